"""Branches of guidance that may be skipped one by one, where the denoiser is called once for each."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from cemq.runtime.history import layout, summed
from cemq.schedule import CacheSchedule


class Branches:
    """The first branch of guidance, and the others.

    Where the schedule skips branches, of the others only the difference to the first is kept and served.
    """

    def __init__(self, schedule: CacheSchedule) -> None:
        self.by_difference: bool = bool(schedule.branch_steps)
        self.first_output: list[Any] = []  # of this step, flattened

    def forget(self) -> None:
        self.first_output = []

    def less_the_first(self, output: Any, *, is_first: bool) -> Any:
        """What is kept of an output: of others than the first the difference to it, None where there is none."""
        if not self.by_difference:
            return output
        leaves, structure = tree_flatten(output)
        if is_first:
            self.first_output = leaves
            return output
        if layout(leaves) != layout(self.first_output):
            return None
        return tree_unflatten([_added(a, b, -1.0) for a, b in zip(leaves, self.first_output, strict=True)], structure)

    def with_the_first(self, prediction: Any, *, is_first: bool) -> Any:
        """The opposite, for what is served."""
        if not self.by_difference:
            return prediction
        leaves, structure = tree_flatten(summed(prediction))
        if is_first:
            self.first_output = leaves
            return tree_unflatten(leaves, structure)
        if layout(leaves) != layout(self.first_output):
            return None
        pairs = zip(self.first_output, leaves, strict=True)
        return tree_unflatten([_like(first, _added(first, leaf, 1.0)) for first, leaf in pairs], structure)


def _added(leaf: Any, other: Any, sign: float) -> Any:
    """In float32: a difference of two halves has few digits left."""
    is_number = torch.is_tensor(leaf) and leaf.is_floating_point()
    return torch.add(leaf.float(), other.float(), alpha=sign) if is_number else leaf


def _like(leaf: Any, value: Any) -> Any:
    return value.to(leaf.dtype) if torch.is_tensor(leaf) else value
