"""What a method is to a comparison: a name, its source, and a way to put it on a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from cemq.errors import InputError
from cemq.pipelines.batches import Batch
from cemq.pipelines.trajectory import Trajectory
from cemq.prior.error_prior import ErrorPrior
from cemq.runtime.runner import Outcome, Runner
from cemq.schedule import CacheSchedule
from cemq.search.trials import ClosedLoop

MOST_SKIPPED = 5  # steps in a row, where a rule has such a limit: the longest that is published with one


@dataclass(kw_only=True, eq=False)
class Bench:
    """What methods are fitted to and planned on: samples that nothing is compared on.

    Args:
        runner: The pipeline that all methods are put on, quantized or not, with nothing attached.
        batches: The samples.
        references: What the full-precision pipeline makes of them.
        trajectories: How it makes it.
        prior: The combined error prior of these samples.
        planned: How many of the batches schedules are run on, the first ones, unless more are asked for.
    """

    runner: Runner
    batches: Sequence[Batch]
    references: Sequence[Outcome]
    trajectories: Sequence[Trajectory]
    prior: ErrorPrior
    planned: int
    timestep: float = 0.0  # of the latest call of a denoiser, for libraries that ask for it
    _fitted: dict[str, Any] = field(default_factory=dict)

    def fitted(self, name: str, fit: Callable[[], Any]) -> Any:
        """What ``fit`` finds, which is called once for every name."""
        if name not in self._fitted:
            self._fitted[name] = fit()
        return self._fitted[name]

    @property
    def num_steps(self) -> int:
        return self.prior.num_steps

    @cached_property
    def features(self) -> np.ndarray:
        """What full precision predicts on the planning samples, (samples, num_steps, numbers of a sample), float64."""
        found = []
        for batch, trajectory in zip(self.batches[: self.planned], self.trajectories, strict=False):
            steps = np.stack([each.float().numpy() for each in trajectory.predictions])
            found.append(steps.reshape(self.num_steps, len(batch.seeds), -1).swapaxes(0, 1).astype(np.float64))
        return np.concatenate(found)

    def new_loop(self) -> ClosedLoop:
        """Runs schedules on the planning samples. Of each plan its own: what one runs is counted as its effort."""
        return ClosedLoop(
            runner=self.runner,
            prior=self.prior,
            batches=self.batches,
            references=self.references,
            planned=self.planned,
        )

    def loss_of_one(self, predictor: str) -> Callable[[Sequence[int]], float]:
        """Of full-compute steps: the squared relative error that their schedule leaves in the first sample."""
        first, reference = self.batches[0], self.references[0]
        one = ClosedLoop(
            runner=self.runner,
            prior=self.prior,
            batches=[Batch(conditions=first.conditions[:1], seeds=first.seeds[:1])],
            references=[dataclasses.replace(reference, images=reference.images[:1], latents=reference.latents[:1])],
        )

        def loss(full_steps: Sequence[int]) -> float:
            schedule = CacheSchedule(num_steps=self.num_steps, full_steps=tuple(full_steps), predictor=predictor)
            return one.run(schedule).relative_l2 ** 2

        return loss


Apply = Callable[[Bench, float], AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The knob is how many steps are computed in full."""


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The knob is a threshold between these two; the larger it is, the less is computed."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The knob is a whole number between these two; the larger it is, the less is computed."""

    low: int
    high: int


Knob = Steps | Threshold | Interval


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to skip work.

    Args:
        name: In tables and on the command line.
        source: The paper, and the library if its own code runs.
        knob: What trades fidelity for compute, and in which range.
        apply: Puts it on the pipeline of a bench for the length of a ``with`` block, at a setting of the knob.
        package: That has to be installed.
    """

    name: str
    source: str
    knob: Knob
    apply: Apply
    package: str | None = None


METHODS: dict[str, Method] = {}


def add_method(name: str, source: str, knob: Knob, *, package: str | None = None) -> Callable[[Apply], Apply]:
    """A decorator: enter what puts a method on a pipeline under a name.

    Raises:
        InputError: There is one of that name.
    """

    def enter(apply: Apply) -> Apply:
        if name in METHODS:
            raise InputError(f"method '{name}': there is one of that name already")
        METHODS[name] = Method(name=name, source=source, knob=knob, apply=apply, package=package)
        return apply

    return enter
