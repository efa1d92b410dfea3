"""Layers computed by other libraries; each module here is imported when its backend is used."""

from __future__ import annotations

import torch

from cemq.errors import SchemeError


def refuse_one_feature(weight: torch.Tensor, what: str) -> None:
    """Raises SchemeError for a weight (out, 1): torch leaves an integer product over one column uninitialised."""
    if weight.shape[1] == 1:
        raise SchemeError(f"{what} needs two input features or more: leave this layer as it is")
