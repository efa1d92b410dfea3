"""The C kernels against the torch ops they stand for, and life without them."""

import platform
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.processes import run_python
from torch import nn

from cemq.errors import ModelError
from cemq.quantize import SCHEMES, NativeLinear, integers
from cemq.quantize.kernels import cpu, integer_linear, integer_weight, own, weight_only_linear

compiled = pytest.mark.skipif(cpu.kernels() is None, reason=f"no CPU kernels: {cpu.why_not()}")
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
dtypes = pytest.mark.parametrize("dtype", cpu.DTYPES)
SIZES, SEEDS = st.integers(1, 70), st.integers(0, 10**6)
WIDTHS = st.one_of(st.integers(1, 70), st.integers(900, 1100), st.sampled_from([1024, 1025, 2048, 2049]))


def random_values(generator, rows, columns, dtype):
    """Rows of very different sizes; one of zeros, one that is constant."""
    values = torch.randn(rows, columns, generator=generator)
    values *= 10.0 ** torch.empty(rows, 1).uniform_(-9, 9, generator=generator)
    values[rows // 2] = 0
    values[rows // 3] = -2.5
    return values.to(dtype)


def random_weight(generator, outputs, inner, bits):
    weight = torch.randn(outputs, inner, generator=generator)
    if bits == 8:
        return integers.quantize_channels(weight)[0], None, torch.rand(outputs, 1, generator=generator)
    packed, group_scale, _ = integers.quantize_int4(weight, integers.GROUP_SIZE)
    return packed, group_scale, torch.rand(outputs, 1, generator=generator)


def without_kernels(function, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "kernels", lambda: None)
        return function(*arguments)


# --- the same numbers


@compiled
@dtypes
@given(rows=SIZES, columns=WIDTHS, smoothed=st.booleans(), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_tokens_are_equal_bit_for_bit(dtype, rows, columns, smoothed, seed):
    generator = torch.Generator().manual_seed(seed)
    values = random_values(generator, rows, columns, dtype)
    smooth = torch.empty(columns).uniform_(0.01, 100, generator=generator) if smoothed else None
    found, expected = cpu.kernels().quantize_tokens(values, smooth), integers.quantize_tokens(values, smooth)
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@compiled
@dtypes
@given(rows=SIZES, columns=WIDTHS, with_bias=st.booleans(), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_rescaled_products_are_equal_bit_for_bit(dtype, rows, columns, with_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    product = torch.randint(-(2**30), 2**30, (rows, columns), dtype=torch.int32, generator=generator)
    zero_point = torch.randint(-128, 128, (rows, 1), dtype=torch.int32, generator=generator)
    sums = torch.randint(-(2**22), 2**22, (columns, 1), dtype=torch.int32, generator=generator)
    scale, weight_scale = torch.rand(rows, 1, generator=generator), torch.rand(columns, 1, generator=generator)
    bias = (1e6 * torch.randn(columns, generator=generator)).to(dtype) if with_bias else None
    arguments = product, scale * 1e-3, zero_point, weight_scale, sums, bias, dtype
    found, expected = cpu.kernels().rescale(*arguments), integers.rescale(*arguments)
    assert found.dtype == expected.dtype == dtype
    assert torch.equal(found, expected)


@compiled
@dtypes
@given(rows=SIZES, columns=WIDTHS, with_bias=st.booleans(), seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_gelu_is_applied_before_rounding(dtype, rows, columns, with_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    product = torch.randint(-3000, 3000, (rows, columns), dtype=torch.int32, generator=generator)
    zero_point, sums = torch.zeros(rows, 1, dtype=torch.int32), torch.zeros(columns, 1, dtype=torch.int32)
    scale, weight_scale = torch.rand(rows, 1, generator=generator), torch.rand(columns, 1, generator=generator)
    bias = torch.randn(columns, generator=generator).to(dtype) if with_bias else None
    arguments = product, scale * 1e-2, zero_point, weight_scale, sums, bias
    exact = integers.rescale(*arguments, torch.float32).double()
    exact = exact * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (exact + 0.044715 * exact**3)))
    rounding = 2**-8 if dtype == torch.bfloat16 else 2e-6
    for rescale in (cpu.kernels().rescale, integers.rescale):
        assert ((rescale(*arguments, dtype, gelu=True) - exact).abs() <= rounding * exact.abs() + 1e-6).all()


@compiled
@given(rows=SIZES, columns=WIDTHS, group_size=st.sampled_from([2, 16, 64]), seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_expanded_int4_is_exact(rows, columns, group_size, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    packed = torch.randint(0, 256, (rows, groups * group_size // 2), dtype=torch.uint8, generator=generator)
    group_scale = torch.randint(-15, 16, (rows, groups), dtype=torch.int8, generator=generator)
    expected = integers.expand_int4(packed, group_scale, columns)
    assert torch.equal(cpu.kernels().expand_int4(packed, group_scale, columns), expected)


@compiled
@dtypes
@pytest.mark.parametrize("bits", [4, 8])
@given(rows=st.integers(1, 31), inner=WIDTHS, outputs=SIZES, with_bias=st.booleans(), seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_few_rows_are_close_to_float64(dtype, bits, rows, inner, outputs, with_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, inner, generator=generator).to(dtype)
    weight, group_scale, scale = random_weight(generator, outputs, inner, bits)
    bias = torch.randn(outputs, generator=generator).to(dtype) if with_bias else None
    found = cpu.kernels().few_rows(values, weight, group_scale, scale, bias)
    exact = weight if group_scale is None else integers.expand_int4(weight, group_scale, inner)
    expected = values.double() @ exact.double().T * scale.T
    largest = values.double().abs() @ exact.double().abs().T * scale.T
    if bias is not None:
        expected = expected + bias
    assert found.dtype == dtype
    rounding = 2**-8 if dtype == torch.bfloat16 else 0
    assert ((found - expected).abs() <= rounding * expected.abs() + 1e-5 * largest + 1e-6).all()


@compiled
@dtypes
@pytest.mark.parametrize("bits", [4, 8])
@given(rows=SIZES, inner=WIDTHS, outputs=SIZES, with_bias=st.booleans(), smoothed=st.booleans(), seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_whole_layers_are_equal_with_and_without_kernels(dtype, bits, rows, inner, outputs, with_bias, smoothed, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, inner, generator=generator).to(dtype)
    weight, group_scale, scale = random_weight(generator, outputs, inner, bits)
    bias = torch.randn(outputs, generator=generator).to(dtype) if with_bias else None
    smooth = torch.rand(inner, generator=generator) + 0.5 if smoothed else None
    sums = integer_weight(weight, group_scale, inner).sum(1, keepdim=True, dtype=torch.int32)
    arguments = values, weight, group_scale, scale, sums, bias, smooth
    assert torch.equal(integer_linear(*arguments), without_kernels(integer_linear, *arguments))
    arguments = values, weight, group_scale, scale, bias, smooth
    found, expected = weight_only_linear(*arguments), without_kernels(weight_only_linear, *arguments)
    assert found.dtype == expected.dtype == dtype
    scaled = values if smooth is None else values * smooth
    largest = scaled.float().abs() @ (integer_weight(weight, group_scale, inner).abs() * scale).T
    if bias is not None:
        largest += bias.abs()
    # without kernels the weight itself is rounded to the model's dtype
    assert ((found - expected).abs() <= (1e-5 if dtype == torch.float32 else 2**-7) * largest).all()


def by_passes(kernels, values, smooth, weight, group_scale, scale, sums, bias, gelu):
    """A layer by the passes around a product of 32-bit integers."""
    tokens, *scales = kernels.quantize_tokens(values, smooth)
    product = tokens.int() @ integer_weight(weight, group_scale, values.shape[1]).int().T
    return kernels.rescale(product, *scales, scale, sums, bias, values.dtype, gelu)


def layer_arguments(generator, rows, inner, outputs, bits, dtype, with_bias=True, smoothed=True):
    """Of `Kernels.linear`, but for ``gelu``."""
    weight, group_scale, scale = random_weight(generator, outputs, inner, bits)
    sums = integer_weight(weight, group_scale, inner).sum(1, keepdim=True, dtype=torch.int32)
    bias = torch.randn(outputs, generator=generator).to(dtype) if with_bias else None
    smooth = torch.rand(inner, generator=generator) + 0.5 if smoothed else None
    return random_values(generator, rows, inner, dtype), smooth, weight, group_scale, scale, sums, bias


@compiled
@dtypes
@pytest.mark.parametrize("bits", [4, 8])
@given(
    rows=SIZES, inner=WIDTHS, outputs=SIZES, with_bias=st.booleans(), smoothed=st.booleans(), gelu=st.booleans(),
    seed=SEEDS,
)  # fmt: skip
@example(rows=600, inner=1500, outputs=40, with_bias=True, smoothed=False, gelu=True, seed=0)  # more than lie near
@settings(max_examples=20, deadline=None)
def test_a_product_in_c_is_exact(dtype, bits, rows, inner, outputs, with_bias, smoothed, gelu, seed):
    generator = torch.Generator().manual_seed(seed)
    arguments = layer_arguments(generator, rows, inner, outputs, bits, dtype, with_bias, smoothed)
    kernels = cpu.kernels()
    assert torch.equal(kernels.linear(*arguments, gelu), by_passes(kernels, *arguments, gelu))


@compiled
@pytest.mark.parametrize("token", [-128, 127])
def test_the_largest_integers_do_not_overflow_what_they_are_added_in(token):
    """A row of -128 or 127 but for one number that sets its scale, times weights of -127."""
    columns = 3000
    values = torch.full((7, columns), float(token))
    values[:, 0] = -128 if token > 0 else 127
    weight = torch.full((33, columns), -127, dtype=torch.int8)
    sums = weight.sum(1, keepdim=True, dtype=torch.int32)
    arguments = values, None, weight, None, torch.ones(33, 1), sums, None
    assert (cpu.kernels().quantize_tokens(values, None)[0][:, 1:] == token).all()
    assert torch.equal(cpu.kernels().linear(*arguments), by_passes(cpu.kernels(), *arguments, False))


@compiled
@pytest.mark.parametrize("faster", [True, False])
def test_a_layer_is_the_same_by_either_product(faster, monkeypatch):
    arguments = layer_arguments(torch.Generator().manual_seed(0), 40, 70, 30, 4, torch.float32)
    values, smooth, *stored = arguments
    monkeypatch.setattr(own, "multiplies_faster", lambda kernels: faster)
    assert torch.equal(
        integer_linear(values, *stored, smooth, by="cpu"), by_passes(cpu.kernels(), *arguments, gelu=False)
    )


@compiled
def test_rows_need_not_be_contiguous():
    generator = torch.Generator().manual_seed(0)
    weight, group_scale, scale = random_weight(generator, 30, 70, 4)
    sums = integer_weight(weight, group_scale, 70).sum(1, keepdim=True, dtype=torch.int32)
    for rows in (5, 40):
        values = torch.randn(rows, 140, generator=generator)[:, ::2]
        dense = values.contiguous()
        arguments = weight, group_scale, scale
        assert torch.equal(
            integer_linear(values, *arguments, sums, None), integer_linear(dense, *arguments, sums, None)
        )
        assert torch.equal(weight_only_linear(values, *arguments, None), weight_only_linear(dense, *arguments, None))


def test_threads_that_share_layers_do_not_disturb_each_other():
    layers = [NativeLinear.from_linear(nn.Linear(128, 96), SCHEMES[scheme]) for scheme in ("w8a8", "w4a8")]
    inputs = [torch.randn(rows, 128) for rows in (3, 40)]

    def outputs(_=None):
        return [layer(values) for layer in layers for values in inputs]

    expected = outputs()
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(outputs, range(60)):
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@dtypes
def test_a_row_that_is_not_finite_stays_so(dtype):
    layer = NativeLinear.from_linear(nn.Linear(40, 30), SCHEMES["w8a8"]).to(dtype)
    values = torch.randn(40, 40, dtype=dtype)
    values[3, 4] = float("nan")
    output = layer(values)
    assert output[3].isnan().all()
    assert output[:3].isfinite().all()
    assert output[4:].isfinite().all()


@pytest.mark.parametrize(("dtype", "bias_dtype"), [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def test_what_the_kernels_do_not_know_runs_on_torch_ops(dtype, bias_dtype):
    generator = torch.Generator().manual_seed(0)
    weight, group_scale, scale = random_weight(generator, 30, 70, 4)
    sums = integer_weight(weight, group_scale, 70).sum(1, keepdim=True, dtype=torch.int32)
    values, bias = torch.randn(40, 70, generator=generator).to(dtype), torch.ones(30, dtype=bias_dtype)
    arguments = values, weight, group_scale, 1e-3 * scale, sums, bias
    found = integer_linear(*arguments)
    assert found.dtype == dtype
    assert torch.equal(found, without_kernels(integer_linear, *arguments))


@dtypes
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [3, 40])
def test_the_compiler_is_told_the_right_shapes(dtype, bits, rows):
    generator = torch.Generator().manual_seed(0)
    weight, group_scale, scale = random_weight(generator, 30, 70, bits)
    sums = integer_weight(weight, group_scale, 70).sum(1, keepdim=True, dtype=torch.int32)
    values, bias = torch.randn(rows, 70, generator=generator).to(dtype), torch.ones(30, dtype=dtype)
    tests = ("test_schema", "test_faketensor")
    operators = torch.ops.cemq
    for smooth in (None, torch.ones(70)):
        arguments = values, weight, group_scale, scale
        torch.library.opcheck(operators.integer_linear, (*arguments, sums, bias, smooth), test_utils=tests)
        torch.library.opcheck(operators.weight_only_linear, (*arguments, bias, smooth), test_utils=tests)


# --- buffers that they refuse


def kernel_arguments(rows=5, columns=128, outputs=6):
    """Arguments of every kernel, by its name and theirs."""
    weight, values = torch.ones(outputs, columns), torch.ones(rows, columns)
    packed, group_scale, scale = integers.quantize_int4(weight, integers.GROUP_SIZE)
    sums, bias = torch.ones(outputs, 1, dtype=torch.int32), torch.ones(outputs)
    _, token_scale, zero_point = integers.quantize_tokens(values)
    scales = {"scale": token_scale, "zero_point": zero_point, "weight_scale": scale, "weight_sum": sums}
    product = torch.ones(rows, outputs, dtype=torch.int32)
    int4 = {"weight": packed, "group_scale": group_scale, "weight_scale": scale}
    int8 = {"weight": integers.quantize_channels(weight)[0], "group_scale": None, "weight_scale": scale}
    return {
        "quantize_tokens": {"values": values, "smooth": torch.ones(columns)},
        "rescale": {"product": product, **scales, "bias": bias, "dtype": torch.float32},
        "expand_int4": {"packed": packed, "group_scale": group_scale, "columns": columns},
        "linear": {"values": values, "smooth": torch.ones(columns), **int4, "weight_sum": sums, "bias": bias},
        "linear of int8": {"values": values, "smooth": None, **int8, "weight_sum": sums, "bias": bias},
        "few_rows": {"values": values, **int4, "bias": bias},
        "few_rows of int8": {"values": values, **int8, "bias": bias},
    }


FAULTS = {
    "dtype": lambda tensor: tensor.to(torch.float64),
    "size": lambda tensor: tensor[:-1].clone(),
    "order": lambda tensor: torch.stack((tensor, tensor), -1)[..., 0],
    "device": lambda tensor: tensor.to("meta"),
}
# these cast what they are given, and work on as many rows as there are
NO_FAULTS = {("few_rows", "values", "dtype"), ("few_rows", "bias", "dtype")}
NO_FAULTS |= {("few_rows", "values", "size"), ("quantize_tokens", "values", "size"), ("linear", "values", "size")}


@compiled
@pytest.mark.parametrize(
    ("kernel", "name", "fault"),
    [
        (kernel, name, fault)
        for kernel, arguments in kernel_arguments().items()
        for name, value in arguments.items()
        for fault in FAULTS
        if torch.is_tensor(value) and (kernel.split()[0], name, fault) not in NO_FAULTS
    ],
)
def test_a_kernel_refuses_a_buffer_that_is_not_what_it_takes_it_for(kernel, name, fault):
    arguments = kernel_arguments()[kernel]
    run_kernel = getattr(cpu.kernels(), kernel.split()[0])
    run_kernel(**arguments)
    arguments[name] = FAULTS[fault](arguments[name])
    with pytest.raises(ModelError, match=r"^a quantized layer's [^\n]*: load the model anew$"):
        run_kernel(**arguments)


@compiled
@pytest.mark.parametrize("kernel", ["linear", "linear of int8", "few_rows", "few_rows of int8"])
def test_a_weight_of_fewer_columns_than_the_values_is_refused(kernel):
    arguments = kernel_arguments()[kernel] | {"values": torch.ones(5, 256)}
    if arguments.get("smooth") is not None:
        arguments["smooth"] = torch.ones(256)
    with pytest.raises(ModelError, match=r"^a quantized layer's weight is [^\n]*: load the model anew$"):
        getattr(cpu.kernels(), kernel.split()[0])(**arguments)


@compiled
def test_groups_that_do_not_fit_in_what_is_unpacked_at_a_time_are_refused():
    packed, group_scale, scale = integers.quantize_int4(torch.ones(6, 960), 96)
    with pytest.raises(ModelError, match="groups of 96 weights"):
        cpu.kernels().few_rows(torch.ones(5, 960), packed, group_scale, scale, None)


# --- building them


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The folder of a cache that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(cpu.SWITCH, raising=False)
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache" / "cemq"


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@compiler
def test_a_library_is_built_once_and_kept(cache, monkeypatch, tmp_path):
    calls = tmp_path / "calls"
    monkeypatch.setenv("CC", script(tmp_path / "cc", f'echo called >> {calls}; exec {COMPILER} "$@"'))
    assert cpu.load()[1] == ""
    (library,) = cache.iterdir()
    assert library.suffix == ".so"
    built = calls.read_text()
    assert built
    assert cpu.load()[1] == ""
    assert calls.read_text() == built
    assert [path.name for path in cache.iterdir()] == [library.name]


@compiler
def test_a_home_that_cannot_be_written_to_still_works(cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    kernels, why_not = cpu.load()
    assert why_not == ""
    assert torch.equal(kernels.quantize_tokens(torch.ones(1, 3), None)[1], torch.tensor([[1 / 255]]))
    assert not list((tmp_path / "scratch").iterdir())


@compiler
@pytest.mark.usefixtures("cache")
def test_without_a_home_folder(monkeypatch):
    def nowhere():
        raise RuntimeError("no home directory")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    assert cpu.load()[1] == ""


@compiler
def test_a_library_that_was_cut_short_is_built_again(cache):
    assert cpu.load()[1] == ""
    (library,) = cache.iterdir()
    library.unlink()
    library.write_bytes(b"x")
    assert cpu.load()[1] == ""
    assert library.stat().st_size > 1


@compiler
def test_a_compiler_without_openmp_is_enough(cache, monkeypatch, tmp_path):
    refuses = f'case "$*" in *-fopenmp*) exit 1;; esac; exec {COMPILER} "$@"'
    monkeypatch.setenv("CC", script(tmp_path / "cc", refuses))
    kernels, why_not = cpu.load()
    assert why_not == ""
    values = torch.randn(5, 70)
    assert torch.equal(kernels.quantize_tokens(values, None)[0], integers.quantize_tokens(values)[0])


EMULATED = """
#include <immintrin.h>
static inline VECTOR emulated(VECTOR sums, VECTOR tokens, VECTOR factors) {
  int32_t sum[sizeof(VECTOR) / 4];
  uint8_t left[sizeof(VECTOR)];
  int8_t right[sizeof(VECTOR)];
  memcpy(sum, &sums, sizeof sums);
  memcpy(left, &tokens, sizeof tokens);
  memcpy(right, &factors, sizeof factors);
  for (unsigned i = 0; i < sizeof left; i++) sum[i / 4] += left[i] * right[i];
  memcpy(&sums, sum, sizeof sums);
  return sums;
}
"""
UNITS = {"__AVX512VNNI__": ("_mm512_dpbusd_epi32", "__m512i"), "__AVXVNNI__": ("_mm256_dpbusd_avx_epi32", "__m256i")}


@compiler
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("unit", [*UNITS, "__AVX2__", "none"])
def test_the_products_of_other_cpus_are_exact_too(unit, tmp_path):
    """Each way to multiply that is not this CPU's, with its one instruction spelled out in C."""
    if unit != "none" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{unit} is of another architecture")
    if unit == "__AVX2__" and "avx2" not in cpu.features():
        pytest.skip("no AVX2")
    source = cpu.SOURCE.read_text()
    for name in (*UNITS, "__AVX2__"):
        assert f"defined({name})" in source
        source = source.replace(f"defined({name})", str(int(name == unit)))
    if unit in UNITS:
        intrinsic, vector = UNITS[unit]
        assert f"){intrinsic}(" in source
        source = source.replace(f"){intrinsic}(", ")emulated(")
        source = source.replace(
            "#include <string.h>\n", f"#include <string.h>\n{EMULATED.replace('VECTOR', vector)}", 1
        )
    other = tmp_path / "cpu.c"
    other.write_text(source)
    kernels, why_not = cpu.load(other)
    assert why_not == ""
    generator = torch.Generator().manual_seed(0)
    for rows, inner, outputs, bits in ((1, 1, 1, 8), (40, 70, 30, 4), (37, 129, 65, 8), (300, 1030, 33, 4)):
        for dtype in cpu.DTYPES:
            arguments = layer_arguments(generator, rows, inner, outputs, bits, dtype)
            assert torch.equal(kernels.linear(*arguments, True), by_passes(kernels, *arguments, True))


@compiler
@pytest.mark.usefixtures("cache")
def test_kernels_that_compute_something_else_are_not_used(tmp_path):
    source = cpu.SOURCE.read_text()
    assert "rintf(VALUE * inverse) + zero" in source
    other = tmp_path / "cpu.c"
    other.write_text(source.replace("rintf(VALUE * inverse) + zero", "floorf(VALUE * inverse) + zero"))
    assert cpu.load(other) == (None, "the compiled kernels do not give what the torch ops give")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo 'no such flag' >&2; echo more >&2; exit 1", "no such flag"),
        ("exit 1", "returned non-zero exit status 1"),
        ('while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"', ""),  # what the loader says of it differs
        ("exit 0", ""),
    ],
)
def test_a_broken_compiler_is_done_without(cache, monkeypatch, tmp_path, caplog, text, reason):
    monkeypatch.setenv("CC", script(tmp_path / "cc", text))
    with caplog.at_level("INFO", "cemq"):
        kernels, why_not = cpu.load()
    assert kernels is None
    assert why_not
    assert reason in why_not
    assert "\n" not in why_not
    assert "torch ops are used instead" in caplog.text
    assert not list(cache.iterdir())


@compiler
def test_a_compiler_that_hangs_is_done_without(cache, monkeypatch):
    run = subprocess.run

    def hang(command, **options):
        return run(["sh", "-c", "echo thinking >&2; exec sleep 5"], **options | {"timeout": 0.2})

    monkeypatch.setattr(cpu.subprocess, "run", hang)
    kernels, why_not = cpu.load()
    assert kernels is None
    assert isinstance(why_not, str)
    assert why_not
    assert not list(cache.iterdir())


def test_a_compiler_that_is_not_there_is_done_without(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "nowhere"))
    assert "No such file" in cpu.load()[1]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("variable", "value", "why_not"),
    [
        ("PATH", "", "no C compiler: neither cc, gcc nor clang is on the PATH"),
        (cpu.SWITCH, "0", "switched off by CEMQ_CPU_KERNELS=0"),
    ],
)
def test_why_there_are_no_kernels(monkeypatch, variable, value, why_not):
    monkeypatch.setenv(variable, value)
    assert cpu.load() == (None, why_not)


def test_a_process_without_kernels_gives_the_same(tmp_path):
    torch.manual_seed(0)
    layers = [NativeLinear.from_linear(nn.Linear(70, 30), SCHEMES[scheme]) for scheme in ("w8a8", "w4a8", "w4a16")]
    layers += [NativeLinear.from_linear(nn.Linear(70, 30).bfloat16(), SCHEMES["w4a8"])]
    inputs = [torch.randn(rows, 70) for rows in (3, 40)]
    outputs = [[layer(values.to(layer.bias.dtype)) for values in inputs] for layer in layers]
    torch.save((layers, inputs, outputs), tmp_path / "layers")
    code = """
import sys, torch
from cemq.quantize.kernels import cpu
layers, inputs, outputs = torch.load(sys.argv[1], weights_only=False)
for layer, wanted in zip(layers, outputs):
    for values, expected in zip(inputs, wanted):
        found = layer(values.to(layer.bias.dtype))
        exact = len(values) >= 32 and layer.scheme.activation_bits == 8
        assert torch.equal(found, expected) if exact else torch.allclose(found, expected, rtol=0.01, atol=0.01)
print(cpu.kernels())
"""
    assert run_python(code, tmp_path / "layers", **{cpu.SWITCH: "0"}) == "None"
