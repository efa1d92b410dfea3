"""The residual of a denoiser's stack of blocks as cached tensor: what all blocks together add, found by two passes.

On a full-compute step that others are served from, the denoiser runs twice: as it is, and with every block handing on
what it is given. The difference where the last block ends is the residual. On a skipped step every block hands on what
it is given, and the predicted residual is added where the last one ends. So embeddings, final layers and whatever is
added between blocks (ControlNets) come from the skipped step itself, and are in the residual only once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from cemq.errors import ModelError
from cemq.runtime.cached.inner import Arguments, Forward, InnerCache, StrayError, block_stack
from cemq.runtime.history import summed

Residual = tuple[int, list[Any]]  # at the end of which call of a block it is added, and what, leaf by leaf
Position = tuple[int, type]  # of a block in the stack, and its class


@dataclass(frozen=True, kw_only=True, eq=False)
class Route:
    """Which argument of a block continues as which leaf of what it returns."""

    structure: Any
    sources: tuple[int | str | None, ...]  # positions or names of arguments; None for leaves that are no tensors
    leaves: tuple[Any, ...]  # dtypes of tensors; other leaves (SD3's last block returns None for its text) themselves

    def handed_on(self, arguments: Mapping[int | str, Any]) -> list[Any]:
        try:
            return [
                leaf if source is None else arguments[source].to(leaf)
                for source, leaf in zip(self.sources, self.leaves, strict=True)
            ]
        except (KeyError, AttributeError):
            raise StrayError from None


# By position and class of the block: Wan 2.2's second denoiser is served before it has run, as the first one was.
Routes = dict[Position, Route]


def route_of(block: str, arguments: Mapping[int | str, Any], output: Any) -> Route:
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
                f"{block} returns a shape that it is not given, so that no residual can be cached; use cache='output'"
            )
        if len(alike) > 1:
            alike.sort(key=lambda key, leaf=leaf: (arguments[key].float() - leaf.float()).norm().item())
        sources.append(alike[0] if alike else None)
    kept = tuple(leaf.dtype if torch.is_tensor(leaf) else leaf for leaf in leaves)
    return Route(structure=structure, sources=tuple(sources), leaves=kept)


@dataclass(eq=False)
class _Pass:
    """One pass through the denoiser: its blocks run, or hand on what they are given until the residual is added."""

    routes: Routes
    computes: bool = False
    residual: Residual | None = None
    called: list[Position] = field(default_factory=list)
    end: list[Any] = field(default_factory=list)  # what the latest block returned, flattened

    def note(self, position: Position, module: nn.Module, arguments: Arguments, output: Any) -> None:
        if position not in self.routes:
            self.routes[position] = route_of(type(module).__name__, arguments, output)
        self.called.append(position)
        self.end = tree_flatten(output)[0]

    def serve(self, position: Position, arguments: Arguments) -> Any:
        route = self.routes.get(position)
        if route is None:
            raise StrayError
        leaves = route.handed_on(arguments)
        self.called.append(position)
        if self.residual is not None and len(self.called) == self.residual[0]:
            leaves = added(leaves, self.residual[1])
        self.end = leaves
        return tree_unflatten(leaves, route.structure)


def added(leaves: Sequence[Any], residual: Sequence[Any]) -> list[Any]:
    """Their sums, in the dtypes of the first. Raises StrayError where shapes differ."""
    if [_shape(leaf) for leaf in leaves] != [_shape(leaf) for leaf in residual]:
        raise StrayError
    return [
        (leaf.to(_wide(leaf)) + more.to(_wide(leaf))).to(leaf.dtype) if torch.is_tensor(leaf) else leaf
        for leaf, more in zip(leaves, residual, strict=True)
    ]


def difference(ends: Sequence[Any], starts: Sequence[Any]) -> list[Any]:
    """Leaf by leaf, in float32 at least; leaves that are no tensors are those of the ends."""
    return [
        end.detach().to(_wide(end)) - start.detach().to(_wide(end)) if torch.is_tensor(end) else end
        for end, start in zip(ends, starts, strict=True)
    ]


def _shape(leaf: Any) -> Any:
    return leaf.shape if torch.is_tensor(leaf) else None


def _wide(leaf: torch.Tensor) -> torch.dtype:
    return torch.promote_types(leaf.dtype, torch.float32)


def _positions(denoiser: nn.Module) -> dict[nn.Module, Position]:
    return {block: (number, type(block)) for number, block in enumerate(block_stack(denoiser))}


class ResidualCache(InnerCache):
    """What `ScheduleHook` keeps and serves where the residual is cached; hooks every block of one denoiser.

    ``routes`` are shared by all denoisers of a pipeline.

    Raises:
        ModelError: The denoiser has no list of blocks.
    """

    cached: str = "residual"
    strayed: str = "which blocks it calls depends on what they return"

    def __init__(self, denoiser: nn.Module, routes: Routes):
        super().__init__(denoiser, _positions)
        self.routes = routes
        self.contents: str = f"the residual of {len(block_stack(denoiser))} blocks"

    @torch.compiler.disable(recursive=False)
    def compute(self, forward: Forward, *, wanted: bool, shapes: Any) -> tuple[Any, Residual | None]:
        """The denoiser's output and, if it is wanted, the residual of its blocks.

        Raises:
            ModelError: The denoiser's output is not what its last block returns and what is around the blocks.
        """
        if not wanted:
            return forward(), None
        full, bare = _Pass(self.routes, computes=True), _Pass(self.routes)
        output = self.hooks.run(forward, full)
        try:
            self.hooks.run(forward, bare)
        except StrayError:
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
        bare, calls = self._bare(residual)
        try:
            output = self.hooks.run(forward, bare)
        except StrayError:
            return None
        return output if len(bare.called) == calls else None

    @torch.compiler.disable()
    def _bare(self, residual: Residual) -> tuple[_Pass, int]:
        """The pass that serves it, and how many calls that is to have."""
        found = summed(residual)
        return _Pass(self.routes, residual=found), found[0]

    @torch.compiler.disable()
    def _difference(self, full: _Pass, bare: _Pass) -> Residual:
        if not full.called:
            self._refuse("it calls none of its blocks")
        if full.called != bare.called:
            self._refuse(self.strayed)
        return len(full.called), difference(full.end, bare.end)

    @torch.compiler.disable()
    def _rounded(self, residual: Residual, full: _Pass) -> Residual:
        calls, leaves = residual
        return calls, [
            r.to(end.dtype) if torch.is_tensor(end) else end for r, end in zip(leaves, full.end, strict=True)
        ]
