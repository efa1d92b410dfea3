"""Quantized diffusers models: casting, saving and loading, strictness, configs, bytes, imports."""

import copy
import json

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import load_file
from support.comparing import identical, relative
from support.pipelines import make_denoiser, predict
from support.processes import run_python
from support.quantized import eight_bits, saved_and_edited, schemes_of
from support.slow import others_slow
from torch import nn

from cemq.errors import BundleError, SchemeError
from cemq.quantize import BACKENDS, CemqConfig, check_scheme, quantize_in_place, schemes

BLOCK = "transformer_blocks.0"
FILE = "diffusion_pytorch_model.safetensors"
EXACT = ("weight_scale", "smooth", "up", "down")  # float tensors that no cast reaches
# every scheme as it is by default, and those that take them with a correction, smoothed, or both
CONFIGS = {scheme: {"scheme": scheme} for scheme in BACKENDS["native"].layers} | {
    "w8a8-smoothed": {"scheme": "w8a8", "smoothed": True},
    "w4a16-corrected": {"scheme": "w4a16", "low_rank": 4},
    "w4a8-both": {"scheme": "w4a8", "smoothed": True, "low_rank": 4},
}
every_config = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)


def quantized_model(scheme, **options):
    model = make_denoiser()
    quantize_in_place(model, CemqConfig(scheme, **options))
    return model


def cast_to(model, dtype):
    """What ``model.bfloat16()`` does; diffusers itself refuses ``model.to(dtype)`` once a model is quantized."""
    return nn.Module.to(model, dtype)


def saved(folder, scheme, edit, **options):
    """A quantized model on disk whose tensors went through ``edit``."""
    return saved_and_edited(quantized_model(scheme, **options), folder, edit)


# --- whole models


@every_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_leaves_the_scales_bit_for_bit(options, dtype):
    model = quantized_model(**options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cast_to(model, dtype)
    cast = 0
    for name, tensor in model.state_dict().items():
        if name.endswith(EXACT) or not before[name].is_floating_point():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
        else:
            cast += 1
            assert tensor.dtype == dtype
    assert cast


@every_config
def test_a_model_cast_to_bfloat16_stays_near_itself(options):
    model = quantized_model(**options)
    expected = predict(model)
    cast = predict(cast_to(model, torch.bfloat16))
    assert cast.dtype == torch.bfloat16
    assert relative(cast, expected) < 0.05


@every_config
def test_a_deep_copy_predicts_the_same_and_shares_nothing(options):
    model = quantized_model(**options)
    twin = copy.deepcopy(model)
    assert identical(model, twin)
    expected = predict(model)
    assert torch.equal(predict(twin), expected)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(predict(model), expected)


@every_config
def test_a_saved_model_reloads_bit_for_bit(tmp_path, options):
    model = quantized_model(**options)
    model.save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert identical(model, loaded)
    assert torch.equal(predict(model), predict(loaded))
    for (name, module), (_, other) in zip(model.named_modules(), loaded.named_modules(), strict=True):
        assert type(module) is type(other), name


@every_config
def test_a_reloaded_model_saves_the_same_files_again(tmp_path, options):
    quantized_model(**options).save_pretrained(tmp_path / "first")
    DiTTransformer2DModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / FILE) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0]["quantization_config"].items() >= {"quant_method": "cemq", "backend": "native", **options}.items()


@every_config
def test_reloading_in_bfloat16_keeps_integers_and_scales_bit_for_bit(tmp_path, options):
    model = quantized_model(**options)
    model.save_pretrained(tmp_path)
    expected = predict(model)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert relative(predict(loaded), expected) < 0.05
    assert identical(cast_to(model, torch.bfloat16), loaded)
    exact = {name: tensor for name, tensor in loaded.state_dict().items() if name.endswith(EXACT)}
    stored = load_file(tmp_path / FILE)
    assert len(exact) >= 18
    assert all(t.dtype == stored[name].dtype and torch.equal(t, stored[name]) for name, t in exact.items())


@every_config
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 0), (torch.bfloat16, 0.05)])
def test_quantizing_while_loading_equals_quantizing_in_place(tmp_path, options, dtype, off):
    make_denoiser().save_pretrained(tmp_path)
    config = CemqConfig(**options)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=config, torch_dtype=dtype)
    model = cast_to(quantized_model(**options), dtype)  # the stored float32 weights are rounded once, not twice
    assert identical(loaded, model)
    # a cast rounds the position table as well, from_pretrained leaves it in float32 (so it does without cemq)
    assert torch.allclose(predict(loaded), predict(model), rtol=0, atol=off)


@every_config
def test_a_model_quantized_while_loading_saves_and_reloads(tmp_path, options):
    make_denoiser().save_pretrained(tmp_path / "float")
    config = CemqConfig(**options)
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "quantized")
    assert identical(DiTTransformer2DModel.from_pretrained(tmp_path / "quantized"), model)


def test_only_safetensors_and_json_are_written(tmp_path):
    quantized_model("w4a8", smoothed=True, low_rank=4).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", FILE]


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("w8a8", f"{BLOCK}.attn1.to_q.weight"),
        ("w8a8", f"{BLOCK}.attn1.to_q.weight_scale"),
        ("w8a8", f"{BLOCK}.attn1.to_q.weight_sum"),
        ("w4a8", f"{BLOCK}.attn1.to_q.weight"),
        ("w4a8", f"{BLOCK}.attn1.to_q.group_scale"),
        ("w4a8", f"{BLOCK}.attn1.to_q.smooth"),
        ("w4a8", f"{BLOCK}.attn1.to_q.down"),
        ("w4a8", f"{BLOCK}.attn1.to_q.bias"),
        ("w4a8", "pos_embed.proj.weight"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, scheme, name):
    folder = saved(tmp_path, scheme, lambda tensors: tensors.pop(name), smoothed=True, low_rank=4)
    with pytest.raises(BundleError, match=rf"DiTTransformer2DModel lacks 1 tensors \({name}\)"):
        DiTTransformer2DModel.from_pretrained(folder)


@pytest.mark.parametrize("leaf", ["weight", "weight_scale", "weight_sum", "group_scale", "smooth", "up", "down"])
def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path, leaf):
    name = f"{BLOCK}.ff.net.2.{leaf}"

    def widen(tensors):
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    folder = saved(tmp_path, "w4a8", widen, smoothed=True, low_rank=4)
    with pytest.raises(BundleError, match=rf"tensor '{name}' is .*expected .*not written under this config"):
        DiTTransformer2DModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("leaf", "dtype"), [("weight", torch.float32), ("weight_scale", torch.bfloat16), ("up", torch.float32)]
)
def test_a_tensor_of_another_dtype_is_refused_by_name(tmp_path, leaf, dtype):
    name = f"{BLOCK}.ff.net.2.{leaf}"

    def convert(tensors):
        tensors[name] = tensors[name].to(dtype)

    folder = saved(tmp_path, "w4a16", convert, low_rank=4)
    with pytest.raises(BundleError, match=rf"tensor '{name}' is .*{dtype}, expected"):
        DiTTransformer2DModel.from_pretrained(folder)


def test_a_bias_of_another_shape_is_refused_by_name(tmp_path):
    name = f"{BLOCK}.ff.net.2.bias"

    def widen(tensors):
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    # of tensors that are not quantized diffusers compares the shapes itself
    with pytest.raises(ValueError, match=rf"{name} expected shape"):
        DiTTransformer2DModel.from_pretrained(saved(tmp_path, "w8a8", widen))


# --- configuration


def test_full_precision_patterns_are_respected():
    model, plain = make_denoiser(), make_denoiser()
    count = quantize_in_place(model, CemqConfig("w4a8", full_precision=["proj_out_1", "*.attn1.*"]))
    schemes = schemes_of(model)
    linears = [name for name, module in plain.named_modules() if type(module) is nn.Linear]
    assert count == len(schemes) == len(linears) - 1 - 2 * 4
    assert "proj_out_2" in schemes
    for name in set(linears) - set(schemes):
        assert name == "proj_out_1" or ".attn1." in name
        assert torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight)


def test_the_layers_around_the_blocks_stay_in_full_precision():
    model = quantized_model("w8a8")
    outside = {name for name in schemes_of(model) if not name.startswith("transformer_blocks.")}
    assert outside == {"proj_out_1"}  # a modulation; the output layer is proj_out_2
    assert type(model.proj_out_2) is nn.Linear


def test_nothing_left_to_quantize_is_refused():
    model = make_denoiser()
    with pytest.raises(SchemeError, match="DiTTransformer2DModel has no linear layer outside the full-precision"):
        quantize_in_place(model, CemqConfig("w8a8", full_precision=["*"]))
    assert identical(model, make_denoiser())


def test_eight_bit_patterns_take_eight_bits_in_a_four_bit_scheme():
    assert eight_bits(quantized_model("w4a8")) == {
        f"transformer_blocks.{block}.{name}"
        for block in (0, 1)
        for name in ("norm1.linear", "norm1.emb.timestep_embedder.linear_1", "norm1.emb.timestep_embedder.linear_2")
    } | {"proj_out_1"}
    model = quantized_model("w4a8", eight_bit=["*.ff.*"])
    assert eight_bits(model) == {name for name in schemes_of(model) if ".ff." in name}


def test_corrections_go_with_four_bit_weights_and_smoothing_with_eight_bit_activations():
    for config in (CemqConfig("w4a8", smoothed=True, low_rank=4), CemqConfig("w4a16", smoothed=True, low_rank=4)):
        narrow, wide = config.scheme_for("block.ff"), config.scheme_for("block.norm1.linear")
        assert (narrow.weight_bits, narrow.low_rank, wide.weight_bits, wide.low_rank) == (4, 4, 8, 0)
        assert narrow.smoothed == wide.smoothed == (config.scheme == "w4a8")
        assert narrow.activation_bits == wide.activation_bits


def test_other_layers_at_eight_bits_change_nothing_else():
    config = CemqConfig("w4a8", full_precision=["a"], low_rank=4, smoothed=True)
    assert config.with_eight_bit(["b"]).to_dict() == config.to_dict() | {"eight_bit": ["b"]}


def test_custom_patterns_survive_saving(tmp_path):
    model = quantized_model("w4a8", full_precision=["*.attn1.to_q"], eight_bit=["*.ff.*"], smoothed=True, low_rank=3)
    model.save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert schemes_of(loaded) == schemes_of(model)
    assert identical(loaded, model)


def test_an_unknown_scheme_names_the_nearest_one():
    with pytest.raises(SchemeError, match=r"unknown scheme 'w4a4'.*did you mean 'w4a8'"):
        CemqConfig("w4a4")


def test_the_scheme_none_is_no_quantization_config():
    check_scheme("none")
    with pytest.raises(SchemeError, match="quantizes nothing: leave the quantization config out"):
        CemqConfig("none")


def test_an_unknown_backend_is_refused():
    with pytest.raises(SchemeError, match="unknown backend 'cuda': choose from native"):
        check_scheme("w8a8", "cuda")


def test_a_scheme_that_a_backend_lacks_names_those_that_have_it():
    with pytest.raises(SchemeError, match=r"'bitsandbytes' does not offer w4a8, only .*--backend native or quanto"):
        check_scheme("w4a8", "bitsandbytes")


def test_a_backend_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(schemes, "find_spec", lambda name: None)
    with pytest.raises(SchemeError, match=r"needs the package optimum.quanto.*pip install 'cemq\[quanto\]'"):
        check_scheme("w8a8", "quanto")


@pytest.mark.parametrize("options", [{"low_rank": 4}, {"smoothed": True}])
def test_corrections_and_smoothing_are_for_the_native_backend(monkeypatch, options):
    monkeypatch.setattr(schemes, "installed", lambda backend: True)
    with pytest.raises(
        SchemeError, match="'quanto' has no low-rank correction and no smoothing: take --backend native"
    ):
        CemqConfig("w4a8", backend="quanto", **options)


def test_an_unknown_config_key_is_refused():
    with pytest.raises(SchemeError, match="unknown keys: colour, group"):
        CemqConfig("w8a8", group=3, colour="red")


def test_an_unknown_key_in_a_saved_config_is_refused(tmp_path):
    folder = saved(tmp_path, "w8a8", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["colour"] = "red"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SchemeError, match="unknown keys: colour"):
        DiTTransformer2DModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"scheme": "w8a8"}, 0.30),
        ({"scheme": "w4a8"}, 0.20),
        ({"scheme": "w4a8", "smoothed": True, "low_rank": 8}, 0.21),
        ({"scheme": "w4a16", "eight_bit": ()}, 0.19),
    ],
)
def test_parameters_shrink_to_near_their_bits(options, share):
    # PixArt shares one modulation layer among all blocks; in a DiT of two blocks the modulation, which keeps 8 bits,
    # and the output layers, which keep 32, are too large a part of the whole to show what 4 bits buy.
    model = PixArtTransformer2DModel(
        num_attention_heads=8, attention_head_dim=64, cross_attention_dim=512, in_channels=4, out_channels=4,
        num_layers=2, sample_size=16, patch_size=2, caption_channels=32, norm_num_groups=1,
    )  # fmt: skip
    before = sum(4 * parameter.numel() for parameter in model.parameters())
    quantize_in_place(model, CemqConfig(**options))
    assert sum(parameter.nbytes for parameter in model.parameters()) <= share * before


# --- imports


@pytest.mark.parametrize(
    "imports",
    others_slow(
        [
            "import cemq; import diffusers.quantizers.auto",
            "import cemq; from diffusers import DiTTransformer2DModel",
            "import diffusers.quantizers.auto; import cemq",
        ],
        ["import cemq; from diffusers import DiTTransformer2DModel"],
    ),
)
def test_diffusers_knows_cemq_whichever_is_imported_first(imports):
    code = f"{imports}\nfrom diffusers.quantizers import auto\nprint('cemq' in auto.AUTO_QUANTIZER_MAPPING)"
    assert run_python(code) == "True"


def test_importing_cemq_loads_neither_torch_nor_diffusers():
    assert run_python("import sys, cemq; print([m for m in ('torch', 'diffusers') if m in sys.modules])") == "[]"
