"""The native layer against what its stored tensors stand for, in float64; casts, copies and torch.compile."""

import copy
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.activations import GELU
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparing import relative
from support.pipelines import make_denoiser, predict
from support.slow import others_slow
from torch import nn

from cemq.quantize import BACKENDS, SCHEMES, CemqConfig, InputStatistics, NativeLinear, quantize_in_place
from cemq.quantize.integers import quantize_tokens
from cemq.quantize.layers import FusedGELU, fuse_gelu

SIZES, SEEDS = st.integers(1, 150), st.integers(0, 10**6)
FEATURES = st.integers(1, 150)
every_scheme = pytest.mark.parametrize("scheme", BACKENDS["native"].layers)
variants = pytest.mark.parametrize(("smoothed", "rank"), [(False, 0), (True, 0), (False, 5), (True, 5)])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def make_layer(scheme, inner, outputs, *, bias=True, smoothed=False, rank=0, fitted=False, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(inner, outputs, bias=bias)
    values = torch.randn(100, inner) * torch.randn(inner).exp()
    statistics = InputStatistics(largest=(1.0,), channel_largest=values.abs().amax(0), hessian=values.T @ values)
    scheme = replace(SCHEMES[scheme], smoothed=smoothed, low_rank=rank)
    return linear, NativeLinear.from_linear(linear, scheme, statistics if fitted else None)


def whole_weight(layer):
    """The integers that a layer multiplies with, int64, read off its tensors."""
    weight = layer.weight.numpy().astype(np.int64)
    if layer.scheme.weight_bits == 4:
        groups = weight.reshape(len(weight), -1, 32)
        int4 = np.concatenate([groups & 15, groups >> 4], 2) - 8
        weight = (int4 * layer.group_scale.numpy()[:, :, None]).reshape(len(weight), -1)[:, : layer.in_features]
    return weight


def formula(layer, values):
    """The output in float64, and the size of what may have been rounded to bfloat16 on the way."""
    scaled = values.numpy() * layer.smooth.numpy() if layer.scheme.smoothed else values.numpy()
    multiplied = scaled.astype(np.float64)
    if layer.scheme.activation_bits == 8 and len(values) >= 32:
        tokens, scale, zero_point = (part.numpy() for part in quantize_tokens(torch.from_numpy(scaled)))
        multiplied = (tokens.astype(np.float64) - zero_point) * scale
    output = multiplied @ (whole_weight(layer) * layer.weight_scale.double().numpy()).T
    if layer.bias is not None:
        output += layer.bias.double().numpy()
    rounded = np.zeros_like(output)
    if layer.scheme.low_rank:
        up, down = layer.up.double().numpy(), layer.down.double().numpy()
        output += scaled @ down.T @ up.T
        rounded = np.abs(scaled) @ np.abs(down).T @ np.abs(up).T
    return output, rounded


def assert_follows_the_formula(layer, values):
    output = layer(values)
    expected, rounded = formula(layer, values)
    assert output.dtype == torch.float32
    assert output.shape == expected.shape
    assert (np.abs(output.numpy() - expected) <= 1e-5 * (1 + np.abs(expected)) + 2**-6 * rounded).all()


# --- the product


@every_scheme
@variants
@pytest.mark.parametrize("fitted", [False, True])
def test_the_output_is_what_the_stored_tensors_stand_for(scheme, smoothed, rank, fitted):
    for inner, outputs in ((70, 33), (64, 64), (129, 1)):
        _, layer = make_layer(scheme, inner, outputs, smoothed=smoothed, rank=rank, fitted=fitted)
        for rows in (1, 31, 32, 33):
            assert_follows_the_formula(layer, torch.randn(rows, inner))


@every_scheme
@variants
@given(rows=SIZES, inner=FEATURES, outputs=SIZES, bias=st.booleans(), fitted=st.booleans(), seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_it_is_so_for_any_shape(scheme, smoothed, rank, rows, inner, outputs, bias, fitted, seed):
    _, layer = make_layer(scheme, inner, outputs, bias=bias, smoothed=smoothed, rank=rank, fitted=fitted, seed=seed)
    values = torch.randn(rows, inner)
    assert_follows_the_formula(layer, values)
    assert torch.equal(layer(values.view(1, rows, 1, inner))[0, :, 0], layer(values))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
@given(rows=st.integers(32, 70), inner=st.integers(2, 150), outputs=SIZES, lowest=st.integers(-255, 0), seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_whole_numbers_are_multiplied_exactly(scheme, rows, inner, outputs, lowest, seed):
    # each token reaches from lowest to lowest + 255: its scale is 1 and it is a whole number of steps from zero
    _, layer = make_layer(scheme, inner, outputs, bias=False, seed=seed)
    layer.weight_scale.fill_(1)
    values = np.random.default_rng(seed).integers(lowest, lowest + 256, (rows, inner))
    values[:, 0], values[:, -1] = lowest, lowest + 255
    expected = values @ whole_weight(layer).T  # below 2^24, where float32 leaves out no whole number
    assert np.array_equal(layer(torch.from_numpy(values.astype(np.float32))).numpy(), expected)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_tokens_are_quantized_from_thirty_two_rows_on(scheme):
    _, layer = make_layer(scheme, 70, 30)
    weight_only = copy.deepcopy(layer)
    weight_only.scheme = replace(layer.scheme, activation=None)
    values = torch.randn(32, 70)
    assert torch.equal(layer(values[:31]), weight_only(values[:31]))
    assert 0 < relative(layer(values), weight_only(values)) < 0.02


@every_scheme
def test_the_weight_sum_is_that_of_the_integers(scheme):
    _, layer = make_layer(scheme, 130, 30)
    assert np.array_equal(layer.weight_sum.numpy()[:, 0], whole_weight(layer).sum(1))
    assert np.array_equal(layer.integer_weight().numpy(), whole_weight(layer))


@pytest.mark.parametrize(("scheme", "worst"), [("w8a8", 0.015), ("w8a16", 0.008), ("w4a8", 0.12), ("w4a16", 0.12)])
@pytest.mark.parametrize("rows", [3, 64])
def test_a_quantized_layer_stays_near_its_float_layer(scheme, worst, rows):
    linear, layer = make_layer(scheme, 200, 100)
    values = torch.randn(rows, 200)
    assert relative(layer(values), linear(values)) < worst


@every_scheme
@variants
def test_a_channel_of_zeros_stays_zero(scheme, smoothed, rank):
    linear = nn.Linear(70, 3, bias=False)
    linear.weight[1] = 0
    layer = NativeLinear.from_linear(linear, replace(SCHEMES[scheme], smoothed=smoothed, low_rank=min(rank, 1)))
    for rows in (3, 40):
        output = layer(torch.randn(rows, 70))
        assert output[:, 1].abs().max() < (1e-6 if rank else 1e-30)
        assert (output[:, 0] != 0).any()


@every_scheme
@variants
@pytest.mark.parametrize(("dtype", "worst"), [(torch.bfloat16, 0.01), (torch.float16, 0.006)])
def test_a_half_precision_layer_answers_in_half_precision(scheme, smoothed, rank, dtype, worst):
    linear = nn.Linear(70, 30).to(dtype)
    layer = NativeLinear.from_linear(linear, replace(SCHEMES[scheme], smoothed=smoothed, low_rank=rank))
    for rows in (3, 40):
        values = torch.randn(rows, 70).to(dtype)
        wide = copy.deepcopy(layer).float()
        assert layer(values).dtype == dtype
        assert relative(layer(values), wide(values.float())) < worst
    assert layer.bias.dtype == dtype


def test_one_input_and_odd_outputs():
    linear, layer = make_layer("w8a8", 1, 3)
    values = torch.randn(40, 1)
    assert relative(layer(values), linear(values)) < 0.02


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_a_weight_that_is_not_contiguous(scheme):
    linear, values = nn.Linear(40, 30), torch.randn(3, 40)
    linear.weight = nn.Parameter(torch.randn(40, 30).t())
    assert relative(NativeLinear.from_linear(linear, SCHEMES[scheme])(values), linear(values)) < 0.02


@every_scheme
def test_no_rows_at_all_are_no_error(scheme):
    _, layer = make_layer(scheme, 70, 30, smoothed=True, rank=4)
    assert layer(torch.empty(2, 0, 70)).shape == (2, 0, 30)


def test_the_rank_is_no_larger_than_the_layer():
    _, layer = make_layer("w4a8", 70, 3, rank=16)
    assert (layer.up.shape, layer.down.shape) == ((3, 3), (3, 70))


# --- casts, copies, moves


@every_scheme
@variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_only_reaches_the_bias(scheme, smoothed, rank, dtype):
    _, layer = make_layer(scheme, 70, 30, smoothed=smoothed, rank=rank, fitted=True)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(dtype)
    assert before.keys() == layer.state_dict().keys()
    for name, tensor in layer.state_dict().items():
        assert tensor.dtype == (dtype if name == "bias" else before[name].dtype)
        assert torch.equal(tensor, before[name].to(tensor.dtype))
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same_and_shares_nothing(twin):
    _, layer = make_layer("w4a8", 70, 30, smoothed=True, rank=4)
    values = torch.randn(40, 70)
    expected, other = layer(values), twin(layer)
    assert torch.equal(other(values), expected)
    for parameter in other.parameters():
        parameter.zero_()
    assert torch.equal(layer(values), expected)


@every_scheme
@variants
def test_a_layer_goes_to_the_meta_device_and_back(scheme, smoothed, rank):
    _, layer = make_layer(scheme, 70, 30, smoothed=smoothed, rank=rank)
    state, values = {name: tensor.clone() for name, tensor in layer.state_dict().items()}, torch.randn(40, 70)
    expected = layer(values)
    layer.to("meta")
    assert all(tensor.is_meta and tensor.dtype == state[name].dtype for name, tensor in layer.state_dict().items())
    assert layer(values.to("meta")).shape == (40, 30)
    layer.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(layer(values), expected)


# --- torch.jit.trace and torch.compile


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("rows", [3, 40])
def test_a_traced_layer(rows):
    _, layer = make_layer("w8a8", 40, 30)
    traced, values = torch.jit.trace(layer, torch.randn(rows, 40), check_trace=False), torch.randn(rows, 40)
    assert torch.allclose(traced(values), layer(values), atol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "dtype"), [("w8a8", torch.float32), ("w4a8", torch.bfloat16), ("w4a16", torch.float32)]
)
@pytest.mark.usefixtures("fresh_compiler")
def test_a_layer_compiles_without_a_graph_break_for_any_rows(scheme, dtype):
    _, layer = make_layer(scheme, 70, 30, smoothed=True, rank=4)
    layer.to(dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (40, 50, 3):
        values = torch.randn(rows, 70).to(dtype)
        assert compiled(values).dtype == dtype
        assert relative(compiled(values), layer(values)) < (1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("scheme", others_slow(["w8a8", "w4a8"], ["w4a8"]))
@pytest.mark.usefixtures("fresh_compiler")
def test_a_denoiser_compiles_without_a_graph_break(scheme):
    model = make_denoiser()
    quantize_in_place(model, CemqConfig(scheme, smoothed=True))
    expected = predict(model)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert relative(predict(model), expected) < 1e-3


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of inductor's own imports
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_gives_nearly_the_same():
    _, layer = make_layer("w4a8", 70, 30, smoothed=True)
    values = torch.randn(40, 70)
    assert relative(torch.compile(layer, fullgraph=True)(values), layer(values)) < 1e-3


# --- the activation that a projection applies itself


@every_scheme
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("rows", [3, 40])
def test_a_fused_gelu_is_the_gelu_of_the_layer(scheme, rank, rows):
    gelu = GELU(70, 33, approximate="tanh")
    gelu.proj = make_layer(scheme, 70, 33, rank=rank)[1]
    model, values = nn.Sequential(gelu), torch.randn(rows, 70)
    expected = model(values)
    names = set(model.state_dict())
    fuse_gelu(model)
    assert type(model[0]) is FusedGELU
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(values), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_only_what_the_layer_can_apply_is_fused(approximate):
    model = nn.Sequential(GELU(70, 33, approximate=approximate))  # its projection stays in full precision
    fuse_gelu(model)
    assert type(model[0]) is GELU
    model[0].proj = make_layer("w8a8", 70, 33)[1]
    fuse_gelu(model)
    assert type(model[0]) is (FusedGELU if approximate == "tanh" else GELU)
