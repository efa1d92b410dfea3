"""What samples are compared by. A metric is one registered function of full precision's samples and another's.

Every metric is told as a mean, a fifth percentile and the worst sample: means hide the few that took another turn.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from cemq.errors import InputError
from cemq.evaluation import image_reward, perceptual
from cemq.metrics import psnr_db, ssim
from cemq.pipelines.outputs import Kind, as_levels, as_pictures, kind_of

Compare = Callable[..., np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number for each sample.

    Args:
        name: Its key in ``scores``.
        compare: Of full precision's samples and others of the same seeds, both as `cemq.pipelines.outputs` tells; gives
            (n,).
        higher_is_better: Or the fifth percentile is the ninety-fifth, and the worst is the highest.
        kinds: Of samples that it can say something of.
        package: That it needs; without it the metric is left out.
        at_hand: Whether all else that it needs is there; it is left out where not.
        reads_prompts: Whether ``compare`` takes the samples' prompts too; without any it is left out.
    """

    name: str
    compare: Compare
    higher_is_better: bool = True
    kinds: tuple[Kind, ...] = get_args(Kind)
    package: str | None = None
    at_hand: Callable[[], bool] = lambda: True
    reads_prompts: bool = False


def of_pictures(compare: Compare) -> Compare:
    """The mean over a video's frames, or over the spectrograms of the channels of audio, of what compares images."""

    def compared(reference: np.ndarray, other: np.ndarray, *prompts: Sequence[str]) -> np.ndarray:
        left, right = as_pictures(reference), as_pictures(other)
        flat = (each.reshape(-1, *each.shape[2:]) for each in (left, right))
        repeated = ([prompt for prompt in each for _ in range(left.shape[1])] for each in prompts)
        return compare(*flat, *repeated).reshape(len(left), -1).mean(1)

    return compared


def flip(reference: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The mean FLIP error (Andersson et al. 2020), 0 for what looks the same, of images at the usual distance."""
    from flip_evaluator import evaluate

    pairs = zip(*(each.astype(np.float32) for each in (reference, images)), strict=True)
    return np.array([evaluate(left, right, "LDR", computeMeanError=True, applyMagma=False)[1] for left, right in pairs])


def change_psnr_db(reference: np.ndarray, videos: np.ndarray) -> np.ndarray:
    """PSNR of the differences between neighbouring frames: what flickers, or moves otherwise, and no frame shows."""
    return psnr_db(np.diff(reference, axis=1), np.diff(videos, axis=1))


def snr_db(reference: np.ndarray, audio: np.ndarray) -> np.ndarray:
    """Signal-to-noise ratio, from -100 to 100 dB."""
    signal, noise = (np.square(each.astype(np.float64)).sum((1, 2)) for each in (reference, audio - reference))
    return 10 * np.log10(np.clip((signal + 1e-20) / (noise + 1e-20), 1e-10, 1e10))


def spectral_db(reference: np.ndarray, audio: np.ndarray) -> np.ndarray:
    """Root mean square difference of logarithmic spectrograms, in dB of their range of 80."""
    left, right = as_pictures(reference)[..., 0], as_pictures(audio)[..., 0]
    return 80 * np.sqrt(np.square(left - right).mean((1, 2, 3)))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(name="psnr_db", compare=lambda a, b: psnr_db(as_levels(a), as_levels(b))),
        Metric(name="ssim", compare=of_pictures(ssim)),
        Metric(
            name="flip", compare=of_pictures(flip), higher_is_better=False, kinds=("image", "video"),
            package="flip_evaluator",
        ),
        Metric(
            name="lpips", compare=of_pictures(perceptual.lpips), higher_is_better=False, kinds=("image", "video"),
            at_hand=perceptual.has_lpips,
        ),
        Metric(
            name="clip_score", compare=of_pictures(perceptual.clip_score), kinds=("image", "video"),
            at_hand=perceptual.has_clip, reads_prompts=True,
        ),
        Metric(
            name="clip_change", compare=of_pictures(perceptual.clip_change), kinds=("image", "video"),
            at_hand=perceptual.has_clip, reads_prompts=True,
        ),
        Metric(
            name="image_reward", compare=of_pictures(image_reward.image_reward), kinds=("image", "video"),
            at_hand=image_reward.has_image_reward, reads_prompts=True,
        ),
        Metric(name="change_psnr_db", compare=change_psnr_db, kinds=("video",)),
        Metric(name="snr_db", compare=snr_db, kinds=("audio",)),
        Metric(name="spectral_db", compare=spectral_db, higher_is_better=False, kinds=("audio",)),
    )
}  # fmt: skip


def register_metric(
    name: str, compare: Compare, *, higher_is_better: bool = True, kinds: Sequence[Kind] = get_args(Kind)
) -> None:
    """Have another metric told wherever fidelity is: in ``scores`` of `cemq.evaluate`, and in bundles that are built.

    Args:
        name: Its key in ``scores``.
        compare: A function of full precision's samples and others of the same seeds, float arrays: images
            (n, height, width, 3) and videos (n, frames, height, width, 3) in [0, 1], audio (n, channels, samples) in
            [-1, 1]; gives one number a sample, (n,).
        higher_is_better: Else the fifth percentile that is told is the ninety-fifth, and the worst is the highest.
        kinds: Of samples that it can say something of: ``image``, ``video``, ``audio``.

    Raises:
        InputError: One of that name is there.
    """
    if name in METRICS:
        raise InputError(f"metric '{name}': there is one of that name; give a name of its own")
    METRICS[name] = Metric(name=name, compare=compare, higher_is_better=higher_is_better, kinds=tuple(kinds))


def score(reference: np.ndarray, other: np.ndarray, conditions: Sequence[str | int] = ()) -> dict[str, np.ndarray]:
    """Every metric that can be had here of samples of this kind, one number a sample.

    Args:
        conditions: What each sample was asked to be; some metrics read prompts.

    Raises:
        InputError: What a metric needs is asked for, and not here.
    """
    kind, has_prompts = kind_of(reference), bool(conditions) and all(isinstance(each, str) for each in conditions)
    found = {}
    for name, metric in METRICS.items():
        if kind not in metric.kinds or (metric.reads_prompts and not has_prompts) or not metric.at_hand():
            continue
        if metric.package is None or importlib.util.find_spec(metric.package):
            found[name] = metric.compare(reference, other, *([list(conditions)] if metric.reads_prompts else []))
    return found


def check_metrics() -> None:
    """Raises InputError where a metric was asked for whose weights are not here, before anything is run for it."""
    perceptual.check_clip()


def summary(name: str, values: np.ndarray, samples: Sequence[tuple[int, str | int]]) -> dict[str, Any]:
    """A metric's values as they are told.

    Args:
        samples: The seed and the condition of each; none if they are not known.

    Returns:
        ``mean``, ``p5``, ``worst``, and whose it is: ``seed`` and ``condition``.
    """
    higher = METRICS[name].higher_is_better
    worst = int(values.argmin() if higher else values.argmax())
    told = {"mean": values.mean(), "p5": np.percentile(values, 5 if higher else 95), "worst": values[worst]}
    whose = dict(zip(("seed", "condition"), samples[worst], strict=True)) if samples else {}
    return {key: float(value) for key, value in told.items()} | whose
