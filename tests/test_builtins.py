"""The built-in models: what there is, and what ``builtin:emoji`` draws."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from cemq.builtin.registry import FOLDER, cards
from cemq.pipelines.opening import BUILTINS, locate, open_pipeline
from cemq.recipe import load_recipe, recipe_for

PAGE = Path(__file__).parents[1] / "docs" / "builtin-models.md"


def test_the_list_of_models_is_that_of_their_folders_and_each_has_a_card_a_recipe_and_a_module():
    assert set(BUILTINS) == {path.parent.name for path in FOLDER.glob("*/model_index.json")} <= cards().keys()
    assert {"dit-digits", "sd3-digits", "emoji", "moving-digits"} <= set(BUILTINS)
    for name in BUILTINS:
        assert load_recipe(recipe_for(f"builtin:{name}")).calib
        assert importlib.util.find_spec(f"cemq.builtin.training.{name.replace('-', '_')}")


def test_the_page_of_the_models_says_what_their_cards_say():
    page = PAGE.read_text(encoding="utf-8")
    for name, card in cards().items():
        assert f"`builtin:{name}`" in page
        for share in card.found.values():
            assert f"{share:.1%}".replace("%", " %") in page, (name, share)
        assert card.licence in page
    assert "Noto Color Emoji (Apache-2.0)" in cards()["emoji"].data
    assert "Noto Color Emoji" in page


@pytest.fixture(scope="module")
def emoji():
    pipe = open_pipeline(locate("builtin:emoji").folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_plain_call_draws_the_size_that_the_model_was_trained_for(emoji):
    (image,) = emoji("a red apple", num_inference_steps=2).images
    assert image.size == (64, 64)


def test_what_is_drawn_is_what_the_prompt_says(emoji):
    prompts = ["a large red heart", "a large blue heart", "a small blue heart on the right"]
    generator = [torch.Generator().manual_seed(7) for _ in prompts]
    call = load_recipe("emoji").call | {"negative_prompt": [""] * len(prompts)}
    images = emoji(prompts, num_inference_steps=12, generator=generator, output_type="np", **call).images
    ink = 1 - images.min(-1)
    red, _, blue = np.moveaxis((images * ink[..., None]).sum((1, 2)) / ink.sum((1, 2))[:, None], -1, 0)
    assert red[0] > blue[0] + 0.2
    assert blue[1] > red[1] + 0.2
    assert ink[2].sum() < ink[1].sum() / 2
    assert ink[2, :, 32:].sum() > 4 * ink[2, :, :32].sum()
