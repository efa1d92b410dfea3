"""How far a long command is, for people: bars on a terminal, and lines in a log file."""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TextIO

from cemq.errors import in_one_line
from cemq.pipelines.batches import BUILD_LOG, Progress

EVERY = 45.0  # seconds between the lines of a stage: one a minute even where the processor is busy
_LOOKS = 9  # at whether a line is due, in that time


@contextmanager
def shown_progress(*, quiet: bool = False, every: float = EVERY) -> Iterator[Progress]:
    """What to tell the progress of a command, which is shown on stderr together with what a build logs.

    On a terminal each stage has a bar. Elsewhere there are plain lines, at least one about ``every`` seconds whether
    anything is told or not. If quiet there is neither, nor any warning.
    """
    stream = sys.stderr  # of now: where there are several processes, all but the main one have theirs redirected
    if quiet or stream is None:
        with _nothing_said():
            yield lambda stage, share: None
    elif stream.isatty():
        with _bars(stream) as report:
            yield report
    else:
        with Lines(stream, every=every).kept_coming() as lines, _notes_to(lines.say):
            yield lines.report


@contextmanager
def _nothing_said() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def _bars(stream: TextIO) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:<22}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console, tasks = Console(file=stream), {}
    with Bars(*columns, console=console) as bars:

        def report(stage: str, share: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0)
            bars.update(tasks[stage], completed=share)

        with _notes_to(lambda text: console.print(text, soft_wrap=True, highlight=False)):
            yield report


@contextmanager
def _notes_to(say: Callable[[str], None]) -> Iterator[None]:
    """Have said what a build logs beside its progress."""
    notes, logger = logging.Handler(), logging.getLogger(BUILD_LOG)
    notes.emit = lambda record: say(record.getMessage())
    logger.setLevel(logging.INFO)
    logger.addHandler(notes)
    try:
        yield
    finally:
        logger.removeHandler(notes)


class Lines:
    """Stages that follow each other, as lines: one when a stage begins, one when it ends, and some in between.

    A stage ends when all of it is done, when another begins, or with the command.

    Args:
        stream: Where the lines go. If it takes no more, the work goes on without.
        clock: Seconds since whenever.
        every: Seconds after which another line is due.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic, every: float = EVERY):
        self._stream, self._clock, self._every = stream, clock, every
        self._lock = threading.Lock()  # a line that is due comes from another thread than what is told
        self._stage: str | None = None  # None between stages
        self._last: str | None = None  # that has ended
        self._first_share = self._share = self._shown_share = 0.0
        self._since = self._written = clock()  # when this stage began, or the last one ended; and the latest line

    def report(self, stage: str, share: float) -> None:
        """Tell the share of a stage that is done."""
        with self._lock:
            if stage != self._stage:
                if stage == self._last and share >= 1:
                    return  # once more: what is left of it is beyond what had been reckoned with
                self._end("done")
                self._stage, self._since = stage, self._clock()
                self._first_share = self._share = self._shown_share = share
                self._write(f"{stage}: begun")
            self._share = share
            if share >= 1:
                self._end("done")

    def say(self, text: str) -> None:
        """Write something else."""
        with self._lock:
            self._write(text)

    def look(self) -> None:
        """Write where the stage is, if a line is due."""
        with self._lock:
            if self._clock() - self._written < self._every:
                return
            gone = self._clock() - self._since
            if self._stage is None:
                since = f"{self._last} was done" if self._last else "the start"
                self._write(f"still at work, {_duration(gone)} since {since}")
                return
            done = self._share - self._first_share
            left = f", about {_duration(gone / done * (1 - self._share))} left" if done > 0 else ""
            still = "still at " if self._share == self._shown_share else ""
            self._shown_share = self._share
            self._write(f"{self._stage}: {still}{_percent(self._share)}, {_duration(gone)} gone{left}")

    @contextmanager
    def kept_coming(self) -> Iterator[Lines]:
        """Look every few seconds, in a thread that ends with the block, as does the stage that is under way then."""
        over, ending = threading.Event(), "stopped"

        def keep_looking() -> None:
            while not over.wait(self._every / _LOOKS):
                self.look()

        thread = threading.Thread(target=keep_looking, name="cemq progress", daemon=True)
        thread.start()
        try:
            yield self
            ending = "done"
        finally:
            over.set()
            thread.join()
            with self._lock:
                self._end(ending)

    def _end(self, how: str) -> None:
        """End the stage, if there is one."""
        if self._stage is None:
            return
        share = f", at {_percent(self._share)}" if self._share < 1 else ""
        self._write(f"{self._stage}: {how} after {_duration(self._clock() - self._since)}{share}")
        self._stage, self._last, self._since = None, self._stage, self._clock()

    def _write(self, text: str) -> None:
        self._written = self._clock()
        with suppress(OSError, ValueError):  # a full disk, or closed: hours of work are worth more than its log
            self._stream.write(in_one_line(text) + "\n")
            self._stream.flush()


def _percent(share: float) -> str:
    return f"{int(100 * share)} %"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))
