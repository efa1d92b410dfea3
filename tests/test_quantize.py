import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from cemq.errors import BundleError, SchemeError
from cemq.quantize import SCHEMES, CemqConfig, QuantizedLinear, check_scheme, quantize_in_place
from cemq.quantize.integers import (
    _padded_matmul,
    expand_int4,
    integer_matmul,
    pack_int4,
    quantize_channels,
    quantize_int4,
    quantize_tokens,
    unpack_int4,
)

SIZES, SEEDS = st.integers(1, 70), st.integers(0, 10**6)
BLOCK = "transformer_blocks.0"
FILE = "diffusion_pytorch_model.safetensors"
both_schemes = pytest.mark.parametrize("scheme", SCHEMES)


def make_model():
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip


@torch.no_grad()
def predict(model):
    """Three images of sixteen tokens, so that the blocks run in integers and the embeddings weight-only."""
    torch.manual_seed(1)
    sample = torch.randn(3, 4, 8, 8).to(model.pos_embed.proj.weight.dtype)
    return model(sample, timestep=torch.tensor([5, 50, 500]), class_labels=torch.tensor([1, 2, 3])).sample


def quantized_model(scheme):
    model = make_model()
    quantize_in_place(model, CemqConfig(scheme))
    return model


def cast_to(model, dtype):
    """What ``model.bfloat16()`` does; diffusers itself refuses ``model.to(dtype)`` once a model is quantized."""
    return nn.Module.to(model, dtype)


def identical(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def saved(folder, scheme, edit):
    """A quantized model on disk whose tensors went through ``edit``."""
    quantized_model(scheme).save_pretrained(folder)
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


def random_int8(seed, *shape):
    """Any int8, or only the extremes, where a product that saturates on the way would show."""
    random = np.random.default_rng(seed)
    values = random.integers(-128, 128, shape) if seed % 2 else random.choice([-128, 127], shape)
    return torch.from_numpy(values.astype(np.int8))


def run_python(code, **variables):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | variables
    ).stdout.strip()


# --- integers


@given(rows=SIZES, inner=SIZES, columns=SIZES, seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_the_integer_product_is_exact(rows, inner, columns, seed):
    left, right = random_int8(seed, rows, inner), random_int8(seed + 2, columns, inner)
    expected = left.numpy().astype(np.int64) @ right.numpy().astype(np.int64).T
    plain, padded = integer_matmul(left, right), _padded_matmul(left, right, min_rows=17, multiple=8)
    assert plain.dtype == padded.dtype == torch.int32
    assert np.array_equal(plain.numpy(), expected)
    assert np.array_equal(padded.numpy(), expected)


def test_the_integer_product_of_a_long_row_of_extremes_is_exact():
    left, right = torch.full((32, 8192), -128, dtype=torch.int8), torch.full((3, 8192), -128, dtype=torch.int8)
    assert (integer_matmul(left, right) == 128 * 128 * 8192).all()


def test_the_integer_product_is_exact_on_a_processor_without_vnni():
    # oneDNN adds pairs of products in 16 bits there, and saturates: pytorch/pytorch#136746
    code = """
import torch
from cemq.quantize.integers import integer_matmul
left = torch.tensor([[127, 127], [-128, 100]], dtype=torch.int8).repeat(16, 32)
right = torch.tensor([[127, 127], [-127, -127], [127, -127]], dtype=torch.int8).repeat(1, 32)
print(torch.equal(integer_matmul(left, right).long(), left.long() @ right.long().T))
"""
    assert run_python(code, ONEDNN_MAX_CPU_ISA="AVX2") == "True"


@given(rows=SIZES, pairs=SIZES, seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_packing_int4_loses_nothing_and_halves_the_bytes(rows, pairs, seed):
    values = torch.from_numpy(np.random.default_rng(seed).integers(-8, 8, (rows, 2 * pairs)).astype(np.int8))
    packed = pack_int4(values)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, pairs)
    assert torch.equal(unpack_int4(packed), values)


def test_the_even_column_sits_in_the_low_half_byte():
    assert pack_int4(torch.tensor([[-8, 7, 0, 1]], dtype=torch.int8)).tolist() == [[0xF0, 0x98]]


@given(rows=SIZES, columns=SIZES, group_size=st.sampled_from([2, 8, 64]), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_expanded_int4_is_int4_times_its_group_scale_and_fits_in_int8(rows, columns, group_size, seed):
    random = np.random.default_rng(seed)
    weight = random.standard_t(2, (rows, columns)).astype(np.float32)
    packed, group_scale, scale = quantize_int4(torch.from_numpy(weight), group_size)
    expanded = expand_int4(packed, group_scale, columns)
    assert expanded.dtype == torch.int8
    assert expanded.shape == (rows, columns)
    assert group_scale.min() >= 1
    assert group_scale.max() <= 18
    for row in range(rows):
        for column in range(columns):
            byte = int(packed[row, column // 2])
            int4 = (byte >> 4 if column % 2 else byte & 15) - 8
            assert -7 <= int4 <= 7
            assert int(expanded[row, column]) == int4 * int(group_scale[row, column // group_size])
    assert np.allclose(scale.squeeze(1), np.abs(weight).max(1) / 126, rtol=1e-6)


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_an_int4_group_scale_is_the_best_of_the_largest_four(seed):
    weight = np.random.default_rng(seed).standard_t(3, (4, 32)).astype(np.float32)
    packed, group_scale, scale = quantize_int4(torch.from_numpy(weight), 8)
    stored = expand_int4(packed, group_scale, 32).numpy() * scale.numpy()
    for row in range(4):
        for group in range(4):
            part, unit = weight[row, 8 * group : 8 * group + 8].astype(np.float64), float(scale[row])
            largest = min(18, max(1, int(np.ceil(np.float32(abs(part).max()) / np.float32(7 * unit)))))
            errors = []
            for candidate in {max(1, largest - trial) for trial in range(4)}:
                step = candidate * unit
                errors.append(np.sum((np.clip(np.round(part / step), -7, 7) * step - part) ** 2))
            error = np.sum((stored[row, 8 * group : 8 * group + 8] - part) ** 2)
            assert error == pytest.approx(min(errors), rel=1e-4, abs=1e-12)


@given(rows=SIZES, channels=SIZES, seed=SEEDS, offset=st.sampled_from([-30.0, 0.0, 3.0]))
@settings(max_examples=40, deadline=None)
def test_quantized_tokens_are_off_by_half_a_step_at_most_and_zero_stays_zero(rows, channels, seed, offset):
    random = np.random.default_rng(seed)
    values = (random.normal(size=(rows, channels)) * 10.0 ** random.uniform(-6, 4, (rows, 1)) + offset).astype("f4")
    values[random.random(values.shape) < 0.2] = 0
    quantized, scale, zero_point = (t.numpy() for t in quantize_tokens(torch.from_numpy(values)))
    assert (quantized.dtype, scale.dtype, zero_point.dtype) == (np.int8, np.float32, np.int32)
    assert zero_point.min() >= -128
    assert zero_point.max() <= 127
    assert (quantized == zero_point)[values == 0].all()
    restored = (quantized.astype(np.float64) - zero_point) * scale
    assert (np.abs(restored - values) <= 0.5001 * scale).all()


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5, 1e-20, -1e30])
def test_constant_tokens_survive_quantization(value):
    quantized, scale, zero_point = quantize_tokens(torch.full((3, 5), value))
    restored = (quantized.double() - zero_point) * scale
    assert restored == pytest.approx(np.full((3, 5), value), rel=1e-6, abs=1e-11)


@given(rows=SIZES, columns=SIZES, seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_quantized_channels_are_off_by_half_a_step_at_most(rows, columns, seed):
    random = np.random.default_rng(seed)
    weight = (random.normal(size=(rows, columns)) * 10.0 ** random.uniform(-6, 4, (rows, 1))).astype("f4")
    quantized, scale = (t.numpy() for t in quantize_channels(torch.from_numpy(weight)))
    assert (quantized.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (rows, 1))
    assert quantized.min() >= -127
    assert (np.abs(quantized.astype(np.float64) * scale - weight) <= 0.5001 * scale).all()


def test_weights_that_fit_the_grid_are_unchanged():
    integers = np.random.default_rng(0).integers(-127, 128, (6, 20)).astype(np.float32)
    integers[:, 3] = 127
    weight = torch.from_numpy(integers * 2.0 ** np.arange(-9, 3, 2, dtype=np.float32)[:, None])
    quantized, scale = quantize_channels(weight)
    assert torch.equal(quantized, torch.from_numpy(integers.astype(np.int8)))
    assert torch.equal(quantized * scale, weight)


@both_schemes
def test_a_channel_of_zeros_stays_zero(scheme):
    linear = nn.Linear(70, 3, bias=False)
    linear.weight.data[1] = 0
    output = QuantizedLinear.from_linear(linear, SCHEMES[scheme])(torch.randn(40, 70))
    assert (output[:, 1] == 0).all()
    assert (output[:, 0] != 0).any()


# --- the linear layer


def dequantized(layer):
    """The float64 weight a layer stands for, read off its tensors."""
    weight = layer.weight.numpy()
    if weight.dtype == np.uint8:
        halves = np.stack([weight & 15, weight >> 4], -1).reshape(len(weight), -1).astype(np.int64) - 8
        weight = (halves * np.repeat(layer.group_scale.numpy(), 64, axis=1))[:, : layer.in_features]
    return weight.astype(np.int64), layer.weight_scale.numpy().astype(np.float64)


def float_linear(inner, columns, bias, seed):
    torch.manual_seed(seed)
    return nn.Linear(inner, columns, bias=bias)


@both_schemes
@given(rows=st.integers(32, 70), inner=SIZES, columns=SIZES, bias=st.booleans(), seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_many_rows_run_as_one_integer_product(scheme, rows, inner, columns, bias, seed):
    linear = float_linear(inner, columns, bias, seed)
    layer = QuantizedLinear.from_linear(linear, SCHEMES[scheme])
    values = F.gelu(2 * torch.randn(rows, inner))
    low, high = values.numpy().min(1, keepdims=True), values.numpy().max(1, keepdims=True)
    token_scale = np.maximum((np.maximum(high, 0) - np.minimum(low, 0)) / np.float32(255), np.float32(1e-12))
    zero_point = np.round(np.float32(-128) - np.minimum(low, 0) / token_scale)
    tokens = np.clip(np.round(values.numpy() / token_scale) + zero_point, -128, 127)
    weight, weight_scale = dequantized(layer)
    product = (tokens.astype(np.int64) - zero_point.astype(np.int64)) @ weight.T
    expected = product * token_scale.astype(np.float64) * weight_scale.T
    if bias:
        expected = expected + linear.bias.detach().double().numpy()
    with torch.no_grad():
        output = layer(values)
    assert output.dtype == torch.float32
    assert np.allclose(output.numpy(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(layer(values.view(1, rows, inner))[0], output)


@both_schemes
@pytest.mark.parametrize("rows", [1, 31])
def test_few_rows_are_weight_only(scheme, rows):
    linear = float_linear(70, 30, True, 0)
    layer = QuantizedLinear.from_linear(linear, SCHEMES[scheme])
    weight, scale = dequantized(layer)
    values = torch.randn(rows, 70)
    expected = F.linear(values, torch.from_numpy((weight * scale).astype(np.float32)), linear.bias)
    assert torch.equal(layer(values), expected)


@both_schemes
def test_thirty_two_rows_are_not_weight_only(scheme):
    layer = QuantizedLinear.from_linear(float_linear(70, 30, False, 0), SCHEMES[scheme])
    weight, scale = dequantized(layer)
    values = torch.randn(32, 70)
    weight_only = F.linear(values, torch.from_numpy((weight * scale).astype(np.float32)))
    assert not torch.equal(layer(values), weight_only)
    assert torch.allclose(layer(values), weight_only, atol=0.05)


@pytest.mark.parametrize(("scheme", "worst"), [("w8a8", 0.015), ("w4a8", 0.12)])
def test_a_quantized_layer_stays_near_its_float_layer(scheme, worst):
    linear = float_linear(200, 100, True, 0)
    values = torch.randn(64, 200)
    with torch.no_grad():
        expected = linear(values)
        error = QuantizedLinear.from_linear(linear, SCHEMES[scheme])(values) - expected
    assert error.norm() / expected.norm() < worst


@both_schemes
def test_quantizing_a_half_precision_layer_answers_in_half_precision(scheme):
    linear = float_linear(70, 30, True, 0).bfloat16()
    layer = QuantizedLinear.from_linear(linear, SCHEMES[scheme])
    for rows in (3, 40):
        values = torch.randn(rows, 70).bfloat16()
        output = layer(values)
        assert output.dtype == torch.bfloat16
        assert torch.allclose(output.float(), linear(values).float(), atol=0.2)
    assert layer.weight_scale.dtype == torch.float32


# --- whole models


@both_schemes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_leaves_the_scales_bit_for_bit(scheme, dtype):
    model = quantized_model(scheme)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cast_to(model, dtype)
    cast = 0
    for name, tensor in model.state_dict().items():
        if name.endswith("weight_scale") or not before[name].is_floating_point():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
        else:
            cast += 1
            assert tensor.dtype == dtype
    assert cast


@both_schemes
def test_a_model_cast_to_bfloat16_stays_near_itself(scheme):
    model = quantized_model(scheme)
    expected = predict(model)
    cast = predict(cast_to(model, torch.bfloat16))
    assert cast.dtype == torch.bfloat16
    assert (cast.float() - expected).norm() / expected.norm() < 0.05


@both_schemes
def test_a_deep_copy_predicts_the_same_and_shares_nothing(scheme):
    model = quantized_model(scheme)
    twin = copy.deepcopy(model)
    assert identical(model, twin)
    expected = predict(model)
    assert torch.equal(predict(twin), expected)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(predict(model), expected)


@both_schemes
def test_a_saved_model_reloads_bit_for_bit(tmp_path, scheme):
    model = quantized_model(scheme)
    model.save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert identical(model, loaded)
    assert torch.equal(predict(model), predict(loaded))
    for (name, module), (_, other) in zip(model.named_modules(), loaded.named_modules(), strict=True):
        assert type(module) is type(other), name


@both_schemes
def test_a_reloaded_model_saves_the_same_files_again(tmp_path, scheme):
    quantized_model(scheme).save_pretrained(tmp_path / "first")
    DiTTransformer2DModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / FILE) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0]["quantization_config"]["scheme"] == scheme


@both_schemes
def test_reloading_in_bfloat16_keeps_integers_and_scales_bit_for_bit(tmp_path, scheme):
    model = quantized_model(scheme)
    model.save_pretrained(tmp_path)
    expected = predict(model)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert (predict(loaded).float() - expected).norm() / expected.norm() < 0.05
    assert identical(cast_to(model, torch.bfloat16), loaded)
    scales = {name: tensor for name, tensor in loaded.state_dict().items() if name.endswith("weight_scale")}
    stored = load_file(tmp_path / FILE)
    assert len(scales) == 18
    assert all(s.dtype == torch.float32 and torch.equal(s, stored[name]) for name, s in scales.items())


@both_schemes
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 0), (torch.bfloat16, 0.05)])
def test_quantizing_while_loading_equals_quantizing_in_place(tmp_path, scheme, dtype, off):
    make_model().save_pretrained(tmp_path)
    config = CemqConfig(scheme=scheme)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=config, torch_dtype=dtype)
    model = cast_to(quantized_model(scheme), dtype)  # the stored float32 weights are rounded once, not twice
    assert identical(loaded, model)
    # a cast rounds the position table as well, from_pretrained leaves it in float32 (so it does without cemq)
    assert torch.allclose(predict(loaded), predict(model), rtol=0, atol=off)


@both_schemes
def test_a_model_quantized_while_loading_saves_and_reloads(tmp_path, scheme):
    make_model().save_pretrained(tmp_path / "float")
    config = CemqConfig(scheme=scheme)
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "quantized")
    assert identical(DiTTransformer2DModel.from_pretrained(tmp_path / "quantized"), model)


@both_schemes
def test_only_safetensors_and_json_are_written(tmp_path, scheme):
    quantized_model(scheme).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", FILE]


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("w8a8", f"{BLOCK}.attn1.to_q.weight"),
        ("w8a8", f"{BLOCK}.attn1.to_q.weight_scale"),
        ("w8a8", f"{BLOCK}.attn1.to_q.weight_sum"),
        ("w4a8", f"{BLOCK}.attn1.to_q.weight"),
        ("w4a8", f"{BLOCK}.attn1.to_q.group_scale"),
        ("w4a8", f"{BLOCK}.attn1.to_q.bias"),
        ("w4a8", "pos_embed.proj.weight"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, scheme, name):
    folder = saved(tmp_path, scheme, lambda tensors: tensors.pop(name))
    with pytest.raises(BundleError, match=rf"DiTTransformer2DModel lacks 1 tensors \({name}\)"):
        DiTTransformer2DModel.from_pretrained(folder)


@pytest.mark.parametrize("leaf", ["weight", "weight_scale", "weight_sum", "group_scale"])
def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path, leaf):
    name = f"{BLOCK}.ff.net.2.{leaf}"

    def widen(tensors):
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    with pytest.raises(BundleError, match=rf"tensor '{name}' is .*expected .*not written under this config"):
        DiTTransformer2DModel.from_pretrained(saved(tmp_path, "w4a8", widen))


@pytest.mark.parametrize(("leaf", "dtype"), [("weight", torch.float32), ("weight_scale", torch.bfloat16)])
def test_a_tensor_of_another_dtype_is_refused_by_name(tmp_path, leaf, dtype):
    name = f"{BLOCK}.ff.net.2.{leaf}"

    def convert(tensors):
        tensors[name] = tensors[name].to(dtype)

    with pytest.raises(BundleError, match=rf"tensor '{name}' is .*{dtype}, expected"):
        DiTTransformer2DModel.from_pretrained(saved(tmp_path, "w8a8", convert))


def test_a_bias_of_another_shape_is_refused_by_name(tmp_path):
    name = f"{BLOCK}.ff.net.2.bias"

    def widen(tensors):
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    # of tensors that are not quantized diffusers compares the shapes itself
    with pytest.raises(ValueError, match=rf"{name} expected shape"):
        DiTTransformer2DModel.from_pretrained(saved(tmp_path, "w8a8", widen))


# --- configuration


def schemes_of(model):
    return {name: module.scheme.name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def test_full_precision_patterns_are_respected():
    model, plain = make_model(), make_model()
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
    assert all(name.startswith("transformer_blocks.") for name in schemes_of(model))
    assert type(model.proj_out_1) is type(model.proj_out_2) is nn.Linear


def test_nothing_left_to_quantize_is_refused():
    model = make_model()
    with pytest.raises(SchemeError, match="DiTTransformer2DModel has no linear layer outside the full-precision"):
        quantize_in_place(model, CemqConfig("w8a8", full_precision=["*"]))
    assert identical(model, make_model())


def test_eight_bit_patterns_take_eight_bits_in_a_four_bit_scheme():
    schemes = schemes_of(quantized_model("w4a8"))
    assert {name for name in schemes if schemes[name] == "w8a8"} == {
        f"transformer_blocks.{block}.{name}"
        for block in (0, 1)
        for name in ("norm1.linear", "norm1.emb.timestep_embedder.linear_1", "norm1.emb.timestep_embedder.linear_2")
    }
    model = make_model()
    quantize_in_place(model, CemqConfig("w4a8", eight_bit=["*.ff.*"]))
    schemes = schemes_of(model)
    assert all((scheme == "w8a8") == (".ff." in name) for name, scheme in schemes.items())


def test_custom_patterns_survive_saving(tmp_path):
    model = make_model()
    quantize_in_place(model, CemqConfig("w4a8", full_precision=["*.attn1.to_q"], eight_bit=["*.ff.*"]))
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


@pytest.mark.parametrize(("scheme", "share"), [("w8a8", 0.30), ("w4a8", 0.20)])
def test_parameters_shrink_to_near_their_bits(scheme, share):
    # PixArt shares one modulation layer among all blocks; in a DiT of two blocks the modulation, which keeps 8 bits,
    # and the output layers, which keep 32, are too large a part of the whole to show what 4 bits buy.
    model = PixArtTransformer2DModel(
        num_attention_heads=8, attention_head_dim=64, cross_attention_dim=512, in_channels=4, out_channels=4,
        num_layers=2, sample_size=16, patch_size=2, caption_channels=32, norm_num_groups=1,
    )  # fmt: skip
    before = sum(4 * parameter.numel() for parameter in model.parameters())
    quantize_in_place(model, CemqConfig(scheme))
    assert sum(parameter.nbytes for parameter in model.parameters()) <= share * before


# --- imports


@pytest.mark.parametrize(
    "imports",
    [
        "import cemq; import diffusers.quantizers.auto",
        "import cemq; from diffusers import DiTTransformer2DModel",
        "import diffusers.quantizers.auto; import cemq",
    ],
)
def test_diffusers_knows_cemq_whichever_is_imported_first(imports):
    code = f"{imports}\nfrom diffusers.quantizers import auto\nprint('cemq' in auto.AUTO_QUANTIZER_MAPPING)"
    assert run_python(code) == "True"


def test_importing_cemq_loads_neither_torch_nor_diffusers():
    assert run_python("import sys, cemq; print([m for m in ('torch', 'diffusers') if m in sys.modules])") == "[]"
