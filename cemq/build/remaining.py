"""How long all that is left of a build will take: what was estimated, put right by what its steps take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from cemq.build.estimate import QUANTIZATION, ROUGHLY, Estimate, Stage, estimate
from cemq.build.settings import BuildSettings
from cemq.errors import first_line
from cemq.pipelines.batches import BUILD_LOG, Progress

_LEAST_SECONDS = 1.0  # of steps that are timed before anything is said: those of small models take milliseconds
_WORTH_SAYING = 60.0  # seconds


class Remaining:
    """Progress that is told on, and what is left in all said beside it.

    First once a step of full precision was timed, or as many as take a second, and again with the first of the
    quantized model and whenever another stage begins. What was not timed yet is taken to be off from the estimate by
    the same factor as what was.

    Args:
        told: What was estimated.
        progress: What is told on.
        say: Given seconds.
        clock: Seconds since whenever.
    """

    def __init__(
        self,
        told: Estimate,
        progress: Progress,
        *,
        say: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stages, self._progress, self._say, self._clock = told.stages, progress, say, clock
        self._timed: dict[str, tuple[float, float]] = {}  # by kind: seconds estimated, and what they came to
        self._current: int | None = None  # number of a stage
        self._known: set[str] = set()  # kinds that it was said for
        # share of the stage that is under way, and time: when it began, after its first step, and now
        self._began = self._stepped = self._latest = (0.0, 0.0)
        self._steps = 0  # told of it

    def __call__(self, stage: str, share: float) -> None:
        """Take what a build tells its progress."""
        self._progress(stage, share)
        number = self._number(stage)
        if number is None:
            return
        now = (share, self._clock())
        if number != self._current:
            self._end()
            self._current, self._steps, self._began, self._stepped, self._latest = number, 0, now, now, now
            if self._known:
                self._say(self.left())
            return
        self._steps, self._latest = self._steps + 1, now
        if self._steps == 1:
            self._stepped = now  # what comes before the first step, and the first call of anything, is no measure
        kind = _kind(self._stages[number])
        if kind not in self._known and kind != QUANTIZATION and self._under_way(number)[1] >= _LEAST_SECONDS:
            self._known.add(kind)
            self._say(self.left())

    def left(self) -> float:
        """Seconds."""
        later = self._stages if self._current is None else self._stages[self._current + 1 :]
        found = sum(stage.seconds * self._factor(_kind(stage)) for stage in later)
        if self._current is None:
            return found
        stage, (expected, taken) = self._stages[self._current], self._under_way(self._current)
        own = taken / expected if expected and taken >= _LEAST_SECONDS else self._factor(_kind(stage))
        return found + (1 - self._latest[0]) * stage.seconds * own

    def _number(self, stage: str) -> int | None:
        """Of the stage of that name, which progress may be told more of behind a comma."""
        for number, each in enumerate(self._stages):
            if stage == each.name or stage.startswith(f"{each.name}, "):
                return number
        return None

    def _under_way(self, number: int) -> tuple[float, float]:
        """Of the stage of this number, which is: seconds estimated and taken, between its first and its latest step."""
        (first, since), (latest, until) = self._stepped, self._latest
        return (latest - first) * self._stages[number].seconds, until - since

    def _end(self) -> None:
        """The stage is over, whether it used all that it was allowed or not."""
        if self._current is None:
            return
        stage, (first, since), (latest, until) = self._stages[self._current], self._began, self._latest
        expected, taken = self._timed.get(_kind(stage), (0.0, 0.0))
        self._timed[_kind(stage)] = expected + (latest - first) * stage.seconds, taken + until - since

    def _factor(self, kind: str) -> float:
        """What the estimate is to be multiplied with."""
        timed = dict(self._timed)
        if self._current is not None:
            under_way = self._under_way(self._current)
            own = _kind(self._stages[self._current])
            expected, taken = timed.get(own, (0.0, 0.0))
            timed[own] = expected + under_way[0], taken + under_way[1]
        chosen = [timed[kind]] if timed.get(kind, (0.0, 0.0))[0] else list(timed.values())
        expected, taken = (sum(each) for each in zip(*chosen, strict=True)) if chosen else (0.0, 0.0)
        return taken / expected if expected and taken else 1.0


def telling_what_is_left(
    settings: BuildSettings, progress: Progress | None, *, clock: Callable[[], float] = time.monotonic
) -> Progress | None:
    """The progress of a build, which says from time to time how long it will still take: from the first run on, for by
    then all that was asked for is checked."""
    if progress is None:
        return None
    begun: list[Progress] = []

    def tell(stage: str, share: float) -> None:
        if not begun:
            begun.append(_told(settings, progress, clock))
        begun[0](stage, share)

    return tell


def _told(settings: BuildSettings, progress: Progress, clock: Callable[[], float]) -> Progress:
    log = logging.getLogger(BUILD_LOG)
    try:
        told = estimate(settings)
    except Exception as error:  # no guess is worth a build, which fails by itself where more than the guess does
        log.info(f"how long this will take cannot be told: {first_line(error)}")
        return progress
    if 60 * told.minutes >= _WORTH_SAYING:
        log.info(
            f"{told.generations['total']:g} generations of one sample at most, {_minutes(60 * told.minutes / ROUGHLY)} "
            f"to {_minutes(60 * told.minutes * ROUGHLY)} min by the sizes of the weights"
        )

    def say(seconds: float) -> None:
        if seconds >= _WORTH_SAYING:
            log.info(f"about {_minutes(seconds)} min left in all")

    return Remaining(told, progress, say=say, clock=clock)


def _kind(stage: Stage) -> str:
    if stage.name == QUANTIZATION:
        return QUANTIZATION
    return "full precision" if stage.full_precision else "quantized"


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds / 60))}"
