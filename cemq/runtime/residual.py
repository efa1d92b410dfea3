"""The residual of a denoiser's stack of blocks as cached tensor: what all blocks together add, found by two passes.

On a full-compute step that others are served from, the denoiser runs twice: as it is, and with every block handing on
what it is given. The difference where the last block ends is the residual. On a skipped step every block hands on what
it is given, and the predicted residual is added where the last one ends. So embeddings, final layers and whatever is
added between blocks (ControlNets) come from the skipped step itself, and are in the residual only once.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from cemq.errors import ModelError
from cemq.families import BLOCK_LISTS
from cemq.models import denoisers
from cemq.runtime.registration import Uncopied, install, keep_outermost, uninstall

Forward = Callable[[], Any]
Residual = tuple[int, list[Any]]  # at the end of which call of a block it is added, and what, leaf by leaf

# Of the output, relative: what is left of rounding is below 1e-6, and a residual that is dropped or counted twice shows
# from 1e-2 on (tiny models with random weights). Between them lies what a quantized final layer makes of rounding.
TOLERANCE = 1e-3


class _StrayError(Exception):
    """A block is called otherwise than when it ran."""


@dataclass(eq=False)
class _Pass:
    """One pass through the denoiser: its blocks run, or hand on what they are given until the residual is added."""

    blocks_run: bool = False
    residual: Residual | None = None
    called: list[_BlockHook] = field(default_factory=list)
    end: list[Any] = field(default_factory=list)  # what the latest block returned, flattened


@dataclass(frozen=True, kw_only=True, eq=False)
class _Route:
    """Which argument of a block continues as which leaf of what it returns."""

    structure: Any
    sources: tuple[int | str | None, ...]  # positions or names of arguments; None for leaves that are no tensors
    leaves: tuple[Any, ...]  # dtypes of tensors; other leaves (SD3's last block returns None for its text) themselves

    def handed_on(self, arguments: dict[int | str, Any]) -> list[Any]:
        try:
            return [
                leaf if source is None else arguments[source].to(leaf)
                for source, leaf in zip(self.sources, self.leaves, strict=True)
            ]
        except (KeyError, AttributeError):
            raise _StrayError from None


# By position and class of the block: Wan 2.2's second denoiser is served before it has run, as the first one was.
Routes = dict[tuple[int, type], _Route]


def _route(block: nn.Module, arguments: dict[int | str, Any], output: Any) -> _Route:
    """A leaf continues the argument of its shape; of several, the nearest, for blocks add to what they are given."""
    leaves, structure = tree_flatten(output)
    sources: list[int | str | None] = []
    for leaf in leaves:
        alike = [
            key
            for key, value in arguments.items()
            if torch.is_tensor(leaf)
            and torch.is_tensor(value)
            and value.shape == leaf.shape
            and value.is_floating_point()
        ]
        if torch.is_tensor(leaf) and not alike:
            raise ModelError(
                f"{type(block).__name__} returns a shape that it is not given, so that no residual can be cached; "
                "use cache='output'"
            )
        if len(alike) > 1:
            alike.sort(key=lambda key, leaf=leaf: (arguments[key].float() - leaf.float()).norm().item())
        sources.append(alike[0] if alike else None)
    kept = tuple(leaf.dtype if torch.is_tensor(leaf) else leaf for leaf in leaves)
    return _Route(structure=structure, sources=tuple(sources), leaves=kept)


class _BlockHook(Uncopied, ModelHook):
    """Runs its block, or hands on what the block is given; outside of the passes of a cache it only runs it."""

    def __init__(self, cache: ResidualCache):
        super().__init__()
        self.cache = cache
        self.position: Any = None  # in the stack, and the block's class
        self.installed: Any = None

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self._runs():
            return self._hand_on(args, kwargs)
        output = self.fn_ref.original_forward(*args, **kwargs)
        self._note(module, args, kwargs, output)
        return output

    @torch.compiler.disable
    def _runs(self) -> bool:
        current = self.cache.current
        return current is None or current.blocks_run

    @torch.compiler.disable
    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        current = self.cache.current
        if current is None:
            return
        if self.position not in self.cache.routes:
            self.cache.routes[self.position] = _route(module, dict(enumerate(args)) | kwargs, output)
        current.called.append(self)
        current.end = tree_flatten(output)[0]

    @torch.compiler.disable
    def _hand_on(self, args: Any, kwargs: Any) -> Any:
        current = self.cache.current
        route = self.cache.routes.get(self.position)
        if route is None:
            raise _StrayError
        leaves = route.handed_on(dict(enumerate(args)) | kwargs)
        current.called.append(self)
        if current.residual is not None and len(current.called) == current.residual[0]:
            leaves = _added(leaves, current.residual[1])
        current.end = leaves
        return tree_unflatten(leaves, route.structure)


def _added(leaves: list[Any], residual: list[Any]) -> list[Any]:
    if [_shape(leaf) for leaf in leaves] != [_shape(leaf) for leaf in residual]:
        raise _StrayError
    return [
        (leaf.to(_wide(leaf)) + more.to(_wide(leaf))).to(leaf.dtype) if torch.is_tensor(leaf) else leaf
        for leaf, more in zip(leaves, residual, strict=True)
    ]


def _shape(leaf: Any) -> Any:
    return leaf.shape if torch.is_tensor(leaf) else None


def _wide(leaf: torch.Tensor) -> torch.dtype:
    return torch.promote_types(leaf.dtype, torch.float32)


def block_stack(denoiser: nn.Module) -> list[nn.Module]:
    """All blocks of a denoiser's lists of blocks, without `torch.compile`'s wrapper.

    Raises:
        ModelError: It has no such list.
    """
    blocks = [
        getattr(block, "_orig_mod", block)
        for name, child in denoiser.named_children()
        if isinstance(child, nn.ModuleList) and any(fnmatchcase(name, pattern) for pattern in BLOCK_LISTS)
        for block in child
    ]
    if not blocks:
        raise ModelError(f"{type(denoiser).__name__} has no list of blocks to cache a residual of; use cache='output'")
    return blocks


class ResidualCache:
    """What `ScheduleHook` keeps and serves where the residual is cached; hooks every block of one denoiser.

    ``routes`` are shared by all denoisers of a pipeline.

    Raises:
        ModelError: The denoiser has no list of blocks.
    """

    def __init__(self, denoiser: nn.Module, routes: Routes):
        self._denoiser, self.routes = denoiser, routes
        self._hooks: dict[nn.Module, _BlockHook] = {}
        self._checked: set[Any] = set()  # shapes of arguments
        self._local = threading.local()  # another thread may run the same denoiser for another pipeline
        block_stack(denoiser)

    @property
    def current(self) -> _Pass | None:
        return getattr(self._local, "current", None)

    def install(self) -> None:
        """Hook every block, above whatever wraps it now; also those that came since."""
        blocks = block_stack(self._denoiser)
        before = list(self._hooks)
        for block in before:
            if block not in blocks:
                uninstall(block)
                del self._hooks[block]
        for number, block in enumerate(blocks):
            if block in self._hooks:
                keep_outermost(block, self._hooks[block])
            else:
                self._hooks[block] = _BlockHook(self)
                install(block, self._hooks[block])
            self._hooks[block].position = number, type(block)
        if list(self._hooks) != before:
            HookRegistry.check_if_exists_or_initialize(self._denoiser).invalidate_child_registries_cache()

    def remove(self) -> None:
        for block in self._hooks:
            uninstall(block)
        self._hooks = {}

    @torch.compiler.disable(recursive=False)
    def compute(self, forward: Forward, *, wanted: bool, shapes: Any) -> tuple[Any, Residual | None]:
        """The denoiser's output and, if it is wanted, the residual of its blocks.

        Raises:
            ModelError: The denoiser's output is not what its last block returns and what is around the blocks.
        """
        if not wanted:
            return forward(), None
        full, bare = _Pass(blocks_run=True), _Pass()
        output = self._run(forward, full)
        try:
            self._run(forward, bare)
        except _StrayError:
            self._refuse("its blocks take their input from somewhere else in every call")
        residual = self._difference(full, bare)
        if shapes not in self._checked:
            again = self.serve(forward, residual)
            self._check(output, again)
            self._checked.add(shapes)
        return output, self._rounded(residual, full)

    @torch.compiler.disable(recursive=False)
    def serve(self, forward: Forward, residual: Residual) -> Any:
        """The output with this residual in place of the blocks; None if the blocks are called in another way now."""
        bare = _Pass(residual=residual)
        try:
            output = self._run(forward, bare)
        except _StrayError:
            return None
        return output if len(bare.called) == residual[0] else None

    @torch.compiler.disable(recursive=False)
    def _run(self, forward: Forward, current: _Pass) -> Any:
        self._enter(current)
        try:
            return forward()
        finally:
            self._enter(None)

    @torch.compiler.disable
    def _enter(self, current: _Pass | None) -> None:
        self._local.current = current

    @torch.compiler.disable
    def _difference(self, full: _Pass, bare: _Pass) -> Residual:
        if not full.called:
            self._refuse("it calls none of its blocks")
        if full.called != bare.called:
            self._refuse("which blocks it calls depends on what they return")
        leaves = [
            end.detach().to(_wide(end)) - start.detach().to(_wide(end)) if torch.is_tensor(end) else end
            for end, start in zip(full.end, bare.end, strict=True)
        ]
        return len(full.called), leaves

    @torch.compiler.disable
    def _rounded(self, residual: Residual, full: _Pass) -> Residual:
        calls, leaves = residual
        return calls, [
            r.to(end.dtype) if torch.is_tensor(end) else end for r, end in zip(leaves, full.end, strict=True)
        ]

    @torch.compiler.disable
    def _check(self, output: Any, again: Any) -> None:
        if again is None:
            self._refuse("which blocks it calls depends on what they return")
        difference = total = 0.0
        for one, other in zip(tree_flatten(output)[0], tree_flatten(again)[0], strict=True):
            if torch.is_tensor(one) and one.is_floating_point():
                difference += (one.double() - other.double()).square().sum().item()
                total += one.double().square().sum().item()
        error = math.sqrt(difference / total) if total else math.sqrt(difference)
        if math.isfinite(total) and not error <= TOLERANCE:
            self._refuse(
                f"served on the very input it was found on, it gives another output (relative error {error:.2g})"
            )

    def _refuse(self, reason: str) -> None:
        name = type(self._denoiser).__name__
        raise ModelError(f"the residual of {name}'s blocks cannot be cached: {reason}; use cache='output'")


class _Probe(Uncopied, ModelHook):
    """Takes the residual of every call, which checks it, and nothing more."""

    def __init__(self, cache: ResidualCache):
        super().__init__()
        self.cache = cache
        self.installed: Any = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = functools.partial(self.fn_ref.original_forward, *args, **kwargs)
        return self.cache.compute(forward, wanted=True, shapes=None)[0]


@contextmanager
def residual_checked(pipe: Any) -> Iterator[None]:
    """Find out in a run without a schedule whether the residual of the denoisers' blocks can be cached.

    Outputs are unchanged. Each denoiser is checked at its first call.

    Raises:
        ModelError: It cannot, at once or at a denoiser's first call; says why.
    """
    routes: Routes = {}
    with ExitStack() as undo:
        for _, denoiser in denoisers(pipe):
            cache = ResidualCache(denoiser, routes)
            install(denoiser, _Probe(cache))
            undo.callback(uninstall, denoiser)
            undo.callback(cache.remove)
            cache.install()
        yield
