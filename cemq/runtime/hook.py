"""The denoiser hook: a skipped step is served from earlier outputs and runs no kernel of the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch.utils._pytree import tree_flatten, tree_unflatten

from cemq.errors import ModelError
from cemq.models import denoisers
from cemq.prior import SamplerFingerprint
from cemq.runtime.callers import ThreadContexts, calling_pipeline
from cemq.runtime.plan import Plan
from cemq.runtime.registration import HOOK, install, keep_outermost, refuse_other_caches, uninstall
from cemq.runtime.steps import AnySamplerTracker, StepTracker, Stream
from cemq.schedule import CacheSchedule


@dataclass
class History:
    """The full-compute outputs of one stream that are still needed, and the shapes they were computed for."""

    shapes: Any = None
    outputs: dict[int, list[Any]] = field(default_factory=dict)  # flattened, by step index
    structure: Any = None

    def keep(self, step_index: int, output: Any, shapes: Any, last_use: np.ndarray) -> None:
        leaves, structure = tree_flatten(output)
        if shapes != self.shapes:
            self.outputs = {}
        self.shapes, self.structure = shapes, structure
        self.outputs = {step: kept for step, kept in self.outputs.items() if last_use[step] > step_index}
        if last_use[step_index] > step_index:  # a copy: whoever gets the output may change it in place
            self.outputs[step_index] = [_copied(leaf) for leaf in leaves]

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


@dataclass
class Run:
    """What a pipeline's denoisers (Wan 2.2 has two) know together of the current or latest run."""

    schedule: CacheSchedule
    histories: dict[Stream, History] = field(default_factory=dict)
    full_evaluations: int = 0
    skipped_evaluations: int = 0

    def __post_init__(self) -> None:
        self.full = frozenset(self.schedule.full_steps)
        steps = np.arange(self.schedule.num_steps)[:, None]
        self.last_use = np.where(self.schedule.served != 0, steps, -1).max(0)  # of every step's output

    def begin(self, schedule: CacheSchedule) -> None:
        """Forget the run before; follow ``schedule``."""
        self.__init__(schedule)


class ScheduleHook(ModelHook):
    """Runs the denoiser on full-compute steps and predicts its output on skipped ones; one history per stream.

    ``full_evaluations`` and ``skipped_evaluations`` count the calls of the current or latest run, of all denoisers;
    ``schedule`` is that of the current or latest run, which at another step count is not the one that was attached.
    """

    _is_stateful = True  # diffusers hands the cache context only to stateful hooks, through a StateManager attribute

    def __init__(self, pipe: Any, plan: Plan, tracker: StepTracker, run: Run):
        super().__init__()
        self.plan, self.tracker, self.run = plan, tracker, run
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
        served, keep = self._before(args, kwargs)
        if served is not None:
            return served
        output = self.fn_ref.original_forward(*args, **kwargs)
        self._after(output, keep)
        return output

    @torch.compiler.disable
    def _before(self, args: Any, kwargs: Any) -> tuple[Any, Callable[[Any], None] | None]:
        """The output of a skipped step, or None and what to do with the output once it is computed."""
        if self._is_foreign():
            self.tracker.warn_once("another pipeline uses the denoiser that a schedule is attached to")
            return None, None
        context = self.contexts._context
        stream = self.tracker.enter_call(context.name if context else None)
        step_index = self._step_index(context)
        if step_index is None:
            self.run.full_evaluations += 1
            return None, None
        history = self.run.histories.setdefault(stream, History())
        shapes = _shapes((args, kwargs))
        if step_index not in self.run.full:
            sources, weights = self.schedule.serving(step_index)
            if history.shapes == shapes and history.outputs.keys() >= set(sources):
                self.run.skipped_evaluations += 1
                return history.serve(sources, weights), None
            self.tracker.warn_once("a call to the denoiser on a skipped step has no earlier output of its shape")
        self.run.full_evaluations += 1
        last_use = self.run.last_use
        return None, lambda output: history.keep(step_index, output, shapes, last_use)

    @torch.compiler.disable
    def _after(self, output: Any, keep: Callable[[Any], None] | None) -> None:
        if keep is not None:
            keep(output)

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
            self.run.histories = {}  # free the memory, keep the counts
            self.contexts.reset()
        return module

    def __deepcopy__(self, memo: Any) -> None:
        raise ModelError("a cemq schedule is attached, and a copy would run the original's weights: detach() it first")

    def __reduce_ex__(self, protocol: Any) -> None:
        raise ModelError("a cemq schedule is attached and cannot be pickled: detach() it first, or load its bundle")


def _shapes(arguments: Any) -> tuple[Any, ...]:
    return tuple(leaf.shape for leaf in tree_flatten(arguments)[0] if torch.is_tensor(leaf))


def attach(pipe: Any, plan: Plan | CacheSchedule, sampler: SamplerFingerprint | None = None) -> ScheduleHook:
    """Have ``pipe`` follow a plan, or a schedule made for ``sampler``, until `detach`.

    A run at other timesteps of the same sampler gets a schedule of its own, of the same compute ratio, if the plan has
    a prior; any other run computes in full, with one warning. Without a sampler to compare with, only the step count
    must be that of the schedule.

    Raises:
        ModelError: A cemq schedule or another cache is active on the denoiser already.
    """
    if isinstance(plan, CacheSchedule):
        plan = Plan(schedule=plan, sampler=sampler)
    found, run, reference = denoisers(pipe), Run(plan.schedule), weakref.ref(pipe)
    hooks: list[ScheduleHook] = []

    def start(schedule: CacheSchedule) -> None:
        run.begin(schedule)
        pipe = reference()
        for _, denoiser in denoisers(pipe) if pipe is not None else ():
            hook = HookRegistry.check_if_exists_or_initialize(denoiser).get_hook(HOOK)
            if hook not in hooks:
                tracker.warn_once("the pipeline's denoiser was replaced after the schedule was attached")
                continue
            refuse_other_caches(pipe, denoiser)
            keep_outermost(denoiser, hook)

    tracker = (AnySamplerTracker if plan.sampler is None else StepTracker)(plan, on_start=start)
    for _, denoiser in found:
        refuse_other_caches(pipe, denoiser)
    try:
        for _, denoiser in found:
            hook = ScheduleHook(pipe, plan, tracker, run)
            install(denoiser, hook)
            hooks.append(hook)
    except ModelError:
        for _, denoiser in found[: len(hooks)]:
            uninstall(denoiser)
        raise
    tracker.follow(pipe.scheduler)
    return hooks[0]


def detach(pipe: Any) -> None:
    """Undo `attach`; does nothing if no schedule is attached."""
    _take_off(denoisers(pipe))


def _take_off(found: Iterable[tuple[str, Any]]) -> None:
    for _, denoiser in found:
        hook = uninstall(denoiser)
        if hook is not None:
            hook.tracker.release()


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
    pipe: Any, plan: Plan | CacheSchedule, sampler: SamplerFingerprint | None = None
) -> Iterator[ScheduleHook]:
    """`attach` for the length of a ``with`` block; undone on exit, also after an exception."""
    found, hook = denoisers(pipe), attach(pipe, plan, sampler)
    try:
        yield hook
    finally:  # on what it was attached to, whatever the pipeline holds by now
        hook.tracker.release()
        _take_off(found)  # `set_budget` may have put another hook in
