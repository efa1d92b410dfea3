"""What is reported of a run is what ran: steps are counted where they are computed, not read off the schedule."""

import json
import logging
import warnings

import numpy as np
import pytest
from support.callbacks import WARNED, drawn, end_guidance, keep_one
from support.families import FAMILIES
from support.pipelines import CALL, FLUX_CALL, ONE, STEPS
from support.schedules import HALF, HALVED, flux_sampler, plan_of

import cemq
from cemq.bench.bundle import bench_bundle
from cemq.bundle.manifest import CARD, EVIDENCE, read_bundle
from cemq.evaluation.report import describe, print_description
from cemq.pipelines.batches import BUILD_LOG, Batch, run
from cemq.runtime import attached
from cemq.runtime.runner import said_of_steps
from cemq.schedule import CacheSchedule
from cemq.schedule.plan import Plan
from cemq.search.explore import affordable
from cemq.search.trials import Trial

# On the last two of six steps SD3 calls its denoiser once more, for guidance by one that lacks a layer. Of that call no
# earlier step was kept, so that it is computed on both: half of two steps that are skipped.
LATE_CALLS = {
    "skip_guidance_layers": [0], "skip_layer_guidance_start": 0.55, "skip_layer_guidance_stop": 1.0,
    "guidance_scale": 3.0, "height": 8, "width": 8, "max_sequence_length": 32,
}  # fmt: skip
PLANNED, RAN = 2, 3.0


def test_every_step_is_counted_as_it_was_run(dit):
    with attached(dit, plan_of(dit)) as hook:
        run(dit, Batch(conditions=(1, 2), seeds=(5, 6)), steps=STEPS, call=CALL)
        assert hook.steps_run == (STEPS, HALF.budget)
        with pytest.warns(UserWarning, match="this run has 4 steps"):
            run(dit, Batch(conditions=(1, 2), seeds=(5, 6)), steps=4, call=CALL)
        assert hook.steps_run == (4, 4)


def test_a_step_of_which_one_of_two_calls_is_served_counts_half(flux):
    with attached(flux, Plan(schedule=HALVED, sampler=flux_sampler(flux))) as hook:
        run(flux, ONE, steps=STEPS, call=FLUX_CALL)
    assert hook.steps_run == (STEPS, 3.5) == (HALVED.num_steps, HALVED.full_count)


@pytest.mark.parametrize("change", [keep_one, end_guidance])
def test_skipped_steps_that_are_computed_after_all_are_counted(change):
    pipe, schedule = FAMILIES["sd3"].pipeline(), CacheSchedule(num_steps=STEPS, full_steps=(0, 2), predictor="reuse")
    with attached(pipe, schedule) as hook, warnings.catch_warnings():
        warnings.filterwarnings("ignore", WARNED)
        drawn(pipe, at=[2], change=change)
        assert hook.steps_run == (STEPS, STEPS - 1)
    assert said_of_steps(schedule, *hook.steps_run) == (
        "5 of 6 steps ran in full, 2 were planned: what is reported is what ran"
    )
    assert said_of_steps(schedule, STEPS, 2) is None


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("counts"), []
    FAMILIES["sd3"].pipeline().save_pretrained(folder / "pipeline")
    (folder / "prompts.txt").write_text("a seven\na three\na bold two\nan eight\n")
    handler = logging.Handler()
    handler.emit = lambda record: said.append((record.levelname, record.getMessage()))
    logging.getLogger(BUILD_LOG).addHandler(handler)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "cemq: a call to the denoiser on a skipped step")
        warnings.filterwarnings("ignore", "Expected types for|.*torch_dtype.*")
        cemq.quantize_and_schedule(
            str(folder / "pipeline"), folder / "bundle", scheme="none", steps=STEPS, budget=PLANNED, solver="uniform",
            predictor="reuse", rectify="none", samples=2, planning_samples=2, effort="quick", call=LATE_CALLS,
            calib=str(folder / "prompts.txt"), device="cpu",
        )  # fmt: skip
    logging.getLogger(BUILD_LOG).removeHandler(handler)
    return folder / "bundle", said


def test_a_build_says_what_ran_in_manifest_card_and_evidence(built):
    bundle, said = built
    manifest = read_bundle(bundle)
    assert manifest.schedule.full_steps == (0, 3)
    assert (manifest.fidelity["num_steps"], manifest.fidelity["full_steps"], manifest.full_steps) == (STEPS, RAN, RAN)
    assert said == [("WARNING", "3 of 6 steps ran in full, 2 were planned: what is reported is what ran")]
    card = (bundle / CARD).read_text()
    assert "3 of 6 steps in full" in card
    assert "| compute ratio | 2.00 |" in card
    winner = json.loads((bundle / EVIDENCE).read_text())["winner"]
    assert (winner["full_steps"], winner["schedule"]["full_steps"]) == (RAN, [0, 3])


def test_evaluate_inspect_and_bench_say_what_ran(built, capsys):
    bundle, _ = built
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = cemq.evaluate(bundle, samples=2, device="cpu")
        timed = bench_bundle(bundle, rounds=1, device="cpu")
    assert (found.num_steps, found.full_steps, found.compute_ratio) == (STEPS, RAN, 2.0)
    assert any("cemq: 3 of 6 steps ran in full, 2 were planned" in str(each.message) for each in caught)
    assert timed["settings"]["full_steps"] == RAN
    assert timed["tables"][1]["rows"][-1]["variant"] == "none, 3 of 6 steps in full"
    assert any("3 of 6 steps ran in full" in note for note in timed["notes"])
    print_description(describe(bundle))
    assert "(3 steps were computed at build time)" in " ".join(capsys.readouterr().out.split())


def trial(full_steps, computed):
    schedule = CacheSchedule(num_steps=10, full_steps=full_steps)
    measured = {"sample_relative_l2": np.zeros(2), "sample_psnr_db": np.zeros(2)}
    return Trial(schedule=schedule, correction=None, full_steps=computed, **measured)


def test_a_schedule_that_computes_more_than_it_says_is_none_of_that_budget():
    honest, greedy, half = trial((0, 5), 2.0), trial((0, 4), 6.0), trial((0, 3), 2.5)
    assert affordable([greedy, honest, half], 2) == [honest]
    assert affordable([greedy, half], 2) == [half]  # none keeps to it: the least costly
    assert affordable([greedy, half], 6) == [greedy, half]
    assert affordable([], 2) == []
    assert (greedy.compute_ratio, greedy.budget, half.budget) == (10 / 6, 6, 3)
