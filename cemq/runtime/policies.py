"""Who decides, while a picture is drawn, which calls of the denoiser are computed and what the others are served.

A `Policy` is settings: frozen, named, and kept in a bundle as such. For every run it makes a `Decider`, which may
remember what it has seen of it. `Scheduled` follows a schedule that was planned beforehand; what decides by what it
sees, as TeaCache does, is a file of its own and is entered with `register_policy`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch

from cemq.errors import InputError
from cemq.schedule import CacheSchedule


@dataclass(frozen=True)
class Serving:
    """What is served in place of a call: the weighted sum of what is cached of these steps, newest first.

    ``added`` is added to the first floating-point tensor of the sum, and has its shape.
    """

    sources: tuple[int, ...]
    weights: tuple[float, ...]
    added: torch.Tensor | None = None


class Probe(NamedTuple):
    """The hidden states of the sample as the first block is given them, and as a later block returns them."""

    before: torch.Tensor
    after: torch.Tensor


@dataclass(frozen=True)
class Place:
    """A block of a denoiser, or one of its attention and feed-forward modules.

    Args:
        block: Which one of all the denoiser's blocks, from 0, list by list.
        stack: The classes of all of them.
        module: The module's name in its block; None for the block itself.
        feeds: Whether the module does nothing but feed a projection that joins attention and feed-forward.
    """

    block: int
    stack: tuple[str, ...]
    module: str | None = None
    feeds: bool = False


class Inside(Protocol):
    """Answers the calls of a denoiser's blocks and of their modules, within one call of it."""

    def answer(self, place: Place, arguments: Mapping[int | str, Any], run: Callable[..., Any]) -> Any:
        """What a block or a module is to return, as a tensor or tensors of its own.

        Args:
            arguments: Its own, by position or name; not to be changed.
            run: Computes it; a tensor that is handed over takes the place of the first tensor among its arguments.

        Raises:
            StrayError: `cemq.runtime.cached.inner.StrayError`: it cannot be answered for.
        """
        ...

    def end(self) -> bool:
        """Told when the call has ended; False if it cannot be what was meant, for other blocks were called."""
        ...


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
        sample: What is denoised, as the denoiser is given it.
        timestep: As the denoiser is given it, a tensor or a number; None where it cannot be told.
        probe: What so many of the first blocks make of the call, found by running the denoiser up to there.
        evaluate: Runs the denoiser; ``sample`` and ``timestep`` are keywords that take the place of the call's own.
        shapes: Of its tensors; equal where calls are alike.
    """

    step: int
    num_steps: int
    stream: Hashable
    is_first: bool
    modulated_input: Callable[[], torch.Tensor]
    sample: torch.Tensor
    timestep: Any
    probe: Callable[[int], Probe]
    evaluate: Callable[..., Any]
    shapes: Any


class Decider(Protocol):
    """Decides for one run.

    It may also have a method ``computed(call, value)``. That is told what is cached of a call that was computed and
    whose step `keeps` has named: a structure of tensors, not to be changed; with ``cache="output"`` the output.
    """

    most_kept: int  # steps that are cached at once, at most

    def decide(self, call: StepCall) -> Serving | Inside | None:
        """What to serve; None to compute the call. With ``cache="inside"`` who answers within it, or None."""
        ...

    def keeps(self, call: StepCall, *, served: bool) -> Collection[int]:
        """The steps, this one among them if it is computed, that later calls of the stream may be served from.

        Asked after `decide`; ``served`` is False also where there was nothing to serve what was decided from.
        """
        ...


class Policy(Protocol):
    """Settings of a way to decide; a frozen dataclass, whose fields JSON can hold."""

    name: ClassVar[str]

    @property
    def cache(self) -> str:
        """What is cached, see `Plan`."""
        ...

    def begin(self, num_steps: int) -> Decider:
        """For a run of so many steps."""
        ...


AnyPolicy = TypeVar("AnyPolicy", bound=Policy)


class FirstDecides:
    """Where branches of guidance are called one by one, the first decides for all of a step."""

    def __init__(self) -> None:
        self._computed: dict[Hashable, int] = {}  # the latest step of each stream that was
        self._skipped: int | None = None  # the step, if its first call is served

    def source(self, call: StepCall, skips: Callable[[StepCall], bool]) -> int | None:
        """The step to serve the call from, None to compute it; only first calls are asked about."""
        if call.is_first:
            self._skipped = call.step if skips(call) else None
        return self._computed.get(call.stream) if self._skipped == call.step else None

    def keeps(self, call: StepCall, *, served: bool) -> tuple[int]:
        """The latest computed step of the call's stream."""
        if not served:
            self._computed[call.stream] = call.step
            if call.is_first:
                self._skipped = None
        return (self._computed[call.stream],)


def refuse_negative(policy: Policy, *names: str) -> None:
    """Raises InputError where one of these settings is no number of 0 or more."""
    for name in names:
        value = getattr(policy, name)
        if not isinstance(value, (int, float)) or not value >= 0:
            raise InputError(f"{policy.name}: {name}={value}: choose 0 or more")


def refuse_fewer(policy: Policy, *, at_least: int, **counts: int) -> None:
    """Raises InputError where a setting is no whole number, or a smaller one."""
    for name, value in counts.items():
        if not isinstance(value, int) or value < at_least:
            raise InputError(f"{policy.name}: {name}={value}: choose a whole number, {at_least} or more")


def refuse_no_share(policy: Policy, name: str) -> None:
    """Raises InputError where a setting is no share of the whole, from 0 to 1."""
    value = getattr(policy, name)
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InputError(f"{policy.name}: {name}={value}: choose 0 to 1")


def set_numbers(policy: Policy, name: str, wanted: str, *, positive: bool = False) -> None:
    """Make a setting a tuple of floats; a single number is one too. Raises InputError for what is none."""
    given = getattr(policy, name)
    given = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if not given or not all(isinstance(each, (int, float)) and (each > 0 or not positive) for each in given):
        raise InputError(f"{policy.name}: {name}: give {wanted}")
    object.__setattr__(policy, name, tuple(map(float, given)))


POLICIES: dict[str, type[Policy]] = {}


def register_policy(kind: type[AnyPolicy]) -> type[AnyPolicy]:
    """Make a policy known by its ``name``, to the command line and to bundles. Also a decorator.

    Raises:
        InputError: It is no frozen dataclass with a name, or another has the name.
    """
    name = getattr(kind, "name", None)
    parameters = getattr(kind, "__dataclass_params__", None)
    if not isinstance(name, str) or parameters is None or not parameters.frozen:
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
