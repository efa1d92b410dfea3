"""TeaCache (arXiv:2411.19108): compute when the modulated input has changed enough since the last computed step.

What the first block's modulation makes of sample and timestep changes from step to step much as the output does, and
is known before anything is computed. With ``x_s`` for it at step ``s`` and a polynomial ``p`` that is fitted to the
model, a step is served from the last computed one as long as

    sum over the steps since of  p(|x_s - x_{s-1}|_1 / |x_{s-1}|_1)  <  threshold

(section 3.3 of the paper). The first and the last step are always computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from cemq.pipelines.batches import Batch
from cemq.pipelines.opening import denoisers
from cemq.pipelines.outputs import first_tensor
from cemq.runtime.attach import attached
from cemq.runtime.policies import Serving, StepCall, refuse_negative, register_policy, set_numbers
from cemq.runtime.runner import Runner

_DEGREE = 4  # of the published polynomials


@register_policy
@dataclass(frozen=True, kw_only=True)
class TeaCache:
    """Settings of TeaCache.

    Args:
        threshold: Accumulated relative change of the output at which a step is computed; 0 computes every one.
        coefficients: Of the polynomial, highest power first; the default takes the change of the input as it is.
        cache: What is cached; the published is the residual of the blocks.

    Raises:
        InputError: A negative threshold, or no coefficient.
    """

    name: ClassVar[str] = "teacache"
    threshold: float
    coefficients: tuple[float, ...] = (1.0, 0.0)
    cache: str = "residual"

    def __post_init__(self) -> None:
        refuse_negative(self, "threshold")
        set_numbers(self, "coefficients", "numbers, highest power first")

    def begin(self, num_steps: int) -> _Accumulating:
        return _Accumulating(self)


@dataclass
class _Stream:
    input: torch.Tensor | None = None  # of the latest call
    accumulated: float = 0.0
    computed: tuple[int, ...] = ()  # the latest step that was


class _Accumulating:
    """TeaCache in one run, for each stream of calls by itself."""

    most_kept = 1

    def __init__(self, settings: TeaCache) -> None:
        self._settings = settings
        self._streams: defaultdict[Hashable, _Stream] = defaultdict(_Stream)

    def decide(self, call: StepCall) -> Serving | None:
        stream, found = self._streams[call.stream], call.modulated_input()
        before, stream.input = stream.input, found
        if not stream.computed or before is None or before.shape != found.shape or call.step == call.num_steps - 1:
            return None
        stream.accumulated += float(np.polyval(self._settings.coefficients, relative_change(before, found)))
        return Serving(stream.computed, (1.0,)) if stream.accumulated < self._settings.threshold else None

    def keeps(self, call: StepCall, *, served: bool) -> Collection[int]:
        stream = self._streams[call.stream]
        if not served:
            stream.computed, stream.accumulated = (call.step,), 0.0
        return stream.computed


def relative_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """``|after - before|_1 / |before|_1``."""
    before = before.float()
    return ((after.float() - before).abs().mean() / before.abs().mean().clamp_min(1e-20)).item()


def fitted_coefficients(runner: Runner, batches: Sequence[Batch], degree: int = _DEGREE) -> tuple[float, ...]:
    """The polynomial of a model: what the change of the modulated input says about that of the output.

    Least squares over all steps and calls of full-compute runs, as published. Highest power first.

    Args:
        batches: A few samples, not those that are judged by.
    """
    changes: list[tuple[float, float]] = []
    for batch in batches:
        watching = _Watching()
        handles = [
            denoiser.register_forward_hook(lambda *call, seen=watching: seen.computed(call[-1]))
            for _, denoiser in denoisers(runner.pipe)
        ]
        try:
            with attached(runner.pipe, watching):
                runner.run_one(batch)
        finally:
            for handle in handles:
                handle.remove()
        changes += watching.changes
    inputs, outputs = np.array(changes).T
    return tuple(np.polyfit(inputs, outputs, degree).tolist())


@dataclass
class _Watching:
    """A policy that computes everything, and pairs what changed in the modulated input and in the output."""

    name: ClassVar[str] = "watching"
    cache: str = "output"
    most_kept: int = 0
    changes: list[tuple[float, float]] = field(default_factory=list)
    _stream: Hashable = None
    _inputs: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    _outputs: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    _change: float | None = None

    def begin(self, num_steps: int) -> _Watching:
        return self

    def decide(self, call: StepCall) -> None:
        found, before = call.modulated_input(), self._inputs.get(call.stream)
        self._change = None if before is None else relative_change(before, found)
        self._stream, self._inputs[call.stream] = call.stream, found

    def keeps(self, call: StepCall, *, served: bool) -> Collection[int]:
        return ()

    def computed(self, output: object) -> None:
        found = first_tensor(output)
        if self._change is not None:
            self.changes.append((self._change, relative_change(self._outputs[self._stream], found)))
        self._outputs[self._stream] = found.detach().clone()
