"""Which step, and which stream of calls within it, is this? Answered by the sampler, never by counting forwards."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from cemq.prior import SamplerFingerprint
from cemq.sampler import fingerprint, intercepted

Stream = tuple[str | None, int]


class StepTracker:
    """Follows one scheduler: ``step_index`` counts ``scheduler.step`` calls since ``set_timesteps``.

    It is None whenever the run is not the one the schedule was planned for: another sampler, step count, start
    (image-to-image strength) or order of timesteps. Then the caller computes in full.
    """

    def __init__(self, expected: SamplerFingerprint, on_start: Callable[[], None]):
        self.expected, self.on_start = expected, on_start
        self.scheduler: Any = None
        self.step_index: int | None = None
        self._calls: Counter[str | None] = Counter()
        self._warned: set[str] = set()
        self._undo = ExitStack()

    def follow(self, scheduler: Any) -> None:
        """Intercept ``set_timesteps`` and ``step`` of this scheduler until `release`."""
        self.scheduler = scheduler
        self._undo.enter_context(intercepted(scheduler, "set_timesteps", self._set_timesteps))
        self._undo.enter_context(intercepted(scheduler, "step", self._step))

    def release(self) -> None:
        self._undo.close()

    def enter_call(self, context: str | None) -> Stream:
        """The stream of this denoiser call: its cache context, and how many calls of that name the step has had."""
        stream = (context, self._calls[context])
        self._calls[context] += 1
        return stream

    def warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"cemq: {message}; computing in full", stacklevel=3)

    def _set_timesteps(self, original: Any, **arguments: Any) -> Any:
        result = original(**arguments)
        self._calls.clear()
        self.on_start()
        self.step_index = 0
        found, expected = fingerprint(self.scheduler), self.expected
        if not found.matches(expected):
            self.step_index = None
            if len(found.timesteps) != len(expected.timesteps):
                difference = (
                    f"this run has {len(found.timesteps)} steps, the schedule was planned for {len(expected.timesteps)}"
                )
            else:
                difference = "the sampler's settings or timesteps are not those the schedule was planned for"
            self.warn_once(difference)
        return result

    def _step(self, original: Any, **arguments: Any) -> Any:
        if self.step_index is not None:
            if not self._is_expected(arguments.get("timestep")):
                self.step_index = None
                self.warn_once("the run takes its timesteps from another place than the schedule was planned for")
            else:
                self.step_index += 1
        self._calls.clear()
        return original(**arguments)

    def _is_expected(self, timestep: Any) -> bool:
        if timestep is None or self.step_index >= len(self.expected.timesteps):
            return False
        planned = self.expected.timesteps[self.step_index]
        return abs(float(timestep) - planned) <= 1e-3 * max(1.0, abs(planned))


class AnySamplerTracker(StepTracker):
    """For schedules that do not say which sampler they were planned for: every sampler with as many steps is theirs."""

    def __init__(self, num_steps: int, on_start: Callable[[], None]):
        super().__init__(SamplerFingerprint(scheduler="", config={}, timesteps=(0.0,) * num_steps), on_start)
        self._num_steps = num_steps

    def _set_timesteps(self, original: Any, **arguments: Any) -> Any:
        def learn(**arguments: Any) -> Any:
            result = original(**arguments)
            found = fingerprint(self.scheduler)
            if len(found.timesteps) == self._num_steps:
                self.expected = found
            return result

        return super()._set_timesteps(learn, **arguments)
