"""Samples of a built-in model to judge it by, from seeds that nothing was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

FIRST_SEED, BATCH = 5_000_000, 50


def draw(pipe: DiffusionPipeline, conditions: Mapping[str, list], *, steps: int, **call: Any) -> np.ndarray:
    """One picture or clip of each condition, shape (n, height, width, 3) or (n, frames, height, width, 3) in [0, 1].

    Args:
        conditions: Arguments that take one for each sample, such as ``prompt``.
    """
    count, images = len(next(iter(conditions.values()))), []
    for first in range(0, count, BATCH):
        part = {name: asked[first : first + BATCH] for name, asked in conditions.items()}
        generator = [torch.Generator().manual_seed(FIRST_SEED + n) for n in range(first, min(first + BATCH, count))]
        options = {"num_inference_steps": steps, "generator": generator, "output_type": "np"}
        images.append(pipe(**part, **options, **call)[0])
    return np.concatenate(images)
