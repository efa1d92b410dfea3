"""fp8: its numbers against E4M3 spelled out, its product against float64, and a bundle of it."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparing import relative
from support.processes import run_python
from torch import nn
from typer.testing import CliRunner

import cemq
from cemq.cli import app
from cemq.quantize import SCHEMES, CemqConfig, NativeLinear
from cemq.quantize.coded import CodedLinear
from cemq.quantize.fp8 import E4M3, LARGEST, has_scaled_product, scaled_product

SCHEME = SCHEMES["w8a8-fp8"]
SIMULATED = replace(SCHEME.weight, product=None)
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
dtypes = pytest.mark.parametrize("dtype", DTYPES)
pytestmark = pytest.mark.usefixtures("_no_grad")
on_each_device = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device")])],
)  # fmt: skip


@pytest.fixture
def _no_grad():
    with torch.no_grad():
        yield


def value_of(code):
    """What the eight bits of E4M3 stand for: sign, four bits of exponent less 7, three of mantissa; no infinity."""
    sign, exponent, mantissa = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)


def product_of(values, weight, bias, dtype):
    """The product by torch's scaled product, and in float64 from the same codes."""
    codec = E4M3()
    tokens, codes = codec.encode(values), codec.encode(weight)
    exact = codec.decode(*tokens).double() @ codec.decode(*codes).double().t()
    if bias is not None:
        exact = exact + bias.double()
    return scaled_product(*tokens, *codes, bias, dtype), exact


def test_codes_are_those_of_e4m3():
    codes = torch.arange(256, dtype=torch.uint8).view(1, -1)
    found = E4M3().decode(codes, torch.ones(1, 1))
    expected = torch.tensor([[value_of(code) for code in range(256)]])
    assert torch.equal(found.nan_to_num(1000.0), expected.nan_to_num(1000.0))
    assert max(filter(lambda value: value == value, expected[0].tolist())) == LARGEST


def test_every_number_that_e4m3_has_comes_back():
    values = torch.tensor([[value_of(code) for code in range(256) if code & 127 != 127]]) * 3
    codes, scale = E4M3().encode(values)
    assert torch.equal(scale, torch.full((1, 1), 3.0))
    assert torch.equal(E4M3().decode(codes, scale), values)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_rounding_is_a_sixteenth_at_most_or_half_of_the_least_step(seed):
    values = torch.randn(7, 50, generator=torch.Generator().manual_seed(seed))
    values *= 10.0 ** torch.arange(-6, 8, 2).view(-1, 1)
    codes, scale = E4M3().encode(values)
    error = (E4M3().decode(codes, scale) - values).abs()
    assert (error <= torch.maximum(values.abs() / 16, scale * 2.0**-10) * (1 + 1e-6)).all()
    assert (codes.view(torch.float8_e4m3fn).float().abs().amax(1) == LARGEST).all()


@on_each_device
@dtypes
@pytest.mark.parametrize(("rows", "inner", "columns"), [(64, 128, 96), (33, 70, 63), (40, 64, 1), (129, 1, 5)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_is_that_of_the_numbers(device, dtype, rows, inner, columns, with_bias):
    if not has_scaled_product(torch.device(device).type, torch.zeros(1, device=device).device.index, dtype):
        pytest.skip("torch has no such product on this device")
    generator = torch.Generator().manual_seed(rows)
    values, weight = (torch.randn(size, inner, generator=generator).to(device) for size in (rows, columns))
    bias = torch.randn(columns, generator=generator).to(device, dtype) if with_bias else None
    found, exact = product_of(values, weight, bias, dtype)
    assert found.shape == exact.shape
    assert found.dtype == dtype
    loose = 2**-9 if device == "cuda" else 0  # sums of fewer bits
    assert relative(found, exact) <= DTYPES[dtype] + loose


@dtypes
@pytest.mark.parametrize(("inner", "columns"), [(128, 64), (70, 33)])
def test_a_layer_gives_what_its_simulation_does(dtype, inner, columns):
    torch.manual_seed(inner)
    linear, values = nn.Linear(inner, columns), torch.randn(40, inner)
    layer = CodedLinear.from_linear(linear, SCHEME).to(dtype)
    simulated = CodedLinear.from_linear(linear, replace(SCHEME, weight=SIMULATED, activation=SIMULATED)).to(dtype)
    found, expected = layer(values.to(dtype)), simulated(values.to(dtype))
    assert found.dtype == expected.dtype == dtype
    assert relative(found, expected) <= 2 * DTYPES[dtype]  # which rounds decoded numbers to the dtype, too
    assert relative(found, linear(values)) < 0.045
    few = values[:3].to(dtype)
    assert torch.equal(layer(few), simulated(few))
    assert relative(layer(few), linear(values[:3])) < 0.032  # inputs are not rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_product_of_torch_numbers_are_decoded(dtype, monkeypatch):
    layer = CodedLinear.from_linear(nn.Linear(64, 48), SCHEME).to(dtype)
    values = torch.randn(40, 64).to(dtype)
    expected = layer(values)
    monkeypatch.setattr("cemq.quantize.fp8.has_scaled_product", lambda *_: False)
    assert relative(layer(values), expected) <= 2 * DTYPES[dtype]


def test_a_version_of_torch_without_it_is_found_out_and_told_by_no_error():
    code = """
import torch
from torch import nn
from cemq.quantize import SCHEMES
from cemq.quantize.coded import CodedLinear
from cemq.quantize.fp8 import has_scaled_product

def refuses(*_, **__):
    raise NotImplementedError("Could not run 'aten::_scaled_mm'")

def wrong(left, right, *_, out_dtype, **__):
    return torch.zeros(left.shape[0], right.shape[1], dtype=out_dtype)

torch.manual_seed(0)
linear, values = nn.Linear(64, 48), torch.randn(40, 64)
for dtype, product in ((torch.float32, refuses), (torch.bfloat16, wrong)):
    torch._scaled_mm = product
    found = CodedLinear.from_linear(linear, SCHEMES["w8a8-fp8"]).to(dtype)(values.to(dtype))
    error = float((found - linear(values)).norm() / linear(values).norm())
    print(has_scaled_product("cpu", None, dtype), error < 0.045)
"""
    assert run_python(code) == "False True\nFalse True"


def test_a_row_that_is_not_finite_stays_so():
    layer = CodedLinear.from_linear(nn.Linear(40, 30), SCHEME)
    for bad in (float("nan"), float("inf")):
        values = torch.ones(40, 40)
        values[3, 4] = bad
        assert layer(values).isfinite().all(1).tolist() == [row != 3 for row in range(40)]


def test_zero_rows_are_zero():
    layer = CodedLinear.from_linear(nn.Linear(64, 6, bias=False), SCHEME)
    values = torch.randn(40, 64)
    values[5] = 0
    assert (layer(values)[5] == 0).all()


def test_int8_is_nearer_where_numbers_are_of_one_size():
    """Four of the eight bits are spent on exponents, which normally distributed numbers make little use of."""
    torch.manual_seed(0)
    linear, values = nn.Linear(256, 64), torch.randn(64, 256)
    exact = linear(values)
    fp8, int8 = (
        relative(kind.from_linear(linear, SCHEMES[scheme])(values), exact)
        for kind, scheme in ((CodedLinear, "w8a8-fp8"), (NativeLinear, "w8a8"))
    )
    assert 3 * int8 < fp8 < 0.045


def test_a_layer_is_compiled_without_a_break(fresh_compiler):
    layer, values = CodedLinear.from_linear(nn.Linear(64, 48), SCHEME), torch.randn(40, 64)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(values), layer(values))


def test_the_scheme_is_that_of_every_layer_and_knows_no_wider_one():
    config = CemqConfig("w8a8-fp8")
    assert config.scheme_for("transformer_blocks.0.attn1.to_q") == SCHEME
    assert config.layer_class(SCHEME) is CodedLinear


def test_the_command_builds_saves_reloads_and_draws(tmp_path):
    def invoke(*arguments):
        done = CliRunner().invoke(app, [*map(str, arguments)])
        assert done.exit_code == 0, done.output
        return done.stdout

    bundle = tmp_path / "digits"
    told = invoke(
        "quantize-and-schedule", "builtin:dit-digits", "--scheme", "w8a8-fp8", "--steps", "6", "--budget", "4",
        "--effort", "instant", "--device", "cpu", "--json", "-o", bundle,
    )  # fmt: skip
    assert json.loads(told)["scheme"] == "w8a8-fp8"
    for name in ("one", "two"):
        invoke("generate", bundle, "--label", "seven", "--device", "cpu", "-o", tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    pipe = cemq.from_pretrained(bundle, device="cpu")
    layers = [module for module in pipe.transformer.modules() if isinstance(module, CodedLinear)]
    assert layers
    assert {layer.integers.dtype for layer in layers} == {torch.uint8}
    stored = 8 * sum(layer.integers.nbytes + layer.weight_scale.nbytes for layer in layers)
    assert stored < 8.6 * sum(layer.integers.numel() for layer in layers)
    pipe.save_pretrained(tmp_path / "again")
    again = cemq.from_pretrained(tmp_path / "again", device="cpu")
    expected, found = pipe.transformer.state_dict(), again.transformer.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
