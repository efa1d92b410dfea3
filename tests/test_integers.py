"""Quantization to integers and the integer product, against NumPy that knows nothing of the package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import run_python

from cemq.quantize import integers
from cemq.quantize.integers import (
    expand_int4,
    float_matmul,
    group_scales,
    integer_matmul,
    pack_int4,
    padded_matmul,
    quantize_channels,
    quantize_int4,
    quantize_tokens,
    rescale,
    unpack_int4,
)

SIZES, SEEDS = st.integers(1, 70), st.integers(0, 10**6)
GROUP_SIZES = st.sampled_from([2, 6, 8, 64])


def random_int8(seed, *shape):
    """Any int8, or only the extremes, where a product that saturates on the way would show."""
    random = np.random.default_rng(seed)
    values = random.integers(-128, 128, shape) if seed % 2 else random.choice([-128, 127], shape)
    return torch.from_numpy(values.astype(np.int8))


def random_float(seed, rows, columns):
    """Rows of very different sizes."""
    random = np.random.default_rng(seed)
    return (random.normal(size=(rows, columns)) * 10.0 ** random.uniform(-6, 4, (rows, 1))).astype(np.float32)


def half_byte(packed, row, column, group_size):
    """One int4: the first half of a group lies in the low half bytes, the second in the high ones."""
    group, place = divmod(column, group_size)
    half = group_size // 2
    byte = int(packed[row, group * half + place % half])
    return (byte >> 4 if place >= half else byte & 15) - 8


# --- the product


@given(rows=SIZES, inner=SIZES, columns=SIZES, seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_the_integer_product_is_exact(rows, inner, columns, seed):
    left, right = random_int8(seed, rows, inner), random_int8(seed + 2, columns, inner)
    expected = left.numpy().astype(np.int64) @ right.numpy().astype(np.int64).T
    padded = padded_matmul(left, right, min_rows=17, multiple=8)
    for found in (integer_matmul(left, right), float_matmul(left, right), padded):
        assert found.dtype == torch.int32
        assert np.array_equal(found.numpy(), expected)


def test_the_integer_product_of_a_long_row_of_extremes_is_exact():
    left, right = torch.full((32, 8192), -128, dtype=torch.int8), torch.full((3, 8192), -128, dtype=torch.int8)
    for product in (integer_matmul, float_matmul):
        assert (product(left, right) == 128 * 128 * 8192).all()


def test_the_integer_product_is_exact_on_a_processor_without_vnni():
    # oneDNN adds pairs of products in 16 bits there, and saturates: pytorch/pytorch#136746
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])  # the module alone: the package would load diffusers
from integers import integer_matmul
left = torch.tensor([[127, 127], [-128, 100]], dtype=torch.int8).repeat(16, 32)
right = torch.tensor([[127, 127], [-127, -127], [127, -127]], dtype=torch.int8).repeat(1, 32)
print(torch.equal(integer_matmul(left, right).long(), left.long() @ right.long().T))
"""
    assert run_python(code, Path(integers.__file__).parent, ONEDNN_MAX_CPU_ISA="AVX2") == "True"


@given(rows=SIZES, inner=SIZES, columns=SIZES, seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_a_w8a8_product_is_exact_before_it_is_scaled(rows, inner, columns, seed):
    weight, _ = quantize_channels(torch.from_numpy(random_float(seed, columns, inner)))
    assert_exact(weight, weight.numpy(), random_float(seed + 1, rows, inner))


@given(rows=SIZES, inner=SIZES, columns=st.integers(1, 20), group_size=GROUP_SIZES, seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_a_w4a8_product_is_exact_before_it_is_scaled(rows, inner, columns, group_size, seed):
    packed, group_scale, _ = quantize_int4(torch.from_numpy(random_float(seed, columns, inner)), group_size)
    reference = np.empty((columns, inner), np.int64)
    for row, column in np.ndindex(columns, inner):
        factor = int(group_scale[row, column // group_size])
        reference[row, column] = half_byte(packed, row, column, group_size) * factor
    assert_exact(expand_int4(packed, group_scale, inner), reference, random_float(seed + 1, rows, inner))


def assert_exact(weight, reference, values):
    """Unit scales leave the integers as they are: none here is beyond what a float32 holds exactly."""
    quantized, _, zero_point = quantize_tokens(torch.from_numpy(values))
    product, units = integer_matmul(quantized, weight), torch.ones(len(weight), 1)
    sums = weight.sum(1, keepdim=True, dtype=torch.int32)
    found = rescale(product, torch.ones(len(values), 1), zero_point, units, sums, None, torch.float32)
    expected = (quantized.numpy().astype(np.int64) - zero_point.numpy()) @ reference.astype(np.int64).T
    assert np.array_equal(found.numpy(), expected)


@given(rows=SIZES, columns=SIZES, bias=st.booleans(), seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_rescaling_is_scale_times_the_product_less_the_zero_point(rows, columns, bias, seed):
    random = np.random.default_rng(seed)
    product = random.integers(-(10**7), 10**7, (rows, columns)).astype(np.int32)
    zero_point = random.integers(-128, 128, (rows, 1)).astype(np.int32)
    sums = random.integers(-8000, 8000, (columns, 1)).astype(np.int32)
    scale, weight_scale = random.random((rows, 1)).astype("f4"), random.random((columns, 1)).astype("f4")
    offset = random.normal(size=columns).astype("f4") if bias else np.zeros(columns, "f4")
    tensors = [torch.from_numpy(a) for a in (product, scale, zero_point, weight_scale, sums)]
    found = rescale(*tensors, torch.from_numpy(offset) if bias else None, torch.float32)
    scaled = (product - zero_point * sums.T.astype(np.int64)) * scale.astype(np.float64) * weight_scale.T
    assert np.allclose(found, scaled + offset, rtol=1e-6, atol=1e-6)


# --- weights


@given(rows=SIZES, groups=st.integers(1, 5), group_size=GROUP_SIZES, seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_packing_int4_loses_nothing_and_halves_the_bytes(rows, groups, group_size, seed):
    random = np.random.default_rng(seed)
    values = torch.from_numpy(random.integers(-8, 8, (rows, groups * group_size)).astype(np.int8))
    packed = pack_int4(values, group_size)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, groups * group_size // 2)
    assert torch.equal(unpack_int4(packed, group_size), values)


def test_the_first_half_of_a_group_sits_in_the_low_half_bytes():
    values = torch.tensor([[-8, 7, 0, 1, 2, 3, 4, 5]], dtype=torch.int8)
    assert pack_int4(values, 4).tolist() == [[0x80, 0x9F, 0xCA, 0xDB]]
    assert pack_int4(values, 8).tolist() == [[0xA0, 0xBF, 0xC8, 0xD9]]


@given(rows=st.integers(1, 20), columns=SIZES, group_size=GROUP_SIZES, seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_expanded_int4_is_int4_times_its_group_scale_and_fits_in_int8(rows, columns, group_size, seed):
    weight = np.random.default_rng(seed).standard_t(2, (rows, columns)).astype(np.float32)
    packed, group_scale, scale = quantize_int4(torch.from_numpy(weight), group_size)
    expanded = expand_int4(packed, group_scale, columns)
    assert expanded.dtype == torch.int8
    assert expanded.shape == (rows, columns)
    assert group_scale.abs().min() >= 1
    assert group_scale.abs().max() <= 15
    for row, column in np.ndindex(rows, columns):
        int4 = half_byte(packed, row, column, group_size)
        assert -8 <= int4 <= 7
        assert int(expanded[row, column]) == int4 * int(group_scale[row, column // group_size])
    assert np.allclose(scale.squeeze(1), np.abs(weight).max(1) / 120, rtol=1e-6)


@given(seed=SEEDS, weighted=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_group_scale_is_the_best_of_the_largest_three_of_either_sign(seed, weighted):
    random = np.random.default_rng(seed)
    weight, importance = random.standard_t(3, (4, 32)), random.random(32) if weighted else np.ones(32)
    weight, counts = weight.astype("f4"), torch.from_numpy(importance) if weighted else None
    group_scale, scale = group_scales(torch.from_numpy(weight), 8, counts)
    for row, group in np.ndindex(4, 4):
        columns, unit = slice(8 * group, 8 * group + 8), float(scale[row])
        part = weight[row, columns].astype(np.float64)

        def error(whole, part=part, unit=unit, columns=columns):
            step = whole * unit
            return np.sum((np.clip(np.round(part / step), -8, 7) * step - part) ** 2 * importance[columns])

        largest = min(15, max(1, int(np.ceil(np.float32(abs(part).max()) / np.float32(8 * unit)))))
        candidates = {sign * max(1, largest - trial) for trial in range(3) for sign in (1, -1)}
        best = min(error(candidate) for candidate in candidates)
        assert error(int(group_scale[row, group])) == pytest.approx(best, rel=1e-4, abs=1e-12)


@given(rows=SIZES, columns=SIZES, seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_quantized_channels_are_off_by_half_a_step_at_most(rows, columns, seed):
    weight = random_float(seed, rows, columns)
    quantized, scale = (t.numpy() for t in quantize_channels(torch.from_numpy(weight)))
    assert (quantized.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (rows, 1))
    assert quantized.min() >= -127
    assert (np.abs(quantized.astype(np.float64) * scale - weight) <= 0.5001 * scale).all()


@pytest.mark.parametrize("side", [1, -1])
def test_four_bit_weights_reach_further_to_the_side_that_needs_it(side):
    weight = torch.arange(-7, 9).repeat(3, 4).float() * side
    packed, group_scale, scale = quantize_int4(weight, 16)
    assert torch.allclose(expand_int4(packed, group_scale, 64) * scale, weight, rtol=1e-6)
    assert (group_scale.sign() == -side).all()


def test_integers_of_bundles_that_were_made_with_larger_group_scales_stay_what_they_were():
    values = torch.randint(-7, 8, (4, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    group_scale = torch.tensor([[18], [17], [1], [16]], dtype=torch.int8)
    assert torch.equal(expand_int4(pack_int4(values, 64), group_scale, 64).int(), values.int() * group_scale.int())


def test_weights_that_fit_the_grid_are_unchanged():
    whole = np.random.default_rng(0).integers(-127, 128, (6, 20)).astype(np.float32)
    whole[:, 3] = 127
    weight = torch.from_numpy(whole * 2.0 ** np.arange(-9, 3, 2, dtype=np.float32)[:, None])
    quantized, scale = quantize_channels(weight)
    assert torch.equal(quantized, torch.from_numpy(whole.astype(np.int8)))
    assert torch.equal(quantized * scale, weight)


# --- tokens


@given(rows=SIZES, channels=SIZES, seed=SEEDS, offset=st.sampled_from([-30.0, 0.0, 3.0]))
@settings(max_examples=40, deadline=None)
def test_quantized_tokens_are_off_by_half_a_step_at_most_and_zero_stays_zero(rows, channels, seed, offset):
    values = random_float(seed, rows, channels) + np.float32(offset)
    values[np.random.default_rng(seed).random(values.shape) < 0.2] = 0
    quantized, scale, zero_point = (t.numpy() for t in quantize_tokens(torch.from_numpy(values)))
    assert (quantized.dtype, scale.dtype, zero_point.dtype) == (np.int8, np.float32, np.int32)
    assert zero_point.min() >= -128
    assert zero_point.max() <= 127
    assert (quantized == zero_point)[values == 0].all()
    restored = (quantized.astype(np.float64) - zero_point) * scale
    assert (np.abs(restored - values) <= 0.5001 * scale).all()


@given(rows=SIZES, channels=SIZES, seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_smoothed_tokens_are_tokens_that_were_multiplied_first(rows, channels, seed):
    values = torch.from_numpy(random_float(seed, rows, channels)).bfloat16()
    smooth = torch.from_numpy(np.random.default_rng(seed).uniform(0.1, 10, channels).astype("f4"))
    for found, expected in zip(quantize_tokens(values, smooth), quantize_tokens(values.float() * smooth), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5, 1e-20, -1e30])
def test_constant_tokens_survive_quantization(value):
    quantized, scale, zero_point = quantize_tokens(torch.full((3, 5), value))
    restored = (quantized.double() - zero_point) * scale
    assert restored == pytest.approx(np.full((3, 5), value), rel=1e-6, abs=1e-11)
