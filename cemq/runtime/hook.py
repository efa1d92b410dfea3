"""The denoiser hook: a skipped step is served from earlier outputs and runs no kernel of the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch.utils._pytree import tree_flatten, tree_unflatten

from cemq.errors import ModelError
from cemq.models import denoisers
from cemq.predict import get_predictor
from cemq.prior import SamplerFingerprint
from cemq.runtime.callers import ThreadContexts, calling_pipeline
from cemq.runtime.registration import HOOK, install, keep_outermost, refuse_other_caches, uninstall
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
        leaves = [_copied(leaf) for leaf in leaves]  # whoever gets the output may change it in place
        if shapes != self.shapes:
            self.steps, self.outputs = [], []
        self.shapes, self.structure = shapes, structure
        self.steps = [step_index, *self.steps][:depth]
        self.outputs = [leaves, *self.outputs][:depth]

    def serve(self, coefficients: tuple[float, ...]) -> Any:
        columns = zip(*self.outputs[: len(coefficients)], strict=True)
        return tree_unflatten([_combine(leaves, coefficients) for leaves in columns], self.structure)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if torch.is_tensor(leaf) else leaf


def _combine(leaves: tuple[Any, ...], coefficients: tuple[float, ...]) -> Any:
    newest = leaves[0]
    if len(coefficients) == 1 or not torch.is_tensor(newest) or not newest.is_floating_point():
        return _copied(newest)
    total = sum(weight * leaf.float() for weight, leaf in zip(coefficients, leaves, strict=True))
    return total.to(newest.dtype)


@dataclass
class Run:
    """What a pipeline's denoisers (Wan 2.2 has two) know together of the current or latest run."""

    histories: dict[Stream, History] = field(default_factory=dict)
    full_evaluations: int = 0
    skipped_evaluations: int = 0


class ScheduleHook(ModelHook):
    """Runs the denoiser on full-compute steps and predicts its output on skipped ones; one history per stream.

    ``full_evaluations`` and ``skipped_evaluations`` count the calls of the current or latest run, of all denoisers.
    """

    _is_stateful = True  # diffusers hands the cache context only to stateful hooks, through a StateManager attribute

    def __init__(self, pipe: Any, schedule: CacheSchedule, tracker: StepTracker, run: Run):
        super().__init__()
        self.schedule, self.tracker, self.run = schedule, tracker, run
        self.contexts = ThreadContexts()
        self.installed: Any = None  # the denoiser's forward once this hook is in it
        self._pipe = weakref.ref(pipe)
        self._full = frozenset(schedule.full_steps)
        self._predictor = get_predictor(schedule.predictor)

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
        if step_index not in self._full:
            if history.steps and history.shapes == shapes:
                self.run.skipped_evaluations += 1
                return history.serve(self._predictor.coefficients(step_index, history.steps)), None
            self.tracker.warn_once("a call to the denoiser on a skipped step has no earlier output of its shape")
        self.run.full_evaluations += 1
        depth = self._predictor.depth
        return None, lambda output: history.keep(step_index, output, shapes, depth)

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


def attach(pipe: Any, schedule: CacheSchedule, sampler: SamplerFingerprint | None) -> ScheduleHook:
    """Have ``pipe`` follow ``schedule`` until `detach`; a run under another sampler or step count computes in full.

    Without a sampler to compare with, only the step count must be that of the schedule.

    Raises:
        ModelError: A cemq schedule or another cache is active on the denoiser already.
    """
    found, run, reference = denoisers(pipe), Run(), weakref.ref(pipe)
    hooks: list[ScheduleHook] = []

    def start() -> None:
        run.histories, run.full_evaluations, run.skipped_evaluations = {}, 0, 0
        pipe = reference()
        for _, denoiser in denoisers(pipe) if pipe is not None else ():
            hook = HookRegistry.check_if_exists_or_initialize(denoiser).get_hook(HOOK)
            if hook not in hooks:
                tracker.warn_once("the pipeline's denoiser was replaced after the schedule was attached")
                continue
            refuse_other_caches(pipe, denoiser)
            keep_outermost(denoiser, hook)

    if sampler is None:
        tracker: StepTracker = AnySamplerTracker(schedule.num_steps, on_start=start)
    else:
        tracker = StepTracker(sampler, on_start=start)
    for _, denoiser in found:
        refuse_other_caches(pipe, denoiser)
    try:
        for _, denoiser in found:
            hook = ScheduleHook(pipe, schedule, tracker, run)
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
    for _, denoiser in denoisers(pipe):
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


@contextmanager
def attached(pipe: Any, schedule: CacheSchedule, sampler: SamplerFingerprint | None) -> Iterator[ScheduleHook]:
    """`attach` for the length of a ``with`` block; undone on exit, also after an exception."""
    found, hook = denoisers(pipe), attach(pipe, schedule, sampler)
    try:
        yield hook
    finally:  # on what it was attached to, whatever the pipeline holds by now
        hook.tracker.release()
        for _, denoiser in found:
            uninstall(denoiser)
