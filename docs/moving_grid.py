"""Draws pictures/moving-digits.gif, what `builtin:moving-digits` makes of prompts: ``python docs/moving_grid.py``."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from prompt_grid import Layout, draw, sheet

from cemq.recipe import load_recipe

PICTURE = Path(__file__).with_name("pictures") / "moving-digits.gif"
PROMPTS = (
    "a bold seven moving left", "a thin three moving up", "a five moving right", "a bold zero moving down",
    "a thin eight moving right", "a two moving down", "a bold four moving up", "a six moving left",
    "a nine moving up", "a bold one moving right", "a thin two moving left", "a bold three",
)  # fmt: skip
LAYOUT = Layout(columns=4, zoom=3, line=16, font_size=9, ink="#323232", least_width=120)
MILLISECONDS, GREYS = 90, 32

if __name__ == "__main__":
    clips = draw("moving-digits", load_recipe("moving-digits"), PROMPTS)
    pages = (sheet(moment, PROMPTS, LAYOUT).convert("L") for moment in clips.swapaxes(0, 1))
    first, *others = (page.quantize(GREYS, dither=Image.Dither.NONE) for page in pages)
    first.save(PICTURE, save_all=True, append_images=others, duration=MILLISECONDS, loop=0, optimize=True)
    print(PICTURE)
