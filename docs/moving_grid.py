"""Draws pictures/moving-digits.gif, what `builtin:moving-digits` makes of prompts: ``python docs/moving_grid.py``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from cemq.pipelines.opening import locate, open_pipeline
from cemq.recipe import load_recipe

PICTURE = Path(__file__).with_name("pictures") / "moving-digits.gif"
PROMPTS = (
    "a bold seven moving left", "a thin three moving up", "a five moving right", "a bold zero moving down",
    "a thin eight moving right", "a two moving down", "a bold four moving up", "a six moving left",
    "a nine moving up", "a bold one moving right", "a thin two moving left", "a bold three",
)  # fmt: skip
COLUMNS, ZOOM, GAP, LINE = 4, 3, 8, 16
MILLISECONDS, GREYS = 90, 32
FIRST_SEED = 9_000_000  # of seeds that neither training nor the check used


def draw() -> np.ndarray:
    """The first clip of each prompt, (n, frames, 32, 32, 3), levels 0 to 255."""
    pipe = open_pipeline(locate("builtin:moving-digits").folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(FIRST_SEED + number) for number in range(len(PROMPTS))]
    recipe = load_recipe("moving-digits")
    frames = pipe(list(PROMPTS), num_inference_steps=recipe.steps, generator=generator, **recipe.call).frames
    return (frames * 255).round().astype(np.uint8)


def sheet(pictures: np.ndarray) -> Image.Image:
    """One frame of every clip with its prompt below, enlarged without smoothing."""
    side = pictures.shape[1] * ZOOM
    rows = -(-len(pictures) // COLUMNS)
    width = max(side, 120)
    page = Image.new("L", (COLUMNS * (width + GAP) + GAP, rows * (side + LINE + GAP) + GAP), 255)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(9)
    for number, (prompt, picture) in enumerate(zip(PROMPTS, pictures, strict=True)):
        left, top = GAP + number % COLUMNS * (width + GAP), GAP + number // COLUMNS * (side + LINE + GAP)
        enlarged = Image.fromarray(picture).convert("L").resize((side, side), Image.Resampling.NEAREST)
        page.paste(enlarged, (left + (width - side) // 2, top))
        pen.text((left + width / 2, top + side + LINE - 6), prompt, fill=50, font=font, anchor="ms")
    return page.quantize(GREYS, dither=Image.Dither.NONE)


if __name__ == "__main__":
    first, *others = (sheet(moment) for moment in draw().swapaxes(0, 1))
    first.save(PICTURE, save_all=True, append_images=others, duration=MILLISECONDS, loop=0, optimize=True)
    print(PICTURE)
