"""Quantizing to what layers are fed while the denoiser runs, with nothing replayed."""

import pytest
import torch
from support.comparing import identical
from support.models import Toy, toy_calls
from support.pipelines import make_denoiser, predict

from cemq.errors import SchemeError
from cemq.quantize import CemqConfig, Observer, quantize_calibrated, record_calls
from cemq.quantize.gptq import gptq_int4
from cemq.quantize.integers import quantize_int4

EVERYWHERE = {"full_precision": (), "eight_bit": ()}
W4A8 = CemqConfig("w4a8", **EVERYWHERE)
OUTER, INNER = 4 * 100**2, 4 * 128**2  # Hessian bytes: of left and right, which share one, and of the layer after them


def watched(observer, model, runs):
    """Run the calls of each run in turn."""
    for number, calls in enumerate(runs):
        with observer.watch(number):
            for call in calls:
                model(*call.arguments)


def in_runs(count, calls=2):
    every = toy_calls(count * calls)
    return [every[start : start + calls] for start in range(0, count * calls, calls)]


def hessian(inputs):
    found = torch.zeros(inputs[0].shape[1], inputs[0].shape[1])
    for values in inputs:
        found.addmm_(values.T, values)
    return found


@pytest.mark.parametrize("config", [W4A8, CemqConfig("w8a8", smoothed=True, **EVERYWHERE)])
def test_an_observed_model_is_quantized_as_one_whose_calls_are_replayed(config):
    runs, observed, replayed = in_runs(3), Toy(), Toy()
    observer = Observer(observed, config, runs=3)
    watched(observer, observed, runs)
    assert observed.calls == 6
    observer.install(observed)
    quantize_calibrated(replayed, config, [call for calls in runs for call in calls])
    assert identical(observed, replayed)
    assert observed.config == replayed.config


def test_only_some_calls_are_watched_and_the_model_is_as_it_was_until_the_end():
    model, twin, (calls,) = make_denoiser(), make_denoiser(), [range(7)]
    observer = Observer(model, CemqConfig("w4a8"), every=3)
    with observer.watch(0, first=1):
        outputs = [predict(model, seed) for seed in calls]
    assert all(torch.equal(found, predict(twin, seed)) for seed, found in zip(calls, outputs, strict=True))
    assert identical(model, twin)
    with record_calls(twin, every=3, first=1) as recorded:
        for seed in calls:
            predict(twin, seed)
    observer.install(model)
    quantize_calibrated(twin, CemqConfig("w4a8"), recorded)
    assert identical(model, twin)


def test_layers_that_do_not_fit_together_are_fitted_to_a_share_of_the_runs_each():
    runs, model, twin = in_runs(4), Toy(), Toy()
    observer = Observer(model, W4A8, runs=4, limit_bytes=INNER)
    watched(observer, model, runs)
    observer.install(model)
    early, late = ([call.arguments[0] for calls in share for call in calls] for share in (runs[:2], runs[2:]))
    fed = [torch.relu(twin.left(values) * twin.right(values)).detach() for values in late]
    for name, inputs in (("left", early), ("right", early), ("after", fed)):
        packed, group_scale, _ = gptq_int4(getattr(twin, name).weight, hessian(inputs), 64)
        assert torch.equal(getattr(model, name).weight.integers, packed)
        assert torch.equal(getattr(model, name).group_scale, group_scale)


def test_the_largest_hessians_are_left_out_where_runs_are_too_few(caplog):
    model, twin, runs = Toy(), Toy(), in_runs(1)
    observer = Observer(model, W4A8, limit_bytes=INNER)
    with caplog.at_level("WARNING", "cemq.build"):
        watched(observer, model, runs)
    assert caplog.messages == [
        "1 of 4 layers of Toy are rounded to nearest: GPTQ of theirs would take more than 1 runs with 6.1e-05 GiB "
        "each; more samples, or a larger effort, leave fewer"
    ]
    observer.install(model)
    assert torch.equal(model.after.weight.integers, quantize_int4(twin.after.weight, 64)[0])
    packed, _, _ = gptq_int4(twin.left.weight, hessian([call.arguments[0] for call in runs[0]]), 64)
    assert torch.equal(model.left.weight.integers, packed)


@pytest.mark.parametrize("limit_bytes", [INNER, 1 << 30])
@pytest.mark.parametrize("finished", [1, 2, 3, 4])
def test_an_observer_goes_on_from_what_another_had_learned(limit_bytes, finished):
    runs, at_once, model = in_runs(4), Toy(), Toy()
    whole = Observer(at_once, W4A8, runs=4, limit_bytes=limit_bytes)
    watched(whole, at_once, runs)
    whole.install(at_once)
    first = Observer(model, W4A8, runs=4, limit_bytes=limit_bytes)
    watched(first, model, runs[:finished])
    second = Observer(model, W4A8, runs=4, limit_bytes=limit_bytes)
    second.restore(first.state())
    for number, calls in list(enumerate(runs))[finished:]:
        with second.watch(number):
            for call in calls:
                model(*call.arguments)
    second.install(model)
    assert identical(model, at_once)


class Peeking(Toy):
    """Casts what it is given to the dtype of a weight."""

    def forward(self, values, **others):
        return super().forward(values.to(self.right.weight.dtype), **others)


def test_a_layer_that_is_read_past_its_forward_stays():
    model, runs = Peeking(), in_runs(2)
    observer = Observer(model, W4A8, runs=2)
    watched(observer, model, runs)
    observer.install(model)
    assert type(model.right) is torch.nn.Linear
    assert "right" in model.config.quantization_config.full_precision
    assert model(*runs[0][0].arguments)["sample"].isfinite().all()


def test_float_weights_may_be_another_objects():
    model, twin, elsewhere, runs = Toy(), Toy(), Toy(), in_runs(2)
    observer = Observer(model, W4A8, runs=2, weights=elsewhere)
    watched(observer, model, runs)
    observer.install(elsewhere)
    quantize_calibrated(twin, W4A8, [call for calls in runs for call in calls])
    assert identical(elsewhere, twin)
    assert type(model.left) is torch.nn.Linear


def test_a_model_that_no_run_called_is_refused():
    with pytest.raises(SchemeError, match="Toy was not called in any reference run, and native w4a8 is fitted to what"):
        Observer(Toy(), W4A8).install(Toy())
    with pytest.raises(SchemeError, match="nothing to quantize"):
        Observer(Toy(), CemqConfig("w4a8", full_precision=("*",)))


def test_an_interrupted_run_leaves_the_model_alone():
    model = Toy()
    with pytest.raises(RuntimeError), Observer(model, W4A8).watch(0):
        model(torch.ones(2, 3))
    assert type(model.left) is torch.nn.Linear
    assert not model.left._forward_pre_hooks
