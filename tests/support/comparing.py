"""Whether models and tensors are the same, and how far they are apart."""

from __future__ import annotations

import torch
from torch import nn


def identical(left: nn.Module, right: nn.Module) -> bool:
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
