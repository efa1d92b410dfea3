"""Making a weight easier to quantize, and rounding it well, given the inputs it will be multiplied with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cemq.errors import SchemeError
from cemq.quantize.integers import INT4_MAX, INT8_MAX, channel_scales, group_scales, pack_int4

DAMPING = 0.01  # share of the mean diagonal that is added to the Hessian's, as in the paper
SMOOTHING = 0.3  # SmoothQuant's alpha: 0 evens out the weight's columns, 1 the input's; docs/benchmarks/quantization.md
_LARGEST_SMOOTHING = 100.0  # a channel that was silent in calibration must not explode later


@torch.no_grad()
def gptq_int4(
    weight: torch.Tensor, hessian: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`integers.quantize_int4`, fitted: scales weighted by the inputs' size, values from `gptq`.

    Args:
        weight: (out, in).
        hessian: (in, in) float32, the sum of ``x x^T`` over the layer's inputs ``x``.
        group_size: Columns that share a group scale.

    Returns:
        packed (out, padded_in / 2) uint8, group scales (out, groups) int8, scales (out, 1) float32.
    """
    columns, padding = weight.shape[1], -weight.shape[1] % group_size
    importance = hessian.diagonal() + DAMPING * hessian.diagonal().mean()
    group_scale, scale = group_scales(
        F.pad(weight.float(), (0, padding)), group_size, importance=F.pad(importance, (0, padding))
    )
    step = (group_scale * scale).repeat_interleave(group_size, 1)[:, :columns]
    values = F.pad(gptq(weight, hessian, step, INT4_MAX), (0, padding))
    return pack_int4(values, group_size), group_scale.to(torch.int8), scale


@torch.no_grad()
def gptq_int8(weight: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`integers.quantize_channels`, fitted: int8 (out, in) from `gptq`, and float32 scales (out, 1)."""
    scale = channel_scales(weight)
    return gptq(weight, hessian, scale, INT8_MAX), scale


def gptq(weight: torch.Tensor, hessian: torch.Tensor, step: torch.Tensor, largest: int) -> torch.Tensor:
    """Whole multiples of ``step`` whose product with the recorded inputs stays close to the weight's (2210.17323).

    The weight is rounded column by column, and later columns make up for each rounding error. Columns are taken in the
    order of falling Hessian diagonals, so that those that matter most are rounded while most others can still make up.

    Args:
        weight: (out, in).
        hessian: (in, in) float32, the sum of ``x x^T`` over the layer's inputs ``x``.
        step: What one unit is worth, (out, in) or (out, 1).
        largest: Bound on the multiples' absolute value.

    Returns:
        int8 (out, in).

    Raises:
        SchemeError: The Hessian holds NaN or infinity.
    """
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp_min(1e-12)
    order = diagonal.argsort(descending=True)
    factor = _inverse_factor(hessian[order][:, order])
    # transposed, so that what is a column above is a run of neighbours here
    remaining = weight.float().T[order].contiguous()
    step = step.T.expand(weight.shape[1], -1)[order]
    values = torch.empty_like(remaining, dtype=torch.int8)
    for start in range(0, len(order), _BLOCK):
        block = remaining[start : start + _BLOCK]
        end = start + len(block)
        errors = torch.empty_like(block)
        for row, (current, width) in enumerate(zip(block, step[start:end], strict=True)):
            reach = factor[start + row, start + row : end]
            rounded = (current / width).round_().clamp_(-largest, largest)
            values[start + row] = rounded
            torch.div(current - rounded * width, reach[0], out=errors[row])
            block[row:].addr_(reach, errors[row], alpha=-1)
        remaining[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    ordered = torch.empty_like(values)
    ordered[order] = values
    return ordered.T.contiguous()


_BLOCK = 128  # columns updated at once: the paper's lazy batches


def smoothing(weight: torch.Tensor, channel_largest: torch.Tensor | None) -> torch.Tensor:
    """What to multiply the input's channels with, and divide the weight's columns by (SmoothQuant, 2211.10438, eq. 4).

    Args:
        weight: (out, in).
        channel_largest: (in,) the largest input of each channel; None: no smoothing, ones.

    Returns:
        float32 (in,), of geometric mean 1.
    """
    if channel_largest is None:
        return torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
    largest_input = channel_largest.to(weight.device).float().clamp_min(1e-5)
    largest_weight = weight.float().abs().amax(0).clamp_min(1e-5)
    smooth = largest_weight ** (1 - SMOOTHING) / largest_input**SMOOTHING
    return (smooth / smooth.log().mean().exp()).clamp(1 / _LARGEST_SMOOTHING, _LARGEST_SMOOTHING)


def low_rank(weight: torch.Tensor, hessian: torch.Tensor | None, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a weight that is best kept out of quantization: ``up @ down``, bfloat16 (out, rank) and (rank, in).

    The best approximation of that rank in the norm of the layer's output, ``tr(E H E^T)``; without a Hessian in that of
    the weight. Taken off before the rest is quantized, as in SVDQuant (2411.05007).
    """
    weight = weight.float()
    if hessian is None:
        up, sizes, down = torch.linalg.svd(weight, full_matrices=False)
        return (up[:, :rank] * sizes[:rank]).bfloat16(), down[:rank].bfloat16()
    damped = hessian.float().clone()
    damped.diagonal().add_(DAMPING * hessian.diagonal().mean().clamp_min(1e-12))
    root = torch.linalg.cholesky(damped)
    up, sizes, down = torch.linalg.svd(weight @ root, full_matrices=False)
    down = torch.linalg.solve_triangular(root, down[:rank], upper=False, left=False)
    return (up[:, :rank] * sizes[:rank]).bfloat16(), down.bfloat16()


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse; more damping where rounding has made the Hessian indefinite."""
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return inverse
        hessian.diagonal().add_(hessian.diagonal().mean() * DAMPING)
    raise SchemeError(
        "a layer's recorded inputs hold NaN or infinity: check dtype and calibration, or round to nearest"
    )
