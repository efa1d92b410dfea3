"""DiCache (arXiv:2508.17356): compute when what the first blocks return has changed enough.

The first blocks are run on every step as a probe. With ``y_s`` for the sample's hidden states after them and ``x_s``
before them, a step is served as long as

    sum over the steps since the last computed one of  |y_s - y_{s-1}|_1 / |y_{s-1}|_1  <  threshold

It is served ``r_b + g (r_a - r_b)`` of the residuals ``r`` of the two latest computed steps, ``a`` the newer, where
``g = |p_s - p_b|_1 / |p_a - p_b|_1`` of the probe's residuals ``p = y - x``, clipped to 1 and a largest weight as
released. The first steps and the last one are always computed (FLUX's release; Wan's does not force the last).

Left out: going on from the probe where a step is computed, its blocks run again; and the other signal of the release,
the change of the probe's output less that of its input.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from cemq.errors import InputError
from cemq.runtime.policies import (
    Serving,
    StepCall,
    refuse_fewer,
    refuse_negative,
    refuse_no_share,
    register_policy,
)
from cemq.runtime.teacache import relative_change


@register_policy
@dataclass(frozen=True, kw_only=True)
class DiCache:
    """Settings of DiCache.

    Args:
        threshold: Accumulated relative change of the probe at which a step is computed; 0 computes every one.
        blocks: The first ones, that probe; published are 1 to 5.
        retention: Share of the steps, the first ones, that are always computed; the step that follows them is too.
        most_aligned: The largest weight of the newest residual; as released 1.5 for FLUX, 2 for Wan. With 1 it is
            reused as it is.
        cache: What is cached; the published is the residual of the blocks.

    Raises:
        InputError: A negative threshold, no block, a retention above 1 or a largest weight below it.
    """

    name: ClassVar[str] = "dicache"
    threshold: float
    blocks: int = 1
    retention: float = 0.2
    most_aligned: float = 1.5
    cache: str = "residual"

    def __post_init__(self) -> None:
        refuse_negative(self, "threshold", "most_aligned")
        refuse_fewer(self, at_least=1, blocks=self.blocks)
        refuse_no_share(self, "retention")
        if self.most_aligned < 1:
            raise InputError(f"dicache: most_aligned={self.most_aligned}: choose 1 or more")

    def begin(self, num_steps: int) -> _Probing:
        return _Probing(self, num_steps)


@dataclass
class _Stream:
    after: torch.Tensor | None = None  # what the probe gave in the latest call
    change: torch.Tensor | None = None  # what it added there
    accumulated: float = 0.0
    computed: list[int] = field(default_factory=list)  # the two latest steps that were, newest first
    changes: list[torch.Tensor] = field(default_factory=list)  # what the probe added there


class _Probing:
    """DiCache in one run, for each stream of calls by itself."""

    most_kept = 2

    def __init__(self, settings: DiCache, num_steps: int) -> None:
        self._settings = settings
        self._retained = int(settings.retention * num_steps)
        self._streams: defaultdict[Hashable, _Stream] = defaultdict(_Stream)

    def decide(self, call: StepCall) -> Serving | None:
        stream, probe = self._streams[call.stream], call.probe(self._settings.blocks)
        before, stream.after = stream.after, probe.after
        stream.change = change = probe.after.float() - probe.before.float()
        if call.step <= self._retained or call.step == call.num_steps - 1:
            return None
        if before is None or not stream.computed or before.shape != probe.after.shape:
            return None
        stream.accumulated += relative_change(before, probe.after)
        if stream.accumulated >= self._settings.threshold:
            return None
        weight = self._aligned(stream, change)
        if weight is None:
            return Serving((stream.computed[0],), (1.0,))
        return Serving(tuple(stream.computed), (weight, 1.0 - weight))

    def keeps(self, call: StepCall, *, served: bool) -> Collection[int]:
        stream = self._streams[call.stream]
        if not served:
            assert stream.change is not None  # `decide` was asked before
            alike = [each for each in stream.changes[:1] if each.shape == stream.change.shape]
            stream.computed = [call.step, *stream.computed[: len(alike)]]
            stream.changes = [stream.change, *alike]
            stream.accumulated = 0.0
        return stream.computed

    def _aligned(self, stream: _Stream, change: torch.Tensor) -> float | None:
        if len(stream.changes) < 2:
            return None
        newer, older = stream.changes
        weight = (change - older).abs().mean() / (newer - older).abs().mean().clamp_min(1e-20)
        return min(max(weight.item(), 1.0), self._settings.most_aligned)
