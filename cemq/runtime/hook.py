"""The denoiser hook: a skipped step is served from earlier outputs, or residuals, and runs no block of the model."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from cemq.errors import ModelError
from cemq.models import denoisers
from cemq.prior import SamplerFingerprint
from cemq.runtime.callers import ThreadContexts, calling_pipeline
from cemq.runtime.plan import Plan
from cemq.runtime.registration import HOOK, Uncopied, install, keep_outermost, refuse_other_caches, uninstall
from cemq.runtime.residual import Forward, ResidualCache, Routes
from cemq.runtime.steps import AnySamplerTracker, StepTracker, Stream
from cemq.schedule import CacheSchedule


@dataclass
class History:
    """What is cached of one stream's full-compute steps and still needed, and the shapes it was computed for."""

    shapes: Any = None
    outputs: dict[int, list[Any]] = field(default_factory=dict)  # or residuals; flattened, by step index
    structure: Any = None

    def keep(self, step_index: int, value: Any, shapes: Any, last_use: np.ndarray) -> None:
        """Note that a step was computed; ``value`` is what is cached of it, None if nothing is."""
        if shapes != self.shapes:
            self.outputs = {}
        self.shapes = shapes
        self.outputs = {step: kept for step, kept in self.outputs.items() if last_use[step] > step_index}
        if value is not None:
            self.outputs[step_index], self.structure = tree_flatten(value)

    def serve(self, sources: tuple[int, ...], weights: tuple[float, ...]) -> Any:
        columns = zip(*(self.outputs[step] for step in sources), strict=True)
        return tree_unflatten([_combine(leaves, weights) for leaves in columns], self.structure)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if torch.is_tensor(leaf) else leaf


def _combine(leaves: tuple[Any, ...], coefficients: tuple[float, ...]) -> Any:
    newest = leaves[0]
    if coefficients == (1.0,) or not torch.is_tensor(newest) or not newest.is_floating_point():
        return _copied(newest)
    total = sum(weight * leaf.float() for weight, leaf in zip(coefficients, leaves, strict=True))
    return total.to(newest.dtype)


class Branch:
    """What one branch of guidance follows: a schedule, its full-compute steps, and the last use of each output."""

    def __init__(self, schedule: CacheSchedule) -> None:
        self.schedule, self.full = schedule, frozenset(schedule.full_steps)
        self.last_use = schedule.last_use


def _leaf_shapes(leaves: list[Any]) -> list[Any]:
    return [leaf.shape if torch.is_tensor(leaf) else None for leaf in leaves]


def _added(leaf: Any, other: Any, sign: float) -> Any:
    """In float32: a difference of two halves has few digits left."""
    is_number = torch.is_tensor(leaf) and leaf.is_floating_point()
    return torch.add(leaf.float(), other.float(), alpha=sign) if is_number else leaf


def _like(leaf: Any, value: Any) -> Any:
    return value.to(leaf.dtype) if torch.is_tensor(leaf) else value


@dataclass
class Run:
    """What a pipeline's denoisers (Wan 2.2 has two) know together of the current or latest run.

    Where the schedule skips branches of guidance, of the others only the difference to the first is kept and served.
    """

    schedule: CacheSchedule
    histories: dict[Stream, History] = field(default_factory=dict)
    full_evaluations: int = 0
    skipped_evaluations: int = 0

    def __post_init__(self) -> None:
        self.by_difference = bool(self.schedule.branch_steps)
        self.first = Branch(self.schedule)
        self.others = Branch(self.schedule.between_branches) if self.by_difference else self.first
        self._first_output: list[Any] = []  # of this step, flattened

    def forget(self) -> None:
        """Free the memory, keep the counts."""
        self.histories, self._first_output = {}, []

    def less_the_first(self, output: Any, *, is_first: bool) -> Any:
        """What is kept of an output: of others than the first the difference to it, None where there is none."""
        if not self.by_difference:
            return output
        leaves, structure = tree_flatten(output)
        if is_first:
            self._first_output = leaves
            return output
        if _leaf_shapes(leaves) != _leaf_shapes(self._first_output):
            return None
        return tree_unflatten([_added(a, b, -1.0) for a, b in zip(leaves, self._first_output, strict=True)], structure)

    def with_the_first(self, served: Any, *, is_first: bool) -> Any:
        """The opposite, for what is served."""
        if not self.by_difference:
            return served
        leaves, structure = tree_flatten(served)
        if is_first:
            self._first_output = leaves
            return served
        if _leaf_shapes(leaves) != _leaf_shapes(self._first_output):
            return None
        pairs = zip(self._first_output, leaves, strict=True)
        return tree_unflatten([_like(first, _added(first, leaf, 1.0)) for first, leaf in pairs], structure)

    def begin(self, schedule: CacheSchedule) -> None:
        """Forget the run before; follow ``schedule``."""
        self.__init__(schedule)


class OutputCache:
    """What `ScheduleHook` keeps and serves where the output is cached: a skipped step runs nothing of the denoiser."""

    @torch.compiler.disable(recursive=False)
    def compute(self, forward: Forward, *, wanted: bool, shapes: Any) -> tuple[Any, Any]:
        output = forward()
        return output, self._copy(output) if wanted else None

    @torch.compiler.disable
    def serve(self, forward: Forward, value: Any) -> Any:
        return value

    @torch.compiler.disable
    def _copy(self, output: Any) -> Any:  # whoever gets the output may change it in place
        return tree_map(_copied, output)

    def install(self) -> None: ...

    def remove(self) -> None: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """What to do with one call of the denoiser: serve it, or compute it and hand what is cached of it to ``keep``."""

    served: Any = None
    wanted: bool = False  # whether a later step is served from this one
    shapes: Any = None
    keep: Callable[[Any], None] | None = None


class ScheduleHook(Uncopied, ModelHook):
    """Runs the denoiser on full-compute steps and predicts its output on skipped ones; one history per stream.

    ``full_evaluations`` and ``skipped_evaluations`` count the calls of the current or latest run, of all denoisers;
    ``schedule`` is that of the current or latest run, which at another step count is not the one that was attached.
    """

    _is_stateful = True  # diffusers hands the cache context only to stateful hooks, through a StateManager attribute

    def __init__(
        self, pipe: Any, plan: Plan, tracker: StepTracker, run: Run, cache: OutputCache | ResidualCache
    ) -> None:
        super().__init__()
        self.plan, self.tracker, self.run, self.cache = plan, tracker, run, cache
        self.contexts = ThreadContexts()
        self.installed: Any = None  # the denoiser's forward once this hook is in it
        self._pipe = weakref.ref(pipe)

    @property
    def schedule(self) -> CacheSchedule:
        return self.run.schedule

    @property
    def full_evaluations(self) -> int:
        return self.run.full_evaluations

    @property
    def skipped_evaluations(self) -> int:
        return self.run.skipped_evaluations

    @torch.compiler.disable(recursive=False)  # the model within is compiled, what is decided from step to step is not
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = functools.partial(self.fn_ref.original_forward, *args, **kwargs)
        call = self._before(args, kwargs)
        if call.served is not None:
            output = self.cache.serve(forward, call.served)
            if output is not None:
                return output
            self._not_served()
        output, value = self.cache.compute(forward, wanted=call.wanted, shapes=call.shapes)
        self._after(call, value)
        return output

    @torch.compiler.disable
    def _before(self, args: Any, kwargs: Any) -> _Call:
        if self._is_foreign():
            self.tracker.warn_once("another pipeline uses the denoiser that a schedule is attached to")
            return _Call()
        context = self.contexts._context
        stream = self.tracker.enter_call(context.name if context else None)
        step_index = self._step_index(context)
        if step_index is None:
            self.run.full_evaluations += 1
            return _Call()
        history = self.run.histories.setdefault(stream, History())
        shapes = _shapes((args, kwargs))
        run, is_first = self.run, self.tracker.is_first_call
        branch = run.first if is_first else run.others
        if step_index not in branch.full:
            sources, weights = branch.schedule.serving(step_index)
            known = history.shapes == shapes and history.outputs.keys() >= set(sources)
            served = run.with_the_first(history.serve(sources, weights), is_first=is_first) if known else None
            if served is not None:
                run.skipped_evaluations += 1
                return _Call(served=served)
            self.tracker.warn_once("a call to the denoiser on a skipped step has no earlier output of its shape")
        run.full_evaluations += 1
        is_used = bool(branch.last_use[step_index] > step_index)

        def keep(value: Any) -> None:
            kept = None if value is None else run.less_the_first(value, is_first=is_first)
            history.keep(step_index, kept if is_used else None, shapes, branch.last_use)

        return _Call(wanted=is_used or (run.by_difference and is_first), shapes=shapes, keep=keep)

    @torch.compiler.disable
    def _after(self, call: _Call, value: Any) -> None:
        if call.keep is not None:
            call.keep(value)

    @torch.compiler.disable
    def _not_served(self) -> None:
        self.run.skipped_evaluations -= 1
        self.run.full_evaluations += 1
        self.tracker.warn_once("a skipped step calls other blocks than the step it is served from")

    def _is_foreign(self) -> bool:
        """Whether another pipeline, which shares the denoiser and not the scheduler, makes this call."""
        pipe, caller = self._pipe(), calling_pipeline()
        return not (caller is None or caller is pipe or caller.scheduler is self.tracker.scheduler)

    def _step_index(self, context: Any) -> int | None:
        pipe = self._pipe()
        if pipe is not None and pipe.scheduler is not self.tracker.scheduler:
            self.tracker.warn_once("the pipeline's scheduler was replaced after the schedule was attached")
            return None
        step_index = self.tracker.step_index
        if step_index is None or step_index >= self.schedule.num_steps:  # the latter: the run is over
            return None
        if context is not None and not self.tracker.agrees(context.step_index, context.sigma):
            self.tracker.warn_once("the pipeline is at another step than its sampler")
            return None
        return step_index

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        if not self._is_foreign():  # nor is the end of another pipeline's run the end of this one's
            self.run.forget()
            self.contexts.reset()
        return module


def _shapes(arguments: Any) -> tuple[Any, ...]:
    return tuple(leaf.shape for leaf in tree_flatten(arguments)[0] if torch.is_tensor(leaf))


def attach(
    pipe: Any, plan: Plan | CacheSchedule, sampler: SamplerFingerprint | None = None, *, cache: str | None = None
) -> ScheduleHook:
    """Have ``pipe`` follow a plan, or a schedule made for ``sampler``, until `detach`.

    A run at other timesteps of the same sampler gets a schedule of its own, of the same compute ratio, if the plan has
    a prior; any other run computes in full, with one warning. Without a sampler to compare with, only the step count
    must be that of the schedule.

    Args:
        cache: ``output`` or ``residual``, see `Plan`; None takes the plan's, for a schedule the output.

    Raises:
        ModelError: A cemq schedule or another cache is active on the denoiser already, or it has no blocks whose
            residual could be cached. Whether the residual serves is checked on the first step that it is taken from:
            computed, then served on the same input, must agree.
        InputError: No such cache.
    """
    if isinstance(plan, CacheSchedule):
        plan = Plan(schedule=plan, sampler=sampler)
    if cache is not None:
        plan = replace(plan, cache=cache)
    found, run, reference = denoisers(pipe), Run(plan.schedule), weakref.ref(pipe)
    routes: Routes = {}
    hooks: list[ScheduleHook] = []

    def start(schedule: CacheSchedule) -> None:
        run.begin(schedule)
        pipe = reference()
        for _, denoiser in denoisers(pipe) if pipe is not None else ():
            hook = HookRegistry.check_if_exists_or_initialize(denoiser).get_hook(HOOK)
            if hook not in hooks:
                tracker.warn_once("the pipeline's denoiser was replaced after the schedule was attached")
                continue
            refuse_other_caches(denoiser)
            keep_outermost(denoiser, hook)
            hook.cache.install()

    tracker = (AnySamplerTracker if plan.sampler is None else StepTracker)(plan, on_start=start)
    for _, denoiser in found:
        refuse_other_caches(denoiser)
    try:
        for _, denoiser in found:
            cached = ResidualCache(denoiser, routes) if plan.cache == "residual" else OutputCache()
            hook = ScheduleHook(pipe, plan, tracker, run, cached)
            install(denoiser, hook)
            hooks.append(hook)
            cached.install()
    except ModelError:
        for _, denoiser in found[: len(hooks)]:
            _uninstall(denoiser)
        raise
    tracker.follow(pipe.scheduler)
    return hooks[0]


def detach(pipe: Any) -> None:
    """Undo `attach`; does nothing if no schedule is attached."""
    _take_off(denoisers(pipe))


def _take_off(found: Iterable[tuple[str, Any]]) -> None:
    for _, denoiser in found:
        hook = _uninstall(denoiser)
        if hook is not None:
            hook.tracker.release()


def _uninstall(denoiser: torch.nn.Module) -> ScheduleHook | None:
    hook = uninstall(denoiser)
    if hook is not None:
        hook.cache.remove()
    return hook


def find_hook(pipe: Any) -> ScheduleHook | None:
    """The hook that `attach` installed, if there is one."""
    for _, denoiser in denoisers(pipe):
        hook = HookRegistry.check_if_exists_or_initialize(denoiser).get_hook(HOOK)
        if hook is not None:
            return hook
    return None


def schedule_hook(pipe: Any) -> ScheduleHook:
    """The hook that `attach` installed: its schedule, and how many evaluations the latest run made.

    Raises:
        ModelError: No schedule is attached.
    """
    hook = find_hook(pipe)
    if hook is None:
        raise ModelError("no cemq schedule is attached to this pipeline")
    return hook


def set_budget(pipe: Any, budget: int | str) -> CacheSchedule:
    """Give a scheduled pipeline another budget, planned from its bundle's prior; returns the new schedule.

    Args:
        budget: Full-compute steps of the step count the bundle was made for, or a compute ratio such as ``"3x"``.

    Raises:
        ModelError: No schedule is attached, or one without a prior.
        InfeasibleBudgetError: The budget is out of range.
    """
    plan = schedule_hook(pipe).plan.with_budget(budget)
    detach(pipe)
    attach(pipe, plan)
    return plan.schedule


@contextmanager
def attached(
    pipe: Any, plan: Plan | CacheSchedule, sampler: SamplerFingerprint | None = None, *, cache: str | None = None
) -> Iterator[ScheduleHook]:
    """`attach` for the length of a ``with`` block; undone on exit, also after an exception."""
    found, hook = denoisers(pipe), attach(pipe, plan, sampler, cache=cache)
    try:
        yield hook
    finally:  # on what it was attached to, whatever the pipeline holds by now
        hook.tracker.release()
        _take_off(found)  # `set_budget` may have put another hook in
