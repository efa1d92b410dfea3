"""Decisions taken while a picture is drawn: the door for them, and TeaCache."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from support.checks import draw
from support.families import FAMILIES
from support.pipelines import BATCH, CALL, FLUX_CALL, make_dit, make_flux
from support.slow import others_slow

import cemq
from cemq.bench import bench_bundle
from cemq.bundle.manifest import CARD, read_bundle
from cemq.errors import BundleError, InputError, ModelError
from cemq.pipelines.batches import Batch, make_batches, run
from cemq.runtime import attached, detach, find_hook, for_request, schedule_hook
from cemq.runtime.policies import POLICIES, Serving, register_policy
from cemq.runtime.policy_names import describe_policy
from cemq.runtime.runner import Runner
from cemq.runtime.teacache import TeaCache, fitted_coefficients
from cemq.schedule import CacheSchedule

STEPS = 8


@dataclass(frozen=True, kw_only=True)
class EveryOther:
    """Serves every second step from the one before it."""

    name: ClassVar[str] = "every-other"
    cache: str = "output"
    most_kept: ClassVar[int] = 1

    def begin(self, num_steps):
        return self

    def decide(self, call):
        return Serving((call.step - 1,), (1.0,)) if call.step % 2 else None

    def keeps(self, call, *, served):
        return () if call.step % 2 else (call.step,)


def drawn(pipe, steps=STEPS, batch=BATCH, call=CALL):
    return run(pipe, batch, steps=steps, call=call)


def teacache_by_hand(pipe, settings, steps):
    """What TeaCache draws, with a wrapper that runs all of the denoiser every time; and the steps computed."""
    model, found, computed = pipe.transformer, [], []
    forward, last = model.forward, {}
    state = {"before": None, "sum": 0.0, "step": 0}

    def wrapped(*args, **kwargs):
        output = forward(*args, **kwargs)
        (modulated,) = found
        found.clear()
        if state["before"] is not None and state["step"] < steps - 1:
            change = (modulated - state["before"]).abs().mean() / state["before"].abs().mean()
            state["sum"] += sum(c * change.item() ** p for p, c in enumerate(reversed(settings.coefficients)))
        served = state["before"] is not None and state["step"] < steps - 1 and state["sum"] < settings.threshold
        if not served:
            last["output"], state["sum"] = output, 0.0
            computed.append(state["step"])
        state["before"], state["step"] = modulated, state["step"] + 1
        return last["output"]

    handle = model.transformer_blocks[0].norm1.register_forward_hook(lambda *call: found.append(call[-1][0].clone()))
    model.forward = wrapped
    try:
        return drawn(pipe, steps), computed
    finally:
        handle.remove()
        del model.forward


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.0, 100.0])
@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (-1.0, 2.0, 0.01)])
def test_teacache_decides_as_worked_out_by_hand(dit, threshold, coefficients):
    settings = TeaCache(threshold=threshold, coefficients=coefficients, cache="output")
    expected, computed = teacache_by_hand(dit, settings, STEPS)
    with attached(dit, settings) as hook:
        assert np.array_equal(drawn(dit), expected)
        assert hook.steps_run == (STEPS, len(computed))
    assert len(computed) >= 2  # the first and the last
    if threshold == 100:
        assert len(computed) == 2
    elif (threshold, coefficients) == (0, (1.0, 0.0)):
        assert len(computed) == STEPS


def test_a_threshold_of_nothing_changes_nothing_and_a_larger_one_computes_less(dit):
    plain, counts, attended = drawn(dit), [], []
    dit.transformer.transformer_blocks[0].attn1.register_forward_pre_hook(lambda *_: attended.append(1))
    for threshold in (0.0, 0.5, 2.0):
        attended.clear()
        with attached(dit, TeaCache(threshold=threshold)) as hook:
            found = drawn(dit)
        assert np.array_equal(found, plain) == (threshold == 0)
        counts.append(hook.full_evaluations)
        assert len(attended) == hook.full_evaluations  # deciding runs no attention, nor does serving the residual
    assert counts[0] == STEPS > counts[1] > counts[2]
    assert np.array_equal(drawn(dit), plain)


def test_a_policy_follows_any_step_count_and_begins_every_run_anew(dit):
    with attached(dit, TeaCache(threshold=1.0)) as hook:
        first = drawn(dit)
        for steps in (5, 11):
            drawn(dit, steps)
            assert hook.steps_run[0] == steps
            assert hook.skipped_evaluations
        assert np.array_equal(drawn(dit), first)


def test_what_cannot_be_served_is_computed_and_the_policy_is_told(dit):
    told = []

    class Greedy(EveryOther):
        def decide(self, call):
            return Serving((call.step - 1,), (1.0,))

        def keeps(self, call, *, served):
            told.append(served)
            return ()

    plain = drawn(dit)
    with attached(dit, Greedy()), pytest.warns(UserWarning, match="no earlier output"):
        assert np.array_equal(drawn(dit), plain)
    assert told == [False] * STEPS


def test_a_policy_serves_what_a_schedule_of_the_same_steps_serves(dit):
    schedule = CacheSchedule(num_steps=STEPS, full_steps=tuple(range(0, STEPS, 2)), predictor="reuse")
    with attached(dit, schedule):
        expected = drawn(dit)
    with attached(dit, EveryOther()) as hook:
        assert np.array_equal(drawn(dit), expected)
        assert hook.steps_run == (STEPS, STEPS / 2)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:In CPU autocast")  # of some models as they are made
@pytest.mark.parametrize("name", others_slow(FAMILIES, ("flux", "sd3", "pixart_sigma", "wan")))
def test_every_family_of_transformers_can_be_decided_about(name):
    family = FAMILIES[name]
    pipe = family.pipeline()
    plain = draw(pipe, family)
    try:
        with attached(pipe, TeaCache(threshold=0.0, cache="output")):
            assert np.array_equal(draw(pipe, family), plain)
    except ModelError as error:
        assert "has no list of blocks" in str(error)  # noqa: PT017
        return
    with attached(pipe, TeaCache(threshold=1e9, cache="output")) as hook:
        assert np.isfinite(draw(pipe, family)).all()
        steps, computed = hook.steps_run
        assert steps == 2 or computed < steps
    assert np.array_equal(draw(pipe, family), plain)


def test_branches_of_guidance_are_decided_about_one_by_one():
    pipe, seen = make_flux(), []

    class Watching(EveryOther):
        def keeps(self, call, *, served):
            seen.append((call.step, call.stream, call.is_first, served))
            return super().keeps(call, served=served)

    with attached(pipe, Watching()):
        drawn(pipe, 4, Batch(conditions=("a seven",), seeds=(1,)), FLUX_CALL | {"negative_prompt": "a two"})
    streams = {stream for _, stream, _, _ in seen}
    assert len(streams) == 2
    for stream in streams:
        assert [(step, served) for step, each, _, served in seen if each == stream] == [
            (step, bool(step % 2)) for step in range(4)
        ]
    firsts = {stream: is_first for _, stream, is_first, _ in seen}
    assert list(firsts.values()) == [True, False]


def test_a_pipeline_for_a_request_follows_the_policy_with_a_history_of_its_own(dit):
    cemq.apply_policy(dit, EveryOther())
    expected = drawn(dit)
    request = for_request(dit)
    assert np.array_equal(drawn(request), expected)
    assert schedule_hook(request).run.policy == EveryOther()
    assert schedule_hook(request) is not schedule_hook(dit)
    detach(dit)
    detach(request)


def test_the_fitted_polynomial_says_how_much_the_output_changes(dit):
    runner = Runner(pipe=dit, steps=12, call=CALL)
    batches = make_batches((1, 2), samples=2, first_seed=0, batch_size=2)
    seen = []
    with attached(dit, TeaCache(threshold=0.0, cache="output")):
        handle = dit.transformer.register_forward_hook(lambda *call: seen.append(call[-1][0].clone()))
        runner.run(batches)
        handle.remove()
    changes = [((b - a).abs().mean() / a.abs().mean()).item() for a, b in itertools.pairwise(seen)]
    (constant,) = fitted_coefficients(runner, batches, degree=0)
    assert constant == pytest.approx(np.mean(changes), rel=1e-4)
    assert len(fitted_coefficients(runner, batches)) == 5


def test_what_is_no_policy_is_not_registered():
    for kind in (type("Bare", (), {"name": "bare"}), dataclass(type("Open", (), {"name": "open"}))):
        with pytest.raises(InputError, match="a policy is a frozen dataclass with a class attribute 'name'"):
            register_policy(kind)
    again = dataclasses.dataclass(frozen=True)(type("Other", (), {"name": "teacache"}))
    with pytest.raises(InputError, match="policy 'teacache': there is one of that name already"):
        register_policy(again)
    assert POLICIES["teacache"] is register_policy(TeaCache) is TeaCache


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    make_dit().save_pretrained(folder / "pipeline")
    (folder / "labels.txt").write_text("1\n2\n3\n4\n")
    cemq.quantize_and_schedule(
        str(folder / "pipeline"), folder / "bundle", scheme="w8a8", rounding="nearest", steps=STEPS, samples=2,
        call=CALL, calib=str(folder / "labels.txt"), device="cpu", policy="teacache:threshold=1.0",
    )  # fmt: skip
    return folder / "bundle"


def test_a_bundle_keeps_its_policy_by_name_and_settings(bundle, tmp_path):
    manifest = read_bundle(bundle, verify=True)
    assert manifest.policy == describe_policy(TeaCache(threshold=1.0))
    assert manifest.cache == "residual"
    assert 2 <= manifest.full_steps < STEPS
    assert "| policy | teacache, threshold 1.0" in (bundle / CARD).read_text()
    pipe = cemq.from_pretrained(bundle, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert schedule_hook(pipe).run.policy == TeaCache(threshold=1.0)
    found = drawn(pipe)
    assert schedule_hook(pipe).skipped_evaluations
    pipe.save_pretrained(tmp_path / "again")
    again = cemq.from_pretrained(tmp_path / "again", device="cpu")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(drawn(again), found)
    evaluated = cemq.evaluate(bundle, samples=2, device="cpu")
    assert evaluated.full_steps < STEPS


def test_a_bundle_with_a_policy_has_no_budget_and_is_saved_with_no_other(bundle, tmp_path):
    with pytest.raises(InputError, match="budget=4: the policy teacache of this bundle decides: leave it out"):
        cemq.from_pretrained(bundle, device="cpu", budget=4)
    pipe = cemq.from_pretrained(bundle, device="cpu")
    with pytest.raises(ModelError, match="without an error prior"):
        cemq.set_budget(pipe, 4)
    detach(pipe)
    cemq.apply_policy(pipe, TeaCache(threshold=0.3))
    with pytest.raises(BundleError, match="follows the policy teacache, and the fidelity in its bundle was measured"):
        pipe.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_bundle_with_a_policy_is_timed_under_it(bundle):
    result = bench_bundle(bundle, rounds=1, device="cpu")
    computed = read_bundle(bundle).full_steps
    assert result["settings"]["full_steps"] < STEPS
    assert (
        result["tables"][1]["rows"][-1]["variant"]
        == f"w8a8, {result['settings']['full_steps']:g} of {STEPS} steps in full"
    )
    assert abs(result["settings"]["full_steps"] - computed) <= 2  # other samples
    assert not [note for note in result["notes"] if "were planned" in note]


def test_a_policy_has_no_schedule_to_export_or_to_follow(bundle, dit):
    for use in (cemq.export, lambda folder: cemq.apply_schedule(dit, folder)):
        with pytest.raises(InputError, match="the policy teacache decides while drawing, so there is no schedule"):
            use(bundle)
    assert find_hook(dit) is None


def test_the_memory_plan_allows_for_what_a_policy_keeps(bundle):
    (denoiser,) = [each for each in cemq.plan_memory(bundle, "4GiB").components if each.name == "transformer"]
    assert denoiser.cached_bytes > 0


@pytest.mark.parametrize("name", ["budget", "solver", "rectify", "effort", "cache"])
def test_a_policy_and_what_is_planned_do_not_go_together(bundle, tmp_path, name):
    given = {"budget": 4, "solver": "uniform", "rectify": "none", "effort": "quick", "cache": "modules"}[name]
    with pytest.raises(InputError, match=f"policy=.*: nothing is planned then, so leave {name} out"):
        cemq.quantize_and_schedule(
            str(bundle.parent / "pipeline"), tmp_path / "b", policy="teacache:threshold=1", **{name: given}
        )


def test_a_policy_stays_within_its_device(dit):
    with attached(dit, TeaCache(threshold=0.05)), torch.inference_mode():
        drawn(dit)
