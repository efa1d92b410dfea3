"""Who decides, while a picture is drawn, which calls of the denoiser are computed and what the others are served.

A `Policy` is settings: frozen, named, and kept in a bundle as such. For every run it makes a `Decider`, which may
remember what it has seen of it. `Scheduled` follows a schedule that was planned beforehand; what decides by what it
sees, as TeaCache does, is a file of its own and is entered with `register_policy`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from cemq.errors import InputError
from cemq.schedule import CacheSchedule


@dataclass(frozen=True)
class Serving:
    """What is served in place of a call: the weighted sum of what is cached of these steps, newest first."""

    sources: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepCall:
    """One call of a denoiser, before anything of it is computed.

    Args:
        step: Index of the step, from 0.
        num_steps: Steps of the run.
        stream: Which of the calls of a step it is: the same in every step.
        is_first: Whether it is the one that each step begins with; others are of other branches of guidance.
        modulated_input: What the first block makes of the call's sample and timestep before its attention, found by
            running the denoiser up to there.
    """

    step: int
    num_steps: int
    stream: Hashable
    is_first: bool
    modulated_input: Callable[[], torch.Tensor]


class Decider(Protocol):
    """Decides for one run."""

    most_kept: int  # steps that are cached at once, at most

    def decide(self, call: StepCall) -> Serving | None:
        """What to serve; None to compute the call."""

    def keeps(self, call: StepCall, *, served: bool) -> Collection[int]:
        """The steps, this one among them if it is computed, that later calls of the stream may be served from.

        Asked after `decide`; ``served`` is False also where there was nothing to serve what was decided from.
        """


class Policy(Protocol):
    """Settings of a way to decide; a frozen dataclass, whose fields JSON can hold."""

    name: ClassVar[str]
    cache: str  # what is cached, see `Plan`

    def begin(self, num_steps: int) -> Decider:
        """For a run of so many steps."""


POLICIES: dict[str, type[Policy]] = {}


def register_policy(kind: type[Policy]) -> type[Policy]:
    """Make a policy known by its ``name``, to the command line and to bundles. Also a decorator.

    Raises:
        InputError: It is no frozen dataclass with a name, or another has the name.
    """
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:
        raise InputError(f"policy {kind.__name__}: a policy is a frozen dataclass with a class attribute 'name'")
    if POLICIES.get(name, kind) is not kind:
        raise InputError(f"policy '{name}': there is one of that name already")
    POLICIES[name] = kind
    return kind


class _Branch:
    """What one branch of guidance follows."""

    def __init__(self, schedule: CacheSchedule) -> None:
        self.schedule, self.full = schedule, frozenset(schedule.full_steps)


class Scheduled:
    """Decides by a schedule; where that skips branches of guidance, otherwise for the first than for the others."""

    def __init__(self, schedule: CacheSchedule) -> None:
        self.most_kept: int = schedule.most_kept
        self._first = self._others = _Branch(schedule)
        if schedule.branch_steps:
            self._others = _Branch(schedule.between_branches)

    def decide(self, call: StepCall) -> Serving | None:
        branch = self._of(call)
        return None if call.step in branch.full else Serving(*branch.schedule.serving(call.step))

    def keeps(self, call: StepCall, *, served: bool) -> Collection[int]:
        branch = self._of(call)
        return [step for step in branch.full if step <= call.step < branch.schedule.last_use[step]]

    def _of(self, call: StepCall) -> _Branch:
        return self._first if call.is_first else self._others
