"""The denoiser hook: a skipped step is served from what is cached of earlier steps."""

from __future__ import annotations

import copy
import functools
import logging
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from cemq.errors import InputError, ModelError
from cemq.memory.placement import format_bytes
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.pipelines.lora import is_adapted
from cemq.pipelines.opening import denoisers, refuse_lost_weights
from cemq.runtime.arguments import DenoiserArguments
from cemq.runtime.branches import Branches
from cemq.runtime.cached.caches import Cache, make_caches
from cemq.runtime.cached.inside import InsideCache
from cemq.runtime.cached.modulated import modulated_input, probed
from cemq.runtime.callers import Caller, ThreadContexts, find_caller
from cemq.runtime.history import History, shapes_of
from cemq.runtime.policies import Decider, Inside, Policy, Scheduled, Serving, StepCall
from cemq.runtime.registration import (
    OutermostHook,
    Uncopied,
    install,
    installed_hook,
    keep_outermost,
    refuse_other_caches,
    uninstall,
)
from cemq.runtime.steps import AnySamplerTracker, AnyStepsTracker, StepTracker, Stream
from cemq.schedule import CacheSchedule, full_compute
from cemq.schedule.plan import INSIDE, Plan

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_OWN = "_cemq_schedule"  # the attribute of a pipeline that keeps its hook


@dataclass
class Run:
    """What a pipeline's denoisers (Wan 2.2 has two) know together of the current or latest run."""

    schedule: CacheSchedule
    histories: dict[Stream, History] = field(default_factory=dict)
    computed: Counter[int] = field(default_factory=Counter)  # calls, by how many steps were taken before them
    served: Counter[int] = field(default_factory=Counter)
    spared: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))  # of the computed, by a policy
    memory: str = ""  # what was said last of the bytes that are cached
    policy: Policy | None = None  # None: the schedule decides

    def __post_init__(self) -> None:
        self.follow(self.schedule)

    def begin(self, schedule: CacheSchedule) -> None:
        """Forget the run before; follow ``schedule``."""
        self.__init__(schedule, memory=self.memory, policy=self.policy)

    def follow(self, schedule: CacheSchedule) -> None:
        """Go on under another schedule, which begins with the same step."""
        self.schedule = schedule
        self.branches: Branches = Branches(schedule)
        self.decider: Decider = Scheduled(schedule) if self.policy is None else self.policy.begin(schedule.num_steps)

    @property
    def full_steps(self) -> float:
        """Steps that were computed; one of which a call in two was served is half a one."""
        return sum((calls - self.spared[step]) / (calls + self.served[step]) for step, calls in self.computed.items())

    @property
    def cached_bytes(self) -> int:
        return sum(history.bytes() for history in self.histories.values())

    def forget(self) -> None:
        """Free the memory, keep the counts."""
        self.histories = {}
        self.branches.forget()
        if self.policy is not None:  # what it remembers is tensors too
            self.decider = self.policy.begin(self.schedule.num_steps)

    def say_memory(self, step_index: int, contents: str) -> None:
        """Log what the cache takes, once it has kept a first step of all calls; again only if that changes."""
        kept = {step for history in self.histories.values() for step in history.kept}
        if len(kept) != 1 or step_index in kept:
            return
        step_bytes, most = self.cached_bytes, self.decider.most_kept
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
    not_served: Callable[[], None] | None = None  # told if it could not be
    inside: Inside | None = None  # who answers within it
    spare: Callable[[float], None] | None = None  # told the share of it that was not computed


class ScheduleHook(Uncopied):
    """Has the calls of one pipeline's denoisers computed on full-compute steps, and served on skipped ones from
    predictions; one history per stream.

    ``full_evaluations`` and ``skipped_evaluations`` count the calls of the current or latest run, of all denoisers;
    ``schedule`` is that of the current or latest run, which at another step count is not the one that was attached.
    """

    def __init__(
        self, pipe: DiffusionPipeline, plan: Plan, tracker: StepTracker, run: Run, models: list[torch.nn.Module]
    ) -> None:
        self.plan: Plan = plan
        self.tracker: StepTracker = tracker
        self.run: Run = run
        self.is_measured: bool = False  # a bundle has figures of what it follows
        self._pipe = weakref.ref(pipe)
        self._models = [weakref.ref(model) for model in models]

    @property
    def schedule(self) -> CacheSchedule:
        return self.run.schedule

    @property
    def followed(self) -> Plan | Policy:
        """What it was attached to follow."""
        return self.plan if self.run.policy is None else self.run.policy

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

    @property
    def pipe(self) -> Any:
        """The pipeline it was attached to; None once that is gone, though its scheduler may live on in a loop."""
        return self._pipe()

    def follows(self, pipe: DiffusionPipeline) -> bool:
        """Whether it is this pipeline's: the one it was attached to, or another that steps the same scheduler."""
        return self.pipe is pipe or self.tracker.scheduler is getattr(pipe, "scheduler", None)

    def begin(self, schedule: CacheSchedule) -> None:
        """A run has been given its timesteps."""
        self.run.begin(schedule)
        if self.is_measured and self.pipe is not None and is_adapted(self.pipe):
            self.tracker.warn_once(
                "this pipeline has a LoRA, and the figures of its bundle were measured without", "its schedule stays"
            )
        for _, denoiser in denoisers(self.pipe) if self.pipe is not None else ():
            hook = _find(denoiser)
            if hook is None or self not in hook.schedules:
                self.tracker.warn_once("the pipeline's denoiser was replaced after the schedule was attached")
                continue
            refuse_other_caches(denoiser)
            refuse_lost_weights(denoiser)
            with hook.lock:
                keep_outermost(denoiser, hook)
                hook.cache.install()

    def leave(self) -> None:
        """Undo `attach`, whatever the pipeline holds by now."""
        self.tracker.release()
        for reference in self._models:
            if (model := reference()) is not None and (hook := _find(model)) is not None:
                hook.part(self)
                _uninstall_unused(model)
        if self.pipe is not None and vars(self.pipe).get(_OWN) is self:
            del vars(self.pipe)[_OWN]

    def before(self, hook: DenoiserHook, caller: Caller, module: torch.nn.Module, args: Any, kwargs: Any) -> _Call:
        """What to do with a call of this run."""
        context = hook.contexts._context
        timestep = hook.arguments.timestep(args, kwargs)
        stream = self.tracker.enter_call(caller, context.name if context else None, timestep)
        step_index = self._step_index(context)
        if step_index is None:
            self.tracker.as_planned = False
            self.run.computed[self.tracker.steps_taken] += 1
            return _Call()
        if self.plan.cache != "output":  # which takes no more than the latents do
            self.run.say_memory(step_index, hook.cache.contents)
        history = self.run.histories.setdefault(stream, History())
        shapes, is_first, branches = shapes_of((args, kwargs)), self.tracker.is_first(stream), self.run.branches
        decider, prediction = self.run.decider, None
        forward = hook.forward_of(args, kwargs)
        asked = StepCall(
            step=step_index, num_steps=self.schedule.num_steps, stream=stream, is_first=is_first,
            modulated_input=functools.partial(modulated_input, module, forward),
            sample=hook.arguments.sample(args, kwargs), timestep=timestep,
            probe=functools.partial(probed, module, forward),
            evaluate=functools.partial(hook.evaluate, args, kwargs), shapes=shapes,
        )  # fmt: skip
        serving = decider.decide(asked)
        inside = None if serving is None or isinstance(serving, Serving) else serving
        if inside is not None and self.plan.cache != INSIDE:
            raise ModelError(f"cache={self.plan.cache}: a policy that answers blocks itself takes cache={INSIDE}")
        if isinstance(serving, Serving):
            if history.shapes == shapes and history.kept.keys() >= set(serving.sources):
                sums = history.serve(serving.sources, serving.weights, serving.added)
                prediction = branches.with_the_first(sums, is_first=is_first)
            if prediction is None:
                self.tracker.as_planned = False
                self.tracker.warn_once(
                    "a call to the denoiser on a skipped step has no earlier output of its shape from the same line"
                )
        needed = decider.keeps(asked, served=prediction is not None)
        history.retain(needed, shapes)  # before anything is computed: what is not needed any more leaves room
        if prediction is not None:
            self.run.served[self.tracker.steps_taken] += 1
            return _Call(served=prediction, not_served=self._not_served)
        self.run.computed[self.tracker.steps_taken] += 1
        is_needed = step_index in needed or self.tracker.keeps_first_step

        def keep(value: Any) -> None:
            kept = branches.less_the_first(value, is_first=is_first)
            if is_needed and kept is not None:
                history.keep(step_index, kept)
                computed = getattr(decider, "computed", None)
                if step_index in needed and computed is not None:
                    computed(asked, kept)

        wanted = is_needed or (branches.by_difference and is_first)
        return _Call(wanted=wanted, shapes=shapes, keep=keep, inside=inside, spare=self._spare)

    def _spare(self, share: float) -> None:
        self.run.spared[self.tracker.steps_taken] += share

    def _not_served(self) -> None:
        self.run.served[self.tracker.steps_taken] -= 1
        self.run.computed[self.tracker.steps_taken] += 1
        self.tracker.warn_once("a skipped step calls other blocks than the step it is served from")

    def before_any_run(self) -> _Call:
        """What to do with a call of its pipeline, which has not set the timesteps that are followed."""
        self.run.computed[self.tracker.steps_taken] += 1
        if not self._scheduler_is_replaced():
            self.tracker.warn_once("the pipeline runs its denoiser without having set the timesteps of its scheduler")
        return _Call()

    def _scheduler_is_replaced(self) -> bool:
        replaced = self.pipe is not None and self.pipe.scheduler is not self.tracker.scheduler
        if replaced:
            self.tracker.warn_once("the pipeline's scheduler was replaced after the schedule was attached")
        return replaced

    def _step_index(self, context: Any) -> int | None:
        if self._scheduler_is_replaced():
            return None
        step_index = self.tracker.step_index
        if step_index is None or step_index >= self.schedule.num_steps:  # the latter: the run is over
            return None
        if context is not None and not self.tracker.agrees(context.step_index, context.sigma):
            self.tracker.warn_once("the pipeline is at another step than its sampler")
            return None
        return step_index


class DenoiserHook(OutermostHook):
    """Lies on a denoiser and asks the schedule of the run that calls it; calls of anybody else are computed.

    Pipelines that share the denoiser share this hook and the cache's hooks inside of the denoiser, nothing else.
    """

    _is_stateful = True  # diffusers hands the cache context only to stateful hooks, through a StateManager attribute

    def __init__(self, module: torch.nn.Module, kind: str, cache: Cache) -> None:
        super().__init__()
        self.kind: str = kind
        self.cache: Cache = cache
        self.contexts: ThreadContexts = ThreadContexts()
        self.lock: threading.Lock = threading.Lock()  # runs of several pipelines may begin at once, and put it on top
        self._schedules: tuple[weakref.ref[ScheduleHook], ...] = ()
        self.arguments: DenoiserArguments = DenoiserArguments(module)

    @property
    def schedules(self) -> list[ScheduleHook]:
        """Those of the pipelines with this denoiser. Each is kept by its pipeline and scheduler, and goes with them."""
        return [found for reference in self._schedules if (found := reference()) is not None]

    def join(self, schedule: ScheduleHook) -> None:
        with self.lock:
            self._schedules = tuple(map(weakref.ref, [*self.schedules, schedule]))

    def part(self, schedule: ScheduleHook) -> None:
        with self.lock:
            self._schedules = tuple(weakref.ref(each) for each in self.schedules if each is not schedule)

    def forward_of(self, args: Any, kwargs: Any) -> Callable[[], Any]:
        """What lies below this hook, called so."""
        return functools.partial(self.fn_ref.original_forward, *args, **kwargs)

    def evaluate(self, args: Any, kwargs: Any, **replaced: Any) -> Any:
        """What lies below this hook answers, called with another ``sample`` or ``timestep``."""
        return self.forward_of(*self.arguments.replaced(args, kwargs, **replaced))()

    @torch.compiler.disable(recursive=False)  # the model within is compiled, what is decided from step to step is not
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.forward_of(args, kwargs)
        call = self._before(module, args, kwargs)
        if call.served is not None:
            output = self.cache.serve(forward, call.served)
            if output is not None:
                return output
            self._not_served(call)
        if call.inside is not None and isinstance(self.cache, InsideCache):
            output, share = self.cache.answered(forward, call.inside)
            self._spare(call, 1 - share)
            return output
        output, value = self.cache.compute(forward, wanted=call.wanted, shapes=call.shapes)
        self._after(call, value)
        return output

    @torch.compiler.disable()
    def _before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> _Call:
        schedules = self.schedules
        caller = find_caller(origin for each in schedules for origin in each.tracker.origins)
        if caller.origins:
            begun = [each for each in schedules if not set(caller.origins).isdisjoint(each.tracker.origins)]
            runs = [each for each in begun if each.tracker.is_under_way] or begun[:1]
            if len(runs) == 1:
                return runs[0].before(self, caller, module, args, kwargs)
            for each in runs:
                each.tracker.give_up("several runs of one denoiser take turns in one function")
        elif caller.pipeline is not None:
            for each in schedules:
                if each.follows(caller.pipeline):
                    return each.before_any_run()
            for each in schedules[:1]:
                each.tracker.warn_once(
                    "another pipeline uses the denoiser that a schedule is attached to (cemq.for_request(pipe) makes "
                    "one that follows it)"
                )
        else:
            for each in schedules:
                if each.tracker.is_followed:
                    each.tracker.warn_once("the denoiser is called from elsewhere than where its run began")
        return _Call()

    @torch.compiler.disable()
    def _after(self, call: _Call, value: Any) -> None:
        if value is not None and call.keep is not None:
            call.keep(value)

    @torch.compiler.disable()
    def _spare(self, call: _Call, share: float) -> None:
        if call.spare is not None:
            call.spare(share)

    @torch.compiler.disable()
    def _not_served(self, call: _Call) -> None:
        if call.not_served is not None:
            call.not_served()

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """A pipeline has ended its run, or somebody wants the memory back: not that of runs of others."""
        schedules = self.schedules
        caller = find_caller(origin for each in schedules for origin in each.tracker.origins)
        if caller.pipeline is None:
            self.contexts.reset()
            for each in schedules:
                for origin in each.tracker.origins[:1]:
                    if origin in caller.origins or (not caller.origins and origin.thread == threading.get_ident()):
                        each.run.forget()
        return module


def attach(
    pipe: DiffusionPipeline,
    followed: Plan | CacheSchedule | Policy,
    sampler: SamplerFingerprint | None = None,
    *,
    cache: str | None = None,
) -> ScheduleHook:
    """Have ``pipe`` follow a plan, a schedule made for ``sampler``, or a policy, until `detach`.

    A run at other timesteps of the same sampler gets a schedule of its own, of the same compute ratio, if the plan has
    a prior; any other run computes in full, with one warning. Without a sampler to compare with, only the step count
    must be that of the schedule. A policy decides in every run, whatever its sampler and steps.

    Args:
        cache: ``output``, ``residual`` or ``modules``, see `Plan`; None takes the plan's or the policy's, for a
            schedule the output. What the latter two keep is logged (INFO, logger ``cemq.runtime``) in bytes, once a
            first step is kept.

    Raises:
        ModelError: A cemq schedule or another cache is active on the denoiser already, or it has no blocks whose
            residual, or whose modules, could be cached. Whether these serve is checked on the first step that they
            are kept of: computed, then served on the same input, must agree.
        InputError: No such cache, or one that the policy does not take.
    """
    policy = None
    if isinstance(followed, CacheSchedule):
        plan = Plan(schedule=followed, sampler=sampler)
    elif isinstance(followed, Plan):
        plan = followed
    else:
        policy, plan = followed, Plan(schedule=full_compute(2), sampler=None, cache=followed.cache)
    if cache is not None:
        plan = replace(plan, cache=cache)
        if is_dataclass(policy) and "cache" in {each.name for each in fields(policy)} and policy.cache != cache:
            replace(policy, cache=cache)  # which says so where it cannot do with that
    if policy is None and plan.cache == INSIDE:
        raise InputError(f"cache={INSIDE}: policies that answer blocks themselves have it, schedules have none")
    models, run = [model for _, model in denoisers(pipe)], Run(plan.schedule, policy=policy)
    for denoiser in models:
        refuse_other_caches(denoiser)
    _refuse_others(pipe, plan, models)
    caches = make_caches(plan.cache, models)

    kind = AnySamplerTracker if plan.sampler is None else StepTracker
    tracker = (AnyStepsTracker if policy is not None else kind)(
        plan, on_start=lambda schedule: found.begin(schedule), on_end=run.forget, on_late_start=run.follow
    )
    found = ScheduleHook(pipe, plan, tracker, run, models)
    try:
        for denoiser, own in zip(models, caches, strict=True):
            hook = _find(denoiser)
            if hook is None:
                hook = DenoiserHook(denoiser, plan.cache, own)
                install(denoiser, hook)
            hook.join(found)
            hook.cache.install()
    except ModelError:
        found.leave()
        raise
    vars(pipe)[_OWN] = found
    tracker.follow(pipe.scheduler)
    return found


def _refuse_others(pipe: DiffusionPipeline, plan: Plan, models: list[torch.nn.Module]) -> None:
    """Raises ModelError where a schedule is attached already that this one cannot live beside."""
    for denoiser in models:
        _uninstall_unused(denoiser)
        hook = _find(denoiser)
        if hook is None:
            continue
        for other in hook.schedules:
            if other.pipe is pipe:
                raise ModelError("a cemq schedule is attached to this pipeline already: detach it first")
            if other.follows(pipe):
                raise ModelError(
                    "a cemq schedule is attached to another pipeline with this one's scheduler, so that both follow "
                    "it: detach it there first, or give this pipeline a scheduler of its own"
                )
            if hook.kind != plan.cache:
                raise ModelError(
                    f"another pipeline with this one's denoiser follows a schedule with cache={hook.kind!r}: "
                    f"take that too, found cache={plan.cache!r}, or detach the schedule there first"
                )


def apply_policy(pipe: DiffusionPipeline, policy: Policy, *, cache: str | None = None) -> ScheduleHook:
    """Have ``policy`` decide, while ``pipe`` draws, which calls of its denoiser are computed; until `detach`.

    It may be any pipeline, quantized or not, at any step count and under any sampler.

    Args:
        cache: What skipped steps are served from, see `attach`; None takes the policy's.

    Returns:
        The hook, which counts full and skipped evaluations of the latest run.

    Raises:
        ModelError, InputError: As `attach` does.
    """
    return attach(pipe, policy, cache=cache)


def for_request(pipe: DiffusionPipeline) -> Any:
    """A pipeline for one request, to be run beside others: all models are those of ``pipe``, which follows a schedule.

    It has a scheduler of its own and follows the same plan, with its own history and counts. Nothing is to be detached
    or freed: what a request keeps goes with it.

    Raises:
        ModelError: No schedule is attached to ``pipe``.
    """
    hook, request = schedule_hook(pipe), copy.copy(pipe)
    request.scheduler = copy.deepcopy(pipe.scheduler)
    attach(request, hook.followed, cache=hook.plan.cache).is_measured = hook.is_measured
    return request


def detach(pipe: DiffusionPipeline) -> None:
    """Undo `attach`; does nothing if no schedule is attached."""
    hook = find_hook(pipe)
    if hook is not None:
        hook.leave()


def _find(denoiser: torch.nn.Module) -> DenoiserHook | None:
    hook = installed_hook(denoiser)
    return hook if isinstance(hook, DenoiserHook) else None


def _uninstall_unused(denoiser: torch.nn.Module) -> None:
    hook = _find(denoiser)
    if hook is not None and not hook.schedules:
        uninstall(denoiser)
        hook.cache.remove()


def find_hook(pipe: DiffusionPipeline) -> ScheduleHook | None:
    """The hook that `attach` returned for this pipeline, or for another with the same scheduler; None for neither."""
    hooks = [hook for _, denoiser in denoisers(pipe) if (hook := _find(denoiser)) is not None]
    found = [each for hook in hooks for each in hook.schedules if each.follows(pipe)]
    return next((each for each in found if each.pipe is pipe), found[0] if found else None)


def schedule_hook(pipe: DiffusionPipeline) -> ScheduleHook:
    """The hook that `attach` returned: its schedule, and how many evaluations the latest run made.

    Raises:
        ModelError: No schedule is attached.
    """
    hook = find_hook(pipe)
    if hook is None:
        raise ModelError("no cemq schedule is attached to this pipeline")
    return hook


def set_budget(pipe: DiffusionPipeline, budget: int | str) -> CacheSchedule:
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
    attach(pipe, plan).is_measured = hook.is_measured
    return plan.schedule


@contextmanager
def attached(
    pipe: DiffusionPipeline,
    followed: Plan | CacheSchedule | Policy,
    sampler: SamplerFingerprint | None = None,
    *,
    cache: str | None = None,
) -> Iterator[ScheduleHook]:
    """`attach` for the length of a ``with`` block; undone on exit, also after an exception."""
    hook = attach(pipe, followed, sampler, cache=cache)
    try:
        yield hook
    finally:
        hook.leave()
        if _OWN in vars(pipe):  # `set_budget` has put another in its place
            vars(pipe)[_OWN].leave()
