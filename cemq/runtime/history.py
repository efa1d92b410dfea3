"""What is cached of one stream of denoiser calls, and the weighted sums that skipped steps are served."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


@dataclass(frozen=True, eq=False)
class Weighted:
    """One leaf of a prediction, not summed yet: of a denoiser's modules there are hundreds, served one after the other.

    Leaves that are no floating-point tensors, and a single one of weight 1, are those of the newest step.
    """

    leaves: tuple[Any, ...]  # newest first
    weights: tuple[float, ...]
    added: torch.Tensor | None = None

    def sum(self) -> Any:
        """The prediction, a tensor of its own in the newest leaf's dtype."""
        newest = self.leaves[0]
        if not _is_number(newest) or (self.weights == (1.0,) and self.added is None):
            return copied(newest)
        parts = (weight * leaf.float() for weight, leaf in zip(self.weights, self.leaves, strict=True))
        total = cast(torch.Tensor, sum(parts))
        if self.added is not None:
            total += self.added
        return total.to(newest.dtype)


def _is_number(leaf: Any) -> bool:
    return torch.is_tensor(leaf) and leaf.is_floating_point()


def summed(prediction: Any) -> Any:
    """The tree with every `Weighted` leaf summed."""
    return tree_map(lambda leaf: leaf.sum() if isinstance(leaf, Weighted) else leaf, prediction)


def copied(leaf: Any) -> Any:
    """A tensor of its own, for whoever gets the original may change it in place; anything else as it is."""
    return leaf.detach().clone() if torch.is_tensor(leaf) else leaf


def layout(tree: Any) -> tuple[Any, ...]:
    """What must be equal, exactly, before leaves of two trees are added up: shapes and devices of tensors, and plain
    values, which say where in a model they belong. Of anything else the type; dtypes are no matter, sums are float32.
    """
    leaves, structure = tree_flatten(tree)
    return (structure, *(_leaf_layout(leaf) for leaf in leaves))


def _leaf_layout(leaf: Any) -> Any:
    if torch.is_tensor(leaf):
        return leaf.shape, leaf.device
    return leaf if isinstance(leaf, (int, str, torch.Size)) else type(leaf)


def shapes_of(arguments: Any) -> tuple[Any, ...]:
    """Shapes and devices of the tensors in the arguments of a call."""
    return tuple(_leaf_layout(leaf) for leaf in tree_flatten(arguments)[0] if torch.is_tensor(leaf))


@dataclass
class History:
    """What is cached of one stream's full-compute steps and still needed, and the shapes it was computed for.

    All that is kept has one layout: a model's first output may be longer than those that follow (a KV cache of its
    prompt), though it is called alike.
    """

    shapes: Any = None
    kept: dict[int, list[Any]] = field(default_factory=dict)  # flattened, by step index
    structure: Any = None
    layout: Any = None

    def retain(self, needed: Iterable[int], shapes: Any) -> None:
        """Free the other steps' memory, and all of it if the shapes have changed."""
        needed = set(needed) if shapes == self.shapes else set()
        self.shapes = shapes
        self.kept = {step: leaves for step, leaves in self.kept.items() if step in needed}

    def keep(self, step_index: int, value: Any) -> None:
        """Keep a step, and forget those of another layout: nothing is summed, or broadcast, with what differs."""
        found = layout(value)
        if found != self.layout:
            self.kept, self.layout = {}, found
        self.kept[step_index], self.structure = tree_flatten(value)

    def serve(self, sources: tuple[int, ...], weights: tuple[float, ...], added: torch.Tensor | None = None) -> Any:
        """The sum of what is kept of these steps, newest first; its leaves are `Weighted`.

        ``added`` is added to the first floating-point tensor among them.
        """
        found = []
        for leaves in zip(*(self.kept[step] for step in sources), strict=True):
            found.append(Weighted(leaves, weights, added if _is_number(leaves[0]) else None))
            added = None if _is_number(leaves[0]) else added
        return tree_unflatten(found, self.structure)

    def bytes(self) -> int:
        return tensor_bytes(list(self.kept.values()))


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in a tree."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_flatten(tree)[0] if torch.is_tensor(leaf))
