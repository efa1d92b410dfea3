"""What `emoji_grid.py` and `moving_grid.py` share: a built-in pipeline's answers to prompts, and a sheet of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from cemq.pipelines.opening import locate, open_pipeline
from cemq.recipe import Recipe

GAP = 8  # pixels between pictures
FIRST_SEED = 9_000_000  # of seeds that neither training nor the check used


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Of a sheet, in pixels.

    Args:
        zoom: How often each pixel stands, in both directions.
        line: Height of what is written below a picture.
        least_width: Of what a picture has, where its prompt is wider than it.
    """

    columns: int
    zoom: int
    line: int
    font_size: int
    ink: str
    least_width: int = 0


def draw(name: str, recipe: Recipe, prompts: Sequence[str], **call: Any) -> np.ndarray:
    """The first picture or clip of each prompt, levels 0 to 255.

    Args:
        name: As after ``builtin:``.
        call: Over the recipe's.
    """
    pipe = open_pipeline(locate(f"builtin:{name}").folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(FIRST_SEED + number) for number in range(len(prompts))]
    given = {"num_inference_steps": recipe.steps, "generator": generator, "output_type": "np", **recipe.call, **call}
    return (pipe(list(prompts), **given)[0] * 255).round().astype(np.uint8)


def sheet(pictures: np.ndarray, prompts: Sequence[str], layout: Layout) -> Image.Image:
    """All of them, (n, height, width, 3), with their prompts below, enlarged without smoothing."""
    side = pictures.shape[1] * layout.zoom
    width, height = max(side, layout.least_width), side + layout.line
    rows = -(-len(pictures) // layout.columns)
    page = Image.new("RGB", (layout.columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), "#ffffff")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(layout.font_size)
    for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        left, top = GAP + number % layout.columns * (width + GAP), GAP + number // layout.columns * (height + GAP)
        enlarged = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
        page.paste(enlarged, (left + (width - side) // 2, top))
        pen.text((left + width / 2, top + height - 6), prompt, fill=layout.ink, font=font, anchor="ms")
    return page
