"""Tensors to numbers. Images are (n, height, width, 3) in [0, 1]; every metric is per sample, shape (n,)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# Identical images have no finite PSNR; 100 dB is below the rounding of one 16-bit level and keeps means and JSON sane.
PSNR_CEILING_DB = 100.0


def psnr_db(reference: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio for a peak of 1, capped at 100 dB."""
    errors = np.square(reference.astype(np.float64) - images).reshape(len(images), -1).mean(1)
    return -10.0 * np.log10(np.maximum(errors, 10 ** (-PSNR_CEILING_DB / 10)))


def ssim(reference: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Structural similarity with an 11-pixel Gaussian window (smaller for images under 11 pixels)."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    left, right = (torch.from_numpy(np.ascontiguousarray(x)).float().movedim(-1, 1) for x in (reference, images))
    smallest = min(left.shape[-2:])
    window = min(11, smallest - (smallest + 1) % 2)
    values = structural_similarity_index_measure(
        right, left, data_range=1.0, kernel_size=window, sigma=1.5 * window / 11, gaussian_kernel=True, reduction="none"
    )
    assert isinstance(values, torch.Tensor)  # a pair only with the images of similarity, which are not asked for
    return values.double().numpy()


def psnr_of(error: float) -> float:
    """PSNR in dB of a root mean square error, for a peak of 1."""
    return min(-20 * math.log10(error), PSNR_CEILING_DB) if error > 0 else PSNR_CEILING_DB


def error_of(psnr: float) -> float:
    """The root mean square error, for a peak of 1, that has this PSNR in dB."""
    return 10 ** (-psnr / 20)


def relative_l2(reference: torch.Tensor, other: torch.Tensor) -> np.ndarray:
    """``|other - reference| / |reference|`` of each sample in a batch of latents."""
    left, right = (x.detach().cpu().double().flatten(1) for x in (reference, other))
    return ((right - left).norm(dim=1) / left.norm(dim=1).clamp_min(1e-20)).numpy()


def middle_mean(values: np.ndarray) -> np.ndarray:
    """Of the last axis, without the sixth that is highest and the sixth that is lowest.

    A sample that takes another turn is off by ten times what the others are; the mean of all says less about others.
    """
    cut = values.shape[-1] // 6
    return np.sort(values)[..., cut : values.shape[-1] - cut].mean(-1)


def middle_error(values: np.ndarray) -> np.ndarray:
    """The standard error of `middle_mean` (Tukey and McLaughlin 1963): that of the mean of values whose outer sixths
    are moved to where the middle ends, over the share that is left; 0 for a single one."""
    count = values.shape[-1]
    cut, ordered = count // 6, np.sort(values)
    held = ordered.clip(ordered[..., cut, None], ordered[..., count - cut - 1, None])
    return held.std(-1, ddof=min(1, count - 1)) / math.sqrt(count) / (1 - 2 * cut / count)
