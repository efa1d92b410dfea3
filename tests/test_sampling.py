"""What is run: conditions from files, arguments from text, and pipelines that refuse them."""

import datetime
import math

import diffusers as D
import pytest
import torch
from PIL import Image
from support.pipelines import make_dit, make_flux

import cemq
from cemq.errors import InputError, ModelError, PipelineError
from cemq.pipelines.batches import (
    Batch,
    check_call,
    check_drivable,
    check_steps,
    make_batches,
    read_call,
    read_conditions,
    run,
    split_conditions,
)
from cemq.recipe import make_recipe

BATCH = Batch(conditions=(1,), seeds=(5,))


# Conditions.


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    (tmp_path / "calib.txt").write_bytes("a cat\r\na dog\r\n".encode("utf-8-sig"))
    assert read_conditions(tmp_path / "calib.txt") == ("a cat", "a dog")


def test_a_byte_order_mark_before_a_comment_does_not_make_it_a_prompt(tmp_path):
    (tmp_path / "calib.txt").write_bytes("# cats\na cat\n".encode("utf-8-sig"))
    assert read_conditions(tmp_path / "calib.txt") == ("a cat",)


def test_an_indented_comment_is_a_comment(tmp_path):
    (tmp_path / "calib.txt").write_text("  # cats\n\t#dogs\na cat # one\n")
    assert read_conditions(tmp_path / "calib.txt") == ("a cat # one",)


def test_only_a_line_break_ends_a_prompt(tmp_path):
    (tmp_path / "calib.txt").write_text("a cat\u2028that sleeps\x0cdeeply\na dog\n", encoding="utf-8")
    assert read_conditions(tmp_path / "calib.txt") == ("a cat\u2028that sleeps\x0cdeeply", "a dog")


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_named(tmp_path, encoding):
    (tmp_path / "calib.txt").write_bytes("ein Kätzchen".encode(encoding))
    with pytest.raises(InputError, match="not UTF-8 text"):
        read_conditions(tmp_path / "calib.txt")


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_that_comes_twice_is_never_held_out_from_itself(seed):
    conditions = tuple(f"prompt {number}" for number in range(10)) * 3
    profiled, held_out = split_conditions(conditions, profiled=5, seed=seed)
    assert len(profiled) == len(held_out) == 5
    assert not set(profiled) & set(held_out)


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1 << 64])
def test_a_seed_that_no_generator_takes_is_refused_before_a_run(seed):
    with pytest.raises(InputError, match=f"seed={seed}: seeds are whole numbers from 0 to {(1 << 63) - 1}"):
        Batch(conditions=(1,), seeds=(seed,))
    with pytest.raises(InputError, match="seed="):
        make_recipe({"seed": seed})
    with pytest.raises(InputError, match="seeds are whole numbers"):
        make_batches((1,), samples=2, first_seed=(1 << 63) - 1, batch_size=1)


# Arguments of the pipeline.


@pytest.mark.parametrize("text", ["1984", "a: b", "no", "null", "", "[a, b]", "1e5", "2001-12-01", "'quoted'", "3: {"])
def test_text_stays_text_where_the_pipeline_takes_text(text):
    for kind, name in (
        (D.StableDiffusion3Pipeline, "negative_prompt"),
        (D.StableDiffusion3Pipeline, "prompt_2"),
        (D.FluxPipeline, "negative_prompt_2"),
        (D.StableDiffusionXLPipeline, "negative_prompt"),
        (D.Lumina2Pipeline, "system_prompt"),
    ):
        assert read_call(kind, {name: text}) == {name: text}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("guidance_scale", "2.5", 2.5),
        ("guidance_scale", "1e-3", 1e-3),
        ("height", "512", 512),
        ("height", "null", None),  # which is its default
        ("sigmas", "[1.0, 0.5]", [1.0, 0.5]),
        ("joint_attention_kwargs", "{scale: 0.5}", {"scale": 0.5}),
        ("callback_on_step_end_tensor_inputs", "[latents]", ["latents"]),
    ],
)
def test_text_for_anything_else_is_read(name, text, value):
    assert read_call(D.StableDiffusion3Pipeline, {name: text}) == {name: value}


@pytest.mark.parametrize("text", ["abc", "", "[1, 2]", "{a: b}", "2001-12-01", "2001-13-45", "[" * 5000, "!!set {a}"])
def test_what_is_no_number_is_refused_where_a_number_is_wanted(text):
    with pytest.raises(InputError, match=r"--call guidance_scale=.*: StableDiffusion3Pipeline takes a number there"):
        read_call(D.StableDiffusion3Pipeline, {"guidance_scale": text})


@pytest.mark.parametrize("text", ["nan", ".nan", "inf", "-.inf", "1e999"])
def test_a_number_that_is_not_finite_is_refused(text):
    with pytest.raises(InputError, match=r"guidance_scale=-?(nan|inf): give a finite number"):
        read_call(D.StableDiffusion3Pipeline, {"guidance_scale": text})


def test_annotations_that_cannot_be_evaluated_leave_values_to_yaml():
    class Odd:
        def __call__(self, prompt, strength: "Nowhere" = 1.0, size=None):  # noqa: F821
            pass

    assert read_call(Odd, {"strength": "0.5", "size": "[1, 2]"}) == {"strength": 0.5, "size": [1, 2]}


@pytest.mark.parametrize(
    "value", [math.nan, datetime.date(2001, 12, 1), {1: 2}, {"a", "b"}, torch.zeros(2), [[math.inf]]],
    ids=["nan", "date", "number as a name", "set", "tensor", "nested"],
)  # fmt: skip
def test_what_a_bundle_cannot_write_down_is_refused_before_it_is_built(value):
    with pytest.raises(InputError, match=r"settings: call=.* is wrong: latents must be text, a finite number"):
        make_recipe({"call": {"latents": value}})


def test_a_value_that_holds_itself_is_refused():
    value = []
    value.append(value)
    with pytest.raises(InputError, match="latents must be text"):
        make_recipe({"call": {"latents": value}})


def test_a_picture_that_is_not_there_is_named_before_anything_is_loaded():
    with pytest.raises(
        InputError, match=r"--call image=/nowhere/cat.png: no picture can be read there \(no such file\)"
    ):
        read_call(D.StableDiffusion3Img2ImgPipeline, {"image": "/nowhere/cat.png"})
    address = {"image": "https://example.org/cat.png"}
    assert read_call(D.StableDiffusion3Img2ImgPipeline, address) == address


def test_a_bundle_made_of_a_relative_picture_knows_it_from_anywhere(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    found = read_call(D.StableDiffusion3Img2ImgPipeline, {"image": "cat.png", "strength": "0.5"})
    assert found == {"image": str(tmp_path / "cat.png"), "strength": 0.5}


def test_an_argument_that_is_not_the_callers_is_named():
    with pytest.raises(InputError, match=r"--call generator=\.\.\.: cemq sets this argument itself"):
        check_call(D.FluxPipeline, {"generator": "1"})
    with pytest.raises(InputError, match=r"unknown argument of FluxPipeline 'heigth'.*did you mean 'height'"):
        check_call(D.FluxPipeline, {"heigth": "1"})


# Pipelines that refuse.

FLUX_CALL = {"height": 16, "width": 16, "max_sequence_length": 16}


def refused(pipe, batch=Batch(conditions=("a cat",), seeds=(0,)), steps=2, **call):  # noqa: B008
    with pytest.raises(PipelineError) as caught:
        run(pipe, batch, steps=steps, call=call)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert caught.value.__cause__ is not None
    return message


def test_what_a_pipeline_refuses_names_the_arguments_the_reason_and_the_place(flux):
    said = refused(flux, **FLUX_CALL | {"max_sequence_length": 10_000})
    assert said.startswith("FluxPipeline cannot be run with num_inference_steps=2, height=16, width=16, max_sequence")
    assert (
        "`max_sequence_length` cannot be greater than 512 but is 10000 (ValueError in pipeline_flux.py, line " in said
    )


def test_what_a_pipeline_stumbles_over_is_one_line():
    said = refused(make_dit(), BATCH, guidance_scale="much")
    assert "guidance_scale='much': '>' not supported between" in said
    assert "(TypeError in pipeline_dit.py, line " in said
    flux = make_flux()
    assert "latents=3" in refused(flux, **FLUX_CALL, latents=3)
    assert "AttributeError in" in refused(flux, **FLUX_CALL, latents=3)


def test_image_to_image_without_an_image_is_one_line(flux):
    pipe = D.FluxImg2ImgPipeline(**flux.components)
    pipe.set_progress_bar_config(disable=True)
    assert "FluxImg2ImgPipeline cannot be run with num_inference_steps=2" in refused(pipe, **FLUX_CALL)


def test_a_long_value_is_cut_short(flux):
    assert len(refused(flux, **FLUX_CALL, sigmas=["x"] * 10_000)) < 500


def test_ctrl_c_and_errors_of_cemq_go_through_a_run_as_they_are(dit):
    for error in (KeyboardInterrupt(), InputError("mine"), Warning("other")):

        def stop(error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            run(dit, BATCH, steps=2, call={}, on_step=stop)
        assert caught.value is error


def test_a_missing_vae_or_text_encoder_is_known_before_any_run(flux):
    check_drivable(flux)
    parts = flux.components
    with pytest.raises(ModelError, match="FluxPipeline was loaded without a vae"):
        check_drivable(D.FluxPipeline(**parts | {"vae": None}))
    check_drivable(D.FluxPipeline(**parts | {"text_encoder": None}))  # there is another
    with pytest.raises(ModelError, match="FluxPipeline was loaded without text_encoder or text_encoder_2"):
        check_drivable(D.FluxPipeline(**parts | {"text_encoder": None, "text_encoder_2": None}))


def test_a_step_count_that_the_noise_scheduler_does_not_take_is_known_before_any_run(dit, flux):
    check_steps(dit, 1, 50, 1000)
    check_steps(flux, 1, 50, 5000)
    for steps in (1001, 1 << 64):
        with pytest.raises(InputError, match=f"steps={steps}: DDIMScheduler does not take it: "):
            check_steps(dit, 50, steps)


def test_a_build_tries_no_step_count_that_a_later_one_would_fail_at(dit_folder, tmp_path):
    with pytest.raises(InputError, match="steps=5000: DDIMScheduler does not take it"):
        cemq.quantize_and_schedule(str(dit_folder), tmp_path / "out", steps=4, also_steps=[5000], device="cpu")
    assert not (tmp_path / "out").exists()
