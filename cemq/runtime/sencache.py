"""SenCache (arXiv:2602.24208): compute when the output must have changed enough, by its measured sensitivities.

With ``x_s`` and ``t_s`` for sample and timestep at step ``s``, ``c`` for the last computed step, and tables of how much
the output changes with either, read at the timestep nearest to ``t_c``, a step is served as long as

    a_x |x_s - x_c|_2 + a_t |t_s - t_c|  <  threshold sqrt(n)

of a sample of ``n`` elements, and no more than so many steps in a row are served. Of branches of guidance that are
called one by one the first decides for all. The first and the last step are always computed (CogVideoX's release).

Otherwise than published, the tables are measured on generated samples, not on videos with noise added; and ``a_t`` is
of a root mean square, so that it holds for any size of sample and batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from cemq.errors import InputError, ModelError
from cemq.pipelines.batches import Batch
from cemq.pipelines.outputs import first_tensor, shared_channels
from cemq.runtime.attach import attached
from cemq.runtime.policies import (
    FirstDecides,
    Serving,
    StepCall,
    refuse_fewer,
    refuse_negative,
    register_policy,
    set_numbers,
)
from cemq.runtime.runner import Runner

_EARLY = 0.2  # share of the steps that the early threshold is for


@register_policy
@dataclass(frozen=True, kw_only=True)
class SenCache:
    """Settings of SenCache; `fitted_sensitivities` measures the tables.

    Args:
        threshold: Root mean square change of the output at which a step is computed; 0 computes every one.
        timesteps: Where the sensitivities were measured, as the denoiser is given them.
        to_sample: Sensitivity to the sample at each of them, unitless.
        to_timestep: Sensitivity to the timestep, as root mean square change per unit of it.
        early_threshold: Takes the threshold's place in the first fifth of the steps, where it is the lower one.
        most_skipped: Steps that are served in a row, at most; published are 2 and 3.
        cache: What is cached; the released is the residual of the blocks, in the paper it is the output.

    Raises:
        InputError: A negative threshold, or tables that are empty, not of one length, or not of numbers of 0 or more.
    """

    name: ClassVar[str] = "sencache"
    threshold: float
    timesteps: tuple[float, ...]
    to_sample: tuple[float, ...]
    to_timestep: tuple[float, ...]
    early_threshold: float = 0.01
    most_skipped: int = 3
    cache: str = "residual"

    def __post_init__(self) -> None:
        refuse_negative(self, "threshold", "early_threshold")
        refuse_fewer(self, at_least=0, most_skipped=self.most_skipped)
        for name in Sensitivities._fields:
            set_numbers(self, name, "a number for every timestep")
        if min(*self.to_sample, *self.to_timestep) < 0:
            raise InputError("sencache: to_sample, to_timestep: choose 0 or more")
        if not len(self.timesteps) == len(self.to_sample) == len(self.to_timestep):
            raise InputError("sencache: timesteps, to_sample, to_timestep: give as many numbers for each")

    def begin(self, num_steps: int) -> _Sensing:
        return _Sensing(self)


@dataclass
class _Reference:
    """Of the latest computed first call."""

    sample: torch.Tensor
    timestep: float


class _Sensing:
    """SenCache in one run."""

    most_kept = 1

    def __init__(self, settings: SenCache) -> None:
        self._settings = settings
        self._branches = FirstDecides()
        self._references: dict[Hashable, _Reference] = {}  # by stream
        self._skipped = 0

    def decide(self, call: StepCall) -> Serving | None:
        source = self._branches.source(call, self._skips)
        return None if source is None else Serving((source,), (1.0,))

    def keeps(self, call: StepCall, *, served: bool) -> Collection[int]:
        if call.is_first:
            self._skipped = self._skipped + 1 if served else 0
            if not served:
                self._references[call.stream] = _Reference(call.sample.detach().clone(), timestep_value(call))
        return self._branches.keeps(call, served=served)

    def _skips(self, call: StepCall) -> bool:
        settings, reference = self._settings, self._references.get(call.stream)
        if reference is None or call.step == call.num_steps - 1 or self._skipped >= settings.most_skipped:
            return False
        if reference.sample.shape != call.sample.shape:
            return False
        nearest = int(np.argmin(np.abs(np.array(settings.timesteps) - reference.timestep)))
        change = settings.to_sample[nearest] * _rms(call.sample, reference.sample)
        change += settings.to_timestep[nearest] * abs(timestep_value(call) - reference.timestep)
        threshold = settings.threshold
        if call.step < round(_EARLY * call.num_steps):
            threshold = min(threshold, settings.early_threshold)
        return change < threshold


def timestep_value(call: StepCall) -> float:
    """The timestep that the denoiser is given; of several, one for each token, the noisiest. Raises ModelError."""
    if call.timestep is None:
        raise ModelError("sencache needs the timestep, and the denoiser's cannot be told; take another policy")
    return float(call.timestep.max() if torch.is_tensor(call.timestep) else call.timestep)


def _rms(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.float() - other.float()).square().mean().sqrt().item()


class Sensitivities(NamedTuple):
    """Settings of `SenCache` that are measured."""

    timesteps: tuple[float, ...]
    to_sample: tuple[float, ...]
    to_timestep: tuple[float, ...]


def fitted_sensitivities(runner: Runner, batches: Sequence[Batch]) -> Sensitivities:
    """The sensitivities of a model at all timesteps of the runner's but the last: means over batches.

    Secants along full-compute runs: each step is computed with the next one's sample too, and with the next one's
    timestep. So every step of a run costs three. As published it is done for one branch of guidance, the first of those
    that are called one by one. ``SenCache(threshold=0.1, **fitted._asdict())`` takes what it returns.

    Args:
        batches: A few samples, not those that are judged by.
    """
    found: defaultdict[int, list[tuple[float, float, float]]] = defaultdict(list)
    for batch in batches:
        with attached(runner.pipe, _Measuring(secants=found)):
            runner.run_one(batch)
    return Sensitivities(*map(tuple, np.array([np.mean(found[step], axis=0) for step in sorted(found)]).T.tolist()))


@dataclass
class _Measuring:
    """A policy that computes everything, and notes how the output changes with either argument."""

    name: ClassVar[str] = "sensing"
    cache: str = "output"
    most_kept: int = 1
    secants: defaultdict[int, list[tuple[float, float, float]]] = field(default_factory=lambda: defaultdict(list))
    _before: tuple[StepCall, torch.Tensor] | None = None  # the step before and its output

    def begin(self, num_steps: int) -> _Measuring:
        return self

    def decide(self, call: StepCall) -> None:
        if not call.is_first or self._before is None or self._before[0].stream != call.stream:
            return
        before, output = self._before
        own, other = timestep_value(before), timestep_value(call)
        by_sample = self._changed(call, output, before.evaluate(sample=call.sample)) / _rms(call.sample, before.sample)
        by_timestep = self._changed(call, output, before.evaluate(timestep=call.timestep)) / abs(other - own)
        self.secants[before.step].append((own, by_sample, by_timestep))

    def keeps(self, call: StepCall, *, served: bool) -> Collection[int]:
        return (call.step,)

    def computed(self, call: StepCall, output: Any) -> None:
        if call.is_first:
            self._before = call, first_tensor(output)

    @staticmethod
    def _changed(call: StepCall, output: torch.Tensor, other: Any) -> float:
        one, another = (shared_channels(each, call.sample)[0] for each in (output, first_tensor(other)))
        return _rms(one, another)
