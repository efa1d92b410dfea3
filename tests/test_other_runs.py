"""Step counts that a bundle was planned for besides its own."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import HeunDiscreteScheduler
from support.pipelines import BATCH, CALL, FLUX_CALL, make_dit, make_flux

import cemq
from cemq.build.settings import BuildSettings
from cemq.bundle.manifest import CARD, EVIDENCE, MANIFEST, PRIOR, BundleError, Manifest, OtherRun, read_bundle, seal
from cemq.errors import InputError
from cemq.pipelines.batches import BUILD_LOG, Batch, run
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.pipelines.opening import ModelSource
from cemq.prior.error_prior import ErrorPrior
from cemq.recipe import make_recipe
from cemq.runtime import schedule_hook
from cemq.schedule import CacheSchedule
from cemq.schedule.plan import Plan
from cemq.schedule.rectify import make_correction

STEPS, OTHER = 10, 6
SETTINGS = {
    "scheme": "w8a8", "rounding": "nearest", "steps": STEPS, "budget": 4, "samples": 2, "planning_samples": 4,
    "effort": "quick", "call": CALL,
}  # fmt: skip


def build(folder, pipe, **settings):
    pipe.save_pretrained(folder / "pipeline")
    (folder / "labels.txt").write_text("1\n2\n3\n4\n")
    given = SETTINGS | {"calib": str(folder / "labels.txt")} | settings
    cemq.quantize_and_schedule(str(folder / "pipeline"), folder / "bundle", **given)
    return folder / "bundle"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return build(tmp_path_factory.mktemp("other"), make_dit(), also_steps=[OTHER], rectify="drift")


@pytest.fixture
def pipe(bundle):
    pipe = cemq.from_pretrained(bundle, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def followed(pipe, steps):
    """The plan of a run of so many steps."""
    run(pipe, BATCH, steps=steps, call=CALL)
    return schedule_hook(pipe).tracker.current


def test_a_run_with_a_planned_step_count_follows_what_was_planned(bundle, pipe):
    (other,) = read_bundle(bundle, verify=True).other_runs
    assert (other.num_inference_steps, other.schedule.num_steps, other.schedule.budget) == (OTHER, OTHER, 2)
    plan = followed(pipe, OTHER)
    assert plan.schedule == schedule_hook(pipe).schedule == other.schedule
    expected = make_correction("drift", ErrorPrior.load(bundle / PRIOR).resampled(other.sampler), other.schedule)
    assert other.correction == plan.correction.method == "drift"
    assert np.array_equal(plan.correction.offset, expected.offset)


def test_runs_of_other_step_counts_and_budgets_are_planned_from_the_prior(bundle, pipe):
    (other,) = read_bundle(bundle).other_runs
    planned = followed(pipe, 8)
    assert planned.schedule.num_steps == 8
    assert planned.schedule == replace(schedule_hook(pipe).plan, others=()).carried_over(planned.sampler).schedule
    assert followed(pipe, OTHER).schedule == other.schedule
    cemq.set_budget(pipe, 4)  # which it has
    assert followed(pipe, OTHER).schedule == other.schedule
    cemq.set_budget(pipe, 5)
    assert followed(pipe, OTHER).schedule.budget == 3


def test_the_evidence_holds_every_run_and_the_carried_over_schedule_is_one_of_them(bundle, pipe):
    evidence = json.loads((bundle / EVIDENCE).read_text())
    (found,), (other,) = evidence["other_runs"], read_bundle(bundle).other_runs
    assert found["num_inference_steps"] == OTHER
    assert found["winner"]["schedule"] == other.schedule.to_dict()
    assert found["winner"]["correction"] == other.correction
    assert (found["samples"], found["seeds"]) == (evidence["samples"], evidence["seeds"])
    carried = replace(schedule_hook(pipe).plan, others=()).carried_over(other.sampler)
    assert carried.schedule.to_dict() in [trial["schedule"] for trial in found["trials"]]


def test_saving_again_keeps_them(bundle, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "again")
    assert read_bundle(tmp_path / "again").other_runs == read_bundle(bundle).other_runs
    assert f"{OTHER} steps, 2 in full" in (bundle / CARD).read_text()


def test_evaluation_at_another_step_count(bundle):
    found = cemq.evaluate(bundle, samples=2, steps=OTHER, device="cpu")
    assert (found.num_steps, found.full_steps, found.compute_ratio) == (OTHER, 2, 3.0)
    assert cemq.evaluate(bundle, samples=2, device="cpu").num_steps == STEPS


def test_inspect_shows_them(bundle, capsys):
    from cemq.evaluation.report import describe, print_description

    description = describe(bundle)
    assert [each["num_inference_steps"] for each in description["other_runs"]] == [OTHER]
    print_description(description)
    assert f"{description['other_runs'][0]['schedule']['strip']}   with {OTHER} steps" in capsys.readouterr().out


def test_manifests_are_read_back_and_those_of_before_have_no_other_runs(bundle):
    manifest = read_bundle(bundle)
    fields = json.loads(json.dumps(manifest.to_dict()))
    assert Manifest.from_dict(fields) == manifest
    with pytest.raises(BundleError, match="missing keys: sampler"):
        OtherRun.from_dict({name: value for name, value in fields["other_runs"][0].items() if name != "sampler"})
    with pytest.raises(BundleError, match="unknown keys: budget"):
        OtherRun.from_dict(fields["other_runs"][0] | {"budget": 2})
    del fields["other_runs"]
    assert Manifest.from_dict(fields).other_runs == ()


def test_a_sampler_that_carries_nothing_over_has_none_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger=BUILD_LOG):
        folder = build(tmp_path, make_dit(HeunDiscreteScheduler()), also_steps=[OTHER], solver="search")
    assert read_bundle(folder).other_runs == ()
    assert json.loads((folder / EVIDENCE).read_text())["other_runs"] == []
    assert f"not planned for {OTHER} steps" in caplog.text
    with pytest.warns(UserWarning, match="computing in full"):
        found = cemq.evaluate(folder, samples=2, steps=OTHER, device="cpu")
    made = 2 * OTHER - 1  # by Heun's sampler
    assert (found.num_steps, found.full_steps, found.compute_ratio) == (made, made, 1.0)


def test_a_text_to_image_pipeline_whose_timesteps_depend_on_the_picture(tmp_path):
    (tmp_path / "prompts.txt").write_text("a seven\na three\na bold two\nan eight\n")
    folder = build(
        tmp_path, make_flux(), also_steps=[OTHER], call=FLUX_CALL, calib=str(tmp_path / "prompts.txt"),
        rectify="none",
    )  # fmt: skip
    (other,) = read_bundle(folder).other_runs
    pipe = cemq.from_pretrained(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    run(pipe, Batch(conditions=("a seven",), seeds=(3,)), steps=OTHER, call=FLUX_CALL)
    assert schedule_hook(pipe).schedule == other.schedule


def test_image_to_image_runs_are_known_by_the_timesteps_they_end_with():
    def sampler(*timesteps):
        return SamplerFingerprint(scheduler="Euler", config={}, timesteps=timesteps)

    own, late = sampler(600.0, 400.0, 200.0, 0.0), sampler(500.0, 250.0, 0.0)
    schedules = [CacheSchedule(num_steps=n, full_steps=(0, 2), predictor="reuse") for n in (4, 3)]
    plan = Plan(schedule=schedules[0], sampler=own)
    plan = replace(plan, others=(replace(plan, schedule=schedules[1], sampler=late),))
    assert plan.carried_over(sampler(1000.0, 750.0, 500.0, 250.0, 0.0)) is plan.others[0]
    assert plan.carried_over(sampler(1000.0, 500.0, 0.0)) is None


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        ({}, 50, (20,)),
        ({}, 30, (12,)),
        ({}, 28, ()),  # 11 would be fewer than pays
        ({"effort": "quick"}, 50, ()),
        ({"solver": "cem"}, 50, ()),
        ({"also_steps": []}, 50, ()),
        ({"also_steps": [28, 20, 28, 50]}, 50, (28, 20)),
        ({"also_steps": [4], "effort": "quick"}, 8, (4,)),
    ],
)
def test_which_step_counts_are_planned_for(settings, steps, expected):
    nowhere = ModelSource(name="", folder=Path())
    settled = BuildSettings(recipe=make_recipe(settings), source=nowhere, device="cpu", dtype="float32")
    assert settled.other_steps(steps) == expected


def test_what_cannot_be_planned_is_said_before_any_work():
    with pytest.raises(InputError, match=r"settings: also_steps=1 is wrong: .* greater than or equal to 2"):
        make_recipe({"also_steps": [1]})
    with pytest.raises(InputError, match="also_steps: other step counts are searched for, found --solver cem"):
        cemq.quantize_and_schedule("builtin:dit-digits", "nowhere", also_steps=[6], solver="cem")


def test_memory_is_planned_for_the_run_that_keeps_most(bundle, tmp_path):
    copy, manifest = tmp_path / "copy", read_bundle(bundle)
    shutil.copytree(bundle, copy)

    def needed(predictor, **options):
        (run,) = manifest.other_runs
        other = replace(run, schedule=CacheSchedule(num_steps=OTHER, full_steps=(0, 1, 2), predictor=predictor))
        own = replace(manifest.schedule, predictor="reuse", corrector="none")
        (copy / MANIFEST).unlink()
        seal(copy, replace(manifest, schedule=own, other_runs=(other,), cache="modules"))
        return cemq.plan_memory(copy, "8GiB", device="cpu", **options).chosen.device_bytes

    assert needed("taylor2") > needed("taylor1") > needed("reuse")
    assert needed("taylor2", budget=3) == needed("reuse", budget=3)  # which the other run does not follow
