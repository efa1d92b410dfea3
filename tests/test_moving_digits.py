"""``builtin:moving-digits``: the clips that it learned from, what it draws, and that a build takes it."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cemq.builtin.training.moving_clips import (
    DIRECTIONS,
    FRAMES,
    STROKES,
    caption,
    centred,
    centres,
    draw_clip,
    measured_directions,
    words,
)
from cemq.builtin.training.moving_digits import normalise, shares, vae
from cemq.cli import app
from cemq.pipelines.opening import locate, open_pipeline
from cemq.recipe import load_recipe

BAR = np.stack([np.zeros(60), np.linspace(-1, 1, 60)], 1)  # a centre line as tall as a digit


def clip(direction, stroke="", seed=0):
    rng = np.random.default_rng(seed)
    return draw_clip(BAR, STROKES[stroke][0], DIRECTIONS[direction], rng)


def test_a_clip_moves_as_its_caption_says():
    drawn = np.stack([clip(direction, seed=seed) for direction in DIRECTIONS for seed in range(3)])
    assert drawn.shape[1:] == (FRAMES, 32, 32)
    assert measured_directions(drawn).tolist() == np.repeat(range(len(DIRECTIONS)), 3).tolist()
    assert drawn[:, :, [0, -1]].max() == drawn[..., [0, -1]].max() == 0  # nothing is cut off


def test_it_goes_straight_through_the_middle_at_one_speed():
    way = centres(clip("up")[None])[0]
    assert np.abs(np.diff(way[:, 0])).max() < 0.1
    assert np.diff(way[:, 1]) == pytest.approx(np.diff(way[:, 1]).mean(), abs=0.15)
    assert way[FRAMES // 2] == pytest.approx([15.5, 15.5], abs=0.8)


def test_centred_frames_of_a_moving_digit_show_it_in_the_middle_with_all_its_ink():
    drawn = clip("left")[None]
    found = centred(drawn)
    assert np.abs(centres(found) - 15.5).max() <= 0.5
    assert found.sum((2, 3)) == pytest.approx(drawn.sum((2, 3)))


def test_a_bolder_stroke_has_more_ink():
    thin, usual, bold = (clip("left", stroke).sum() for stroke in ("thin", "", "bold"))
    assert thin < usual < bold


def test_a_caption_says_what_is_not_as_usual_in_words_that_are_known():
    thin, usual, bold = (list(STROKES).index(stroke) for stroke in ("thin", "", "bold"))
    assert caption(7, bold, list(DIRECTIONS).index("left")) == "a bold seven moving left"
    assert caption(0, thin, list(DIRECTIONS).index("")) == "a thin zero"
    assert caption(3, usual, list(DIRECTIONS).index("")) == "a three"
    assert {"a", "thin", "zero", "moving", "down"} < set(words())


class AlwaysSeven(torch.nn.Module):
    """A judge that sees a bold seven on every frame with ink, a thin zero elsewhere."""

    def forward(self, frames):
        inked = (frames.amax((1, 2, 3)) > 0).float()
        answers = torch.zeros(len(frames), 10 * len(STROKES))
        answers[:, 7 * len(STROKES) + list(STROKES).index("bold")] = 2 * inked
        answers[:, list(STROKES).index("thin")] = 1
        return answers


def test_shares_count_clips_that_are_right_on_most_frames_and_on_all():
    right, left = list(DIRECTIONS).index("right"), list(DIRECTIONS).index("left")
    bold = list(STROKES).index("bold")
    whole, broken = (np.repeat(clip("right", "bold")[..., None], 3, -1) for _ in range(2))
    broken[3] = 0
    videos = np.stack([whole, broken, whole, whole])
    found = shares(AlwaysSeven(), videos, [(7, bold, right), (7, bold, right), (7, 0, right), (5, bold, left)])
    assert found == {"digit": 0.75, "throughout": 0.5, "stroke": 0.75, "direction": 0.75}


def test_normalised_latents_are_what_the_pipeline_takes_back_with_the_autoencoders_settings():
    autoencoder = vae()
    scales = torch.linspace(0.5, 3, autoencoder.config.z_dim).view(-1, 1, 1, 1)
    latents = 0.7 + scales * torch.randn(20, autoencoder.config.z_dim, 4, 8, 8, generator=torch.Generator())
    found = normalise(autoencoder, latents)
    assert found.mean((0, 2, 3, 4)).abs().max() < 1e-3
    assert (found.std((0, 2, 3, 4)) - 1).abs().max() < 1e-3
    mean, deviation = (
        torch.tensor(autoencoder.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    assert torch.allclose(found * deviation + mean, latents, atol=1e-5)


@pytest.fixture(scope="module")
def pipe():
    pipe = open_pipeline(locate("builtin:moving-digits").folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def videos(pipe):
    prompts = ["a bold seven moving left", "a thin seven moving left", "a bold zero moving down", "a bold zero"]
    generator = [torch.Generator().manual_seed(7) for _ in prompts]
    call = load_recipe("moving-digits").call
    return pipe(prompts, num_inference_steps=12, generator=generator, **call).frames


def test_what_is_drawn_moves_as_the_prompt_says(videos):
    assert videos.shape == (4, FRAMES, 32, 32, 3)
    asked = [list(DIRECTIONS).index(word) for word in ("left", "left", "down", "")]
    assert measured_directions(videos.mean(-1)).tolist() == asked


def test_what_is_drawn_has_the_stroke_and_the_shape_of_the_prompt(videos):
    bold, thin, zero, _ = videos.mean(-1)
    assert bold.sum() > 1.7 * thin.sum()
    middle = centres(zero[None])[0].round().astype(int)
    inside = [frame[y, x] for frame, (x, y) in zip(zero, middle, strict=True)]
    assert np.mean(inside) < 0.4 * zero.max()  # the hole of a zero


def test_a_build_takes_it_and_its_bundle_draws_a_video(tmp_path):
    output = tmp_path / "bundle"
    build = ("quantize-and-schedule", "builtin:moving-digits", "--effort", "instant", "--steps", "6", "--budget", "3")
    for command in (
        (*build, "--also-steps", "none", "-o", output),
        ("generate", output, "--prompt", "a bold seven moving left", "-o", tmp_path / "seven.gif"),
    ):
        done = CliRunner().invoke(app, [str(part) for part in command])
        assert done.exit_code == 0, done.output
    recipe = json.loads((output / "cemq.json").read_text())["recipe"]
    assert recipe["call"]["num_frames"] == FRAMES
    from PIL import Image

    with Image.open(tmp_path / "seven.gif") as picture:
        assert (picture.size, picture.n_frames) == ((32, 32), FRAMES)
