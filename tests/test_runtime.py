import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HookRegistry, PNDMScheduler
from support.pipelines import BATCH, CALL, FLUX_CALL, ONE, STEPS
from support.priors import profiled
from support.schedules import EVERY, HALF, HALVED, flux_sampler, plan_of, sampler_of

from cemq.errors import InfeasibleBudgetError, InputError, ModelError
from cemq.pipelines.batches import Batch, run
from cemq.pipelines.noise_scheduler import fingerprint, intercepted, landing_lengths, responses
from cemq.pipelines.trajectory import record
from cemq.predict.predictors import PREDICTORS
from cemq.runtime import attach, attached, detach, schedule_hook, set_budget
from cemq.runtime.registration import HOOK
from cemq.schedule import CacheSchedule, plan_predicted, plan_schedule, stretched
from cemq.schedule.plan import Plan
from cemq.schedule.rectify import METHODS, Correction, make_correction


def count_blocks(model):
    calls = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_a_full_schedule_equals_the_plain_pipeline_bit_for_bit(dit):
    plain = run(dit, BATCH, steps=STEPS, call=CALL)
    with attached(dit, Plan(schedule=EVERY, sampler=sampler_of(dit))):
        assert np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), plain)


def test_a_skipped_step_runs_no_block(dit):
    calls = count_blocks(dit.transformer)
    with attached(dit, plan_of(dit)) as hook:
        run(dit, BATCH, steps=STEPS, call=CALL)
    assert len(calls) == HALF.budget == hook.full_evaluations
    assert hook.skipped_evaluations == STEPS - HALF.budget


def test_two_runs_with_the_same_seed_are_identical(dit):
    with attached(dit, plan_of(dit)):
        first, second = (run(dit, BATCH, steps=STEPS, call=CALL) for _ in range(2))
    assert np.array_equal(first, second)


def test_removal_restores_the_pipeline_bit_for_bit(dit):
    plain = run(dit, BATCH, steps=STEPS, call=CALL)
    with attached(dit, plan_of(dit)):
        assert not np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), plain)
    assert np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), plain)
    assert not {"step", "set_timesteps"} & set(dit.scheduler.__dict__)
    with pytest.raises(ModelError, match="no cemq schedule"):
        schedule_hook(dit)


def test_a_run_after_an_aborted_run_is_clean(dit):
    with attached(dit, plan_of(dit)):
        expected = run(dit, BATCH, steps=STEPS, call=CALL)
        steps = []

        def stop():
            steps.append(1)
            if len(steps) == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(dit, Batch(conditions=(7, 8), seeds=(1, 2)), steps=STEPS, call=CALL, on_step=stop)
        assert np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), expected)


@pytest.mark.parametrize("predictor", [*PREDICTORS, ("reuse", "damped", "taylor2")])
def test_skipped_steps_are_served_as_the_schedule_says(dit, predictor):
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 4), predictor=predictor)
    with attached(dit, plan_of(dit, schedule)), record(dit) as trajectory:
        run(dit, BATCH, steps=STEPS, call=CALL)
    p = trajectory.predictions
    for step in (2, 3, 5):
        expected = sum(weight * p[source] for source, weight in zip(*schedule.serving(step), strict=True))
        assert torch.allclose(p[step], expected, atol=1e-5)


def test_each_guidance_branch_has_its_own_history(flux):
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 3), predictor="reuse")
    batch, calls = Batch(conditions=("a bold seven",), seeds=(3,)), count_blocks(flux.transformer)
    with record(flux) as plain:
        run(flux, batch, steps=STEPS, call=FLUX_CALL)
    calls.clear()
    with attached(flux, Plan(schedule=schedule, sampler=plain.sampler)) as hook, record(flux) as cached:
        run(flux, batch, steps=STEPS, call=FLUX_CALL)
    assert len(calls) == 2 * schedule.budget == hook.full_evaluations
    assert torch.equal(cached.predictions[0], plain.predictions[0])
    assert torch.equal(cached.predictions[1], cached.predictions[0])  # so neither branch served the other
    assert torch.equal(cached.predictions[5], cached.predictions[3])


def test_repeated_timesteps_do_not_shift_the_schedule(dit):
    dit.scheduler = PNDMScheduler(skip_prk_steps=True)  # one step more than asked for, one timestep twice
    expected = sampler_of(dit)
    schedule = CacheSchedule(num_steps=STEPS + 1, full_steps=(0, 2, 4))
    with attached(dit, Plan(schedule=schedule, sampler=expected)) as hook:
        run(dit, BATCH, steps=STEPS, call=CALL)
    assert (hook.full_evaluations, hook.skipped_evaluations) == (3, STEPS - 2)


def test_without_a_prior_another_step_count_computes_in_full_and_warns_once(dit):
    plain = run(dit, BATCH, steps=4, call=CALL)
    with attached(dit, plan_of(dit)):
        with pytest.warns(UserWarning, match="this run has 4 steps, the schedule was planned for 6") as caught:
            assert np.array_equal(run(dit, BATCH, steps=4, call=CALL), plain)
            run(dit, BATCH, steps=4, call=CALL)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(dit, BATCH, steps=STEPS, call=CALL)


def test_another_sampler_setting_computes_in_full(dit):
    expected = sampler_of(dit)
    dit.scheduler = DDIMScheduler(beta_end=0.03)
    plain = run(dit, BATCH, steps=STEPS, call=CALL)
    with (
        attached(dit, Plan(schedule=HALF, sampler=expected)),
        pytest.warns(UserWarning, match="settings or timesteps are not those"),
    ):
        assert np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), plain)


def test_a_scheduler_swapped_after_attaching_computes_in_full(dit):
    with attached(dit, plan_of(dit)) as hook:
        dit.scheduler = DDIMScheduler.from_config(dit.scheduler.config)
        with pytest.warns(UserWarning, match="scheduler was replaced"):
            run(dit, BATCH, steps=STEPS, call=CALL)
        assert hook.full_evaluations == STEPS
        assert not hook.run.histories


def test_a_run_that_starts_in_the_middle_computes_in_full(dit):
    with attached(dit, plan_of(dit)) as hook:
        dit.scheduler.set_timesteps(STEPS)
        latents = torch.zeros(1, 4, 8, 8)
        with pytest.warns(UserWarning, match="takes its timesteps from another place"):
            for timestep in dit.scheduler.timesteps[2:]:  # image to image with strength 2/3
                with torch.no_grad():
                    output = dit.transformer(
                        latents, timestep=timestep[None], class_labels=torch.tensor([1]), return_dict=False
                    )[0]
                latents = dit.scheduler.step(output[:, :4], timestep, latents).prev_sample
        assert hook.skipped_evaluations == 0


def test_a_batch_that_changes_within_a_run_is_not_served_from_the_wrong_shape(dit):
    with attached(dit, plan_of(dit)):
        dit.scheduler.set_timesteps(STEPS)
        with pytest.warns(UserWarning, match="no earlier output of its shape"), torch.no_grad():
            for index, timestep in enumerate(dit.scheduler.timesteps):
                rows = 2 if index < 2 else 1
                output = dit.transformer(
                    torch.zeros(rows, 4, 8, 8), timestep=timestep[None], class_labels=torch.tensor([1] * rows)
                ).sample
                assert output.shape[0] == rows
                dit.scheduler.step(output[:, :4], timestep, torch.zeros(rows, 4, 8, 8))


def test_attaching_twice_is_refused_and_detaching_twice_is_not(dit):
    attach(dit, plan_of(dit))
    with pytest.raises(ModelError, match="already"):
        attach(dit, plan_of(dit))
    detach(dit)
    detach(dit)
    assert HookRegistry.check_if_exists_or_initialize(dit.transformer).get_hook(HOOK) is None


def test_an_active_diffusers_cache_is_refused(flux):
    from diffusers import FirstBlockCacheConfig

    flux.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ModelError, match="disable_cache"):
        attach(flux, Plan(schedule=HALF, sampler=fingerprint(DDIMScheduler())))


# --- memory


def outputs_kept(pipe, schedule):
    """Which outputs are held after each step."""
    kept = []
    with attached(pipe, plan_of(pipe, schedule)) as hook:
        run(
            pipe, BATCH, steps=STEPS, call=CALL,
            on_step=lambda: kept.append({step for each in hook.run.histories.values() for step in each.kept}),
        )  # fmt: skip
    return kept


@pytest.mark.parametrize(
    ("full_steps", "predictor", "expected"),
    [
        ((0, 1, 4), "taylor1", [{0}, {0, 1}, {0, 1}, {1}, {1, 4}, set()]),
        ((0, 1, 4), "reuse", [set(), {1}, {1}, set(), {4}, set()]),
        ((0, 1, 3), "taylor2", [{0}, {0, 1}, {0, 1}, {0, 1, 3}, {0, 1, 3}, set()]),
        ((0, 2, 5), ("reuse", "taylor1", "taylor1"), [{0}, {0}, {0, 2}, {0, 2}, set(), set()]),
        (range(STEPS), "taylor1", [set()] * STEPS),
    ],
)
def test_only_outputs_that_are_still_needed_are_kept(dit, full_steps, predictor, expected):
    assert outputs_kept(dit, CacheSchedule(num_steps=STEPS, full_steps=full_steps, predictor=predictor)) == expected


# --- other step counts and budgets


@pytest.mark.parametrize("solver", ["uniform", "segment", "cem", "search"])
@pytest.mark.parametrize("steps", [4, 9, 12])
def test_another_step_count_follows_a_schedule_of_the_same_compute_ratio(dit, steps, solver):
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 2, 5), solver=solver)
    plan = plan_of(dit, schedule, prior=profiled(dit), solver=solver)
    with attached(dit, plan) as hook, warnings.catch_warnings():
        warnings.simplefilter("error")
        run(dit, BATCH, steps=steps, call=CALL)
        carried = hook.schedule
        assert (hook.full_evaluations, hook.skipped_evaluations) == (carried.budget, steps - carried.budget)
        run(dit, BATCH, steps=steps, call=CALL)
        assert hook.schedule == carried
        run(dit, BATCH, steps=STEPS, call=CALL)
        assert hook.schedule == schedule
        assert hook.full_evaluations == 3
    assert carried.num_steps == steps
    assert carried.budget == round(steps / 2) or (solver != "uniform" and carried.budget < round(steps / 2))
    expected = plan.prior.resampled(plan.carried_over(sampler_of(dit, steps)).sampler)
    assert plan.carried_over(sampler_of(dit, steps)).prior.qv == pytest.approx(expected.qv)


def test_what_a_set_of_timesteps_takes_to_plan_is_done_once(dit, caplog, monkeypatch):
    """However often users go back and forth; with a corrector the sampler is measured once as well."""
    dit.scheduler = DDIMScheduler(clip_sample=False)
    prior = profiled(dit)
    prior = replace(prior, metadata=replace(prior.metadata, corrector="linear"))
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 2, 5), predictor="reuse", corrector="linear")
    planned, measured, carry_over = [], [], Plan.carried_over
    monkeypatch.setattr(Plan, "carried_over", lambda plan, found: planned.append(found) or carry_over(plan, found))
    monkeypatch.setattr("cemq.runtime.steps.responses", lambda *args: measured.append(args[1]) or responses(*args))
    pictures = {}
    with attached(dit, plan_of(dit, schedule, prior=prior)) as hook, caplog.at_level("INFO", "cemq.runtime"):
        for steps in (9, 12, STEPS, 9, 12, 9, STEPS):
            found = run(dit, BATCH, steps=steps, call=CALL)
            assert np.array_equal(found, pictures.setdefault(steps, found))
            assert hook.schedule.num_steps == steps
    assert [len(found.timesteps) for found in planned] == [9, 12]
    assert sorted(measured) == [STEPS, 9, 12]
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == [
        f"planned {steps} steps, {steps // 2} in full, on predictions" for steps in (9, 12)
    ]


def test_a_plan_that_corrects_nothing_carries_no_channels_to_other_step_counts(dit):
    prior = profiled(dit)
    plan = plan_of(dit, prior=prior)
    assert not plan.lean().prior.channel_grams.size
    assert plan.lean().carried_over(sampler_of(dit, 9)).schedule == plan.carried_over(sampler_of(dit, 9)).schedule
    corrected = replace(plan, correction=make_correction("affine", prior, HALF))
    assert corrected.lean().carried_over(sampler_of(dit, 9)).correction.gain.shape == (9, 4)


def test_a_rule_without_a_path_at_another_step_count_gives_way_to_segments(dit):
    prior = profiled(dit, 50)
    schedule = CacheSchedule(num_steps=50, full_steps=(*range(0, 45, 5), 49), solver="cem")
    plan = Plan(schedule=schedule, sampler=prior.metadata.sampler, prior=prior, solver="cem")
    with pytest.raises(InfeasibleBudgetError):
        plan_schedule(prior.resampled(sampler_of(dit, 20)), 4, solver="cem")
    assert plan.carried_over(sampler_of(dit, 20)).schedule.solver == "segment"


def test_another_sampler_class_computes_in_full_with_one_warning(dit):
    plan = plan_of(dit, prior=profiled(dit))
    dit.scheduler = DPMSolverMultistepScheduler()
    plain = run(dit, BATCH, steps=STEPS, call=CALL)
    with attached(dit, plan) as hook:
        with pytest.warns(UserWarning, match="settings or timesteps are not those") as caught:
            assert np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), plain)
            run(dit, BATCH, steps=STEPS, call=CALL)
        assert len([each for each in caught if str(each.message).startswith("cemq: ")]) == 1
        assert hook.skipped_evaluations == 0


@pytest.mark.parametrize("taught", [False, True])
def test_local_search_is_believed_only_by_a_prior_that_runs_have_taught(dit, taught):
    prior = replace(profiled(dit), coherence=3.0 if taught else np.inf)
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 2, 4))
    found = plan_of(dit, schedule, prior=prior).with_budget(4).schedule
    by_program = plan_schedule(prior, 4, predictor="taylor1", corrector=found.corrector)
    known = replace(stretched(schedule, schedule.full_steps, STEPS, 4), corrector=found.corrector)
    searched = plan_predicted(prior, 4, predictor="auto", corrector=found.corrector, known=known)
    assert found == (searched if taught else by_program)
    assert searched.key != by_program.key  # or this would say nothing


def test_another_budget_of_a_sampler_that_meets_timesteps_twice(dit):
    dit.scheduler = PNDMScheduler(skip_prk_steps=True)
    schedule = CacheSchedule(num_steps=STEPS + 1, full_steps=(0, 2, 4))
    other = plan_of(dit, schedule, prior=profiled(dit)).with_budget(5).schedule
    assert (other.num_steps, other.budget) == (STEPS + 1, 5)


def test_a_budget_that_a_plan_has_is_not_planned_again(dit):
    plan = plan_of(dit, CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 5)), prior=profiled(dit))
    assert plan.with_budget(3) is plan  # it may have been run; what is predicted to be better was not
    assert plan.with_budget("2x") is plan


def test_another_budget_is_planned_and_followed_until_it_is_set_again(dit):
    plain = run(dit, BATCH, steps=STEPS, call=CALL)
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 2, 4), solver="uniform", predictor="reuse")
    asked = {"solver": "uniform", "predictor": "reuse"}
    with attached(dit, plan_of(dit, schedule, prior=profiled(dit), **asked)):
        first = run(dit, BATCH, steps=STEPS, call=CALL)
        assert set_budget(dit, 2) == CacheSchedule(num_steps=STEPS, full_steps=(0, 3), **asked)
        assert not np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), first)
        assert schedule_hook(dit).full_evaluations == 2
        assert set_budget(dit, "1x").budget == STEPS
        assert np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), plain)
        with pytest.raises(InfeasibleBudgetError, match=r"choose 2\.\.6"):
            set_budget(dit, 7)
        assert schedule_hook(dit).schedule.budget == STEPS  # what was refused changed nothing
        assert set_budget(dit, "2x") == schedule
        assert np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), first)
    assert np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), plain)


def test_without_a_prior_no_other_budget_can_be_planned(dit):
    with attached(dit, plan_of(dit)), pytest.raises(ModelError, match="came without an error prior"):
        set_budget(dit, 2)
    with pytest.raises(ModelError, match="no cemq schedule is attached"):
        set_budget(dit, 2)


# --- corrections


def numbered_correction(steps=STEPS, channels=4):
    random = np.random.default_rng(0)
    gain, offset = 1 + 0.1 * random.normal(size=(steps, channels)), 0.1 * random.normal(size=(steps, channels))
    return Correction(method="affine", gain=gain, offset=offset)


@pytest.mark.parametrize("schedule", [EVERY, HALF])
def test_what_the_sampler_consumes_is_corrected_on_full_and_skipped_steps(dit, schedule):
    fix = numbered_correction()

    def by_hand(original, call):
        index, output = len(seen), call.get("model_output")
        seen.append(output)
        table = [torch.tensor(x[index], dtype=torch.float32).view(1, 4, 1, 1) for x in (fix.gain, fix.offset)]
        call = call.replaced(model_output=output * table[0] + table[1])
        return original(*call.args, **call.kwargs)

    seen = []
    with attached(dit, plan_of(dit, schedule)), intercepted(dit.scheduler, "step", by_hand):
        expected = run(dit, BATCH, steps=STEPS, call=CALL)
    with attached(dit, plan_of(dit, schedule)):
        uncorrected = run(dit, BATCH, steps=STEPS, call=CALL)
    with attached(dit, plan_of(dit, schedule, correction=fix)):
        found = run(dit, BATCH, steps=STEPS, call=CALL)
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, uncorrected)


def test_packed_latents_are_corrected_channel_by_channel(flux):
    batch = Batch(conditions=("a bold seven",), seeds=(3,))
    with record(flux) as plain:
        run(flux, batch, steps=3, call=FLUX_CALL)
    channels = plain.predictions[0].shape[2]
    fix = Correction(method="drift", gain=np.ones((3, channels)), offset=np.outer([0, 0, 1], np.arange(channels)))
    schedule = CacheSchedule(num_steps=3, full_steps=range(3))
    with record(flux) as corrected, attached(flux, Plan(schedule=schedule, sampler=plain.sampler, correction=fix)):
        run(flux, batch, steps=3, call=FLUX_CALL)
    moved = corrected.predictions[2] - plain.predictions[2]
    assert torch.equal(corrected.predictions[1], plain.predictions[1])
    assert torch.allclose(moved, torch.arange(channels).float().expand(moved.shape), atol=1e-5)


def test_a_correction_of_other_channels_changes_nothing(dit):
    with attached(dit, plan_of(dit)):
        expected = run(dit, BATCH, steps=STEPS, call=CALL)
    with attached(dit, plan_of(dit, correction=numbered_correction(channels=5))):
        assert np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), expected)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"erta"}))  # which needs another sampler
def test_a_correction_follows_its_plan_to_other_step_counts_and_budgets(dit, method):
    prior = profiled(dit)
    plan = plan_of(dit, prior=prior, correction=make_correction(method, prior, HALF))
    assert plan.carried_over(sampler_of(dit, 9)).correction.gain.shape == (9, 4)
    other = plan.with_budget(2)
    expected = make_correction(method, prior, other.schedule)
    assert np.array_equal(other.correction.gain, expected.gain)
    assert np.array_equal(other.correction.offset, expected.offset)


def test_a_run_that_is_computed_in_full_for_want_of_a_plan_is_not_corrected(dit):
    plain = run(dit, BATCH, steps=4, call=CALL)
    with (
        attached(dit, plan_of(dit, correction=numbered_correction())),
        pytest.warns(UserWarning, match="this run has 4 steps"),
    ):
        assert np.array_equal(run(dit, BATCH, steps=4, call=CALL), plain)


def timesteps_seen(pipe, **settings):
    """The timesteps a run calls the denoiser with, how many calls were computed, and the trajectory."""
    seen = []
    with attached(pipe, Plan(**settings)) as hook, record(pipe) as trajectory:
        watched = pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(float(kwargs["timestep"].flatten()[0])), with_kwargs=True
        )
        run(pipe, Batch(conditions=("a bold seven",), seeds=(3,)), steps=STEPS, call=FLUX_CALL)
        watched.remove()
    return seen, hook.full_evaluations, trajectory


def test_scaled_steps_call_the_denoiser_at_the_time_the_sample_is_at_and_land_at_the_end(flux):
    with record(flux) as plain:
        run(flux, Batch(conditions=("a bold seven",), seeds=(3,)), steps=STEPS, call=FLUX_CALL)
    factors = np.array([1, 1, 0.25, 0.5, 1, 0.5])
    fix = numbered_correction(channels=plain.predictions[0].shape[2])
    fix = replace(fix, gain=np.ones_like(fix.gain), offset=np.zeros_like(fix.offset), step_factors=factors)
    seen, computed, found = timesteps_seen(flux, schedule=HALF, sampler=plain.sampler, correction=fix)
    lengths = -np.diff([*plain.sampler.timesteps, 0.0])
    expected = plain.sampler.timesteps[0] - np.cumsum([0.0, *landing_lengths(lengths, factors)])
    assert expected[-1] == pytest.approx(0.0, abs=1e-3)
    assert computed == 2 * HALF.budget  # two branches
    assert 1000 * np.array(seen[::2]) == pytest.approx(expected[:-1], abs=0.01)
    sample = found.samples[0]
    for step in range(1, STEPS):  # Euler, with the new lengths
        sample = sample - (expected[step] - expected[step + 1]) / 1000 * found.predictions[step]
        assert torch.allclose(found.samples[step], sample, atol=1e-4)


def test_factors_of_one_change_nothing(flux):
    with record(flux) as plain:
        run(flux, Batch(conditions=("a bold seven",), seeds=(3,)), steps=STEPS, call=FLUX_CALL)
    channels = plain.predictions[0].shape[2]
    tables = {"gain": np.ones((STEPS, channels)), "offset": np.zeros((STEPS, channels))}
    fix = Correction(method="erta", **tables, step_factors=np.ones(STEPS))
    _, _, found = timesteps_seen(flux, schedule=EVERY, sampler=plain.sampler, correction=fix)
    assert torch.equal(found.samples[-1], plain.samples[-1])


# --- branches of guidance


def branch_outputs(pipe, plan):
    """What every call of a run returned, conditional first, (steps, 2) tensors; what was guided; evaluations."""
    returned = []
    with attached(pipe, plan) as hook, record(pipe) as trajectory:
        watched = pipe.transformer.register_forward_hook(lambda *call: returned.append(call[-1][0].clone()))
        run(pipe, ONE, steps=STEPS, call=FLUX_CALL)
        watched.remove()
        counts = hook.full_evaluations, hook.skipped_evaluations
    return [returned[i : i + 2] for i in range(0, len(returned), 2)], trajectory, counts


def test_a_skipped_branch_is_the_other_one_plus_the_difference_predicted(flux):
    sampler = flux_sampler(flux)
    calls = count_blocks(flux.transformer)
    outputs, guided, counts = branch_outputs(flux, Plan(schedule=HALVED, sampler=sampler))
    assert len(calls) == 2 * 3 + 1 == counts[0]
    assert sum(counts) == 2 * STEPS
    first, other = ([pair[index] for pair in outputs] for index in (0, 1))
    between = [b - a for a, b in outputs]
    assert torch.allclose(between[2], 2 * between[1] - between[0], atol=1e-5)  # half computed
    assert torch.allclose(first[3], 2 * first[2] - first[1], atol=1e-5)  # skipped
    assert torch.allclose(between[3], 3 * between[1] - 2 * between[0], atol=1e-5)
    assert torch.allclose(between[5], between[4] + (between[4] - between[1]) / 3, atol=1e-5)
    for step, prediction in enumerate(guided.predictions):  # true_cfg_scale 2
        assert torch.allclose(prediction, 2 * first[step] - other[step], atol=1e-5)


def test_the_first_branch_does_not_notice_that_the_other_is_skipped(flux):
    sampler = flux_sampler(flux)
    both, *_ = branch_outputs(flux, Plan(schedule=replace(HALVED, branch_steps=()), sampler=sampler))
    halved, *_ = branch_outputs(flux, Plan(schedule=HALVED, sampler=sampler))
    for step in range(2):
        assert torch.equal(halved[step][0], both[step][0])
        assert torch.equal(halved[step][1], both[step][1])
    assert torch.equal(halved[2][0], both[2][0])
    assert not torch.equal(halved[2][1], both[2][1])


def test_nothing_is_left_of_a_run_with_skipped_branches(flux):
    plan = Plan(schedule=HALVED, sampler=flux_sampler(flux))
    plain = run(flux, ONE, steps=STEPS, call=FLUX_CALL)
    with attached(flux, plan) as hook:
        first, second = (run(flux, ONE, steps=STEPS, call=FLUX_CALL) for _ in range(2))
        assert not hook.run.histories
        assert not hook.run.branches.first_output
    assert np.array_equal(first, second)
    assert np.array_equal(run(flux, ONE, steps=STEPS, call=FLUX_CALL), plain)


def test_where_one_call_holds_both_branches_none_is_skipped(dit):
    with attached(dit, plan_of(dit, replace(HALVED, branch_steps=()))):
        expected = run(dit, BATCH, steps=STEPS, call=CALL)
    with attached(dit, plan_of(dit, HALVED)) as hook:
        assert np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), expected)
        assert hook.full_evaluations == 4


def test_branches_are_skipped_of_outputs_only(flux):
    with pytest.raises(InputError, match="cache=residual: branches of guidance are skipped one by one with cache=out"):
        attach(flux, Plan(schedule=HALVED, sampler=None), cache="residual")


def test_a_plan_that_skips_branches_does_so_at_other_step_counts_and_budgets(dit):
    plan = plan_of(dit, replace(HALVED, solver="uniform"), prior=profiled(dit))
    carried = plan.carried_over(sampler_of(dit, 12)).schedule
    assert (carried.budget, len(carried.full_steps), len(carried.branch_steps)) == (7, 8, 2)  # 12 steps at 6 / 3.5
    assert plan.with_budget(5).schedule.full_steps == tuple(range(STEPS))
    assert plan.with_budget(5).schedule.budget == 5
    with pytest.raises(InputError, match="cannot tell branches of guidance apart"):
        make_correction("drift", plan.prior, HALVED)
