"""Which step, and which stream of calls within it, is this? Answered by the sampler, never by counting forwards."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from cemq.errors import ModelError
from cemq.prior import SamplerFingerprint
from cemq.runtime.corrector import Corrector
from cemq.runtime.plan import Plan
from cemq.sampler import fingerprint, intercepted, next_sample, responses, retimed
from cemq.schedule import CacheSchedule

Stream = tuple[str | None, int]


class StepTracker:
    """Follows one scheduler: ``step_index`` counts ``scheduler.step`` calls since ``set_timesteps``.

    Other timesteps than planned for get a plan of their own, where the plan carries over. ``step_index`` is None
    whenever the run is none that there is a plan for: another sampler, start (image-to-image strength) or order of
    timesteps. Then the caller computes in full. On planned steps the plan's correction is applied to the prediction.
    """

    def __init__(self, plan: Plan, on_start: Callable[[CacheSchedule], None]):
        self.plan, self.on_start = plan, on_start
        self._current = plan  # that of the latest run
        self._timesteps: tuple[float, ...] = ()  # which it is expected to take
        self._corrector: Corrector | None = None  # of the run
        self._measured: tuple[SamplerFingerprint, Any] | None = None
        self.scheduler: Any = None
        self.step_index: int | None = None
        self.steps_taken = 0  # since `set_timesteps`, planned or not
        self.as_planned = True  # no call of this step was computed that should have been served
        self._calls: Counter[str | None] = Counter()
        self._warned: set[str] = set()
        self._undo = ExitStack()
        self._thread: int | None = None  # that of the run: a second one at once would mix up both

    def follow(self, scheduler: Any) -> None:
        """Intercept ``set_timesteps`` and ``step`` of this scheduler until `release`."""
        self.scheduler = scheduler
        self._undo.enter_context(intercepted(scheduler, "set_timesteps", self._set_timesteps))
        self._undo.enter_context(intercepted(scheduler, "step", self._step))

    def release(self) -> None:
        self._undo.close()

    def enter_call(self, context: str | None) -> Stream:
        """The stream of this denoiser call: its cache context, and how many calls of that name the step has had."""
        if self.step_index is None or self.step_index < self._current.schedule.num_steps:  # the run is not over yet
            self._check_thread()
        stream = (context, self._calls[context])
        self._calls[context] += 1
        return stream

    @property
    def is_first_call(self) -> bool:
        """Whether the call just entered is the first of its step; any after it are of other branches of guidance."""
        return self._calls.total() == 1

    def agrees(self, step_index: int | None, sigma: float | None) -> bool:
        """Whether this is the step that the pipeline's cache context says it is, where it says so."""
        if step_index is not None and step_index != self.step_index:
            return False
        sigmas = getattr(self.scheduler, "sigmas", None)
        if sigma is None or sigmas is None or self.step_index >= len(sigmas):
            return True
        expected = float(sigmas[self.step_index + (getattr(self.scheduler, "begin_index", None) or 0)])
        return abs(sigma - expected) <= 1e-3 * max(1.0, abs(expected))

    def _check_thread(self) -> None:
        if self._thread not in (None, threading.get_ident()):
            raise ModelError("two threads run this pipeline at once: give each a pipeline (or scheduler) of its own")

    def warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"cemq: {message}; computing in full", stacklevel=3)

    def _set_timesteps(self, original: Any, **arguments: Any) -> Any:
        result = original(**arguments)
        self._calls.clear()
        self._thread = threading.get_ident()
        self.step_index, self.steps_taken, self.as_planned = 0, 0, True
        found, expected = fingerprint(self.scheduler), self.plan.sampler
        if found.ends_like(expected):
            self._current = self.plan
        elif self._current is self.plan or not found.matches(self._current.sampler):  # else carried over already
            carried = self.plan.carried_over(found)
            self._current = carried or self.plan
            self.step_index = None if carried is None else 0
        self.on_start(self._current.schedule)
        self._timesteps = self._current.sampler.timesteps
        correction = self._current.correction
        if self.step_index is not None and correction is not None and correction.step_factors is not None:
            self._timesteps = retimed(self.scheduler, correction.step_factors)
        self._corrector = None
        if self.step_index is not None and self._current.schedule.corrects:
            moved = self._responses_of(found)
            if moved is None:
                self.step_index = None
                self.warn_once(f"{found.scheduler} steps as set up here cannot be corrected later")
            else:
                self._corrector = Corrector(self._current.schedule, moved)
        elif self.step_index is None:
            self.warn_once(_difference(found, expected))
        return result

    def _responses_of(self, found: SamplerFingerprint) -> Any:
        """`responses` of the scheduler as it is now, measured once for runs that are alike."""
        if self._measured is None or self._measured[0] != found:
            self._measured = found, responses(self.scheduler, self._current.schedule.num_steps)
        return self._measured[1]

    def _step(self, original: Any, **arguments: Any) -> Any:
        self._check_thread()
        corrector, step_index = None, self.step_index
        if step_index is not None:
            if not self._is_expected(arguments.get("timestep")):
                self.step_index = None
                self.warn_once("the run takes its timesteps from another place than the schedule was planned for")
            else:
                corrector, correction, output = self._corrector, self._current.correction, arguments["model_output"]
                if corrector is not None:
                    output = corrector.apply(output, step_index, arguments.get("sample"), as_planned=self.as_planned)
                if correction is not None:
                    output = correction.apply(output, step_index)
                arguments["model_output"] = output
                self.step_index += 1
        self._calls.clear()
        self.steps_taken, self.as_planned = self.steps_taken + 1, True
        result = original(**arguments)
        if corrector is not None:
            corrector.returned(next_sample(result), step_index)
        return result

    def _is_expected(self, timestep: Any) -> bool:
        if timestep is None or self.step_index >= len(self._timesteps):
            return False
        planned = self._timesteps[self.step_index]
        found = timestep.flatten()[0] if hasattr(timestep, "flatten") else timestep  # some hand one per sample
        return abs(float(found) - planned) <= 1e-3 * max(1.0, abs(planned))


def _difference(found: SamplerFingerprint, expected: SamplerFingerprint) -> str:
    if len(found.timesteps) != len(expected.timesteps):
        return f"this run has {len(found.timesteps)} steps, the schedule was planned for {len(expected.timesteps)}"
    return "the sampler's settings or timesteps are not those the schedule was planned for"


class AnySamplerTracker(StepTracker):
    """For plans that do not say which sampler they were made for: every sampler with as many steps is theirs."""

    def __init__(self, plan: Plan, on_start: Callable[[CacheSchedule], None]):
        num_steps = plan.schedule.num_steps
        unknown = SamplerFingerprint(scheduler="", config={}, timesteps=(0.0,) * num_steps)
        super().__init__(dataclasses.replace(plan, sampler=unknown), on_start)

    def _set_timesteps(self, original: Any, **arguments: Any) -> Any:
        def learn(**arguments: Any) -> Any:
            result = original(**arguments)
            found = fingerprint(self.scheduler)
            if len(found.timesteps) == self.plan.schedule.num_steps:
                self.plan = dataclasses.replace(self.plan, sampler=found)
            return result

        return super()._set_timesteps(learn, **arguments)
