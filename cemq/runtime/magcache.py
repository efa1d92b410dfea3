"""MagCache (arXiv:2506.09045): compute when the magnitude of the residual has drifted enough, by a table of its ratios.

The norm of the blocks' residual changes from step to step in a way that is the model's, not the sample's. With
``g_s`` for the mean over tokens of ``|r_s|_2 / |r_{s-1}|_2``, measured beforehand, and ``c`` the last computed step, a
step ``s`` is served from it as long as

    sum over k = c+1 .. s of  |1 - g_{c+1} ... g_k|  <  threshold

and no more than so many steps in a row are served. The first steps are always computed, the last one is not.

Left out: a table for each branch of guidance (Wan's), here all branches have one; and the step of FLUX's that the
release never skips.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from cemq.pipelines.batches import Batch
from cemq.runtime.attach import attached
from cemq.runtime.policies import (
    Serving,
    StepCall,
    refuse_fewer,
    refuse_negative,
    refuse_no_share,
    register_policy,
    set_numbers,
)
from cemq.runtime.runner import Runner


@register_policy
@dataclass(frozen=True, kw_only=True)
class MagCache:
    """Settings of MagCache.

    Args:
        threshold: Accumulated error of the magnitude at which a step is computed; 0 computes every one.
        magnitudes: Ratio of every step's magnitude to that of the step before, of the first step 1; see
            `fitted_magnitudes`. A run of another step count takes the nearest, as released.
        most_skipped: Steps that are served in a row, at most.
        retention: Share of the steps, the first ones, that are always computed.
        cache: What is cached; the published is the residual of the blocks.

    Raises:
        InputError: A negative threshold, no magnitudes or some that are not above 0, or a retention above 1.
    """

    name: ClassVar[str] = "magcache"
    threshold: float
    magnitudes: tuple[float, ...]
    most_skipped: int = 3
    retention: float = 0.2
    cache: str = "residual"

    def __post_init__(self) -> None:
        refuse_negative(self, "threshold")
        set_numbers(self, "magnitudes", "a number above 0 for every step", positive=True)
        refuse_fewer(self, at_least=0, most_skipped=self.most_skipped)
        refuse_no_share(self, "retention")

    def begin(self, num_steps: int) -> _Drifting:
        return _Drifting(self, num_steps)


@dataclass
class _Stream:
    ratio: float = 1.0
    error: float = 0.0
    skipped: int = 0
    computed: tuple[int, ...] = ()  # the latest step that was


class _Drifting:
    """MagCache in one run, for each stream of calls by itself."""

    most_kept = 1

    def __init__(self, settings: MagCache, num_steps: int) -> None:
        self._settings = settings
        self._retained = int(settings.retention * num_steps + 0.5)
        self._magnitudes = resampled(settings.magnitudes, num_steps)
        self._streams: defaultdict[Hashable, _Stream] = defaultdict(_Stream)

    def decide(self, call: StepCall) -> Serving | None:
        stream = self._streams[call.stream]
        if not stream.computed or call.step < self._retained:
            return None
        stream.ratio *= self._magnitudes[call.step]
        stream.error += abs(1 - stream.ratio)
        stream.skipped += 1
        if stream.error < self._settings.threshold and stream.skipped <= self._settings.most_skipped:
            return Serving(stream.computed, (1.0,))
        return None

    def keeps(self, call: StepCall, *, served: bool) -> Collection[int]:
        if not served:
            self._streams[call.stream] = _Stream(computed=(call.step,))
        return self._streams[call.stream].computed


def resampled(table: Sequence[float], num_steps: int) -> list[float]:
    """The nearest entry for every step of a run of so many; first and last are those of the table."""
    scale = (len(table) - 1) / max(num_steps - 1, 1)
    return [table[round(step * scale)] for step in range(num_steps)]


def fitted_magnitudes(runner: Runner, batches: Sequence[Batch]) -> tuple[float, ...]:
    """The ``magnitudes`` of a model, for the runner's step count: means over tokens, calls and batches.

    Every batch is run once, in full. Tokens of the text are left out where the last block returns them apart.

    Args:
        batches: One sample or a few, not those that are judged by.
    """
    found: defaultdict[int, list[float]] = defaultdict(list)
    for batch in batches:
        with attached(runner.pipe, _Measuring(ratios=found)):
            runner.run_one(batch)
    return (1.0, *(sum(found[step]) / len(found[step]) for step in sorted(found)))


@dataclass
class _Measuring:
    """A policy that computes everything, and notes how the residual's magnitude changes."""

    name: ClassVar[str] = "measuring"
    cache: str = "residual"
    most_kept: int = 1
    ratios: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))  # by step
    _norms: dict[Hashable, torch.Tensor] = field(default_factory=dict)  # of the tokens, of the step before
    _shape: torch.Size | None = None  # of the sample's tokens

    def begin(self, num_steps: int) -> _Measuring:
        return self

    def decide(self, call: StepCall) -> None:
        self._shape = call.probe(1).before.shape

    def keeps(self, call: StepCall, *, served: bool) -> Collection[int]:
        return (call.step,)

    def computed(self, call: StepCall, value: Any) -> None:
        tensors = [leaf for leaf in value[1] if torch.is_tensor(leaf)]
        of_sample = [leaf for leaf in tensors if leaf.shape == self._shape] or tensors
        norms = torch.cat([leaf.float().norm(dim=-1).flatten() for leaf in of_sample])
        before, self._norms[call.stream] = self._norms.get(call.stream), norms
        if before is not None:
            self.ratios[call.step].append((norms / before.clamp_min(1e-20)).mean().item())
