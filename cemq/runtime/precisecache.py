"""LFCache of PreciseCache (arXiv:2603.00976): compute when what is large in the output must have changed.

On every step the denoiser is tried on the sample reduced to every fourth row and column, and every other frame of
videos, which costs little. With ``L_s`` for the low frequencies of what that predicts, those of its Fourier transform
over rows and columns within a circle of a fifth of the shorter side, and ``c`` for the last computed step, a step is
served the output of ``c`` as long as

    sum over the steps since c of  |L_s - L_{s-1}|_2  <=  threshold * the largest of these changes so far

No code is released. Told is that the sample is reduced so much, that the share is 0.5 or 0.7, and that sums begin anew
with a computed step; taken here are rows and columns as they are, for these hold as much noise as the timestep says,
and the largest change of the run up to the step, which is that of the run where changes shrink. Of branches of guidance
that are called one by one the first decides for all.

Left out: BlockCache, which serves the blocks that change least on some of the computed steps. Of its share of blocks
what can be read says both that 40 % are kept and that they are served.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cemq.errors import InputError, ModelError
from cemq.pipelines.outputs import first_tensor, shared_channels
from cemq.runtime.policies import (
    FirstDecides,
    Serving,
    StepCall,
    refuse_fewer,
    refuse_negative,
    refuse_no_share,
    register_policy,
)


@register_policy
@dataclass(frozen=True, kw_only=True)
class PreciseCache:
    """Settings of PreciseCache's LFCache.

    Args:
        threshold: Share of the largest change of the low frequencies, above which a sum of them computes a step; as
            published 0.5 or 0.7. With 0 a step is served only if nothing has changed.
        shrink: One row and column in so many is tried.
        shrink_frames: One frame of a video in so many; 1 for denoisers that have channels after frames (CogVideoX).
        radius: Of the circle of low frequencies, as a share of the shorter side of what is tried.
        cache: The output; no other will do.

    Raises:
        InputError: A negative threshold, a reduction below 1, a radius above 1, or another cache.
    """

    name: ClassVar[str] = "precisecache"
    threshold: float
    shrink: int = 4
    shrink_frames: int = 2
    radius: float = 0.2
    cache: str = "output"

    def __post_init__(self) -> None:
        refuse_negative(self, "threshold")
        refuse_fewer(self, at_least=1, shrink=self.shrink, shrink_frames=self.shrink_frames)
        refuse_no_share(self, "radius")
        if self.cache != "output":
            raise InputError(f"precisecache: cache={self.cache}: it reuses the output, take cache=output")

    def begin(self, num_steps: int) -> _Trying:
        return _Trying(self)


class _Trying:
    """LFCache in one run."""

    most_kept = 1

    def __init__(self, settings: PreciseCache) -> None:
        self._settings = settings
        self._branches = FirstDecides()
        self._latest: torch.Tensor | None = None  # low frequencies of the latest step
        self._largest = self._accumulated = 0.0

    def decide(self, call: StepCall) -> Serving | None:
        source = self._branches.source(call, self._skips)
        return None if source is None else Serving((source,), (1.0,))

    def keeps(self, call: StepCall, *, served: bool) -> Collection[int]:
        if call.is_first and not served:
            self._accumulated = 0.0
        return self._branches.keeps(call, served=served)

    def _skips(self, call: StepCall) -> bool:
        tried = reduced(call.sample, self._settings.shrink, self._settings.shrink_frames)
        answer: Any = first_tensor(call.evaluate(sample=tried))
        before, self._latest = self._latest, low_frequencies(shared_channels(answer, tried)[0], self._settings.radius)
        if before is None or before.shape != self._latest.shape:
            return False
        change = (self._latest - before).norm().item()
        self._largest = max(self._largest, change)
        self._accumulated += change
        return self._accumulated <= self._settings.threshold * self._largest


def reduced(sample: torch.Tensor, shrink: int, shrink_frames: int) -> torch.Tensor:
    """One row and column in so many of images (batch, channels, height, width), and one frame in so many of videos
    (batch, channels, frames, height, width).

    Raises:
        ModelError: The sample has no height and width, or is too small.
    """
    if sample.dim() not in (4, 5) or min(sample.shape[-2:]) < shrink:
        raise ModelError(
            f"precisecache: samples of {tuple(sample.shape)} cannot be reduced by {shrink}: it takes a denoiser that "
            "is given pictures with a height and a width, not tokens, and large enough"
        )
    fewer = sample[..., ::shrink, ::shrink]
    return (fewer[:, :, ::shrink_frames] if sample.dim() == 5 else fewer).contiguous()


def low_frequencies(values: torch.Tensor, radius: float) -> torch.Tensor:
    """Coefficients of the Fourier transform over the last two axes, within a circle around the constant; as long
    together as the values would be of all of them."""
    height, width = values.shape[-2:]
    spectrum = torch.fft.fft2(values.float(), norm="ortho")
    rows, columns = (
        torch.fft.fftfreq(side, d=1 / side, device=values.device, dtype=torch.float32) for side in (height, width)
    )
    near = rows[:, None].square() + columns.square() <= (radius * min(height, width)) ** 2
    return spectrum[..., near]
