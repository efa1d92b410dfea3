"""Which step, and which stream of calls within it, is this? Answered by the sampler, never by counting forwards."""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from cemq.errors import ModelError
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.pipelines.noise_scheduler import Call, Interception, fingerprint, intercepted, next_sample, responses, retimed
from cemq.runtime.callers import Caller, Origin, find_caller
from cemq.runtime.corrector import Corrector
from cemq.schedule import CacheSchedule, full_compute
from cemq.schedule.plan import Plan

Place = tuple[str | None, int]  # a cache context, and where in the code of its run a call is made
Stream = tuple[Place, int]
_RECENT = 8  # sets of timesteps


class _Recent:
    """What was made for the latest few sets of timesteps: for many steps that takes a second, and users come back."""

    def __init__(self) -> None:
        self._made: list[tuple[SamplerFingerprint, Any]] = []  # latest first

    def get(self, sampler: SamplerFingerprint, make: Callable[[SamplerFingerprint], Any]) -> Any:
        found = next((each for each in self._made if each[0].matches(sampler)), None) or (sampler, make(sampler))
        self._made = [found, *(each for each in self._made if each is not found)][:_RECENT]
        return found[1]


class StepTracker:
    """Follows one scheduler: ``step_index`` counts ``scheduler.step`` calls since ``set_timesteps``.

    A run is what is called from where its timesteps were set (`Origin`), until that has returned or raised: ``on_end``.
    Other timesteps than planned for get a plan of their own, where the plan carries over. ``step_index`` is None
    whenever the run is none that there is a plan for: another sampler, start (image-to-image strength) or order of
    timesteps. Then the caller computes in full. On planned steps the plan's correction is applied to the prediction.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        on_start: Callable[[CacheSchedule], None],
        on_end: Callable[[], None],
        on_late_start: Callable[[CacheSchedule], None],
    ):
        self.plan: Plan = plan
        self.on_start: Callable[[CacheSchedule], None] = on_start
        self.on_end: Callable[[], None] = on_end
        self.on_late_start: Callable[[CacheSchedule], None] = on_late_start
        self.current: Plan = plan  # that of the latest run
        self._timesteps: tuple[float, ...] = ()  # which it is expected to take
        self._corrector: Corrector | None = None  # of the run
        self._plans, self._corrections = _Recent(), _Recent()
        self.scheduler: Any = None
        self.step_index: int | None = None
        self.steps_taken: int = 0  # since `set_timesteps`, planned or not
        self.as_planned: bool = True  # no call of this step was computed that should have been served
        self.origins: list[Origin] = []  # of the run, and of those in other threads that it broke into
        self._calls: Counter[Place] = Counter()
        self._first_stream: Stream | None = None  # of the run
        self._first_timesteps: dict[Place, Any] = {}  # of the first step, as the denoiser gets them
        self._warned: set[str] = set()
        self._undo, self._undo_step = ExitStack(), ExitStack()
        self._stepping: Interception | None = None

    def follow(self, scheduler: Any) -> None:
        """Intercept ``set_timesteps`` and ``step`` of this scheduler until `release`."""
        self.scheduler = scheduler
        self._undo.enter_context(intercepted(scheduler, "set_timesteps", self._set_timesteps))
        self._undo.callback(self._undo_step.close)
        self._follow_steps()

    def _follow_steps(self) -> None:
        """Intercept ``step`` above whatever has been put in its place, which may have been put in ours."""
        self._undo_step.close()
        self._stepping = self._undo_step.enter_context(intercepted(self.scheduler, "step", self._step))

    def release(self) -> None:
        self._undo.close()

    @property
    def keeps_first_step(self) -> bool:
        """Whether what follows this step may be served from it though the schedule does not say so."""
        return False

    @property
    def is_under_way(self) -> bool:
        """Whether a run has begun that has not made all of its steps."""
        if self.step_index is not None:
            return self.is_followed
        return bool(self.origins) and self.steps_taken < len(self.scheduler.timesteps)

    @property
    def is_followed(self) -> bool:
        """Whether it is under way, and under the plan."""
        left = self.step_index is not None and self.step_index < self.current.schedule.num_steps
        return left and not self.origins[0].is_over

    def enter_call(self, caller: Caller, context: str | None, timestep: Any) -> Stream:
        """The stream of this denoiser call: its place, and how many calls from there the step has had.

        Raises:
            ModelError: Another thread has begun a run with this scheduler since.
        """
        self._check_thread(caller)
        place = (context, caller.place)
        stream = (place, self._calls[place])
        self._calls[place] += 1
        if self._first_stream is None:
            self._first_stream = stream
        if self.step_index == 0 and self._calls[place] > 1 and _differ(self._first_timesteps[place], timestep):
            self.give_up(
                "the denoiser is called at another timestep though its scheduler has made no step: the pipeline steps "
                "copies of it, or none"
            )
        elif self.step_index == 0:
            self._first_timesteps.setdefault(place, timestep)
        return stream

    def is_first(self, stream: Stream) -> bool:
        """Whether it is the one that each step begins with; the others are of other branches of guidance."""
        return stream == self._first_stream

    def agrees(self, step_index: int | None, sigma: float | None) -> bool:
        """Whether this is the step that the pipeline's cache context says it is, where it says so."""
        if step_index is not None and step_index != self.step_index:
            return False
        sigmas, own = getattr(self.scheduler, "sigmas", None), self.step_index
        if sigma is None or sigmas is None or own is None or own >= len(sigmas):
            return True
        expected = float(sigmas[own + (getattr(self.scheduler, "begin_index", None) or 0)])
        return abs(sigma - expected) <= 1e-3 * max(1.0, abs(expected))

    def _check_thread(self, caller: Caller) -> None:
        if self.origins[0] not in caller.origins:
            raise ModelError(
                "two threads run this pipeline at once: give each one of its own, which cemq.for_request(pipe) makes"
            )

    def warn_once(self, message: str, then: str = "computing in full") -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"cemq: {message}; {then}", stacklevel=3)

    def _set_timesteps(self, original: Any, call: Call) -> Any:
        result = original(*call.args, **call.kwargs)
        self._begin()
        found, expected = fingerprint(self.scheduler), self.plan.own_sampler
        if found.ends_like(expected):
            self.current = self.plan
        else:
            carried = self._plans.get(found, self._carried_over)
            self.current = carried or self.plan
            self.step_index = None if carried is None else 0
        self.on_start(self.current.schedule)
        self._timesteps = self.current.own_sampler.timesteps
        correction = self.current.correction
        if self.step_index is not None and correction is not None and correction.step_factors is not None:
            self._timesteps = retimed(self.scheduler, correction.step_factors)
        self._corrector = None
        if self.step_index is not None and self.current.schedule.corrects:
            added = self._corrections.get(found, self._added_under)
            if added is None:
                self.step_index = None
                self.warn_once(_uncorrected(found))
            else:
                self._corrector = Corrector(self.current.schedule, added)
        elif self.step_index is None:
            self.warn_once(_difference(found, expected))
        return result

    def _begin(self) -> None:
        origin = Origin(self.scheduler, self._ended)
        broken_into = [o for o in self.origins if o.is_known and not o.is_over and o.thread != origin.thread]
        self.origins = [origin, *broken_into]
        if self._stepping is None or not self._stepping.is_seen:
            self._follow_steps()
        self.step_index, self.steps_taken, self.as_planned = 0, 0, True
        self._first_stream, self._first_timesteps = None, {}
        self._calls.clear()

    def _ended(self, origin: Origin) -> None:
        """What is left of the run is of no use to anyone: after an exception it may be much."""
        if self.origins[0] is origin:
            self._corrector, self._first_timesteps = None, {}
            self.on_end()

    def give_up(self, reason: str) -> None:
        """Compute the rest of the run in full."""
        self.step_index, self._corrector = None, None
        self.on_end()
        self.warn_once(reason)

    def _carried_over(self, found: SamplerFingerprint) -> Plan | None:
        """`Plan.carried_over`, less what no run needs of it: a prior of many steps is large."""
        started = time.perf_counter()
        carried = self.plan.lean().carried_over(found)
        if carried is None:
            return None
        if carried not in self.plan.others:
            logging.getLogger("cemq.runtime").info(
                f"planned {carried.schedule.num_steps} steps, {carried.schedule.budget} in full, on predictions: "
                f"{time.perf_counter() - started:.1f} s"
            )
        return dataclasses.replace(carried, prior=None)

    def _added_under(self, found: SamplerFingerprint) -> np.ndarray | None:
        """`CacheSchedule.correcting` under the scheduler as it is now; None where it has no `responses`."""
        schedule = self.current.schedule
        moved = responses(self.scheduler, schedule.num_steps)
        return None if moved is None else schedule.correcting(moved)

    def _step(self, original: Any, call: Call) -> Any:
        caller = find_caller(self.origins)
        if not caller.origins:
            if self.origins and self.is_followed:
                self.give_up("its scheduler is stepped from elsewhere than where a run began")
            return original(*call.args, **call.kwargs)
        self._check_thread(caller)
        corrector, step_index = None, self.step_index
        if step_index is not None:
            objection = self._objection(step_index, call.get("timestep"))
            if objection:
                self.give_up(objection)
            else:
                corrector, correction, output = self._corrector, self.current.correction, call.get("model_output")
                if corrector is not None:
                    output = corrector.apply(output, step_index, call.get("sample"), as_planned=self.as_planned)
                if correction is not None:
                    output = correction.apply(output, step_index)
                call = call.replaced(model_output=output)
                self.step_index = step_index + 1
        self._calls.clear()
        self.steps_taken, self.as_planned = self.steps_taken + 1, True
        result = original(*call.args, **call.kwargs)
        if corrector is not None and step_index is not None:
            corrector.returned(next_sample(result), step_index)
        return result

    def _objection(self, step_index: int, timestep: Any) -> str | None:
        """Why the run does not follow its plan if this step of it is at this timestep."""
        expected = self._timesteps[step_index : step_index + 1]
        if timestep is not None and expected and _is_near(_number(timestep), *expected):
            return None
        return "the run takes its timesteps from another place than the schedule was planned for"


def _difference(found: SamplerFingerprint, expected: SamplerFingerprint) -> str:
    if len(found.timesteps) != len(expected.timesteps):
        return _count_differs(len(found.timesteps), len(expected.timesteps))
    return "the sampler's settings or timesteps are not those the schedule was planned for"


def _count_differs(found: int, planned: int) -> str:
    return f"this run has {found} steps, the schedule was planned for {planned}"


def _uncorrected(sampler: SamplerFingerprint) -> str:
    return f"{sampler.scheduler} steps as set up here cannot be corrected later"


def _number(timestep: Any) -> float:
    return float(timestep.flatten()[0] if hasattr(timestep, "flatten") else timestep)  # some hand one per sample


def _is_near(found: float, planned: float) -> bool:
    return abs(found - planned) <= 1e-3 * max(1.0, abs(planned))


def _differ(one: Any, other: Any) -> bool:
    """Whether these are timesteps of two steps; of other shapes they may be those of other samples."""
    if torch.is_tensor(one) and torch.is_tensor(other):
        return one.shape == other.shape and not torch.equal(one, other.to(one))
    return isinstance(one, (int, float)) and isinstance(other, (int, float)) and one != other


class AnySamplerTracker(StepTracker):
    """For plans that do not say which sampler they were made for: every sampler with as many steps is theirs.

    An image-to-image run begins late, which its first step shows. If it then has as many steps as the schedule, it
    follows that; if the sampler was given as many timesteps, it follows the tail of the schedule.
    """

    def __init__(self, plan: Plan, **callbacks: Callable[..., None]):
        self._whole, self._all_timesteps = plan, ()
        unknown = SamplerFingerprint(scheduler="", config={}, timesteps=(0.0,) * plan.schedule.num_steps)
        super().__init__(dataclasses.replace(plan, sampler=unknown), **callbacks)

    def _set_timesteps(self, original: Any, call: Call) -> Any:
        def learn(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            found, steps = fingerprint(self.scheduler), self._whole.schedule.num_steps
            self._all_timesteps = found.timesteps
            if len(found.timesteps) >= steps:
                last = dataclasses.replace(found, timesteps=found.timesteps[-steps:])
                self.plan = dataclasses.replace(self._whole, sampler=last)
            return result

        return super()._set_timesteps(learn, call)

    @property
    def keeps_first_step(self) -> bool:
        schedule = self._whole.schedule
        return self.step_index == 0 and len(schedule.full_steps) < schedule.num_steps

    def _objection(self, step_index: int, timestep: Any) -> str | None:
        if step_index == 0 and timestep is not None:
            steps, found = self._whole.schedule.num_steps, _number(timestep)
            start = next((i for i, each in enumerate(self._all_timesteps) if _is_near(found, each)), None)
            if start is not None and len(self._all_timesteps) == steps:
                return self._begin_at(start) if start else None
            if start is not None and len(self._all_timesteps) - start != steps:
                return _count_differs(len(self._all_timesteps) - start, steps)
        return super()._objection(step_index, timestep)

    def _begin_at(self, start: int) -> str | None:
        """Follow the schedule from this step of it on; why not, if that cannot be."""
        schedule, correction = self._whole.schedule.from_step(start), self._whole.correction
        sampler = dataclasses.replace(self.plan.own_sampler, timesteps=self._all_timesteps[start:])
        correction = correction and correction.from_step(start)
        self.current = dataclasses.replace(self.plan, schedule=schedule, sampler=sampler, correction=correction)
        self._timesteps = self._timesteps[start:]
        self._corrector = None
        if schedule.corrects:
            added = self._corrections.get(sampler, self._added_under)
            if added is None:
                return _uncorrected(sampler)
            self._corrector = Corrector(schedule, added)
        self.on_late_start(schedule)
        return None


class AnyStepsTracker(AnySamplerTracker):
    """For policies that follow no plan: every run is theirs, however many steps it has."""

    @property
    def keeps_first_step(self) -> bool:
        return False

    def _set_timesteps(self, original: Any, call: Call) -> Any:
        def learn(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            schedule = full_compute(len(fingerprint(self.scheduler).timesteps))
            self._whole = dataclasses.replace(self._whole, schedule=schedule)
            return result

        return super()._set_timesteps(learn, call)
