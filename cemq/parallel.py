"""Several processes, one job: each runs its share of the batches, and every one of them knows all results in order.

Results are gathered batch by batch and reduced by every process in the same order, never summed up per process, so that
numbers are those of one process, bit for bit. Nothing else is shared: a seed belongs to its sample.
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cemq.errors import CemqError, ProcessError, first_line

Item = TypeVar("Item")
# What torchrun and accelerate launch both set. Clusters set WORLD_SIZE for jobs that are one process a node, hence all.
_SET_BY_LAUNCHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_POLL_SECONDS = 0.005
_GRACE_SECONDS = 10.0  # that a failed process gives the others to notice and clean up, before its launcher ends them
_FAILURE, _LEFT = "failure", "left"
_INTERRUPTED = "interrupted"


@dataclass(frozen=True, kw_only=True, eq=False)
class Processes:
    """This process among all that work on one job; by default it is the only one, and every method is trivial.

    All processes must call `gather`, `agree`, `wait` and `deal` equally often and in the same order.
    """

    rank: int = 0
    count: int = 1
    store: Any = None  # torch's key-value store: who has arrived where, and what went wrong
    group: Any = None  # a gloo group: results travel through host memory, whatever the device
    _meetings: Iterator[int] = field(default_factory=itertools.count, repr=False)
    _deals: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files; it has the first item of everything that is shared."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's items, in turn; none, where there are more processes than items.

        >>> Processes(rank=1, count=3).share("abcdefg")
        'be'
        """
        return items[self.rank :: self.count]

    def deal(self, count: int) -> Iterator[int]:
        """The numbers below ``count`` in order, each to the process that is free first: for work of unequal length.

        Raises:
            ProcessError: Another process has failed.
        """
        if self.count == 1:
            yield from range(count)
            return
        deal = f"deal {next(self._deals)}"
        while (number := self._added(deal, 1) - 1) < count:
            self._look_out()
            yield number

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within, other libraries know of no process but this one.

        Some take all that there are for ones which draw one picture together: cache-dit (1.5) decides by the mean over
        them, and waits for it.
        """
        if self.count == 1:
            yield
            return
        import torch.distributed as dist

        known = dist.is_initialized
        dist.is_initialized = lambda: False
        try:
            yield
        finally:
            dist.is_initialized = known

    def gather(self, mine: Sequence[Item]) -> list[Item]:
        """The results of all items in their order, given those of this process's share.

        Raises:
            ProcessError: Another process has failed.
        """
        if self.count == 1:
            return list(mine)
        import torch.distributed as dist

        parts: list[Any] = [None] * self.count
        packed = pickle.dumps(list(mine))  # before the others wait for it: what cannot be pickled fails here
        self.wait()
        try:
            dist.all_gather_object(parts, packed, group=self.group)
        except RuntimeError as error:
            raise ProcessError(f"a process is gone: {first_line(error)}") from error
        parts = [pickle.loads(part) for part in parts]
        return [parts[i % self.count][i // self.count] for i in range(sum(map(len, parts)))]

    def agree(self, what: str, value: Any) -> None:
        """Raises ProcessError unless all processes come with the same value, or if one of them has failed."""
        for rank, other in enumerate(self.gather([value])):
            if self.count > 1 and other != value:
                raise ProcessError(
                    f"processes {rank} and {self.rank} differ in {what}: give all the same arguments, libraries and "
                    "kind of device"
                )

    def wait(self) -> None:
        """Until every process is here.

        Raises:
            ProcessError: Another process has failed; it need not come here any more.
        """
        if self.count == 1:
            return
        meeting = f"meeting {next(self._meetings)}"
        self._added(meeting, 1)
        while self._added(meeting, 0) < self.count:
            self._look_out()
            time.sleep(_POLL_SECONDS)  # and not in gloo, which neither Ctrl-C nor a failure would wake

    def _added(self, name: str, more: int) -> int:
        """A number that all processes share, after adding to it. Raises ProcessError."""
        with _reaching_the_main_process():
            return self.store.add(name, more)

    def _look_out(self) -> None:
        """Raises what went wrong in another process, if anything did."""
        with _reaching_the_main_process():
            if self.store.check([_FAILURE]):
                raise self._failure()

    def _failure(self) -> BaseException:
        reason = self.store.get(_FAILURE).decode()
        return KeyboardInterrupt() if reason == _INTERRUPTED else ProcessError(reason)

    def _fail(self, error: BaseException) -> BaseException:
        """Tell the others, let them clean up, and return what went wrong first."""
        _ignore_signals()  # that of a launcher, which ends all processes with the first one, would cut this short
        if isinstance(error, KeyboardInterrupt):
            reason = _INTERRUPTED
        else:
            text = str(error) if isinstance(error, CemqError) else f"{type(error).__name__}: {first_line(error)}"
            reason = f"process {self.rank}: {text}"
        with suppress(RuntimeError):  # the store is gone where the process that holds it is
            first = self.store.compare_set(_FAILURE, "", reason).decode()
            if isinstance(error, KeyboardInterrupt) and first != _INTERRUPTED:
                error = self._failure()  # the signal came from the launcher, because of this
            self.store.add(_LEFT, 1)
            deadline = time.monotonic() + _GRACE_SECONDS
            while self.store.add(_LEFT, 0) < self.count and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        return error


@contextmanager
def _reaching_the_main_process() -> Iterator[None]:
    """Raises ProcessError where it has gone, and the store with it."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(f"the main process is gone: {first_line(error)}") from error


ALONE = Processes()


@contextmanager
def launched() -> Iterator[Processes]:
    """The processes that ``torchrun`` or ``accelerate launch`` started; without them `ALONE`, and nothing is set up.

    A failure or Ctrl-C in one process ends the block in all of them, at the latest where they next wait for each other,
    and the launcher ends who does not get there within seconds. Inside the block all processes but the main one print
    nothing, and a `CemqError` ends them without a word: the main process reports it. Each takes a CUDA device of its
    own, where there is one.

    Raises:
        ProcessError: Another process has failed, or they cannot reach each other.
    """
    if not os.environ.keys() >= _SET_BY_LAUNCHERS or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    processes = _join()
    handlers = _on_signals(_interrupt)
    try:
        with ExitStack() as silent:
            if not processes.is_main:
                nowhere = silent.enter_context(open(os.devnull, "w"))
                silent.enter_context(redirect_stdout(nowhere))
                silent.enter_context(redirect_stderr(nowhere))
            yield processes
            processes.wait()
    except BaseException as error:
        cause = processes._fail(error)
        if not processes.is_main and isinstance(cause, (CemqError, KeyboardInterrupt)):
            sys.exit(1)
        if cause is not error:
            raise cause from None
        raise
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _join() -> Processes:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        if not dist.is_initialized():  # left open at the end: a second job in this process uses it again
            dist.init_process_group("gloo")
        group = dist.new_group(backend="gloo")
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"the processes cannot reach each other: {first_line(error)}") from error
    assert isinstance(group, dist.ProcessGroup)  # of all processes, so that this one is in it
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    store = dist.PrefixStore(f"cemq {group.group_name}", _get_default_store())
    return Processes(rank=dist.get_rank(), count=dist.get_world_size(), store=store, group=group)


def _interrupt(*_: Any) -> None:
    """Ctrl-C, or a launcher ending all processes because of one: clean up, once."""
    _ignore_signals()
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    """From here on there is only cleaning up."""
    _on_signals(signal.SIG_IGN)


def _on_signals(handler: Any) -> dict[int, Any]:
    """Set, and return what was set before; only the main thread may."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
