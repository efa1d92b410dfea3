"""Draws pictures/emoji.png, what `builtin:emoji` makes of some prompts: ``python docs/emoji_grid.py``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from cemq.pipelines.opening import locate, open_pipeline
from cemq.recipe import load_recipe

PICTURE = Path(__file__).with_name("pictures") / "emoji.png"
PROMPTS = (
    "a red apple", "a green apple", "a blue heart", "a purple heart", "a yellow car", "a blue car",
    "a grinning cat face", "a smiling face with sunglasses", "a face with tears of joy", "a panda", "a fox", "a frog",
    "a robot", "a ghost", "a pumpkin", "a birthday cake", "a pizza slice", "an ice cream",
    "a flag with a star", "a house", "a rocket", "a rainbow", "a sunflower", "an evergreen tree",
    "a small owl on the left", "a small owl on the right", "a large owl", "a small balloon", "a green dress",
    "an orange umbrella",
)  # fmt: skip
COLUMNS, ZOOM, GAP, LINE = 6, 2, 8, 18
FIRST_SEED = 9_000_000  # of seeds that neither training nor the check used


def draw() -> np.ndarray:
    """The first picture of each prompt, (n, 64, 64, 3), levels 0 to 255."""
    pipe = open_pipeline(locate("builtin:emoji").folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(FIRST_SEED + number) for number in range(len(PROMPTS))]
    recipe = load_recipe("emoji")
    call = recipe.call | {"negative_prompt": [recipe.call["negative_prompt"]] * len(PROMPTS)}
    images = pipe(
        list(PROMPTS), num_inference_steps=recipe.steps, generator=generator, output_type="np", **call
    ).images  # fmt: skip
    return (images * 255).round().astype(np.uint8)


def sheet(pictures: np.ndarray) -> Image.Image:
    """All of them with their prompts below, enlarged without smoothing."""
    side = pictures.shape[1] * ZOOM
    rows = -(-len(pictures) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (side + GAP) + GAP, rows * (side + LINE + GAP) + GAP), "#ffffff")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for number, (prompt, picture) in enumerate(zip(PROMPTS, pictures, strict=True)):
        left, top = GAP + number % COLUMNS * (side + GAP), GAP + number // COLUMNS * (side + LINE + GAP)
        page.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (left, top))
        pen.text((left + side / 2, top + side + LINE - 6), prompt, fill="#333333", font=font, anchor="ms")
    return page


if __name__ == "__main__":
    sheet(draw()).save(PICTURE, optimize=True)
    print(PICTURE)
