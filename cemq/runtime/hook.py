"""The denoiser hook: a skipped step is served from earlier outputs and runs no kernel of the model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch.utils._pytree import tree_flatten, tree_unflatten

from cemq.errors import ModelError
from cemq.models import denoisers
from cemq.runtime.plan import Plan
from cemq.runtime.steps import StepTracker, Stream
from cemq.schedule import CacheSchedule

HOOK = "cemq_schedule"


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
        if last_use[step_index] > step_index:
            self.outputs[step_index] = leaves

    def serve(self, sources: tuple[int, ...], weights: tuple[float, ...]) -> Any:
        columns = zip(*(self.outputs[step] for step in sources), strict=True)
        return tree_unflatten([_combine(leaves, weights) for leaves in columns], self.structure)


def _combine(leaves: tuple[Any, ...], coefficients: tuple[float, ...]) -> Any:
    newest = leaves[0]
    if coefficients == (1.0,) or not torch.is_tensor(newest) or not newest.is_floating_point():
        return newest
    total = sum(weight * leaf.float() for weight, leaf in zip(coefficients, leaves, strict=True))
    return total.to(newest.dtype)


class ScheduleHook(ModelHook):
    """Runs the denoiser on full-compute steps and predicts its output on skipped ones; one history per stream.

    ``full_evaluations`` and ``skipped_evaluations`` count the calls of the current or latest run; ``schedule`` is the
    one of the current or latest run, which under another step count is not the one that was attached.
    """

    _is_stateful = True  # diffusers hands the cache context only to stateful hooks, through a StateManager attribute

    def __init__(self, pipe: Any, plan: Plan, tracker: StepTracker):
        super().__init__()
        self.plan, self.tracker = plan, tracker
        self.contexts = StateManager(BaseState)
        self._pipe = weakref.ref(pipe)
        self._histories: dict[Stream, History] = {}
        self.follow(plan.schedule)

    def follow(self, schedule: CacheSchedule) -> None:
        """Take ``schedule`` from the next run on."""
        self.schedule = schedule
        self._full = frozenset(schedule.full_steps)
        steps = np.arange(schedule.num_steps)[:, None]
        self._last_use = np.where(schedule.served != 0, steps, -1).max(0)
        self._histories.clear()
        self.full_evaluations = self.skipped_evaluations = 0

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        context = self.contexts._context
        stream = self.tracker.enter_call(context.name if context else None)
        step_index = self._step_index()
        if step_index is None:
            self.full_evaluations += 1
            return self.fn_ref.original_forward(*args, **kwargs)
        history = self._histories.setdefault(stream, History())
        shapes = _shapes((args, kwargs))
        if step_index not in self._full:
            sources, weights = self.schedule.serving(step_index)
            if history.shapes == shapes and history.outputs.keys() >= set(sources):
                self.skipped_evaluations += 1
                return history.serve(sources, weights)
            self.tracker.warn_once("a call to the denoiser on a skipped step has no earlier output of its shape")
        self.full_evaluations += 1
        output = self.fn_ref.original_forward(*args, **kwargs)
        history.keep(step_index, output, shapes, self._last_use)
        return output

    def _step_index(self) -> int | None:
        pipe = self._pipe()
        if pipe is not None and pipe.scheduler is not self.tracker.scheduler:
            self.tracker.warn_once("the pipeline's scheduler was replaced after the schedule was attached")
            return None
        return self.tracker.step_index

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self._histories.clear()  # end of a run: free the memory, keep the counts
        self.contexts.reset()
        return module


def _shapes(arguments: Any) -> tuple[Any, ...]:
    return tuple(leaf.shape for leaf in tree_flatten(arguments)[0] if torch.is_tensor(leaf))


def attach(pipe: Any, plan: Plan) -> ScheduleHook:
    """Have ``pipe`` follow ``plan`` until `detach`.

    A run at other timesteps of the same sampler gets a schedule of its own, of the same compute ratio, if the plan has
    a prior; any other run computes in full, with one warning.

    Raises:
        ModelError: A cache is active on the denoiser already.
    """
    tracker = StepTracker(plan, on_start=lambda schedule: hook.follow(schedule))
    hook = ScheduleHook(pipe, plan, tracker)
    for _, denoiser in denoisers(pipe):
        registry = HookRegistry.check_if_exists_or_initialize(denoiser)
        if registry.get_hook(HOOK) is not None:
            raise ModelError("a cemq schedule is attached to this pipeline already: detach it first")
        if getattr(denoiser, "is_cache_enabled", False):
            raise ModelError("a diffusers cache is enabled on this denoiser: call disable_cache() first")
        registry.register_hook(hook, HOOK)
    tracker.follow(pipe.scheduler)
    return hook


def detach(pipe: Any) -> None:
    """Undo `attach`; does nothing if no schedule is attached."""
    for _, denoiser in denoisers(pipe):
        registry = HookRegistry.check_if_exists_or_initialize(denoiser)
        hook = registry.get_hook(HOOK)
        if hook is not None:
            hook.tracker.release()
            registry.remove_hook(HOOK, recurse=False)


def schedule_hook(pipe: Any) -> ScheduleHook:
    """The hook that `attach` installed: its schedule, and how many evaluations the latest run made.

    Raises:
        ModelError: No schedule is attached.
    """
    for _, denoiser in denoisers(pipe):
        hook = HookRegistry.check_if_exists_or_initialize(denoiser).get_hook(HOOK)
        if hook is not None:
            return hook
    raise ModelError("no cemq schedule is attached to this pipeline")


def set_budget(pipe: Any, budget: int | str) -> CacheSchedule:
    """Give a scheduled pipeline another budget, planned from its bundle's prior; returns the new schedule.

    Args:
        budget: Full-compute steps of the step count the bundle was made for, or a compute ratio such as ``"3x"``.

    Raises:
        ModelError: No schedule is attached, or one without a prior.
        InfeasibleBudgetError: The budget is out of range.
    """
    hook = schedule_hook(pipe)
    plan = hook.plan.with_budget(budget)
    detach(pipe)
    attach(pipe, plan)
    return plan.schedule


@contextmanager
def attached(pipe: Any, plan: Plan) -> Iterator[ScheduleHook]:
    """`attach` for the length of a ``with`` block; undone on exit, also after an exception."""
    hook = attach(pipe, plan)
    try:
        yield hook
    finally:
        detach(pipe)
