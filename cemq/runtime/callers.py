"""Who calls the denoiser or its sampler: which run, from which place in it, in which thread, under which context.

Nothing that a pipeline hands its denoiser says whose call this is, and pipelines share denoisers; the stack says it. A
run belongs to the function that set its timesteps, or had them set: a pipeline's ``__call__`` or a loop of one's own.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from diffusers import ConfigMixin
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager

_MARK = "<run of a cemq schedule>"  # no name that a function could give a variable


@dataclass(frozen=True)
class _Seen:
    """A call on the stack: what it runs, and where its own caller is. Another call may come to lie in its memory, but
    hardly one of the same function from the same line."""

    code: CodeType
    parent: int
    place: int

    @classmethod
    def of(cls, frame: FrameType) -> _Seen:
        parent = frame.f_back
        return cls(frame.f_code, id(parent), parent.f_lasti if parent else 0)


class _Mark:
    """Lies among the variables of a function that runs, and goes when they go."""


class Origin:
    """The call that a run belongs to; made where ``set_timesteps`` is called.

    It is that of the innermost pipeline with this sampler. In a loop of one's own, whose timesteps may have been set in
    a helper of its own, it shows only with the first call to the denoiser: the innermost call that led to both.

    Args:
        on_end: Called with this once that call has returned or raised, and nothing keeps its traceback.
    """

    def __init__(self, scheduler: Any, on_end: Callable[[Origin], None]) -> None:
        self.thread: int = threading.get_ident()
        self._on_end = on_end
        self._call: tuple[int, weakref.ref[Any]] | None = None
        self._candidates: dict[int, _Seen] = {}
        for frame in _stack():
            pipeline = _pipeline(frame)
            if pipeline is not None:
                if pipeline.scheduler is scheduler:
                    self._settle(frame)
                break
            self._candidates[id(frame)] = _Seen.of(frame)
            if not _is_function(frame):  # what lies further out runs scripts and notebook cells
                break

    @property
    def is_known(self) -> bool:
        return self._call is not None

    @property
    def is_over(self) -> bool:
        """Whether the call has returned or raised."""
        return self._call is not None and self._call[1]() is None

    @property
    def ids(self) -> Iterable[int]:
        """Of the frames that it may be."""
        return self._candidates if self._call is None else (self._call[0],)

    def is_call(self, frame: FrameType) -> bool:
        """Whether this is it, and not another that has come to lie in the same memory."""
        if self._call is None:
            if self._candidates.get(id(frame)) != _Seen.of(frame):
                return False
            self._settle(frame)
            return True
        mark = self._call[1]()
        return mark is not None and id(frame) == self._call[0] and _mark_of(frame) is mark

    def _settle(self, frame: FrameType) -> None:
        # Frames take no weak references, and a strong one would keep all their variables. What is put among these goes
        # with this one call; the code of a script or a notebook cell runs once.
        mark = frame.f_locals.setdefault(_MARK, _Mark()) if _is_function(frame) else frame.f_code
        self._call, self._candidates = (id(frame), weakref.ref(mark, lambda _: self._on_end(self))), {}


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The nearest call on the stack that says something: where runs began, or of a pipeline that has begun none."""

    origins: tuple[Origin, ...] = ()
    place: int = 0  # in the code of that call
    pipeline: Any = None


def find_caller(origins: Iterable[Origin]) -> Caller:
    """Whose call this is: which of these runs makes it, several where one loop has begun them, or which pipeline."""
    by_id: dict[int, list[Origin]] = {}
    for origin in origins:
        for known in tuple(origin.ids):
            by_id.setdefault(known, []).append(origin)
    for frame in _stack():
        begun_here = tuple(origin for origin in by_id.get(id(frame), ()) if origin.is_call(frame))
        if begun_here:
            return Caller(origins=begun_here, place=frame.f_lasti)
        pipeline = _pipeline(frame)
        if pipeline is not None:
            return Caller(pipeline=pipeline)
    return Caller()


def _stack() -> Iterator[FrameType]:
    """The frames of this thread, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _pipeline(frame: FrameType) -> Any:
    """The pipeline whose ``__call__`` this is; None for any other function."""
    if frame.f_code.co_name == "__call__":
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigMixin) and hasattr(owner, "scheduler"):
            return owner
    return None


def _is_function(frame: FrameType) -> bool:
    """Whether its variables are its own; those of a module or a notebook cell are seen by all."""
    return bool(frame.f_code.co_flags & inspect.CO_OPTIMIZED)


def _mark_of(frame: FrameType) -> Any:
    return frame.f_locals.get(_MARK) if _is_function(frame) else frame.f_code


class ThreadContexts(StateManager):
    """Keeps diffusers' cache context per thread, for pipelines that share a denoiser and run side by side."""

    def __init__(self) -> None:
        self._local = threading.local()
        super().__init__(BaseState)  # pyright: ignore[reportArgumentType]  # it takes the class, not one of it

    @property
    def _context(self) -> CacheContext | None:
        return getattr(self._local, "context", None)

    @_context.setter
    def _context(self, context: CacheContext | None) -> None:
        self._local.context = context
