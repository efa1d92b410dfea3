"""What a denoiser answers, and how far two answers are apart."""

from __future__ import annotations

from typing import Any

import torch

from cemq.bench.architectures import Inputs
from cemq.metrics import relative_l2


@torch.no_grad()
def predict(model: Any, inputs: Inputs) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


def relative_error(reference: torch.Tensor, output: torch.Tensor) -> float:
    """Relative L2, mean over the batch."""
    return float(relative_l2(reference, output).mean())
