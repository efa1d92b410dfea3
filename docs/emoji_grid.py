"""Draws pictures/emoji.png, what `builtin:emoji` makes of some prompts: ``python docs/emoji_grid.py``."""

from __future__ import annotations

from pathlib import Path

from prompt_grid import Layout, draw, sheet

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
LAYOUT = Layout(columns=6, zoom=2, line=18, font_size=10, ink="#333333")

if __name__ == "__main__":
    recipe = load_recipe("emoji")
    negative = [recipe.call["negative_prompt"]] * len(PROMPTS)
    pictures = draw("emoji", recipe, PROMPTS, negative_prompt=negative)
    sheet(pictures, PROMPTS, LAYOUT).save(PICTURE, optimize=True)
    print(PICTURE)
