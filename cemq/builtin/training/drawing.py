"""Samples of a built-in model to judge it by, from seeds that nothing was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

FIRST_SEED, BATCH = 5_000_000, 50


def draw(pipe: DiffusionPipeline, conditions: Mapping[str, list], *, steps: int, **call: Any) -> np.ndarray:
    """One picture of each condition, shape (n, height, width, 3) in [0, 1].

    Args:
        conditions: The argument that takes them, and one for each sample.
    """
    ((name, asked),) = conditions.items()
    images = []
    for first in range(0, len(asked), BATCH):
        part = asked[first : first + BATCH]
        generator = [torch.Generator().manual_seed(FIRST_SEED + first + i) for i in range(len(part))]
        options = {name: part, "num_inference_steps": steps, "generator": generator, "output_type": "np"}
        images.append(pipe(**options, **call).images)
    return np.concatenate(images)
