"""Recording calls, quantizing to what they hold, and spending a budget of bits."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.comparing import identical, relative
from support.models import Toy, toy_calls
from support.pipelines import make_denoiser, predict
from torch import nn

from cemq.errors import InputError, ReplayError, SchemeError
from cemq.quantize import (
    BACKENDS,
    CemqConfig,
    NativeLinear,
    QuantizedLinear,
    choose_eight_bit,
    quantize_calibrated,
    quantize_in_place,
    record_calls,
    stored_bits,
)
from cemq.quantize.calls import replay
from cemq.quantize.gptq import gptq_int4
from cemq.quantize.integers import quantize_int4

EVERYWHERE = {"full_precision": (), "eight_bit": ()}
BLOCK = "transformer_blocks.0"
SHARED = [f"{BLOCK}.attn1.to_{name}" for name in "qkv"]


def recorded(model, count=3):
    with record_calls(model, every=1) as calls:
        for seed in range(count):
            predict(model, seed)
    return calls


@pytest.fixture
def statistics(monkeypatch):
    """What each layer was told of its inputs, in order of quantization: (shape of the weight, statistics)."""
    told, quantize = [], NativeLinear.quantize.__func__

    def spy(cls, weight, scheme, known):
        told.append((tuple(weight.shape), known))
        return quantize(cls, weight, scheme, known)

    monkeypatch.setattr(NativeLinear, "quantize", classmethod(spy))
    return told


# --- recording and replaying


@pytest.mark.parametrize(("every", "first", "kept"), [(1, 0, [0, 1, 2, 3, 4, 5, 6]), (3, 0, [0, 3, 6]), (2, 3, [3, 5])])
def test_every_nth_call_is_kept(every, first, kept):
    model = Toy()
    with record_calls(model, every=every, first=first) as calls:
        for number in range(7):
            model(torch.full((2, 100), float(number)))
    model(torch.zeros(2, 100))
    assert [float(call.arguments[0][0, 0]) for call in calls] == kept


def test_recording_ends_even_after_an_error():
    model = Toy()
    with pytest.raises(ZeroDivisionError), record_calls(model, every=1):
        raise ZeroDivisionError
    assert not model._forward_pre_hooks


def test_calls_in_inference_mode_are_recorded():
    model = nn.Linear(3, 3)
    with record_calls(model, every=1) as calls, torch.inference_mode():
        model(torch.ones(2, 3))
    assert len(calls) == 1


def test_tensors_that_come_again_are_copied_once_and_changed_ones_again():
    model, text, values = Toy(), torch.ones(100), torch.zeros(2, 100)
    with record_calls(model, every=1) as calls:
        for _ in range(2):
            model(values, text=text, extras=[text])
        values += 1
        model(values, text=text.clone())
    text.zero_()
    assert calls[0].keywords["text"] is calls[1].keywords["text"] is calls[1].keywords["extras"][0]
    assert calls[2].keywords["text"] is not calls[0].keywords["text"]
    assert calls[0].arguments[0] is calls[1].arguments[0]
    assert [float(call.arguments[0].sum()) for call in calls] == [0, 0, 200]
    assert all((call.keywords["text"] == 1).all() for call in calls)


def test_a_replayed_call_gives_what_it_gave():
    model = Toy()
    arguments = torch.randn(2, 100), {"text": torch.randn(100), "extras": [None, torch.randn(2, 100)]}
    with record_calls(model, every=1) as calls:
        expected = model(arguments[0], **arguments[1])["sample"]
    found = replay(model, calls[0])["sample"]
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_a_replayed_call_of_a_denoiser_gives_what_it_gave():
    model = make_denoiser()
    with record_calls(model, every=1) as calls:
        expected = predict(model)
    assert torch.equal(replay(model, calls[0]).sample, expected)


class Cache:
    """What some pipelines hand their denoiser at every call and empty when they are done."""

    def __init__(self):
        self.parts, self.tag = [], {"count": [0]}


class Caching(Toy):
    """Remembers its inputs in a cache that it is given, and answers with their sum."""

    def forward(self, values, *, cache):
        cache.parts.append(values)
        cache.tag["count"][0] += 1
        values += 1  # in place
        return (super().forward(sum(cache.parts) * cache.tag["count"][0])["sample"], cache)


def run_caching(model, steps=4):
    cache, outputs = Cache(), []
    for step in range(steps):
        outputs.append(model(torch.full((2, 100), float(step)), cache=cache)[0])
    cache.parts.clear()
    cache.tag.clear()
    return outputs


@torch.no_grad()
def test_a_cache_that_is_emptied_later_is_replayed_as_it_was_as_often_as_one_likes():
    model = Caching()
    with record_calls(model, every=1) as calls:
        expected = run_caching(model)
    for _ in range(2):
        for call, output in zip(calls, expected, strict=True):
            assert torch.equal(replay(model, call)[0], output)
    assert [len(call.keywords["cache"].parts) for call in calls] == [0, 1, 2, 3]


@torch.no_grad()
def test_layers_are_fitted_to_calls_whose_cache_was_emptied():
    model = Caching()
    with record_calls(model, every=1) as calls:
        run_caching(model)
    assert quantize_calibrated(model, CemqConfig("w4a8", **EVERYWHERE), calls, hessian_bytes=1) == 4


def test_the_denoiser_itself_is_not_copied_with_what_refers_to_it():
    model, cache = Toy(), Cache()
    cache.parts = [model.left]
    model.forward = lambda values, cache: cache.parts[0](values)
    with record_calls(model, every=1) as calls:
        model(torch.ones(2, 100), cache=cache)
    assert calls[0].keywords["cache"].parts[0] is model.left


class Stateful(Toy):
    def forward(self, values):
        return super().forward(values * (self.calls + 1))


def test_a_denoiser_that_depends_on_more_than_its_arguments_is_found_out():
    model = Stateful()
    with pytest.raises(ReplayError, match="a call of Stateful gives something else when it is replayed"):  # noqa: SIM117
        with record_calls(model, every=1):
            model(torch.ones(2, 100))


def test_a_call_that_fails_when_it_is_replayed_is_found_out():
    model = Toy()
    with pytest.raises(ReplayError, match=r"a call of Toy cannot be replayed: .*multiplied"):  # noqa: SIM117
        with record_calls(model, every=1):
            model(torch.ones(2, 100))
            model.after = nn.Linear(7, 7)


def test_arguments_that_cannot_be_copied_are_found_out_and_leave_the_run_alone():
    model = Toy()
    model.forward = lambda values, numbers: values + next(numbers)
    with pytest.raises(ReplayError, match=r"a call of Toy cannot be copied: .*generator"):  # noqa: SIM117
        with record_calls(model, every=1):
            numbers = iter([1, 2])
            assert model(torch.zeros(1), (number for number in numbers)) == 1
            assert next(numbers) == 2


def test_replaying_draws_no_random_number_and_an_output_that_is_no_number_is_replayed():
    model = Toy()
    model.forward = lambda values: values * torch.rand(1) * 0 + float("nan")
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with record_calls(model, every=1):
        model(torch.ones(2, 100))
    assert torch.equal(torch.rand(1), expected[1:])


def test_recorded_calls_stay_within_their_memory_and_keep_both_branches(caplog):
    model, one = Toy(), 4 * 2 * 100
    with caplog.at_level("INFO", "cemq.build"), record_calls(model, every=1, limit_bytes=4 * one) as calls:
        for number in range(14):
            model(torch.full((2, 100), float(number)))
            assert len(calls) <= 4
    assert [float(call.arguments[0][0, 0]) for call in calls] == [0, 9]
    assert caplog.messages == ["recorded calls of Toy take much memory: one in 9 is kept, instead of one in 1"]


def test_one_call_is_kept_however_large():
    model = Toy()
    with record_calls(model, every=1, limit_bytes=1) as calls:
        for number in range(5):
            model(torch.full((2, 100), float(number)))
    assert [float(call.arguments[0][0, 0]) for call in calls] == [0]


def test_recording_keeps_no_tensor_of_the_pipeline_alive():
    model, values = Toy(), torch.ones(2, 100)
    gone = weakref.ref(values)
    with record_calls(model, every=1):
        model(values)
        del values
        gc.collect()
        assert gone() is None


# --- quantizing to calls


@pytest.mark.parametrize("hessian_bytes", [1, 1 << 30])
def test_statistics_are_those_of_the_inputs(statistics, hessian_bytes):
    model, calls = Toy(), toy_calls()
    twin = Toy()
    count = quantize_calibrated(model, CemqConfig("w4a8", **EVERYWHERE), calls, hessian_bytes=hessian_bytes)
    assert count == len(statistics) == 4
    (_, left), (_, right), (_, after), (_, unused) = statistics
    assert unused is None
    assert right is left or torch.equal(right.hessian, left.hessian)
    inputs = torch.cat([call.arguments[0] for call in calls])
    if hessian_bytes == 1:  # the layers before were quantized already when this one's inputs were recorded
        for name in ("left", "right"):
            twin.set_submodule(name, getattr(model, name))
    hidden = torch.relu(twin.left(inputs) * twin.right(inputs)).detach()
    for known, values in ((left, inputs), (after, hidden)):
        expected = values.double().T @ values.double()
        assert relative(known.hessian, expected) < 1e-6
        assert torch.allclose(known.channel_largest, values.abs().amax(0), rtol=1e-5)
        assert known.largest == pytest.approx([float(part.abs().max()) for part in values.split(50)], rel=1e-5)


def test_the_hessians_of_one_pass_fit_in_their_limit():
    config, calls = CemqConfig("w4a8", **EVERYWHERE), toy_calls(2)
    for hessian_bytes, passes in ((1 << 30, 1), (4 * (2 * 100**2 + 128**2), 1), (4 * 30_000, 2), (1, 3)):
        model = Toy()
        quantize_calibrated(model, config, calls, hessian_bytes=hessian_bytes)
        assert model.calls == 1 + 2 * passes  # the first finds out which layers are fed alike
        model = Toy()
        quantize_calibrated(model, config, calls, hessian_bytes=hessian_bytes, gptq=False)
        assert model.calls == 1 + 2


def test_layers_are_fitted_to_their_inputs():
    model, twin, calls = Toy(), Toy(), toy_calls()
    quantize_calibrated(model, CemqConfig("w4a8", **EVERYWHERE), calls)
    hessian = torch.zeros(100, 100)
    for call in calls:
        hessian.addmm_(call.arguments[0].T, call.arguments[0])
    for name in ("left", "right"):
        layer = getattr(model, name)
        for found, expected in zip(
            (layer.weight, layer.group_scale, layer.weight_scale),
            gptq_int4(getattr(twin, name).weight, hessian, 64),
            strict=True,
        ):
            assert torch.equal(found, expected)


def test_a_layer_that_no_call_reached_is_rounded():
    model, twin = Toy(), Toy()
    quantize_calibrated(model, CemqConfig("w4a8", smoothed=True, low_rank=4, **EVERYWHERE), toy_calls())
    assert (model.unused.smooth == 1).all()
    rest = twin.unused.weight - model.unused.up.float() @ model.unused.down.float()
    assert torch.equal(model.unused.weight, quantize_int4(rest, 64)[0])
    assert torch.equal(model.unused.bias, twin.unused.bias)


@pytest.mark.parametrize("hessian_bytes", [1, 4 * (2 * 32**2 + 128**2), 1 << 30])
def test_q_k_and_v_share_their_statistics(statistics, hessian_bytes):
    model = make_denoiser()
    config = CemqConfig("w4a8", eight_bit=(), full_precision=("*norm1*", "proj_out*", "pos_embed*"))
    calls = recorded(model)
    inputs = []
    hook = model.get_submodule(SHARED[1]).register_forward_pre_hook(
        lambda _, given: inputs.append(given[0].flatten(0, 1))
    )
    for call in calls:
        replay(model, call)
    hook.remove()
    quantize_calibrated(model, config, calls, hessian_bytes=hessian_bytes)
    inputs = torch.cat(inputs).double()
    for _, known in statistics[:3]:
        assert relative(known.hessian, inputs.T @ inputs) < 1e-6
    assert len({known.hessian.data_ptr() for _, known in statistics[:3]}) == 1
    assert len({known.hessian.data_ptr() for _, known in statistics}) == 2 * (1 + 1 + 2)  # q, k, v; out; feed-forward


def test_rounding_without_gptq_is_rounding_in_place():
    config = CemqConfig("w4a8", full_precision=("proj_out*",))
    model, twin = make_denoiser(), make_denoiser()
    quantize_calibrated(model, config, recorded(model), gptq=False)
    quantize_in_place(twin, config)
    assert identical(model, twin)


@pytest.mark.parametrize("low_rank", [0, 4])
@pytest.mark.parametrize("hessian_bytes", [1, 1 << 30])
def test_a_fitted_model_is_nearer_than_a_rounded_one(low_rank, hessian_bytes):
    config, calls = CemqConfig("w4a16", low_rank=low_rank, **EVERYWHERE), toy_calls()
    exact, fitted, rounded = Toy(), Toy(), Toy()
    quantize_calibrated(fitted, config, calls, hessian_bytes=hessian_bytes)
    quantize_in_place(rounded, config)
    expected = torch.cat([replay(exact, call)["sample"] for call in calls])
    errors = [
        relative(torch.cat([replay(model, call)["sample"] for call in calls]), expected) for model in (fitted, rounded)
    ]
    assert errors[0] < 0.4 * errors[1]


@pytest.mark.parametrize("scheme", BACKENDS["native"].layers)
def test_every_scheme_is_calibrated_in_bfloat16_too(scheme):
    model = make_denoiser().bfloat16()
    expected, calls = predict(model), recorded(model)
    smoothed = scheme.endswith("a8")
    quantize_calibrated(model, CemqConfig(scheme, smoothed=smoothed, eight_bit=()), calls)
    assert predict(model).dtype == torch.bfloat16
    limits = {"w8a8": 0.02, "w8a16": 0.02, "w4a8": 0.06, "w4a16": 0.06, "w8a8-fp8": 0.03}
    assert relative(predict(model), expected) < limits[scheme]


def test_progress_grows_to_one():
    shares = []
    quantize_calibrated(Toy(), CemqConfig("w4a8", **EVERYWHERE), toy_calls(4), hessian_bytes=1, progress=shares.append)
    assert shares == pytest.approx([number / 16 for number in range(1, 17)])  # three passes of four calls; four layers


def test_nothing_left_to_quantize_is_refused():
    with pytest.raises(SchemeError, match="Toy has no linear layer outside the full-precision patterns"):
        quantize_calibrated(Toy(), CemqConfig("w4a8", full_precision=("*",)), toy_calls())


def test_a_calibrated_model_saves_and_reloads(tmp_path):
    model = make_denoiser()
    quantize_calibrated(model, CemqConfig("w4a8", smoothed=True, low_rank=4, eight_bit=()), recorded(model))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert identical(loaded, model)
    assert torch.equal(predict(loaded), predict(model))


# --- bits


@pytest.mark.parametrize("scheme", BACKENDS["native"].layers)
@pytest.mark.parametrize(("smoothed", "low_rank"), [(False, 0), (True, 8)])
def test_stored_bits_are_the_bytes_on_disk(tmp_path, scheme, smoothed, low_rank):
    model = make_denoiser()
    config = CemqConfig(scheme, smoothed=smoothed, low_rank=low_rank, eight_bit=["*.ff.*"])
    expected = stored_bits(model, config)
    quantize_in_place(model, config)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    size = sum(
        tensor.nbytes
        for name, tensor in stored.items()
        if name.rpartition(".")[0] in layers and not name.endswith(".bias")
    )
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    assert expected == pytest.approx(8 * size / weights)


FOUR_BITS = CemqConfig("w4a8", **EVERYWHERE)


@given(budget=st.floats(4.5, 10), more=st.floats(0, 3), smoothed=st.booleans(), low_rank=st.sampled_from([0, 4]))
@settings(max_examples=20, deadline=None)
def test_a_budget_is_kept_and_more_of_it_is_more_bytes(budget, more, smoothed, low_rank):
    model = Toy(256)
    config = CemqConfig("w4a8", smoothed=smoothed, low_rank=low_rank, **EVERYWHERE)
    least = stored_bits(model, config)
    found = [
        stored_bits(model, config.with_eight_bit(choose_eight_bit(model, config, spent)))
        for spent in (max(least, budget), max(least, budget) + more)
    ]
    assert least <= found[0] <= max(least, budget)
    assert found[0] <= found[1] <= max(least, budget) + more


def test_the_least_budget_raises_nothing_and_a_large_one_everything():
    model = Toy(256)
    assert choose_eight_bit(model, FOUR_BITS, stored_bits(model, FOUR_BITS)) == []
    assert set(choose_eight_bit(model, FOUR_BITS, 16)) == {"left", "right", "after", "unused"}


def test_a_budget_below_four_bits_is_refused():
    with pytest.raises(InputError, match=r"bits budget 4.0: w4a8 needs 4\.\d\d bits a weight at least"):
        choose_eight_bit(Toy(256), FOUR_BITS, 4.0)


def test_a_bits_budget_with_nothing_to_quantize():
    nothing = CemqConfig("w4a8", full_precision=("*",))
    with pytest.raises(SchemeError, match="nothing to quantize"):
        choose_eight_bit(nn.Sequential(nn.Linear(64, 64)), nothing, 6)
    assert choose_eight_bit(nn.Sequential(nn.Linear(64, 64)), nothing) == []


@pytest.mark.parametrize("width", [33, 66])
def test_layers_as_large_at_four_bits_as_at_eight_are_raised_for_free(width):
    model = nn.Sequential(nn.Linear(width, width))
    for budget in (stored_bits(model, FOUR_BITS), 20):
        assert choose_eight_bit(model, FOUR_BITS, budget) == ["0"]


ORDER = [
    "single_transformer_blocks.1.attn.to_v",
    "single_transformer_blocks.1.proj_mlp",
    "single_transformer_blocks.1.proj_out",
    "transformer_blocks.0.attn.to_v",
    "transformer_blocks.0.ff.net.2",
    "single_transformer_blocks.1.attn.to_k",
    "transformer_blocks.0.attn.to_q",
    "single_transformer_blocks.1.norm.linear",
    "transformer_blocks.0.attn2.to_v",
    "transformer_blocks.0.attn.add_q_proj",
    "transformer_blocks.0.ff_context.net.2",
    "time_text_embed.linear_1",
]


def like_flux():
    """Layers of one size, named and defined in the order of a FLUX's (and one of a Wan's)."""
    model = nn.Module()
    for name in (
        "time_text_embed.linear_1", "transformer_blocks.0.attn2.to_v", "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_v", "transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.ff.net.2",
        "transformer_blocks.0.ff_context.net.2", "single_transformer_blocks.1.norm.linear",
        "single_transformer_blocks.1.attn.to_k", "single_transformer_blocks.1.attn.to_v",
        "single_transformer_blocks.1.proj_mlp", "single_transformer_blocks.1.proj_out",
    ):  # fmt: skip
        *path, last = name.split(".")
        at = model
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.add_module(last, nn.Linear(256, 256, device="meta", dtype=torch.float32))
    return model


def test_what_the_last_blocks_add_to_the_picture_is_raised_first_and_modulation_last():
    model = like_flux()
    layers = [stored_bits(model, FOUR_BITS.with_eight_bit(ORDER[:count])) for count in range(len(ORDER) + 1)]
    for count, budget in enumerate(layers):
        assert set(choose_eight_bit(model, FOUR_BITS, budget + 1e-6)) == set(ORDER[:count])


def test_a_fifth_of_the_weights_is_raised_where_no_budget_is_given():
    assert set(choose_eight_bit(like_flux(), FOUR_BITS)) == set(ORDER[: len(ORDER) // 5])


def test_layers_that_are_named_come_before_all_others():
    first = ["transformer_blocks.0.attn.to_q", "time_*"]
    assert set(choose_eight_bit(like_flux(), FOUR_BITS, first=first)) == {ORDER[6], ORDER[-1]}


def test_the_chosen_layers_take_eight_bits_and_the_output_comes_nearer():
    calls = toy_calls(3, width=256)
    expected = torch.cat([replay(Toy(256), call)["sample"] for call in calls])
    errors = []
    for budget in (4.8, 7, 16):
        model = Toy(256)
        config = FOUR_BITS.with_eight_bit(choose_eight_bit(model, FOUR_BITS, budget))
        quantize_in_place(model, config)
        taken = {name for name, layer in model.named_children() if layer.scheme.weight_bits == 8}
        assert taken == set(config.eight_bit)
        errors.append(relative(torch.cat([replay(model, call)["sample"] for call in calls]), expected))
    assert errors[2] < errors[1] < errors[0]
