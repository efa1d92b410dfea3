"""Who calls the denoiser: which pipeline, in which thread, under which cache context."""

from __future__ import annotations

import sys
import threading
from typing import Any

from diffusers import ConfigMixin
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager


def calling_pipeline() -> Any:
    """The pipeline whose ``__call__`` is running in this thread, innermost first; None in a loop of one's own.

    Looked up on the stack: pipelines may share a denoiser, and nothing they hand it says who they are.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            owner = frame.f_locals.get("self")
            if isinstance(owner, ConfigMixin) and hasattr(owner, "scheduler"):
                return owner
        frame = frame.f_back
    return None


class ThreadContexts(StateManager):
    """Keeps diffusers' cache context per thread, for pipelines that share a denoiser and run side by side."""

    def __init__(self) -> None:
        self._local = threading.local()
        super().__init__(BaseState)

    @property
    def _context(self) -> CacheContext | None:
        return getattr(self._local, "context", None)

    @_context.setter
    def _context(self, context: CacheContext | None) -> None:
        self._local.context = context
