"""Rounding to recorded inputs, smoothing and low-rank corrections, against brute force in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparing import relative

from cemq.errors import SchemeError
from cemq.quantize import SCHEMES, InputStatistics, NativeLinear
from cemq.quantize.gptq import DAMPING, SMOOTHING, gptq_int4, gptq_int8, low_rank, refitted_scale, smoothing
from cemq.quantize.integers import expand_int4, group_scales, quantize_channels, quantize_int4

GROUP = 64
widths = pytest.mark.parametrize("width", [64, 100, 130, 300])
SEEDS = st.integers(0, 10**6)


def correlated(seed, tokens, width):
    """Inputs that lie near a space of few dimensions, some channels much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, max(1, width // 8), generator=generator)
    values = few @ torch.randn(few.shape[1], width, generator=generator)
    values += 0.1 * torch.randn(tokens, width, generator=generator)
    return values * torch.randn(width, generator=generator).exp()


def random_weight(seed, outputs, width):
    return torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed))


def restored(packed, group_scale, scale, width):
    return expand_int4(packed, group_scale, width) * scale


def output_error(quantized, weight, values):
    stood_for = restored(*quantized, weight.shape[1])
    return relative(values.double() @ stood_for.double().T, values.double() @ weight.double().T)


# --- GPTQ


@widths
def test_the_output_is_nearer_than_with_rounding_to_nearest(width):
    values, weight = correlated(0, 600, width), random_weight(1, 40, width)
    fitted, rounded = gptq_int4(weight, values.T @ values, GROUP), quantize_int4(weight, GROUP)
    for found, expected in zip(fitted, rounded, strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert output_error(fitted, weight, values) < 0.2 * output_error(rounded, weight, values)


@widths
def test_eight_bits_are_fitted_under_the_same_scales(width):
    values, weight = correlated(0, 600, width), random_weight(1, 40, width)
    fitted, rounded = gptq_int8(weight, values.T @ values), quantize_channels(weight)
    assert fitted[0].dtype == torch.int8
    assert torch.equal(fitted[1], rounded[1])
    expected = values @ weight.T
    assert relative(values @ (fitted[0] * fitted[1]).T, expected) < 0.2 * relative(
        values @ (rounded[0] * rounded[1]).T, expected
    )


@given(width=st.integers(1, 150), outputs=st.integers(1, 20), size=st.sampled_from([1e-3, 1.0, 1e4]), seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_inputs_alike_in_all_directions_make_it_rounding_to_nearest(width, outputs, size, seed):
    weight = random_weight(seed, outputs, width)
    hessian = size * torch.eye(width)
    packed, group_scale, scale = gptq_int4(weight, hessian, GROUP)
    rounded = quantize_int4(weight, GROUP)
    assert torch.equal(packed, rounded[0])
    assert torch.equal(group_scale, rounded[1])
    integers = expand_int4(packed, group_scale, width).double()
    assert torch.allclose(scale[:, 0].double(), (weight * integers).sum(1) / integers.square().sum(1), rtol=1e-4)
    assert all(map(torch.equal, gptq_int8(weight, hessian), quantize_channels(weight)))


def test_uncorrelated_inputs_only_move_the_scales():
    weight, sizes = random_weight(0, 30, 200), torch.linspace(0.1, 10, 200)
    packed, group_scale, scale = gptq_int4(weight, torch.diag(sizes**2), GROUP)
    before = weight.abs().amax(1, keepdim=True) / 120
    wide = group_scale.repeat_interleave(GROUP, 1)[:, :200]
    nearest = (weight / (wide * before)).round().clamp(-8, 7) * wide
    assert torch.equal(expand_int4(packed, group_scale, 200), nearest.to(torch.int8))
    assert (scale / before - 1).abs().max() < 0.05
    assert not torch.equal(group_scale, quantize_int4(weight, GROUP)[1])


def plain_gptq(weight, hessian, step, least, greatest):
    """The algorithm as it is first told (2210.17323, section 3): after each column the rest of the weight is moved by
    what the inverse Hessian of the columns that are left says, which is inverted anew each time. In float64."""
    hessian, left = hessian.double(), weight.double().clone()
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    values, importance = torch.zeros_like(left), torch.zeros(len(hessian), dtype=torch.float64)
    columns = hessian.diagonal().argsort(descending=True).tolist()
    while columns:
        inverse, first = torch.linalg.inv(hessian[columns][:, columns]), columns[0]
        values[:, first] = (left[:, first] / step[:, first]).round().clamp(least, greatest)
        error = (left[:, first] - values[:, first] * step[:, first]) / inverse[0, 0]
        left[:, columns] -= error.outer(inverse[0])
        importance[first] = 1 / inverse[0, 0]
        columns = columns[1:]
    return values, importance


@pytest.mark.parametrize("width", [20, 64, 150])
def test_values_and_scales_are_those_of_a_plain_loop(width):
    values, weight = correlated(0, 400, width), random_weight(1, 12, width)
    hessian = values.T @ values
    packed, group_scale, scale = gptq_int4(weight, hessian, GROUP)
    before = weight.abs().amax(1, keepdim=True) / 120
    wide = group_scale.repeat_interleave(GROUP, 1)[:, :width].double()
    expected, importance = plain_gptq(weight, hessian, wide * before, -8, 7)
    padding = -width % GROUP
    padded = [torch.nn.functional.pad(tensor.float(), (0, padding)) for tensor in (weight, importance)]
    assert torch.equal(group_scale, group_scales(padded[0], GROUP, padded[1])[0].to(torch.int8))
    integers = expand_int4(packed, group_scale, width).double()
    assert (integers != expected * wide).double().mean() < 0.01  # float32 may break a tie otherwise
    damped = hessian.double() + DAMPING * hessian.diagonal().double().mean() * torch.eye(width)
    best = [(q @ damped @ w) / (q @ damped @ q) for q, w in zip(integers, weight.double(), strict=True)]
    assert torch.allclose(scale[:, 0].double(), torch.stack(best), rtol=1e-3)


@given(width=st.integers(1, 80), outputs=st.integers(1, 10), tokens=st.integers(1, 100), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_a_refitted_scale_never_makes_the_output_worse(width, outputs, tokens, seed):
    values, weight = correlated(seed, tokens, width), random_weight(seed, outputs, width)
    integers = torch.randint(-120, 121, weight.shape, generator=torch.Generator().manual_seed(seed))
    hessian, before = values.T @ values, weight.abs().amax(1, keepdim=True) / 120
    after = refitted_scale(weight, integers, hessian, before)
    assert (after > 0).all()

    def errors(scale):
        left = integers * scale.double() - weight.double()
        return (left @ hessian.double() * left).sum(1)

    size = (weight.double() @ hessian.double() * weight.double()).sum(1)
    assert (errors(after) <= errors(before) * (1 + 1e-5) + 1e-5 * size).all()


def test_integers_that_have_nothing_in_common_with_the_weight_keep_their_scale():
    weight, scale = random_weight(0, 3, 20), torch.full((3, 1), 0.5)
    assert torch.equal(refitted_scale(weight, torch.zeros(3, 20), torch.eye(20), scale), scale)
    assert torch.equal(refitted_scale(weight, -weight.sign(), torch.eye(20), scale), scale)


def test_weights_that_fit_the_grid_are_unchanged_whatever_the_inputs():
    values = correlated(0, 500, 130)
    generator = torch.Generator().manual_seed(1)
    int4 = torch.randint(-8, 8, (20, 130), generator=generator)
    int4[:, ::GROUP] = -8
    signs = torch.randint(0, 2, (20, 3), generator=generator).repeat_interleave(GROUP, 1)[:, :130] * 2 - 1
    weight = int4 * signs * 15 * 2.0 ** torch.randint(-9, 3, (20, 1), generator=generator)
    found = restored(*gptq_int4(weight, values.T @ values, GROUP), 130)
    assert torch.allclose(found, weight, rtol=1e-5)


def test_the_unit_of_the_inputs_does_not_matter():
    values, weight = correlated(0, 300, 100), random_weight(1, 20, 100)
    hessian = values.T @ values
    for found, expected in zip(
        gptq_int4(weight, hessian * 2**-30, GROUP), gptq_int4(weight, hessian, GROUP), strict=True
    ):
        assert torch.equal(found, expected)


@widths
def test_channels_that_are_silent_do_no_harm(width):
    values, weight = correlated(0, 600, width), random_weight(1, 40, width)
    values[:, ::3] = 0
    fitted, rounded = gptq_int4(weight, values.T @ values, GROUP), quantize_int4(weight, GROUP)
    assert output_error(fitted, weight, values) < 0.2 * output_error(rounded, weight, values)


@pytest.mark.parametrize("tokens", [1, 5, 60])
def test_fewer_tokens_than_channels_are_enough(tokens):
    values, weight = correlated(0, tokens, 130), random_weight(1, 40, 130)
    fitted, rounded = gptq_int4(weight, values.T @ values, GROUP), quantize_int4(weight, GROUP)
    assert output_error(fitted, weight, values) < 0.2 * output_error(rounded, weight, values)


def test_weights_of_silent_channels_are_rounded_like_others():
    values, weight = correlated(0, 600, 130), random_weight(1, 40, 130)
    values[:, ::3] = 0
    found, scale = gptq_int8(weight, values.T @ values)
    assert torch.equal(found[:, ::3], quantize_channels(weight)[0][:, ::3])
    assert torch.equal(scale, quantize_channels(weight)[1])


def test_channels_that_repeat_each_other_are_no_obstacle():
    values, weight = correlated(0, 600, 50).repeat(1, 3), random_weight(1, 40, 150)
    fitted, rounded = gptq_int4(weight, values.T @ values, GROUP), quantize_int4(weight, GROUP)
    assert output_error(fitted, weight, values) < 0.2 * output_error(rounded, weight, values)


def test_inputs_that_are_all_zero_leave_something_finite():
    packed, group_scale, scale = gptq_int4(random_weight(0, 10, 70), torch.zeros(70, 70), GROUP)
    assert restored(packed, group_scale, scale, 70).isfinite().all()
    assert group_scale.abs().min() >= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(bad):
    values = correlated(0, 100, 70)
    values[3, 5] = bad
    with pytest.raises(SchemeError, match="recorded inputs hold NaN or infinity"):
        gptq_int4(random_weight(1, 10, 70), values.T @ values, GROUP)


def test_a_half_precision_weight_is_fitted_in_float32():
    values, weight = correlated(0, 300, 100), random_weight(1, 20, 100).bfloat16()
    hessian = values.T @ values
    assert all(map(torch.equal, gptq_int4(weight, hessian, GROUP), gptq_int4(weight.float(), hessian, GROUP)))


def test_neither_weight_nor_hessian_is_changed():
    values, weight = correlated(0, 300, 100), random_weight(1, 20, 100)
    hessian = values.T @ values
    before = weight.clone(), hessian.clone()
    gptq_int4(weight, hessian, GROUP)
    low_rank(weight, hessian, 4)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


# --- low-rank corrections


@pytest.mark.parametrize("fitted", [False, True])
def test_a_weight_of_that_rank_is_kept_up_to_bfloat16(fitted):
    values = correlated(0, 500, 90)
    weight = random_weight(1, 50, 6) @ random_weight(2, 6, 90)
    up, down = low_rank(weight, values.T @ values if fitted else None, 6)
    assert (up.shape, down.shape) == ((50, 6), (6, 90))
    assert up.dtype == down.dtype == torch.bfloat16
    assert relative(up.float() @ down.float(), weight) < 2**-7


@pytest.mark.parametrize("tokens", [20, 500])
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_the_correction_is_the_best_of_its_rank_for_the_output(rank, tokens):
    values, weight = correlated(0, tokens, 90).double(), random_weight(1, 50, 90).double()
    hessian = values.T @ values
    up, down = low_rank(weight, hessian, rank)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(90)
    sizes, directions = torch.linalg.eigh(damped)
    root = directions @ torch.diag(sizes.sqrt()) @ directions.T  # another root than Cholesky's: the norm is the same
    least = torch.linalg.svdvals(weight @ root)[rank:].square().sum()
    error = weight - up.double() @ down.double()
    found = torch.trace(error @ damped @ error.T)
    rounding = (2**-7) ** 2 * torch.trace(weight @ damped @ weight.T)
    assert least <= found <= 1.001 * least + rounding


def test_a_correction_for_inputs_that_are_all_zero():
    up, down = low_rank(random_weight(0, 4, 8), torch.zeros(8, 8), 2)
    assert (up.float() @ down.float()).isfinite().all()


def test_without_inputs_the_correction_is_the_best_for_the_weight():
    weight = random_weight(0, 50, 90)
    up, down = low_rank(weight, None, 8)
    least = torch.linalg.svdvals(weight)[8:].square().sum()
    assert (weight - up.float() @ down.float()).square().sum() == pytest.approx(float(least), rel=1e-3)


def test_a_corrected_layer_is_nearer_than_one_without():
    torch.manual_seed(0)
    linear, values = torch.nn.Linear(100, 60), torch.randn(500, 100) * torch.randn(100).exp()
    statistics = InputStatistics(largest=(1.0,), channel_largest=values.abs().amax(0), hessian=values.T @ values)
    with torch.no_grad():
        expected = linear(values)
        plain, corrected = (
            NativeLinear.from_linear(linear, replace(SCHEMES["w4a16"], low_rank=rank), statistics)(values)
            for rank in (0, 16)
        )
    assert relative(corrected, expected) < 0.95 * relative(plain, expected)


# --- smoothing


@given(width=st.integers(1, 150), outputs=st.integers(1, 20), seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_smoothing_keeps_the_float_product(width, outputs, seed):
    values, weight = correlated(seed, 20, width), random_weight(seed, outputs, width)
    smooth = smoothing(weight, values.abs().amax(0))
    assert (smooth.shape, smooth.dtype) == ((width,), torch.float32)
    found = (values * smooth).double() @ (weight / smooth).double().T
    largest = values.double().abs() @ weight.double().abs().T
    assert ((found - values.double() @ weight.double().T).abs() <= 1e-6 * largest).all()


def test_smoothing_moves_a_share_of_each_channel_from_the_input_to_the_weight():
    values, weight = correlated(0, 500, 90).double(), random_weight(1, 50, 90).double()
    largest = values.abs().amax(0)
    smooth = smoothing(weight, largest.float()).double()
    expected = weight.abs().amax(0) ** (1 - SMOOTHING) / largest**SMOOTHING
    assert torch.allclose(smooth / smooth[0], expected / expected[0], rtol=1e-5)
    assert smooth.log().mean().abs() < 1e-6


def test_nothing_known_of_the_inputs_is_no_smoothing():
    assert torch.equal(smoothing(random_weight(0, 10, 70), None), torch.ones(70))


def test_silent_channels_and_zero_weights_are_smoothed_within_limits():
    values, weight = correlated(0, 500, 90), random_weight(1, 50, 90)
    values[:, 3], weight[:, 5], values[:, 7] = 0, 0, 1e9
    smooth = smoothing(weight, values.abs().amax(0))
    assert smooth.min() >= 0.01
    assert smooth.max() <= 100


@pytest.mark.parametrize(("scheme", "share"), [("w8a8", 0.75), ("w4a8", 0.95)])
def test_smoothing_helps_where_some_channels_stand_out(scheme, share):
    torch.manual_seed(0)
    linear, values = torch.nn.Linear(128, 60), torch.randn(200, 128)
    values[:, ::16] *= 30
    statistics = InputStatistics(largest=(1.0,), channel_largest=values.abs().amax(0), hessian=values.T @ values)
    with torch.no_grad():
        expected = linear(values)
        plain, smoothed = (
            NativeLinear.from_linear(linear, replace(SCHEMES[scheme], smoothed=smoothed), statistics)(values)
            for smoothed in (False, True)
        )
    assert relative(smoothed, expected) < share * relative(plain, expected)
