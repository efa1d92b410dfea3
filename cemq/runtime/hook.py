"""The denoiser hook: a skipped step is served from what is cached of earlier steps."""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook

from cemq.errors import ModelError
from cemq.models import denoisers, refuse_lost_weights
from cemq.placement import format_bytes
from cemq.prior import SamplerFingerprint
from cemq.runtime.branches import Branches
from cemq.runtime.caches import Cache, make_caches
from cemq.runtime.callers import ThreadContexts, calling_pipeline
from cemq.runtime.history import History, shapes_of
from cemq.runtime.plan import Plan
from cemq.runtime.registration import HOOK, Uncopied, install, keep_outermost, refuse_other_caches, uninstall
from cemq.runtime.steps import AnySamplerTracker, StepTracker, Stream
from cemq.schedule import CacheSchedule


@dataclass
class Run:
    """What a pipeline's denoisers (Wan 2.2 has two) know together of the current or latest run."""

    schedule: CacheSchedule
    histories: dict[Stream, History] = field(default_factory=dict)
    computed: Counter[int] = field(default_factory=Counter)  # calls, by how many steps were taken before them
    served: Counter[int] = field(default_factory=Counter)
    memory: str = ""  # what was said last of the bytes that are cached

    def __post_init__(self) -> None:
        self.branches = Branches(self.schedule)

    def begin(self, schedule: CacheSchedule) -> None:
        """Forget the run before; follow ``schedule``."""
        self.__init__(schedule, memory=self.memory)

    @property
    def full_steps(self) -> float:
        """Steps that were computed; one of which a call in two was served is half a one."""
        return sum(calls / (calls + self.served[step]) for step, calls in self.computed.items())

    @property
    def cached_bytes(self) -> int:
        return sum(history.bytes() for history in self.histories.values())

    def forget(self) -> None:
        """Free the memory, keep the counts."""
        self.histories = {}
        self.branches.forget()

    def say_memory(self, step_index: int, contents: str) -> None:
        """Log what the cache takes, once it has kept a first step of all calls; again only if that changes."""
        kept = {step for history in self.histories.values() for step in history.kept}
        if len(kept) != 1 or step_index in kept:
            return
        step_bytes, most = self.cached_bytes, self.schedule.most_kept
        memory = (
            f"the cache keeps {format_bytes(step_bytes)} of a full-compute step ({contents}), "
            f"at most {most} of them at once: {format_bytes(most * step_bytes)}"
        )
        if memory != self.memory:
            self.memory = memory
            logging.getLogger("cemq.runtime").info(memory)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """What to do with one call of the denoiser: serve it, or compute it and hand what is cached of it to ``keep``."""

    served: Any = None
    wanted: bool = False  # whether a later step is served from this one
    shapes: Any = None
    keep: Callable[[Any], None] | None = None


class ScheduleHook(Uncopied, ModelHook):
    """Runs the denoiser on full-compute steps and serves skipped ones from predictions; one history per stream.

    ``full_evaluations`` and ``skipped_evaluations`` count the calls of the current or latest run, of all denoisers;
    ``schedule`` is that of the current or latest run, which at another step count is not the one that was attached.
    """

    _is_stateful = True  # diffusers hands the cache context only to stateful hooks, through a StateManager attribute

    def __init__(self, pipe: Any, plan: Plan, tracker: StepTracker, run: Run, cache: Cache) -> None:
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
        return self.run.computed.total()

    @property
    def skipped_evaluations(self) -> int:
        return self.run.served.total()

    @property
    def steps_run(self) -> tuple[int, float]:
        """Steps of the current or latest run, and how many of them were computed: what was, not what was planned.

        A pipeline whose steps go unseen (another scheduler makes them) is counted as one step.
        """
        return len({*self.run.computed, *self.run.served}), self.run.full_steps

    @property
    def cached_bytes(self) -> int:
        """Bytes of all that is cached at this moment, of all denoisers."""
        return self.run.cached_bytes

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
            self.tracker.as_planned = False
            self.run.computed[self.tracker.steps_taken] += 1
            return _Call()
        if self.plan.cache != "output":  # which takes no more than the latents do
            self.run.say_memory(step_index, self.cache.contents)
        history = self.run.histories.setdefault(stream, History())
        shapes, is_first, branches = shapes_of((args, kwargs)), self.tracker.is_first_call, self.run.branches
        branch, prediction = branches.of(is_first=is_first), None
        needed = branch.needed_after(step_index)
        if step_index not in branch.full:
            sources, weights = branch.schedule.serving(step_index)
            if history.shapes == shapes and history.kept.keys() >= set(sources):
                prediction = branches.with_the_first(history.serve(sources, weights), is_first=is_first)
            if prediction is None:
                self.tracker.as_planned = False
                self.tracker.warn_once("a call to the denoiser on a skipped step has no earlier output of its shape")
        history.retain(needed, shapes)  # before anything is computed: what is not needed any more leaves room
        if prediction is not None:
            self.run.served[self.tracker.steps_taken] += 1
            return _Call(served=prediction)
        self.run.computed[self.tracker.steps_taken] += 1
        is_needed = step_index in needed

        def keep(value: Any) -> None:
            kept = branches.less_the_first(value, is_first=is_first)
            if is_needed and kept is not None:
                history.keep(step_index, kept)

        return _Call(wanted=is_needed or (branches.by_difference and is_first), shapes=shapes, keep=keep)

    @torch.compiler.disable
    def _after(self, call: _Call, value: Any) -> None:
        if value is not None:
            call.keep(value)

    @torch.compiler.disable
    def _not_served(self) -> None:
        self.run.served[self.tracker.steps_taken] -= 1
        self.run.computed[self.tracker.steps_taken] += 1
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


def attach(
    pipe: Any, plan: Plan | CacheSchedule, sampler: SamplerFingerprint | None = None, *, cache: str | None = None
) -> ScheduleHook:
    """Have ``pipe`` follow a plan, or a schedule made for ``sampler``, until `detach`.

    A run at other timesteps of the same sampler gets a schedule of its own, of the same compute ratio, if the plan has
    a prior; any other run computes in full, with one warning. Without a sampler to compare with, only the step count
    must be that of the schedule.

    Args:
        cache: ``output``, ``residual`` or ``modules``, see `Plan`; None takes the plan's, for a schedule the output.
            What the latter two keep is logged (INFO, logger ``cemq.runtime``) in bytes, once a first step is kept.

    Raises:
        ModelError: A cemq schedule or another cache is active on the denoiser already, or it has no blocks whose
            residual, or whose modules, could be cached. Whether these serve is checked on the first step that they
            are kept of: computed, then served on the same input, must agree.
        InputError: No such cache.
    """
    if isinstance(plan, CacheSchedule):
        plan = Plan(schedule=plan, sampler=sampler)
    if cache is not None:
        plan = replace(plan, cache=cache)
    models, run, reference = [model for _, model in denoisers(pipe)], Run(plan.schedule), weakref.ref(pipe)
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
            refuse_lost_weights(denoiser)
            keep_outermost(denoiser, hook)
            hook.cache.install()

    tracker = (AnySamplerTracker if plan.sampler is None else StepTracker)(plan, on_start=start)
    for denoiser in models:
        refuse_other_caches(denoiser)
    try:
        for denoiser, cached in zip(models, make_caches(plan.cache, models), strict=True):
            hook = ScheduleHook(pipe, plan, tracker, run, cached)
            install(denoiser, hook)
            hooks.append(hook)
            cached.install()
    except ModelError:
        for denoiser in models[: len(hooks)]:
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
