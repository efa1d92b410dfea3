"""From the settings of a build to quantized components."""

import itertools
import json
from pathlib import Path

import diffusers as D
import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.utils import load_image
from support.families import flux2_parts, picture, qwen3, tokenizer
from support.pipelines import make_dit
from support.quantized import eight_bits, schemes_of
from torch import nn
from transformers import Qwen3ForCausalLM

import cemq
from cemq.bundle.manifest import read_bundle
from cemq.errors import InputError, ReplayError, SchemeError
from cemq.families import EIGHT_BIT, FULL_PRECISION, matches
from cemq.quantize import (
    CemqConfig,
    QuantizationSettings,
    choose_eight_bit,
    quantize_pipeline,
    record_calls,
    schemes,
)

QUICK = {"solver": "uniform", "effort": "quick", "rectify": "none", "planning_samples": 1}
SETTINGS = {"steps": 6, "budget": 3, "samples": 2, "call": {"guidance_scale": 2.0}, **QUICK}


@pytest.fixture
def everything_installed(monkeypatch):
    monkeypatch.setattr(schemes, "installed", lambda backend: True)


@pytest.fixture
def wide_dit():
    """Of layers that four bits make smaller than eight do: groups of 64 fill them."""
    return make_dit(head_dim=64)


@torch.no_grad()
def recorded(pipe):
    with record_calls(pipe.transformer, every=1) as calls:
        pipe(class_labels=[1, 2], num_inference_steps=2, guidance_scale=2.0, output_type="latent")
    return {"transformer": calls}


# --- what goes together


@pytest.mark.parametrize(
    ("error", "message", "plan"),
    [
        (InputError, "low rank: only 4-bit schemes of the native backend", {"scheme": "w8a8", "low_rank": 8}),
        (InputError, "low rank: ", {"scheme": "w4a8", "low_rank": 8, "backend": "quanto"}),
        (InputError, "low rank: ", {"scheme": "none", "low_rank": 8}),
        (InputError, "bits budget: only 4-bit schemes of the native", {"scheme": "w8a16", "bits_budget": 8.5}),
        (InputError, "bits budget: ", {"scheme": "w4a16", "bits_budget": 5, "backend": "bitsandbytes"}),
        (InputError, "components to quantize are named, but", {"scheme": "none", "components": ["transformer"]}),
        (
            InputError,
            "bits budget: only the denoiser takes it, and the components are text_encoder: name it too",
            {"scheme": "w4a8", "bits_budget": 5, "components": ["text_encoder"]},
        ),
        (InputError, "low rank: only the denoiser", {"scheme": "w4a8", "low_rank": 8, "components": ["text_encoder"]}),
        (InputError, "one is named twice", {"scheme": "w8a8", "components": ["transformer", "transformer"]}),
        (SchemeError, "unknown scheme 'w2a8'", {"scheme": "w2a8"}),
        (SchemeError, "'native' does not offer w4a16-fp4.*bitsandbytes", {"scheme": "w4a16-fp4"}),
    ],
)
@pytest.mark.usefixtures("everything_installed")
def test_what_does_not_go_together_is_refused(error, message, plan):
    with pytest.raises(error, match=message):
        QuantizationSettings(**plan).check()


@pytest.mark.parametrize(
    "plan",
    [
        {"scheme": "none"},
        {"scheme": "w4a8", "low_rank": 8, "bits_budget": 5, "smoothed": True},
        {"scheme": "w4a16", "gptq": False, "low_rank": 8},
        {"scheme": "w8a16", "components": ["text_encoder"]},
    ],
)
def test_what_goes_together_is_accepted(plan):
    QuantizationSettings(**plan).check()


@pytest.mark.usefixtures("everything_installed")
def test_layers_at_eight_bits_go_with_the_rounding(dit):
    for plan, expected in (
        ({}, choose_eight_bit(dit.transformer, CemqConfig("w4a8"))), ({"gptq": False}, EIGHT_BIT),
        ({"backend": "quanto"}, EIGHT_BIT),
    ):  # fmt: skip
        assert QuantizationSettings(scheme="w4a8", **plan).config(dit.transformer).eight_bit == list(expected)
    assert not QuantizationSettings(scheme="w8a8").config(dit.transformer).eight_bit


def test_a_budget_of_weights_that_are_rounded_goes_to_modulation_first(wide_dit):
    plan = QuantizationSettings(scheme="w4a8", gptq=False, bits_budget=5)
    chosen = plan.config(wide_dit.transformer).eight_bit
    assert chosen
    assert all(matches(name, EIGHT_BIT) for name in chosen)


def test_the_plan_reaches_the_config(dit):
    config = QuantizationSettings(scheme="w4a8", low_rank=3, smoothed=True, full_precision=["a*"]).config(
        dit.transformer
    )
    assert (config.low_rank, config.smoothed, config.full_precision) == (3, True, ["a*"])
    config = QuantizationSettings(scheme="w4a16", smoothed=True).config(dit.transformer)
    assert (config.low_rank, config.smoothed, config.full_precision) == (0, False, list(FULL_PRECISION))


@pytest.mark.parametrize(
    ("needed", "plan"),
    [
        (True, {}),
        (False, {"gptq": False}),
        (True, {"gptq": False, "smoothed": True}),
        (False, {"gptq": False, "smoothed": True, "scheme": "w4a16"}),
        (False, {"gptq": False, "bits_budget": 20.0}),
        (True, {"backend": "quanto"}),
        (False, {"backend": "quanto", "scheme": "w4a16"}),
        (False, {"scheme": "none"}),
        (False, {"components": ["text_encoder"]}),
        (True, {"components": ["text_encoder", "transformer"]}),
    ],
)
def test_calls_are_recorded_only_where_something_is_fitted_to_them(dit, needed, plan):
    if plan.get("backend") == "quanto":
        pytest.importorskip("optimum.quanto")
    assert QuantizationSettings(**{"scheme": "w4a8"} | plan).is_fitted(dit.transformer) == needed


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ("component 'vae' stays in full precision: name the denoiser or text encoders", "vae"),
        ("unknown component of FluxPipeline 'text_encoder_3'.*did you mean 'text_encoder", "text_encoder_3"),
        ("unknown component of FluxPipeline 'scheduler': choose from", "scheduler"),
    ],
)
def test_only_denoisers_and_text_encoders_are_quantized(flux, message, name):
    QuantizationSettings(scheme="w8a8", components=["transformer", "text_encoder", "text_encoder_2"]).check_pipeline(
        flux
    )
    with pytest.raises(InputError, match=message):
        QuantizationSettings(scheme="w8a8", components=["transformer", name]).check_pipeline(flux)


def test_a_budget_that_is_too_small_is_refused_before_anything_runs(wide_dit):
    QuantizationSettings(scheme="w4a8", bits_budget=5).check_pipeline(wide_dit)
    with pytest.raises(InputError, match=r"bits budget 4.2: w4a8 needs 4\.\d\d bits a weight at least"):
        QuantizationSettings(scheme="w4a8", bits_budget=4.2).check_pipeline(wide_dit)


def test_where_calls_cannot_be_replayed_native_weights_are_rounded_and_other_backends_give_up():
    reason = ReplayError("a call cannot be replayed")
    rounded = QuantizationSettings(scheme="w4a8", smoothed=True, bits_budget=5.0).without_calls(reason)
    assert rounded == QuantizationSettings(scheme="w4a8", gptq=False, bits_budget=5.0)
    with pytest.raises(ReplayError, match="a call cannot be replayed, and quanto is fitted to calls: take --backend n"):
        QuantizationSettings(scheme="w4a8", backend="quanto").without_calls(reason)


# --- quantizing a pipeline


def test_only_the_named_components_are_quantized(flux):
    quantize_pipeline(flux, QuantizationSettings(scheme="w4a8", components=["text_encoder_2"]), {})
    assert not schemes_of(flux.transformer)
    assert not schemes_of(flux.text_encoder)
    assert {scheme.name for scheme in schemes_of(flux.text_encoder_2).values()} == {"w4a16", "w8a16"}
    quantize_pipeline(flux, QuantizationSettings(scheme="w8a8", gptq=False), {})
    assert {scheme.name for scheme in schemes_of(flux.transformer).values()} == {"w8a8"}
    assert not schemes_of(flux.text_encoder)


def test_the_scheme_none_quantizes_nothing(dit):
    quantize_pipeline(dit, QuantizationSettings(scheme="none"), {})
    assert not schemes_of(dit.transformer)


def test_a_plan_that_needs_calls_is_refused_without(dit):
    with pytest.raises(SchemeError, match="native w4a8 is fitted to recorded inputs, and none were recorded"):
        quantize_pipeline(dit, QuantizationSettings(scheme="w4a8"), {})
    assert not schemes_of(dit.transformer)


def test_a_budget_of_bits_raises_layers_and_says_how_far_it_is(wide_dit):
    reports = {}
    plan = QuantizationSettings(scheme="w4a8", bits_budget=5.5)
    quantize_pipeline(
        wide_dit, plan, recorded(wide_dit), lambda stage, share: reports.setdefault(stage, []).append(share)
    )
    model = wide_dit.transformer
    assert 0 < len(eight_bits(model)) < len(schemes_of(model))
    assert set(model.config.quantization_config.eight_bit) == eight_bits(model)
    assert list(reports) == ["quantization"]
    assert all(shares == sorted(shares) and shares[-1] == 1 for shares in reports.values())


def test_a_budget_that_is_too_small_is_refused(wide_dit):
    with pytest.raises(InputError, match=r"bits budget 4.2: w4a8 needs 4\.\d\d bits a weight at least"):
        quantize_pipeline(wide_dit, QuantizationSettings(scheme="w4a8", bits_budget=4.2), recorded(wide_dit))
    assert not schemes_of(wide_dit.transformer)


# --- whole builds


def build(folder, *, head_dim=16, **settings):
    make_dit(head_dim=head_dim).save_pretrained(folder / "pipeline")
    (folder / "labels.txt").write_text("1\n2\n3\n")
    calib = str(folder / "labels.txt")
    cemq.quantize_and_schedule(str(folder / "pipeline"), folder / "bundle", calib=calib, **SETTINGS, **settings)
    pipe = cemq.from_pretrained(folder / "bundle", device="cpu")
    return pipe.transformer, read_bundle(folder / "bundle").recipe


def test_weights_are_fitted_unless_rounding_to_nearest_is_asked_for(tmp_path):
    fitted, recipe = build(tmp_path / "gptq", scheme="w4a8")
    assert "rounding" not in recipe
    rounded, recipe = build(tmp_path / "nearest", scheme="w4a8", rounding="nearest")
    assert recipe["rounding"] == "nearest"
    assert eight_bits(fitted) == set(choose_eight_bit(make_dit().transformer, CemqConfig("w4a8")))
    assert eight_bits(rounded) != eight_bits(fitted)
    name = "transformer_blocks.0.attn1.to_q.weight"
    weights = [model.get_parameter(name) for model in (fitted, rounded)]
    assert not torch.equal(*weights)
    plain = make_dit().transformer
    cemq.quantize_in_place(plain, cemq.CemqConfig("w4a8"))
    assert torch.equal(weights[1], plain.get_parameter(name))


def test_every_setting_reaches_the_bundle(tmp_path):
    settings = {"scheme": "w4a8", "smoothed": True, "low_rank": 2, "bits_budget": 6.5, "full_precision": ["proj_out*"]}
    model, recipe = build(tmp_path, head_dim=64, components=["transformer"], **settings)
    found = schemes_of(model)
    assert recipe.items() >= settings.items()
    assert all(scheme.smoothed and scheme.low_rank == 2 * (scheme.weight_bits == 4) for scheme in found.values())
    assert 0 < len(eight_bits(model)) < len(found)
    stored = json.loads((tmp_path / "bundle" / "transformer" / "config.json").read_text())["quantization_config"]
    assert (stored["low_rank"], stored["smoothed"], stored["full_precision"]) == (2, True, ["proj_out*"])
    assert set(stored["eight_bit"]) == eight_bits(model)


def test_text_encoders_are_quantized_where_they_are_named(tmp_path):
    cemq.quantize_and_schedule(
        "builtin:sd3-digits", tmp_path / "bundle", scheme="w4a8", rounding="nearest", steps=4, budget=2, samples=1,
        components=["transformer", "text_encoder_2"], **QUICK,
    )  # fmt: skip
    pictures = []
    for _ in range(2):
        pipe = cemq.from_pretrained(tmp_path / "bundle", device="cpu")
        pipe.set_progress_bar_config(disable=True)
        assert not schemes_of(pipe.text_encoder)
        assert {scheme.name for scheme in schemes_of(pipe.text_encoder_2).values()} == {"w4a16"}
        assert {scheme.name for scheme in schemes_of(pipe.transformer).values()} == {"w4a8", "w8a8"}
        assert any(type(module) is nn.Linear for module in pipe.text_encoder.modules())
        pictures.append(
            pipe("a bold seven", num_inference_steps=4, height=32, width=32, generator=torch.manual_seed(0)).images[0]
        )
    assert pictures[0].tobytes() == pictures[1].tobytes()


@pytest.fixture
def forgetful_dit(monkeypatch):
    """The class of a denoiser that answers another way each time: a call of it cannot be replayed."""
    counts, forward = itertools.count(), DiTTransformer2DModel.forward

    def drifting(self, hidden_states, *args, **kwargs):
        return forward(self, hidden_states * (1 + 0.1 * next(counts)), *args, **kwargs)

    monkeypatch.setattr(DiTTransformer2DModel, "forward", drifting)


@pytest.mark.usefixtures("forgetful_dit", "everything_installed")
@pytest.mark.parametrize("settings", [{"smoothed": True}, {"backend": "quanto"}])
def test_what_cannot_be_replayed_is_fitted_while_it_runs(tmp_path, caplog, settings):
    with caplog.at_level("WARNING", "cemq.build"):
        model, _ = build(tmp_path, head_dim=64, scheme="w4a8", batch_size=1, **settings)
    assert not caplog.messages
    if "backend" not in settings:
        assert not any(matches(name, EIGHT_BIT) for name in eight_bits(model))  # as if they were only rounded


def test_a_pipeline_that_empties_its_cache_is_fitted_to_what_was_in_it():
    """FLUX.2 Klein with a KV cache of its reference picture: extracted on the first step, used, and cleared."""
    pipe = D.Flux2KleinKVPipeline(
        **flux2_parts(False), text_encoder=qwen3(Qwen3ForCausalLM), tokenizer=tokenizer("qwen", 64)
    )
    pipe.set_progress_bar_config(disable=True)
    with record_calls(pipe.transformer, every=1) as calls:
        pipe(
            prompt="a cat", image=load_image(picture(64)), num_inference_steps=3, height=16, width=16,
            max_sequence_length=32, text_encoder_out_layers=[1], output_type="latent",
        )  # fmt: skip
    assert [call.keywords["kv_cache_mode"] for call in calls] == ["extract", "cached", "cached"]
    quantize_pipeline(pipe, QuantizationSettings(scheme="w8a8"), {"transformer": calls})
    assert schemes_of(pipe.transformer)


def test_nothing_is_written_where_a_build_fails(tmp_path):
    make_dit().save_pretrained(tmp_path / "pipeline")
    with pytest.raises(InputError, match=r"bits budget 4\.1"):
        cemq.quantize_and_schedule(
            str(tmp_path / "pipeline"), tmp_path / "bundle", scheme="w4a8", bits_budget=4.1, **SETTINGS
        )
    assert [path.name for path in Path(tmp_path).iterdir()] == ["pipeline"]
