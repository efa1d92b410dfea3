"""What full-compute steps make up for: weights, samplers, runs of tiny pipelines, and plans."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pipelines import BATCH, CALL, FLUX_CALL, STEPS, make_dit
from support.planning import BUDGET, prepared, quickly
from support.priors import prior_of, trajectories
from support.schedules import all_schedules, full_steps_of

from cemq.errors import InputError
from cemq.metrics import psnr_of
from cemq.pipelines.batches import Batch, run
from cemq.pipelines.noise_scheduler import fingerprint, intercepted, is_linear, next_sample, responses
from cemq.predict.correctors import CORRECTORS, WORTH_CORRECTING, correcting_matrix, integrated_matrix, straying_matrix
from cemq.predict.predictors import PREDICTORS, serving_matrix
from cemq.prior.error_prior import ErrorPrior
from cemq.runtime import attach, attached, detach, set_budget
from cemq.schedule import (
    CacheSchedule,
    plan_predicted,
    plan_schedule,
    segment_costs,
    solve_segments,
    suited_corrector,
)
from cemq.schedule.local_search import settle
from cemq.schedule.plan import Plan
from cemq.schedule.segment import SLOPES
from cemq.search.choose import plan
from cemq.search.choose import predicted as expected
from cemq.search.settings import PlanSettings, SearchSettings
from cemq.search.trials import ClosedLoop

LINEAR_DDIM = {"clip_sample": False}

# --- weights


def test_between_two_full_steps_the_corrector_interpolates():
    full = (0, 1, 4)
    served = serving_matrix(6, full, ("taylor1",) * 3)
    linear, quadratic = (integrated_matrix(served, full, name)[:, full] for name in ("linear", "quadratic"))
    assert linear[[2, 3]] == pytest.approx(np.array([[0, 2 / 3, 1 / 3], [0, 1 / 3, 2 / 3]]))
    # Lagrange's polynomials through 0, 1 and 4
    assert quadratic[[2, 3]] == pytest.approx(np.array([[-1 / 2, 4 / 3, 1 / 6], [-1 / 2, 1, 1 / 2]]))
    for found in (linear, quadratic):
        assert np.array_equal(found[[0, 1, 4]], np.eye(3))
        assert np.array_equal(found[5], served[5, full])  # nothing comes after it
    assert np.array_equal(integrated_matrix(served, full, "none"), served)


def test_what_is_owed_is_paid_with_the_next_full_step():
    """Steps of length 1: reuse went twice along v(0); the line to v(3) has (v(0) + v(3)) / 2 on average."""
    served = serving_matrix(5, (0, 3), ("reuse", "reuse"))
    added = correcting_matrix(served, (0, 3), "linear", np.tril(np.ones((5, 5))))
    assert np.flatnonzero(added.any(1)).tolist() == [3]
    assert added[3].tolist() == pytest.approx([-1, 0, 0, 1, 0])
    halved = correcting_matrix(served, (0, 3), "linear", np.tril(np.ones((5, 5))) * [1, 1, 1, 2, 1])
    assert halved[3].tolist() == pytest.approx([-0.5, 0, 0, 0.5, 0])  # a longer step moves the sample twice as far


@given(case=full_steps_of(at_least=2), data=st.data())
@settings(max_examples=60, deadline=None)
def test_after_each_full_step_the_sample_is_where_interpolated_predictions_lead(case, data):
    steps, full = case
    names = data.draw(st.lists(st.sampled_from(list(PREDICTORS)), min_size=len(full), max_size=len(full)))
    corrector = data.draw(st.sampled_from(list(CORRECTORS)))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    # a sampler with a memory: what a step is given moves the sample on later steps too
    moved = np.tril(generator.uniform(0.5, 1, (steps, steps)))
    schedule = CacheSchedule(num_steps=steps, full_steps=full, predictor=names, corrector=corrector)
    added = schedule.correcting(moved)
    assert not np.triu(added, 1).any()  # nothing is known before it is computed
    assert not np.delete(added, full, axis=1).any()
    for last, step in enumerate(full):
        known = integrated_matrix(schedule.served, full[: last + 1], corrector)
        assert moved[step] @ (schedule.served + added) == pytest.approx(moved[step] @ known, rel=1e-6, abs=1e-6)


def test_a_step_of_no_length_leaves_the_debt_to_the_next():
    served = serving_matrix(5, (0, 3), ("reuse", "reuse"))
    added = correcting_matrix(served, (0, 3), "linear", np.tril(np.ones((5, 5))) * [1, 1, 1, 0, 1])
    assert added[3].tolist() == [0] * 5
    assert added[4].tolist() == pytest.approx([-1, 0, 0, 1, 0])


def test_a_corrector_that_has_nothing_to_do_changes_no_schedule():
    def schedule(corrector, full=(0, 1, 2)):
        return CacheSchedule(num_steps=6, full_steps=full, predictor="taylor1", corrector=corrector)

    assert not schedule("quadratic").corrects
    assert schedule("quadratic").key == schedule("none").key
    assert len({schedule(name, (0, 1, 4)).key for name in ("none", *CORRECTORS)}) == 3
    assert schedule("none").to_dict().keys() == {"num_steps", "full_steps", "predictor", "solver"}
    assert CacheSchedule.from_dict(schedule("linear").to_dict()) == schedule("linear")
    with pytest.raises(InputError, match="unknown corrector 'cubic'"):
        schedule("cubic")


# --- samplers

SAMPLERS = {
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "ddim": DDIMScheduler(**LINEAR_DDIM, prediction_type="v_prediction"),
    "dpm++": DPMSolverMultistepScheduler(),
    "unipc": UniPCMultistepScheduler(),
    "heun": HeunDiscreteScheduler(),
    "ancestral": EulerAncestralDiscreteScheduler(),
}


def stepped(scheduler, outputs):
    """The samples that a fresh copy of a sampler returns for these outputs, flattened."""
    scheduler, found = copy.deepcopy(scheduler), []
    sample = torch.zeros(1, outputs.shape[1], 1, 1, dtype=torch.float64)
    noise = "generator" in scheduler.step.__code__.co_varnames
    for timestep, output in zip(scheduler.timesteps, outputs, strict=True):
        random = {"generator": torch.Generator().manual_seed(3)} if noise else {}
        sample = next_sample(scheduler.step(output.view(1, -1, 1, 1), timestep, sample, **random)).double()
        found.append(sample.flatten().numpy())
    return np.stack(found)


@pytest.mark.parametrize("name", SAMPLERS)
def test_responses_say_where_a_sampler_goes(name):
    scheduler = SAMPLERS[name]
    scheduler.set_timesteps(8)
    state = torch.random.get_rng_state()
    found = responses(scheduler, len(scheduler.timesteps))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert scheduler.step_index is None if hasattr(scheduler, "step_index") else True  # only twins were stepped
    outputs = torch.randn(len(found), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moved = stepped(scheduler, outputs) - stepped(scheduler, torch.zeros_like(outputs))
    assert found @ outputs.numpy() == pytest.approx(moved, rel=1e-3, abs=1e-4 * np.abs(moved).max())


def test_responses_of_a_run_that_begins_late_are_those_of_its_steps():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    lengths = np.diff(scheduler.sigmas.double().numpy())
    assert responses(scheduler, 5) == pytest.approx(np.tril(np.tile(lengths[3:], (5, 1))), rel=1e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(clip_sample=True),
        DPMSolverMultistepScheduler(thresholding=True),
        CogVideoXDPMScheduler(),  # wants what it returned the step before
    ],
)
def test_samplers_that_clip_or_want_more_have_no_responses(scheduler):
    assert not is_linear(scheduler, 8)
    scheduler.set_timesteps(8)
    assert responses(scheduler, 8) is None


def test_whether_steps_are_linear_is_known_before_a_run():
    for scheduler in (*SAMPLERS.values(), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)):
        assert is_linear(copy.deepcopy(scheduler), 8)


# --- runs

RUNS = {
    "ddim": (lambda: make_dit(DDIMScheduler(**LINEAR_DDIM)), {"guidance_scale": 2.0}, BATCH),
    "dpm++": (lambda: make_dit(DPMSolverMultistepScheduler()), {"guidance_scale": 2.0}, BATCH),
    "flow": (None, FLUX_CALL, Batch(conditions=("a", "b"), seeds=(5, 6))),
}


def watched(pipe, batch, call):
    """What the denoiser predicted at each step (after guidance), and the sample before the run and after each step."""
    outputs, samples = [], []

    def step(original, call):
        if not samples:
            samples.append(call.get("sample").clone())
        outputs.append(call.get("model_output").clone())
        result = original(*call.args, **call.kwargs)
        samples.append(next_sample(result).clone())
        return result

    with intercepted(pipe.scheduler, "step", step):
        run(pipe, batch, steps=STEPS, call=call)
    return outputs, samples


@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_where_its_sampler_would_with_interpolated_predictions(name, corrector, flux):
    make, call, batch = RUNS[name]
    pipe = make() if make else flux
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 4), predictor="reuse", corrector=corrector)
    pipe.scheduler.set_timesteps(STEPS, **({"mu": 0.7} if name == "flow" else {}))
    with attached(pipe, schedule):
        outputs, samples = watched(pipe, batch, call)
        again, _ = watched(pipe, batch, call)
    assert all(torch.equal(one, other) for one, other in zip(outputs, again, strict=True))
    full = [outputs[step] for step in schedule.full_steps]
    rows = schedule.integrated[:, schedule.full_steps]
    twin, sample = copy.deepcopy(pipe.scheduler), samples[0]
    if name == "flow":
        twin.set_begin_index(0)
    else:
        twin.set_timesteps(STEPS)
    twin._step_index = None
    for step in range(5):
        output = sum(weight * each for weight, each in zip(rows[step].tolist(), full, strict=True))
        sample = next_sample(twin.step(output, twin.timesteps[step], sample))
    assert torch.allclose(samples[5], sample, rtol=1e-3, atol=1e-4)  # after step 4, the last full one
    assert not torch.allclose(samples[4], samples[5], atol=1e-2)


def test_a_full_schedule_with_a_corrector_changes_nothing():
    pipe = make_dit(DDIMScheduler(**LINEAR_DDIM))
    plain = run(pipe, BATCH, steps=STEPS, call=CALL)
    with attached(pipe, CacheSchedule(num_steps=STEPS, full_steps=range(STEPS), corrector="quadratic")):
        assert np.array_equal(run(pipe, BATCH, steps=STEPS, call=CALL), plain)


def test_a_sampler_that_clips_computes_in_full_with_one_warning(dit):
    plain = run(dit, BATCH, steps=STEPS, call=CALL)
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 2), corrector="linear")
    attach(dit, schedule)
    with pytest.warns(UserWarning, match="DDIMScheduler steps as set up here cannot be corrected"):
        assert np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), plain)
    detach(dit)


def test_only_outputs_are_corrected():
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 2), corrector="linear")
    with pytest.raises(InputError, match="corrected later with cache=output only"):
        Plan(schedule=schedule, sampler=None, cache="residual")


# --- plans


def predicted(prior, schedule):
    return prior.final_error(schedule.served, schedule.integrated)


@pytest.mark.parametrize("coherence", [np.inf, 2.0])
@pytest.mark.parametrize("corrector", CORRECTORS)
def test_the_segment_solver_finds_the_best_corrected_schedule_of_every_budget(corrector, coherence):
    """Against every schedule there is, by the error of what is integrated and what each full-compute step answers to
    where the sample has strayed, segment by segment."""
    steps = 7
    q, v, step_sizes = trajectories(steps)
    sensitivity = np.random.default_rng(1).uniform(0.2, 3, (2, steps))
    prior = dataclasses.replace(prior_of(q, v, step_sizes), sensitivity=sensitivity, coherence=coherence)
    weights = step_sizes * sensitivity[0]
    together = np.exp(-np.abs(np.subtract.outer(range(steps), range(steps))) / coherence)

    def total(full):
        schedule = CacheSchedule(num_steps=steps, full_steps=full, predictor="taylor1", corrector=corrector)
        moved = weights[:, None] * (schedule.integrated @ q - v)
        apart = np.searchsorted(full, range(steps), side="right")
        errors = np.sum(together * (apart[:, None] == apart) * (moved @ moved.T)) / q.shape[1]
        return errors + sum(answered(schedule, *ends) for ends in itertools.pairwise(full))

    def answered(schedule, start, end):
        strayed = step_sizes[start:end] @ ((schedule.served - schedule.integrated) @ q)[start:end]
        fading = [weights[end + age] * (1 - age / (end - start)) for age in range(min(end - start, steps - end))]
        reach = weights[start:end] @ schedule.integrated[start:end, end] + sum(fading)
        return (prior.response[:, end] ** 2).sum() * strayed @ strayed / q.shape[1] * reach**2

    table = segment_costs(prior, ("taylor1",), corrector=corrector, gamma=2.0, max_gap=steps)
    for budget, (full, cost) in enumerate(solve_segments(table.costs, steps), start=1):
        assert cost == pytest.approx(min(map(total, all_schedules(steps, budget))), rel=1e-6, abs=1e-9)
        assert total(full) == pytest.approx(cost, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("corrector", CORRECTORS)
def test_a_segment_is_served_so_that_the_sample_strays_least(corrector):
    steps = 9
    q, v, step_sizes = trajectories(steps)
    prior = prior_of(q, v, step_sizes)
    found = plan_schedule(prior, 4, predictor="auto", corrector=corrector)
    named = [dataclasses.replace(found, predictor=name) for name in SLOPES]
    strays = [straying_matrix(each.served, each.integrated, step_sizes) @ q for each in named]
    least = np.linalg.norm(strays, axis=2)[:, found.full_steps[1:]].argmin(0)
    best = tuple(list(SLOPES)[index] for index in least)
    assert found.predictors[1:-1] == best[1:]  # the first one reuses anyway
    settled = settle(prior, named[0])
    assert settled.predictors[1:-1] == best[1:]
    tails = [dataclasses.replace(settled, predictor=(*settled.predictors[:-1], name)) for name in SLOPES]
    assert settled in tails
    last = found.full_steps[-1]

    def tail_error(schedule):
        return np.linalg.norm(step_sizes[last:] @ (schedule.served @ q - v)[last:])

    assert tail_error(settled) == pytest.approx(min(map(tail_error, tails)))
    without = dataclasses.replace(found, corrector="none")
    assert settle(prior, without) is without


@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("response", [(0.0, 0.0), (1.5, 0.0), (0.0, 2.0), (-0.5, 1.0)])
def test_a_step_answers_to_where_its_sample_has_strayed(corrector, response):
    """With a response along the way it went the output of the step is off by so much; across, by as much more that has
    nothing to do with it."""
    q, v, step_sizes = trajectories(STEPS)
    prior = dataclasses.replace(prior_of(q, v, step_sizes), response=np.array(response))
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 4), predictor="reuse", corrector=corrector)
    strayed = np.zeros_like(q)
    for start, end in ((0, 1), (1, 4)):
        strayed[end] = step_sizes[start:end] @ ((schedule.served - schedule.integrated) @ q)[start:end]
    assert np.linalg.norm(strayed[4]) > 0.1
    assert not strayed[1].any()
    along, across = response
    off = step_sizes @ (schedule.integrated @ (q + along * strayed) - v)
    beside = step_sizes @ schedule.integrated @ strayed * across
    expected = np.sqrt((off @ off + beside @ beside) / q.shape[1])
    assert predicted(prior, schedule) == pytest.approx(expected, rel=1e-9)


def fresh(loop):
    """The same, with nothing run."""
    return ClosedLoop(runner=loop.runner, prior=loop.prior, batches=loop.batches, references=loop.references)


@pytest.fixture(scope="module")
def corrected():
    pipe = make_dit(DDIMScheduler(**LINEAR_DDIM))
    loop = ClosedLoop(**prepared(pipe=pipe))
    return loop, quickly(loop, BUDGET, rectify="none")


def test_the_search_corrects_where_it_can(corrected, tmp_path):
    loop, found = corrected
    drawn = [trial.schedule for trial in loop.trials if trial.schedule.solver == "sample"]
    assert {schedule.corrector for schedule in drawn} == {"quadratic"}
    tried = {trial.schedule.corrector for trial in loop.trials if trial.schedule.solver not in ("sample", "full")}
    assert tried >= {"none", "quadratic"}  # what was published has none
    assert found.prior.corrector == "quadratic"
    found.prior.save(tmp_path / "prior.safetensors")
    assert ErrorPrior.load(tmp_path / "prior.safetensors").corrector == "quadratic"


def test_plans_at_load_are_corrected_as_the_bundles_own(corrected):
    loop, found = corrected
    sampler = loop.prior.metadata.sampler
    bundled = Plan(schedule=dataclasses.replace(found.schedule, corrector="linear"), sampler=sampler, prior=found.prior)
    assert bundled.with_budget(4).schedule.corrector == "linear"
    published = Plan(schedule=dataclasses.replace(found.schedule, corrector="none"), sampler=sampler, prior=found.prior)
    assert published.with_budget(2).schedule.corrector == "quadratic"
    assert dataclasses.replace(published, cache="residual").with_budget(2).schedule.corrector == "none"
    pipe = loop.runner.pipe
    attach(pipe, bundled)
    try:
        assert set_budget(pipe, 4).corrector == "linear"
        pipe.scheduler.set_timesteps(9)
        assert bundled.carried_over(fingerprint(pipe.scheduler)).schedule.corrector == "linear"
    finally:
        detach(pipe)


@pytest.mark.parametrize("budget", range(2, STEPS + 1))
def test_what_is_planned_at_load_is_corrected_where_even_spacing_is_predicted_to_lose_enough(corrected, budget):
    prior = corrected[1].prior
    even = plan_schedule(prior, budget, solver="uniform")
    full = CacheSchedule(num_steps=STEPS, full_steps=range(STEPS))
    lost = psnr_of(predicted(prior, full)) - psnr_of(predicted(prior, even))
    expected = "quadratic" if lost > WORTH_CORRECTING else "none"
    assert suited_corrector(prior, budget) == expected
    assert (budget, expected) in {(2, "quadratic"), (STEPS, "none")} or 2 < budget < STEPS
    without = dataclasses.replace(prior.metadata, corrector="none")
    assert suited_corrector(dataclasses.replace(prior, metadata=without), budget) == "none"


@pytest.mark.parametrize("effort", ["instant", "normal"])
@pytest.mark.parametrize(("asked", "at_load"), [("auto", "quadratic"), ("none", "none"), ("linear", "linear")])
def test_what_no_run_was_fitted_to_is_corrected_at_load_where_it_pays(corrected, effort, asked, at_load):
    loop = fresh(corrected[0])
    settings = PlanSettings(budget=STEPS - 1, effort=effort, corrector=asked, rectify="none")
    if effort == "instant":
        scheduler = loop.runner.pipe.scheduler
        found = expected(loop.prior, settings, cache="output", scheduler=scheduler, steps=STEPS)
    else:
        found = plan(loop, settings)
    assert not found.prior.is_fitted
    assert found.schedule.corrector == ("none" if asked == "auto" else asked)  # one step that is skipped loses little
    bundled = Plan(schedule=found.schedule, sampler=loop.prior.metadata.sampler, prior=found.prior)
    assert bundled.with_budget(2).schedule.corrector == at_load


@pytest.mark.parametrize("budget", [BUDGET, "auto"])
def test_where_even_spacing_loses_little_there_is_nothing_to_correct(corrected, budget):
    loop = fresh(corrected[0])
    measured = corrected[0].run

    def lost(steps):
        even = plan_schedule(loop.prior, steps, solver="uniform", predictor="taylor1")
        full = CacheSchedule(num_steps=loop.num_steps, full_steps=range(loop.num_steps))
        return float(np.mean(measured(full).sample_psnr_db - measured(even).sample_psnr_db))

    at_half = lost(2)
    at_budget = at_half if budget == "auto" else lost(budget)
    cases = {at_budget - 0.01: {"quadratic"}, at_half + 0.01: {"none"}}
    if budget == BUDGET:  # fewer steps may lose enough where these do not
        assert at_budget < at_half
        cases[(at_budget + at_half) / 2] = {"none", "quadratic"}
    for worth, correctors in cases.items():
        loop = fresh(loop)
        found = quickly(loop, budget, rectify="none", search=SearchSettings(worth_correcting=worth))
        drawn = [trial.schedule for trial in loop.trials if trial.schedule.solver == "sample"]
        assert {schedule.corrector for schedule in drawn} == correctors
        assert found.prior.corrector == max(correctors)
        if len(correctors) == 2:
            assert {schedule.budget for schedule in drawn if schedule.corrector == "quadratic"} == {2}
            assert found.schedule.corrector == "none"


@pytest.mark.parametrize("solver", ["segment", pytest.param("search", marks=pytest.mark.slow)])
def test_a_corrector_that_is_asked_for_is_taken(corrected, solver):
    loop = fresh(corrected[0])
    found = quickly(loop, BUDGET, rectify="none", corrector="linear", solver=solver)
    if solver == "segment":
        assert found.schedule.corrector == "linear"
    drawn = [trial.schedule.corrector for trial in loop.trials if trial.schedule.solver == "sample"]
    assert set(drawn) == {"linear"}


def test_published_schedules_are_taken_as_published_unless_a_corrector_is_asked_for(corrected):
    loop = corrected[0]
    for corrector, taken in (("auto", "none"), ("linear", "linear")):
        found = quickly(loop, BUDGET, solver="uniform", corrector=corrector, rectify="none")
        assert found.schedule.corrector == taken


def test_a_corrector_that_the_sampler_has_no_room_for_is_refused():
    loop = ClosedLoop(**prepared())
    assert quickly(loop, BUDGET, rectify="none").schedule.corrector == "none"
    with pytest.raises(InputError, match="corrector=linear: needs cache=output and a sampler whose steps are linear"):
        quickly(loop, BUDGET, corrector="linear")
    with pytest.raises(InputError, match="unknown corrector 'cubic'"):
        PlanSettings(budget=3, corrector="cubic").check(6)


@pytest.mark.parametrize("corrector", CORRECTORS)
def test_local_search_predicts_no_more_error_than_the_program_and_even_spacing(corrected, corrector):
    prior, settings = corrected[1].prior, {"predictor": "reuse", "corrector": corrector}
    found = plan_predicted(prior, BUDGET, **settings)
    assert (found.corrector, set(found.predictors)) == (corrector, {"reuse"})
    for solver in ("segment", "uniform"):
        start = plan_schedule(prior, BUDGET, solver=solver, **settings)
        assert predicted(prior, found) <= predicted(prior, start) * (1 + 1e-9)
