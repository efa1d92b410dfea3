"""The denoiser hook: a skipped step is served from earlier outputs and runs no kernel of the model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch.utils._pytree import tree_flatten, tree_unflatten

from cemq.errors import ModelError
from cemq.models import denoisers
from cemq.predict import get_predictor
from cemq.prior import SamplerFingerprint
from cemq.runtime.order import HOOK, keep_outermost, put_on, take_off
from cemq.runtime.steps import AnySamplerTracker, StepTracker, Stream
from cemq.schedule import CacheSchedule


@dataclass
class History:
    """The latest full-compute outputs of one stream, newest first, and the shapes they were computed for."""

    shapes: Any = None
    steps: list[int] = field(default_factory=list)
    outputs: list[list[Any]] = field(default_factory=list)  # flattened
    structure: Any = None

    def keep(self, step_index: int, output: Any, shapes: Any, depth: int) -> None:
        leaves, structure = tree_flatten(output)
        if shapes != self.shapes:
            self.steps, self.outputs = [], []
        self.shapes, self.structure = shapes, structure
        self.steps = [step_index, *self.steps][:depth]
        self.outputs = [leaves, *self.outputs][:depth]

    def serve(self, coefficients: tuple[float, ...]) -> Any:
        columns = zip(*self.outputs[: len(coefficients)], strict=True)
        return tree_unflatten([_combine(leaves, coefficients) for leaves in columns], self.structure)


def _combine(leaves: tuple[Any, ...], coefficients: tuple[float, ...]) -> Any:
    newest = leaves[0]
    if len(coefficients) == 1 or not torch.is_tensor(newest) or not newest.is_floating_point():
        return newest
    total = sum(weight * leaf.float() for weight, leaf in zip(coefficients, leaves, strict=True))
    return total.to(newest.dtype)


class ScheduleHook(ModelHook):
    """Runs the denoiser on full-compute steps and predicts its output on skipped ones; one history per stream.

    ``full_evaluations`` and ``skipped_evaluations`` count the calls of the current or latest run.
    """

    _is_stateful = True  # diffusers hands the cache context only to stateful hooks, through a StateManager attribute

    def __init__(self, pipe: Any, schedule: CacheSchedule, tracker: StepTracker):
        super().__init__()
        self.schedule, self.tracker = schedule, tracker
        self.contexts = StateManager(BaseState)
        self._pipe = weakref.ref(pipe)
        self._full = frozenset(schedule.full_steps)
        self._predictor = get_predictor(schedule.predictor)
        self._histories: dict[Stream, History] = {}
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
            if history.steps and history.shapes == shapes:
                self.skipped_evaluations += 1
                return history.serve(self._predictor.coefficients(step_index, history.steps))
            self.tracker.warn_once("a call to the denoiser on a skipped step has no earlier output of its shape")
        self.full_evaluations += 1
        output = self.fn_ref.original_forward(*args, **kwargs)
        history.keep(step_index, output, shapes, self._predictor.depth)
        return output

    def _step_index(self) -> int | None:
        pipe = self._pipe()
        if pipe is not None and pipe.scheduler is not self.tracker.scheduler:
            self.tracker.warn_once("the pipeline's scheduler was replaced after the schedule was attached")
            return None
        return self.tracker.step_index

    def start(self) -> None:
        """A new run begins."""
        pipe = self._pipe()
        for _, denoiser in denoisers(pipe) if pipe is not None else ():
            keep_outermost(denoiser)
        self._histories.clear()
        self.full_evaluations = self.skipped_evaluations = 0

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self._histories.clear()  # end of a run: free the memory, keep the counts
        self.contexts.reset()
        return module


def _shapes(arguments: Any) -> tuple[Any, ...]:
    return tuple(leaf.shape for leaf in tree_flatten(arguments)[0] if torch.is_tensor(leaf))


def attach(pipe: Any, schedule: CacheSchedule, sampler: SamplerFingerprint | None) -> ScheduleHook:
    """Have ``pipe`` follow ``schedule`` until `detach`; a run under another sampler or step count computes in full.

    Without a sampler to compare with, only the step count must be that of the schedule.

    Raises:
        ModelError: A cache is active on the denoiser already.
    """
    if sampler is None:
        tracker: StepTracker = AnySamplerTracker(schedule.num_steps, on_start=lambda: hook.start())
    else:
        tracker = StepTracker(sampler, on_start=lambda: hook.start())
    hook = ScheduleHook(pipe, schedule, tracker)
    for _, denoiser in denoisers(pipe):
        registry = HookRegistry.check_if_exists_or_initialize(denoiser)
        if registry.get_hook(HOOK) is not None:
            raise ModelError("a cemq schedule is attached to this pipeline already: detach it first")
        if getattr(denoiser, "is_cache_enabled", False):
            raise ModelError("a diffusers cache is enabled on this denoiser: call disable_cache() first")
        put_on(denoiser, hook)
    tracker.follow(pipe.scheduler)
    return hook


def detach(pipe: Any) -> None:
    """Undo `attach`; does nothing if no schedule is attached."""
    for _, denoiser in denoisers(pipe):
        hook = HookRegistry.check_if_exists_or_initialize(denoiser).get_hook(HOOK)
        if hook is not None:
            hook.tracker.release()
            take_off(denoiser)


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


@contextmanager
def attached(pipe: Any, schedule: CacheSchedule, sampler: SamplerFingerprint | None) -> Iterator[ScheduleHook]:
    """`attach` for the length of a ``with`` block; undone on exit, also after an exception."""
    hook = attach(pipe, schedule, sampler)
    try:
        yield hook
    finally:
        detach(pipe)
