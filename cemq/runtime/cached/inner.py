"""Hooks on modules inside of a denoiser: how the residual of its blocks, and the outputs of their parts, are cached."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from diffusers.hooks.hooks import HookRegistry
from torch import nn
from torch.utils._pytree import tree_flatten

from cemq.errors import ModelError
from cemq.families import BLOCK_LISTS, matches
from cemq.runtime.registration import OutermostHook, install, keep_outermost, uninstall

Forward = Callable[[], Any]
Arguments = dict[int | str, Any]  # of a call, by position or name

# Of the output, relative: what is left of rounding is below 1e-6, and a residual that is dropped or counted twice shows
# from 1e-2 on (tiny models with random weights). Between them lies what a quantized final layer makes of rounding.
TOLERANCE = 1e-3


class StrayError(Exception):
    """A module is called otherwise than when it was computed."""


class Pass(Protocol):
    """One call of the denoiser, as the modules that are hooked see it."""

    computes: bool  # else every module is served

    def note(self, position: Any, module: nn.Module, arguments: Arguments, output: Any) -> None:
        """A module has computed its output."""

    def serve(self, position: Any, arguments: Arguments) -> Any:
        """What a module returns in place of computing it. Raises StrayError."""


class Answers(ABC):
    """One call of the denoiser in which something else decides, module by module, what each returns."""

    @abstractmethod
    def call(self, position: Any, args: Any, kwargs: Any, forward: Callable[..., Any]) -> Any:
        """What a module returns; ``forward`` computes it."""


class _InnerHook(OutermostHook):
    """Runs its module, or returns what the current pass serves; outside of a pass it only runs it."""

    def __init__(self, hooks: InnerHooks):
        super().__init__()
        self.hooks = hooks
        self.position: Any = None

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        answers = self._answers()
        if answers is not None:
            return answers.call(self.position, args, kwargs, self.fn_ref.original_forward)
        if not self._computes():
            return self._serve(args, kwargs)
        output = self.fn_ref.original_forward(*args, **kwargs)
        self._note(module, args, kwargs, output)
        return output

    @torch.compiler.disable()
    def _answers(self) -> Answers | None:
        current = self.hooks.current
        return current if isinstance(current, Answers) else None

    @torch.compiler.disable()
    def _computes(self) -> bool:
        current = self.hooks.current
        return current is None or isinstance(current, Answers) or current.computes

    @torch.compiler.disable()
    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        current = self.hooks.current
        if current is not None and not isinstance(current, Answers):
            current.note(self.position, module, dict(enumerate(args)) | kwargs, output)

    @torch.compiler.disable()
    def _serve(self, args: Any, kwargs: Any) -> Any:
        current = self.hooks.current
        assert current is not None  # or the module would compute
        assert not isinstance(current, Answers)
        return current.serve(self.position, dict(enumerate(args)) | kwargs)


class InnerHooks:
    """Hooks on the modules that ``find`` names in one denoiser, by what it calls their position."""

    def __init__(self, denoiser: nn.Module, find: Callable[[nn.Module], dict[nn.Module, Any]]):
        self._denoiser, self._find = denoiser, find
        self._hooks: dict[nn.Module, _InnerHook] = {}
        self._local = threading.local()  # another thread may run the same denoiser for another pipeline

    @property
    def current(self) -> Pass | Answers | None:
        """The pass that this thread is in."""
        return getattr(self._local, "current", None)

    def install(self) -> None:
        """Hook every module, above whatever wraps it now; also those that came since."""
        found = self._find(self._denoiser)
        before = list(self._hooks)
        for module in before:
            if module not in found:
                uninstall(module)
                del self._hooks[module]
        for module, position in found.items():
            if module in self._hooks:
                keep_outermost(module, self._hooks[module])
            else:
                self._hooks[module] = _InnerHook(self)
                install(module, self._hooks[module])
            self._hooks[module].position = position
        if list(self._hooks) != before:
            HookRegistry.check_if_exists_or_initialize(self._denoiser).invalidate_child_registries_cache()

    def remove(self) -> None:
        for module in self._hooks:
            uninstall(module)
        self._hooks = {}

    @torch.compiler.disable(recursive=False)
    def run(self, forward: Forward, current: Pass | Answers) -> Any:
        """``forward()``, as one pass."""
        self._enter(current)
        try:
            return forward()
        finally:
            self._enter(None)

    @torch.compiler.disable()
    def _enter(self, current: Pass | Answers | None) -> None:
        self._local.current = current


def block_stack(denoiser: nn.Module) -> list[nn.Module]:
    """All blocks of a denoiser's lists of blocks, without `torch.compile`'s wrapper.

    Raises:
        ModelError: It has no such list.
    """
    blocks = [
        getattr(block, "_orig_mod", block)
        for name, child in denoiser.named_children()
        if isinstance(child, nn.ModuleList) and matches(name, BLOCK_LISTS)
        for block in child
    ]
    if not blocks:
        raise ModelError(f"{type(denoiser).__name__} has no list of blocks to cache anything of; use cache='output'")
    return blocks


class InnerCache:
    """What caches of something inside of one denoiser share: its hooks, and the check before the first use."""

    cached: str  # what of the blocks, in words
    strayed: str  # why it cannot be, where other modules are called when they are served

    def __init__(self, denoiser: nn.Module, find: Callable[[nn.Module], dict[nn.Module, Any]]):
        self._denoiser = denoiser
        self.hooks: InnerHooks = InnerHooks(denoiser, find)
        self._checked: set[Any] = set()  # shapes of arguments
        self.error: float | None = None  # the largest that the check has found

    def install(self) -> None:
        self.hooks.install()

    def remove(self) -> None:
        self.hooks.remove()

    @torch.compiler.disable()
    def _check(self, computed: Any, served: Any) -> None:
        """Raises ModelError if the denoiser, served what was cached of the very same input, gives another output."""
        if served is None:
            self._refuse(self.strayed)
        difference = total = 0.0
        for one, other in zip(tree_flatten(computed)[0], tree_flatten(served)[0], strict=True):
            if torch.is_tensor(one) and one.is_floating_point():
                difference += (one.double() - other.double()).square().sum().item()
                total += one.double().square().sum().item()
        error = math.sqrt(difference / total) if total else math.sqrt(difference)
        if not math.isfinite(total):
            return
        self.error = max(self.error or 0.0, error)
        if not error <= TOLERANCE:
            self._refuse(
                f"served on the very input it was found on, it gives another output (relative error {error:.2g})"
            )

    def _refuse(self, reason: str) -> NoReturn:
        name = type(self._denoiser).__name__
        raise ModelError(f"the {self.cached} of {name}'s blocks cannot be cached: {reason}; use cache='output'")
