"""Skipping one branch of guidance: in every kind of pipeline that calls its denoiser once for each, and in plans."""

import numpy as np
import pytest
from support.checks import draw, plain_run
from support.families import FAMILIES, STEPS
from support.pipelines import FLUX_CALL, make_dit, make_flux
from support.planning import quickly

from cemq.pipelines.batches import make_batches
from cemq.pipelines.opening import denoisers
from cemq.runtime import attached
from cemq.runtime.runner import Runner
from cemq.schedule import CacheSchedule
from cemq.schedule.plan import Plan
from cemq.search.trials import ClosedLoop

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own names
ONE_BY_ONE = ("flux_true_cfg", "wan", "wan22", "qwenimage", "flux2_klein", "lumina2", "chroma")


def plan_of(trajectory, branch_steps=()):
    steps = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 2, 4), predictor="taylor1", branch_steps=branch_steps)
    return Plan(schedule=steps, sampler=trajectory.sampler)


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_a_branch_is_skipped_in_every_pipeline_that_calls_them_one_by_one(name):
    family = FAMILIES[name]
    pipe = family.pipeline()
    plain, trajectory = plain_run(pipe, family)
    with attached(pipe, plan_of(trajectory)) as hook:
        both = draw(pipe, family)
        assert hook.full_evaluations == 2 * 4
    with attached(pipe, plan_of(trajectory, (2, 4))) as hook:
        first, second = draw(pipe, family), draw(pipe, family)
        assert (hook.full_evaluations, hook.skipped_evaluations) == (2 * 4 - 2, 2 * (STEPS - 4) + 2)
    assert np.isfinite(first).all()
    assert np.array_equal(first, second)
    assert not np.array_equal(first, both)
    assert np.array_equal(draw(pipe, family), plain)


def test_skipping_a_branch_that_equals_the_other_changes_nothing():
    family = FAMILIES["wan"]
    pipe = family.pipeline()
    call = {**family.call, "negative_prompt": family.conditions[0]}
    (batch,) = make_batches(family.conditions[:1], samples=1, first_seed=0, batch_size=1)
    runner = Runner(pipe=pipe, steps=STEPS, call=call)
    with attached(pipe, plan_of(plain_run(pipe, family)[1])):
        both = runner.run_one(batch)
    with attached(pipe, plan_of(plain_run(pipe, family)[1], (1, 2, 4))):
        one = runner.run_one(batch)
    assert np.allclose(one.latents, both.latents, atol=1e-5)


def loop_of(pipe, conditions, call):
    profiled, planning = (make_batches(conditions, samples=2, first_seed=seed, batch_size=1) for seed in (0, 5))
    runner = Runner(pipe=pipe, steps=STEPS, call=call)
    prior = runner.profile(profiled, runner.record(profiled), scheme="none", dtype="float32")
    return ClosedLoop(runner=runner, prior=prior, batches=planning, references=runner.run(planning))


def test_a_plan_skips_the_branch_that_says_nothing_new():
    prompt = "a bold seven"
    loop = loop_of(make_flux(), (prompt,), FLUX_CALL | {"negative_prompt": prompt})
    found = quickly(loop, 4)
    winner, tried = found.evidence["winner"], [trial for trial in loop.trials if trial.schedule.branch_steps]
    assert found.evidence["calls_per_step"] == 2
    assert tried
    assert found.schedule.branch_steps
    assert found.schedule.budget == 4 < len(found.schedule.full_steps)
    assert CacheSchedule.from_dict(winner["schedule"]) == found.schedule
    assert winner["psnr_db"] > max(t.psnr_db for t in loop.plain() if t.schedule.budget <= 4)
    assert all(trial not in loop.plain() for trial in tried)
    with attached(loop.runner.pipe, Plan(schedule=found.schedule, sampler=loop.prior.metadata.sampler)) as hook:
        loop.runner.run_one(loop.batches[0])
        assert hook.full_evaluations == 2 * 4


def test_a_plan_with_guidance_is_never_worse_for_trying_to_skip_a_branch():
    loop = loop_of(make_flux(), ("a bold seven", "a thin two"), FLUX_CALL)
    found = quickly(loop, 3, rectify="none")
    plain = max(trial.psnr_db for trial in loop.plain() if trial.schedule.budget <= 3)
    tried = [trial for trial in loop.trials if trial.schedule.branch_steps]
    assert tried
    assert all(trial.schedule.budget == 3 for trial in tried)
    assert found.schedule.branch_steps == () or found.evidence["winner"]["psnr_db"] > plain
    assert found.evidence["winner"]["psnr_db"] >= loop.run(CacheSchedule(num_steps=STEPS, full_steps=(0, 2, 4))).psnr_db


def test_where_one_call_holds_both_branches_no_plan_skips_one():
    pipe = make_dit()
    loop = loop_of(pipe, (1, 2), {"guidance_scale": 2.0})
    found = quickly(loop, 3, rectify="none")
    assert found.evidence["calls_per_step"] == len(denoisers(pipe)) == 1
    assert not any(trial.schedule.branch_steps for trial in loop.trials)


def test_a_correction_that_is_asked_for_leaves_the_branches_together():
    loop = loop_of(make_flux(), ("a bold seven",), FLUX_CALL | {"negative_prompt": "a bold seven"})
    found = quickly(loop, 4, rectify="drift")
    assert found.correction.method == "drift"
    assert not any(trial.schedule.branch_steps for trial in loop.trials)
