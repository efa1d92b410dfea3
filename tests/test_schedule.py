import dataclasses
import functools
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.priors import prior_of, trajectories
from support.schedules import all_schedules

from cemq.errors import InfeasibleBudgetError, InputError
from cemq.predict.predictors import DAMPING, PREDICTORS, taylor
from cemq.prior.error_prior import VIEWS, ErrorPrior
from cemq.schedule import (
    AUTO,
    SOLVERS,
    CacheSchedule,
    CemRule,
    cem_costs,
    improve,
    neighbours,
    parse_budget,
    plan_all,
    plan_branches,
    plan_predicted,
    plan_schedule,
    published_errors,
    segment_costs,
    skip_branches,
    solve_cem,
    solve_relaxed_cem,
    solve_segments,
    stretched,
    uniform_steps,
)
from cemq.schedule.segment import SLOPES
from cemq.schedule.threshold import threshold_steps

INF = math.inf
SHARES = {"reuse": 0.0, "damped": 0.5, "taylor1": 1.0}  # of the slope through the two latest full steps


# --- cache schedules


@pytest.mark.parametrize(
    ("full_steps", "message"),
    [
        ((), "first full-compute step must be 0, found none"),
        ((1, 2), r"first full-compute step must be 0, found \(1,\)"),
        ((0, 3, 2), "must rise strictly"),
        ((0, 2, 2), "must rise strictly"),
        ((0, 4), "stay below 4"),
        ((0, 9), "stay below 4"),
        ((0, -1), "must rise strictly"),
    ],
)
def test_a_schedule_that_cannot_run_is_refused(full_steps, message):
    with pytest.raises(InputError, match=message):
        CacheSchedule(num_steps=4, full_steps=full_steps)


def test_a_schedule_with_an_unknown_predictor_is_refused():
    with pytest.raises(InputError, match=r"unknown predictor 'tailor1'.*did you mean 'taylor1'"):
        CacheSchedule(num_steps=4, full_steps=(0, 2), predictor="tailor1")


def test_a_schedule_knows_its_budget_and_compute_ratio():
    schedule = CacheSchedule(num_steps=9, full_steps=[0, 2, 5, 6])
    assert schedule.full_steps == (0, 2, 5, 6)
    assert schedule.budget == 4
    assert schedule.compute_ratio == 9 / 4


def test_a_full_step_is_served_from_itself():
    schedule = CacheSchedule(num_steps=9, full_steps=(0, 2, 6))
    assert [schedule.serving(step) for step in (0, 2, 6)] == [((0,), (1.0,)), ((2,), (1.0,)), ((6,), (1.0,))]


def test_reuse_serves_a_skipped_step_from_the_latest_full_one():
    schedule = CacheSchedule(num_steps=9, full_steps=(0, 2, 6), predictor="reuse")
    assert [schedule.serving(step) for step in (1, 3, 5, 8)] == [
        ((0,), (1.0,)), ((2,), (1.0,)), ((2,), (1.0,)), ((6,), (1.0,)),
    ]  # fmt: skip


def test_taylor1_serves_a_skipped_step_from_the_two_latest_full_ones():
    schedule = CacheSchedule(num_steps=9, full_steps=(0, 2, 6), predictor="taylor1")
    assert schedule.serving(1) == ((0,), (1.0,))
    assert schedule.serving(5) == ((2, 0), (2.5, -1.5))
    assert schedule.serving(7) == ((6, 2), (1.25, -0.25))


@pytest.mark.parametrize(
    ("full_steps", "predictor", "most"),
    [
        ((0, 3, 5), "reuse", 1),
        ((0, 3, 5), "taylor1", 2),
        ((0, 3, 5), "taylor2", 3),
        ((0, 1, 2, 3, 4, 5, 6, 7), "taylor2", 0),  # no step is served
        ((0, 2, 3, 4, 5, 6, 7), "taylor1", 1),  # of step 0 alone, and only while step 1 needs it
        ((0, 3, 5), ("reuse", "taylor1", "reuse"), 2),
    ],
)
def test_a_schedule_knows_how_many_steps_are_kept_at_a_time(full_steps, predictor, most):
    assert CacheSchedule(num_steps=8, full_steps=full_steps, predictor=predictor).most_kept == most


def test_a_schedule_takes_a_predictor_for_each_full_step():
    schedule = CacheSchedule(num_steps=9, full_steps=(0, 2, 6), predictor=["reuse", "taylor1", "reuse"])
    assert schedule.predictors == ("reuse", "taylor1", "reuse")
    assert schedule.predictor_text() == "reuse, taylor1, reuse"
    assert [schedule.serving(step) for step in (1, 5, 8)] == [
        ((0,), (1.0,)), ((2, 0), (2.5, -1.5)), ((6,), (1.0,)),
    ]  # fmt: skip
    assert CacheSchedule.from_dict(schedule.to_dict()) == schedule


def test_equal_predictors_are_one():
    schedule = CacheSchedule(num_steps=9, full_steps=(0, 2), predictor=("goc", "goc"))
    assert (schedule.predictor, schedule.predictors) == ("goc", ("goc", "goc"))


def test_schedules_are_told_apart_by_what_they_do():
    def key(*predictors, full_steps=(0, 1, 2, 5), branch_steps=()):
        found = CacheSchedule(num_steps=8, full_steps=full_steps, predictor=predictors, branch_steps=branch_steps)
        return found.key

    alike = key("reuse", "taylor1", "taylor2", "damped")
    assert key("taylor1", "reuse", "taylor2", "damped") == alike  # the first two segments skip nothing
    assert len({alike, key(*["taylor2"] * 4), key("reuse", "taylor1", "taylor2", "reuse")}) == 3
    few = (0, 3, 5)  # with one and with two outputs known
    assert key("taylor1", "taylor2", "reuse", full_steps=few) == key("reuse", "taylor1", "reuse", full_steps=few)
    assert key("taylor1", "taylor1", "reuse", full_steps=few) != key("taylor1", "damped", "reuse", full_steps=few)
    assert len({alike, key("reuse", "taylor1", "taylor2", "damped", branch_steps=(2, 5))}) == 2


def test_runs_of_predictors_are_counted():
    names = ("taylor1", "taylor1", "taylor1", "reuse", "damped")
    text = CacheSchedule(num_steps=9, full_steps=range(5), predictor=names).predictor_text()
    assert text == "taylor1 x3, reuse, damped"


def test_a_schedule_with_too_few_predictors_is_refused():
    with pytest.raises(InputError, match="2 predictors for 3 full-compute steps"):
        CacheSchedule(num_steps=9, full_steps=(0, 2, 6), predictor=("reuse", "goc"))


def test_the_strip_shows_one_character_a_step():
    assert CacheSchedule(num_steps=7, full_steps=(0, 1, 4)).strip() == "██··█··"


def test_a_schedule_survives_a_round_trip_through_a_dict():
    schedule = CacheSchedule(num_steps=7, full_steps=(0, 1, 4), predictor="reuse", solver="cem")
    fields = schedule.to_dict()
    assert fields == {"num_steps": 7, "full_steps": [0, 1, 4], "predictor": "reuse", "solver": "cem"}
    assert CacheSchedule.from_dict(fields) == schedule


def test_a_schedule_dict_with_an_unknown_key_is_refused():
    fields = CacheSchedule(num_steps=7, full_steps=(0, 1)).to_dict()
    with pytest.raises(InputError, match=r"expected the keys .*found .*'colour'"):
        CacheSchedule.from_dict(fields | {"colour": "red"})


def test_a_schedule_dict_that_lacks_a_key_is_refused():
    fields = CacheSchedule(num_steps=7, full_steps=(0, 1)).to_dict()
    del fields["solver"]
    with pytest.raises(InputError, match=r"expected the keys .*'solver'"):
        CacheSchedule.from_dict(fields)


# --- branches of guidance


def test_a_step_with_one_branch_costs_half():
    schedule = CacheSchedule(
        num_steps=9, full_steps=(0, 2, 5, 6), predictor=("taylor1", "reuse", "taylor2", "damped"), branch_steps=[2, 6]
    )
    assert (schedule.budget, schedule.compute_ratio) == (3, 9 / 3)
    assert schedule.strip() == "█·▌··█▌··"
    between = schedule.between_branches
    assert (between.full_steps, between.predictors, between.branch_steps) == ((0, 5), ("taylor1", "taylor2"), ())
    odd = dataclasses.replace(schedule, branch_steps=(2,))
    assert (odd.budget, odd.compute_ratio) == (4, 9 / 3.5)
    for each in (schedule, odd):
        assert CacheSchedule.from_dict(each.to_dict()) == each
    assert "branch_steps" not in dataclasses.replace(schedule, branch_steps=()).to_dict()


@pytest.mark.parametrize("branch_steps", [(0,), (3,), (5, 2), (2, 2)])
def test_one_branch_alone_cannot_be_computed_on_such_steps(branch_steps):
    with pytest.raises(InputError, match="steps with one branch must rise strictly and be full-compute steps after"):
        CacheSchedule(num_steps=9, full_steps=(0, 2, 5, 6), branch_steps=branch_steps)


def test_branches_are_skipped_on_every_other_of_the_last_steps():
    schedule = CacheSchedule(num_steps=12, full_steps=(0, 2, 4, 6, 8, 10))
    assert skip_branches(schedule, 6) == skip_branches(schedule, 9) == schedule
    assert skip_branches(schedule, 5).branch_steps == (6, 10)
    assert skip_branches(schedule, 4).branch_steps == (2, 6, 8, 10)  # 8 comes after 10, 6 and 2
    assert skip_branches(schedule, 3).branch_steps == (2, 4, 6, 8, 10)  # one step with both is the least


@given(steps=st.integers(2, 50), data=st.data())
@settings(max_examples=60, deadline=None)
def test_skipped_branches_cost_the_budget_and_leave_the_steps(steps, data):
    budget = data.draw(st.integers(2, steps))
    count = data.draw(st.integers(budget, min(2 * budget - 1, steps)))
    schedule = CacheSchedule(num_steps=steps, full_steps=uniform_steps(steps, count))
    found = skip_branches(schedule, budget)
    assert found.full_steps == schedule.full_steps
    assert found.budget == budget
    assert found.compute_ratio == pytest.approx(steps / budget)


def test_a_plan_with_skipped_branches_is_that_of_more_steps():
    prior = prior_of(*trajectories(20))
    found = plan_branches(prior, 6, 0.5, predictor="reuse", solver="uniform")
    assert found.full_steps == plan_schedule(prior, 8, predictor="reuse", solver="uniform").full_steps
    assert (found.budget, len(found.branch_steps)) == (6, 4)
    for budget in (2, 6, 20):
        assert plan_branches(prior, budget, 1.0, solver="uniform") == plan_schedule(prior, budget, solver="uniform")
    assert plan_branches(prior, 15, 0.1, solver="uniform").full_steps == tuple(range(20))
    assert plan_branches(prior, 15, 0.1, solver="uniform").budget == 15


# --- budgets


@pytest.mark.parametrize(
    ("budget", "steps"),
    [(2, 2), (15, 15), (50, 50), ("15", 15), (" 15 ", 15), ("3x", 17), ("2.5x", 20), ("1x", 50), ("1000x", 2)],
)
def test_a_budget_is_a_number_of_steps_or_a_compute_ratio(budget, steps):
    assert parse_budget(budget, 50) == steps


@pytest.mark.parametrize("budget", [0, 1, 51, "1", "51"])
def test_a_budget_out_of_range_names_the_range(budget):
    with pytest.raises(InfeasibleBudgetError, match=f"budget={budget} is out of range for 50 steps: choose 2..50"):
        parse_budget(budget, 50)


def test_a_compute_ratio_below_one_is_refused():
    with pytest.raises(InfeasibleBudgetError, match=r"budget=0\.5x: a compute ratio is at least 1x"):
        parse_budget("0.5x", 50)


@pytest.mark.parametrize("budget", ["", "many", "x", "3 x", "x3", "-3", -3, 2.5, "3xx", ".5x", None])
def test_a_budget_that_is_neither_is_refused(budget):
    with pytest.raises(InputError, match="is neither a number of full-compute steps nor a compute ratio"):
        parse_budget(budget, 50)


# --- uniform


@given(steps=st.integers(2, 60), data=st.data())
@settings(max_examples=60, deadline=None)
def test_uniform_gaps_differ_by_at_most_one(steps, data):
    budget = data.draw(st.integers(1, steps))
    full_steps = uniform_steps(steps, budget)
    assert full_steps[0] == 0
    assert len(full_steps) == budget
    gaps = np.diff([*full_steps, steps])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


# --- the segment solver


@functools.cache
def brute_force_case(steps, view, predictor, coherence):
    """Energy of the errors of every segment (older full step or None, this full step, end), best predictor first."""
    q, v, step_sizes = trajectories(steps)
    sensitivity = np.random.default_rng(1).uniform(0.2, 3, (2, steps))
    x, y = {"combined": (q, v), "cache": (v, v), "self": (q, q)}[view]
    energies = {}
    for start in range(steps):
        for older in [None] if start == 0 else range(start):
            for end in range(start + 1, steps + 1):
                found = []
                for name in SLOPES if predictor == AUTO else [predictor]:
                    slope = 0 if older is None else SHARES[name] * (x[start] - x[older]) / (start - older)
                    reuses = name == "reuse" and (older is not None or predictor == "reuse")
                    moved = [
                        step_sizes[s]
                        * sensitivity[int(reuses and s > start), s]
                        * (x[start] + (s - start) * slope - y[s])
                        for s in range(start, end)
                    ]
                    energy = sum(
                        np.mean(a * b) * math.exp(-abs(i - j) / coherence)
                        for i, a in enumerate(moved)
                        for j, b in enumerate(moved)
                    )
                    found.append((energy, name))
                energies[older, start, end] = min(found, key=lambda pair: pair[0])
    prior = dataclasses.replace(prior_of(q, v, step_sizes), sensitivity=sensitivity, coherence=coherence)
    return prior, energies


def segments(full_steps, steps):
    bounds = [None, *full_steps, steps]
    return [tuple(bounds[i - 1 : i + 2]) for i in range(1, len(bounds) - 1)]


def brute_force_total(energies, steps, full_steps, gamma=2.0):
    return sum(energies[segment][0] ** (gamma / 2) for segment in segments(full_steps, steps))


@pytest.mark.parametrize("coherence", [INF, 2.0])
@pytest.mark.parametrize("gamma", [1, 2, 4])
@pytest.mark.parametrize("predictor", [*SLOPES, AUTO])
@pytest.mark.parametrize("view", VIEWS)
def test_the_segment_solver_finds_the_best_of_all_schedules_of_every_budget(view, predictor, gamma, coherence):
    steps = 7
    prior, energies = brute_force_case(steps, view, predictor, coherence)
    names = tuple(SLOPES) if predictor == AUTO else (predictor,)
    table = segment_costs(prior, names, view=view, gamma=gamma, max_gap=steps)
    found = solve_segments(table.costs, steps)
    assert len(found) == steps
    for budget, (full_steps, total) in enumerate(found, start=1):
        schedules = all_schedules(steps, budget)
        least = min(brute_force_total(energies, steps, schedule, gamma) for schedule in schedules)
        assert full_steps in schedules
        assert total == pytest.approx(least, rel=1e-6, abs=1e-6)
        assert brute_force_total(energies, steps, full_steps, gamma) == pytest.approx(least, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("coherence", [INF, 2.0])
@pytest.mark.parametrize("predictor", [*SLOPES, AUTO])
def test_a_plan_is_the_best_schedule_within_its_budget(predictor, coherence):
    steps = 7
    prior, energies = brute_force_case(steps, "combined", predictor, coherence)
    for budget in range(2, steps):
        plan = plan_schedule(prior, budget, predictor=predictor)
        within = [schedule for count in range(1, budget + 1) for schedule in all_schedules(steps, count)]
        least = min(brute_force_total(energies, steps, schedule) for schedule in within)
        assert plan.budget <= budget
        assert brute_force_total(energies, steps, plan.full_steps) == pytest.approx(least, rel=1e-6)


def test_with_auto_each_segment_is_served_by_the_predictor_that_suits_it_best():
    steps = 7
    prior, energies = brute_force_case(steps, "combined", AUTO, 2.0)
    plan = plan_schedule(prior, 4, predictor=AUTO)
    assert len(set(plan.predictors)) > 1
    for segment, name in zip(segments(plan.full_steps, steps), plan.predictors, strict=True):
        older, start, end = segment
        if older is not None and end > start + 1:  # else all predictors serve it alike
            assert name == energies[segment][1]


@pytest.mark.parametrize("max_gap", [2, 3])
def test_with_a_longest_gap_the_segment_solver_finds_the_best_of_what_is_left(max_gap):
    steps = 7
    prior, energies = brute_force_case(steps, "combined", "taylor1", INF)
    for budget in range(2, steps):
        within = [schedule for count in range(1, budget + 1) for schedule in all_schedules(steps, count)]
        within = [s for s in within if np.diff([*s, steps]).max() <= max_gap]
        if not within:
            with pytest.raises(InfeasibleBudgetError, match=f"gaps of at most {max_gap}"):
                plan_schedule(prior, budget, max_gap=max_gap)
            continue
        found = plan_schedule(prior, budget, max_gap=max_gap).full_steps
        assert found in within
        least = min(brute_force_total(energies, steps, schedule) for schedule in within)
        assert brute_force_total(energies, steps, found) == pytest.approx(least, rel=1e-6)


@st.composite
def priors(draw):
    """Arbitrary ones: any predictions, step sizes, sensitivity and coherence."""
    steps, seed = draw(st.integers(2, 12)), draw(st.integers(0, 10**6))
    random = np.random.default_rng(seed)
    prior = prior_of(*trajectories(steps, seed, noise=draw(st.sampled_from([0.0, 0.3, 3.0]))))
    coherence = draw(st.sampled_from([0.3, 2.0, 20.0, INF]))
    return dataclasses.replace(prior, sensitivity=np.exp(random.normal(size=(2, steps))), coherence=coherence)


@given(prior=priors(), view=st.sampled_from(VIEWS), predictor=st.sampled_from([*PREDICTORS, AUTO]))
@settings(max_examples=40, deadline=None)
def test_every_budget_is_feasible_and_the_largest_is_full_compute(prior, view, predictor):
    for budget in range(2, prior.num_steps + 1):
        schedule = plan_schedule(prior, budget, view=view, predictor=predictor)
        assert schedule.budget <= budget
        assert schedule.num_steps == prior.num_steps
    assert schedule.full_steps == tuple(range(prior.num_steps))


@given(prior=priors(), view=st.sampled_from(VIEWS), predictor=st.sampled_from([*SLOPES, AUTO]))
@settings(max_examples=40, deadline=None)
def test_a_larger_budget_never_predicts_more_error(prior, view, predictor):
    steps = prior.num_steps
    names = tuple(SLOPES) if predictor == AUTO else (predictor,)
    table = segment_costs(prior, names, view=view, gamma=2.0, max_gap=steps)

    def predicted(schedule):
        gaps, ends = np.diff(schedule.full_steps, prepend=0), np.diff(schedule.full_steps, append=steps)
        return table.costs[schedule.full_steps, gaps, ends].sum()

    totals = [predicted(plan_schedule(prior, budget, view=view, predictor=predictor)) for budget in range(2, steps)]
    assert all(more <= less for less, more in itertools.pairwise(totals))


@given(prior=priors(), predictor=st.sampled_from([*PREDICTORS, AUTO]))
@settings(max_examples=20, deadline=None)
def test_all_budgets_at_once_are_the_plans_of_each(prior, predictor):
    plans = plan_all(prior, prior.num_steps - 1, predictor=predictor) if prior.num_steps > 2 else []
    assert plans == [plan_schedule(prior, budget, predictor=predictor) for budget in range(2, prior.num_steps)]


def test_a_plan_spends_less_than_its_budget_where_signed_errors_cancel():
    # from step 1 on, serving 0 errs by 0, -1 and +1: nothing in sum, so a third full step can only do harm
    v = np.array([[100.0], [0.0], [1.0], [-1.0]])
    prior = prior_of(v, v, np.ones(4))
    plans = [plan_schedule(prior, budget, predictor="reuse") for budget in (2, 3, 4)]
    assert [plan.full_steps for plan in plans] == [(0, 1), (0, 1), (0, 1, 2, 3)]
    assert [prior.final_error(plan.served) for plan in plans] == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("largest", [2, 7, 99])
def test_long_runs_have_a_plan_for_every_budget(largest):
    plans = plan_all(prior_of(*trajectories(100)), largest)
    assert len(plans) == largest - 1
    assert all(plan.budget <= budget for budget, plan in enumerate(plans, start=2))


def test_a_longest_gap_too_short_for_the_budget_names_the_budgets_that_fit():
    prior = prior_of(*trajectories(11))
    with pytest.raises(InfeasibleBudgetError, match=r"cannot cover 11 steps with gaps of at most 3: choose 4\.\.11"):
        plan_schedule(prior, 3, max_gap=3)
    assert plan_schedule(prior, 4, max_gap=3).budget == 4
    with pytest.raises(InputError, match="max_gap=0"):
        plan_schedule(prior, 4, max_gap=0)


def test_with_a_longest_gap_all_budgets_at_once_are_those_that_can_keep_it():
    prior = prior_of(*trajectories(11))
    plans = plan_all(prior, 6, max_gap=3)
    assert plans == [plan_schedule(prior, budget, predictor=AUTO, max_gap=3) for budget in (4, 5, 6)]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_schedule_records_how_it_was_planned(solver):
    schedule = plan_schedule(prior_of(*trajectories(12)), "3x", solver=solver, predictor="reuse")
    assert (schedule.solver, schedule.predictor) == (solver, "reuse")
    assert schedule.budget == 4 or (schedule.budget < 4 and solver in ("segment", "threshold"))


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_computes_in_full_where_every_step_may_be(solver):
    assert plan_schedule(prior_of(*trajectories(9)), 9, solver=solver).full_steps == tuple(range(9))


@pytest.mark.parametrize("corrector", ["none", "linear", "quadratic"])
@pytest.mark.parametrize(
    ("name", "rule"), [("reuse", taylor(0)), ("damped", taylor(1, DAMPING)), ("taylor1", taylor(1))]
)
def test_any_predictor_is_costed_by_the_weights_that_it_gives(monkeypatch, name, rule, corrector):
    """What is known in closed form, under another name: by its rows alone."""
    monkeypatch.setitem(PREDICTORS, "nameless", rule)
    settings = {"corrector": corrector, "gamma": 2.0, "max_gap": 9}
    generator = np.random.default_rng(1)
    prior = dataclasses.replace(
        prior_of(*trajectories(9)), sensitivity=generator.uniform(0.2, 3, (2, 9)), coherence=3.0,
        response=generator.uniform(0, 1, (2, 9)),
    )  # fmt: skip
    known, found = (segment_costs(prior, (each,), **settings).costs for each in (name, "nameless"))
    assert np.array_equal(np.isfinite(known), np.isfinite(found))
    assert found[np.isfinite(found)] == pytest.approx(known[np.isfinite(known)], rel=1e-9, abs=1e-9)


def test_a_predictor_that_looks_further_back_is_planned_as_what_it_is():
    prior = prior_of(*trajectories(10))
    planned = {name: plan_schedule(prior, 4, predictor=name).full_steps for name in ("taylor1", "taylor2", "goc")}
    assert len(set(planned.values())) > 1
    table = segment_costs(prior, ("taylor2",), gamma=2.0, max_gap=10)
    served = CacheSchedule(num_steps=10, full_steps=(0, 2, 4, 6), predictor="taylor2").served
    errors = prior.step_sizes[6:, None] * (served @ trajectories(10)[0] - trajectories(10)[1])[6:]
    assert table.costs[6, 2, 4] == pytest.approx(np.mean(np.square(errors.sum(0))), rel=1e-6)  # evenly spaced: exact


def test_an_unknown_solver_names_the_nearest_one():
    with pytest.raises(InputError, match=r"unknown solver 'segments'.*did you mean 'segment'"):
        plan_schedule(prior_of(*trajectories(6)), 3, solver="segments")


def test_planning_for_quantization_noise_changes_the_schedule():
    q, v, weights = trajectories(10)
    q[4] += 50  # the quantized model is bad at one step, the cache alone cannot know
    prior = prior_of(q, v, weights)
    assert 4 not in plan_schedule(prior, 4, predictor="reuse", view="combined").full_steps
    assert plan_schedule(prior, 4, view="cache") == plan_schedule(prior_of(v, v, weights), 4, view="combined")


# --- local search


def test_the_neighbours_of_a_schedule_by_hand():
    schedule = CacheSchedule(num_steps=6, full_steps=(0, 2), predictor="reuse")
    found = {(move.full_steps, move.predictors) for move in neighbours(schedule, ("reuse", "taylor1"))}
    moved = {((0, step), ("reuse", "reuse")) for step in (1, 3, 4)}  # by one or two; 6 and -2 are no steps
    # without step 2 the longest gap is the whole run, and 3 its middle: one of the moves above
    assert found == moved | {((0, 2), ("taylor1", "reuse")), ((0, 2), ("reuse", "taylor1"))}


@given(prior=priors(), data=st.data())
@settings(max_examples=20, deadline=None)
def test_neighbours_keep_the_budget_and_differ_from_where_they_began(prior, data):
    budget = data.draw(st.integers(1, prior.num_steps))
    schedule = CacheSchedule(num_steps=prior.num_steps, full_steps=uniform_steps(prior.num_steps, budget))
    for move in neighbours(schedule, tuple(SLOPES)):
        assert move.budget == budget
        assert (move.full_steps, move.predictors) != (schedule.full_steps, schedule.predictors)


@given(prior=priors(), data=st.data())
@settings(max_examples=15, deadline=None)
def test_an_improved_schedule_has_no_better_neighbour(prior, data):
    budget = data.draw(st.integers(2, prior.num_steps))
    start = CacheSchedule(num_steps=prior.num_steps, full_steps=uniform_steps(prior.num_steps, budget))
    best = improve(prior, start, predictors=tuple(SLOPES))
    least = prior.final_error(best.served)
    assert best.budget == budget
    assert least <= prior.final_error(start.served)
    assert all(prior.final_error(move.served) >= least * (1 - 1e-6) for move in neighbours(best, tuple(SLOPES)))


@given(prior=priors(), data=st.data())
@settings(max_examples=15, deadline=None)
def test_what_is_planned_on_predictions_is_no_worse_than_any_start(prior, data):
    budget = data.draw(st.integers(2, prior.num_steps))
    others = st.lists(st.integers(1, prior.num_steps - 1), unique=True, min_size=budget - 1, max_size=budget - 1)
    other = CacheSchedule(num_steps=prior.num_steps, full_steps=(0, *sorted(data.draw(others))))
    starts = [plan_schedule(prior, budget, predictor=name) for name in (AUTO, "taylor1")]
    starts += [plan_schedule(prior, budget, solver="uniform")]
    found = plan_predicted(prior, budget)
    assert found.budget <= budget
    least = min(prior.final_error(start.served) for start in starts)
    assert prior.final_error(found.served) <= least * (1 + 1e-9) + 1e-12
    better = plan_predicted(prior, budget, known=other)
    least = min(least, prior.final_error(other.served))
    assert prior.final_error(better.served) <= least * (1 + 1e-9) + 1e-12
    whole = plan_predicted(prior, budget, predictor="reuse")
    assert set(whole.predictors) == {"reuse"}


def many_steps(steps):
    """Predictions that turn, faster and faster, and noise."""
    angles = np.linspace(0, 2, steps)[:, None] ** 2 * np.arange(1, 4)
    v = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    q = v + 0.05 * np.random.default_rng(0).normal(size=v.shape)
    return prior_of(q, v, np.full(steps, 1 / steps))


@pytest.mark.parametrize(
    ("steps", "budget", "corrector"),
    [
        *((steps, budget, "none") for steps, budget in ((101, 30), (101, 2), (250, 75), (400, 8), (1000, 300))),
        *((steps, budget, "quadratic") for steps, budget in ((101, 30), (250, 75))),
        *(pytest.param(*case, "quadratic", marks=pytest.mark.slow) for case in ((101, 2), (400, 8), (1000, 300))),
    ],
)
def test_the_work_of_planning_many_steps_is_bounded(steps, budget, corrector, monkeypatch):
    """Counted, not timed: entries of cost tables, and schedules whose error is predicted."""
    tables, predicted = [], []

    def costs(prior, *args, max_gap, **settings):
        tables.append(prior.num_steps * max_gap**2)
        return segment_costs(prior, *args, max_gap=max_gap, **settings)

    def error(prior, *args, **settings):
        predicted.append(prior.num_steps)
        return final_error(prior, *args, **settings)

    prior, final_error = many_steps(steps), ErrorPrior.final_error
    monkeypatch.setattr("cemq.schedule.solvers.segment_costs", costs)
    monkeypatch.setattr(ErrorPrior, "final_error", error)
    known = CacheSchedule(
        num_steps=steps, full_steps=uniform_steps(steps, budget), predictor="reuse", corrector=corrector
    )
    found = plan_predicted(prior, budget, corrector=corrector, known=known)
    assert len(tables) == 1
    assert tables[0] <= 100**3
    assert len(predicted) == 3
    assert (found.num_steps, found.corrector) == (steps, corrector)
    assert 2 <= found.budget <= budget
    even = plan_schedule(prior, budget, solver="uniform", corrector=corrector)
    errors = [final_error(prior, each.served, each.integrated) for each in (found, even, known)]
    assert errors[0] <= min(errors[1:])


def test_a_plan_of_one_budget_solves_no_smaller_ones(monkeypatch):
    solved = []
    monkeypatch.setattr(
        "cemq.schedule.solvers.segment_costs", lambda *args, **more: solved.append(1) or segment_costs(*args, **more)
    )
    prior = many_steps(130)
    one = plan_schedule(prior, 40, predictor=AUTO)
    assert len(solved) == 1
    assert one == plan_all(prior, 40)[-1]
    assert len(solved) > 2


def test_a_thinned_prior_has_longer_steps():
    prior = dataclasses.replace(many_steps(6), coherence=3.0)
    few = prior.thinned([0, 2, 5])
    assert few.step_sizes == pytest.approx(np.array([2, 3, 1]) / 6)
    assert few.qv[1, 2] == prior.qv[2, 5]
    assert few.coherence == 1.5
    same = prior.thinned(range(6))
    schedule = CacheSchedule(num_steps=6, full_steps=(0, 2))
    assert same.final_error(schedule.served) == prior.final_error(schedule.served)


def test_a_schedule_is_stretched_by_hand():
    full = (0, 5, 10, 20, 30, 40)
    schedule = CacheSchedule(num_steps=50, full_steps=full, predictor=("reuse",) * 3 + ("taylor1",) * 3)
    assert stretched(schedule, full, 50, 6) == schedule
    fewer = stretched(schedule, full, 50, 3)
    assert (fewer.full_steps, fewer.predictors) == ((0, 10, 30), ("reuse", "reuse", "taylor1"))
    more = stretched(schedule, full, 50, 12)
    assert more.full_steps == (0, 2, 5, 8, 10, 15, 20, 25, 30, 35, 40, 45)
    assert more.predictors == tuple(name for name in schedule.predictors for _ in range(2))
    assert stretched(schedule, [2 * step for step in full], 100, 6).full_steps == (0, 10, 20, 40, 60, 80)
    assert stretched(schedule, [0, 0, 0.2, 0.4, 1, 1], 6, 6).full_steps == (0, 1, 2, 3, 4, 5)  # no room to lie closer
    assert stretched(schedule, [3, 4, 5, 6, 7, 8], 9, 6).full_steps == (0, 4, 5, 6, 7, 8)  # the first step is full


@given(st.integers(2, 60), st.integers(2, 60), st.data())
@settings(max_examples=50, deadline=None)
def test_a_stretched_schedule_spends_the_budget(before, after, data):
    full = (0, *sorted(data.draw(st.sets(st.integers(1, before - 1)))))
    schedule = CacheSchedule(num_steps=before, full_steps=full)
    places = sorted(data.draw(st.lists(st.floats(0, after - 1), min_size=len(full), max_size=len(full))))
    budget = data.draw(st.integers(1, after))
    assert stretched(schedule, places, after, budget).budget == budget  # and its steps rise, or it could not be made


# --- ERTACache's threshold


def aged(steps):
    """The error of reuse is how old the output is."""
    table = np.full((steps, steps), np.nan)
    for age in range(steps):
        table[age, age:] = age
    return table


@pytest.mark.parametrize(
    ("budget", "full_steps"),
    [(1, (0,)), (2, (0, 3)), (3, (0, 2, 4)), (4, (0, 2, 4)), (5, (0, 1, 2, 3, 4))],
)
def test_the_threshold_policy_by_hand(budget, full_steps):
    # one full step: 4 old at the end; two: 2 old; three or four: 1 old, which cannot be spread over four
    assert threshold_steps(aged(5), budget) == full_steps


def test_the_threshold_policy_computes_where_the_error_grows_fast():
    table = aged(8)
    table[1:, 3] += 10  # nothing older serves step 3
    assert 3 in threshold_steps(table, 3)


# --- the relaxed CEM rule


def relaxed_brute_force(costs, budget, spread=1):
    """Every path of the rule; of equal ones the latest end."""
    steps = costs.shape[1]
    centre = round(steps / budget)
    low, high = max(1, centre - spread), min(10, centre + spread)
    found = []
    for path in all_schedules(steps, budget):
        tail = steps - 1 - path[-1]
        if set(np.diff(path).tolist()) <= set(range(low, high + 1)) and tail < low:
            total = sum(costs[after - before - 1, after] for before, after in itertools.pairwise(path))
            found.append((total + (costs[tail - 1, -1] if tail else 0.0), path))
    return min(found, key=lambda pair: (round(pair[0], 9), -pair[1][-1]), default=(INF, ()))


def test_the_relaxed_cem_rule_finds_the_best_of_all_its_paths():
    solved = refused = 0
    for steps, budget in itertools.product((5, 8, 9, 11), range(2, 9)):
        random = np.random.default_rng(steps * budget)
        costs = cem_costs(np.triu(random.uniform(0.1, 1, (steps, steps)), 1))
        least, path = relaxed_brute_force(costs, budget)
        if math.isinf(least):
            refused += 1
            with pytest.raises(InfeasibleBudgetError, match=f"relaxed CEM rule cannot spend budget={budget}"):
                solve_relaxed_cem(costs, budget)
        else:
            solved += 1
            assert solve_relaxed_cem(costs, budget) == (path, pytest.approx(least))
    assert min(solved, refused) >= 3


def test_of_equal_paths_the_relaxed_rule_ends_latest():
    costs = np.ones((9, 9))
    costs[0, -1] = costs[1, -1] = 0.0  # neither one nor two steps after the last full one cost anything
    assert solve_relaxed_cem(costs, 3) == ((0, 4, 8), 2.0)


def test_the_relaxed_rule_spends_what_the_published_one_cannot():
    errors = np.triu(np.ones((50, 50)), 1)
    with pytest.raises(InfeasibleBudgetError):
        solve_cem(cem_costs(errors), 7)
    assert len(solve_relaxed_cem(cem_costs(errors), 7)[0]) == 7


# --- the published CEM rule


def naive_costs(errors, weighter):
    weigh = {"none": lambda c: 1.0, "linear": lambda c: float(c), "quadratic": lambda c: float(c * c)}[weighter]
    costs = []
    for interval, row in enumerate(errors):
        running, line = 0.0, []
        for error in row:
            running = running + error
            cost = weigh(interval) * running
            line.append(0.0 if interval == 0 else INF if cost == 0 else cost)
        costs.append(line)
    return costs


def naive_solve(costs, budget, rules=None):
    steps = len(costs[0])
    centre = round(steps / budget)
    best, came = {(0, 1): 0.0}, {}
    window = range(max(1, centre - 1), min(10, centre + 1) + 1)
    for step in range(1, steps):
        for used in range(2, budget + 1):
            for gap in range(min(step, 10), 0, -1) if rules else range(1, min(step, 10) + 1):
                ruled = [gaps for where, gaps in (rules or {}).items() if where.start <= step - gap < where.stop]
                if gap not in (ruled[0] if ruled else window):
                    continue
                total = best.get((step - gap, used - 1), INF) + costs[gap - 1][step]
                if total < best.get((step, used), INF):
                    best[step, used], came[step, used] = total, gap
    if best.get((steps - 1, budget), INF) == INF:
        return None
    path, step = [steps - 1], steps - 1
    for used in range(budget, 1, -1):
        step -= came[step, used]
        path.insert(0, step)
    return tuple(path), best[steps - 1, budget]


def synthetic_errors(random, steps):
    """Uniform, or few levels so that ties abound, or with zeros that make edges infeasible."""
    kind = random.integers(3)
    errors = random.uniform(0, 1, (steps, steps)) if kind == 0 else random.integers(kind - 1, 3, (steps, steps)) / 4
    return np.triu(errors)


@pytest.mark.parametrize("weighter", ["none", "linear", "quadratic"])
def test_cem_costs_equal_the_published_rule_bit_for_bit(weighter):
    random = np.random.default_rng(1)
    for _ in range(30):
        errors = synthetic_errors(random, int(random.integers(2, 30)))
        before = errors.copy()
        assert cem_costs(errors, weighter).tolist() == naive_costs(errors.tolist(), weighter)
        assert np.array_equal(errors, before)


def test_cem_costs_of_one_step_weigh_the_error_alone():
    errors = np.triu(np.arange(1.0, 10.0).reshape(3, 3))
    assert cem_costs(errors, "quadratic", cumulative=False).tolist() == [[0, 0, 0], [INF, 5, 6], [INF, INF, 36]]


def test_an_unknown_cem_weighter_names_the_nearest_one():
    with pytest.raises(InputError, match=r"unknown CEM weighter 'square': choose from none, linear, quadratic"):
        cem_costs(np.zeros((2, 2)), "square")


@pytest.mark.parametrize("weighter", ["none", "linear", "quadratic"])
def test_the_cem_solver_equals_the_published_rule_bit_for_bit(weighter):
    random = np.random.default_rng(2)
    solved = refused = 0
    for _ in range(200):
        steps = int(random.integers(2, 51))
        budget = int(random.integers(2, steps + 1))
        costs = cem_costs(synthetic_errors(random, steps), weighter)
        expected = naive_solve(costs.tolist(), budget)
        if expected is None:
            refused += 1
            with pytest.raises(InfeasibleBudgetError, match=f"cannot spend budget={budget} on {steps} steps"):
                solve_cem(costs, budget)
        else:
            solved += 1
            assert solve_cem(costs, budget) == expected
            assert expected[0][0] == 0
            assert expected[0][-1] == steps - 1
    assert min(solved, refused) >= 5


def test_of_equal_paths_the_cem_solver_takes_the_smallest_last_gap():
    # gaps of 1 to 3 that add up to 8 in three: 3, 3 and 2 in any order
    assert solve_cem(np.ones((9, 9)), 4) == ((0, 3, 6, 8), 3.0)


def test_no_gap_of_the_cem_rule_is_longer_than_ten():
    costs = np.ones((200, 200))
    costs[10] = 0.001  # gaps of 11 would be a bargain
    full_steps, total = solve_cem(costs, 21)
    assert (full_steps, total) == naive_solve(costs.tolist(), 21)
    assert sorted(np.diff(full_steps)) == [9] + [10] * 19


def exact_errors(steps):
    c, s = np.mgrid[:steps, :steps]
    return np.where(s >= c, ((7 * c + 5 * s) % 11 + 1) / 16, 0.0)  # exact in binary


# What the released solvers (github.com/leaves162/CEM at ffa2a61) make of `exact_errors`.
WARM_UP, THREE_RULES = {range(2): {1, 2}}, {range(2): {1, 2}, range(10, 18): {2}, range(20, 36): {2}}
GOLDEN = [
    (20, 5, CemRule(), (0, 5, 10, 15, 19)),
    (20, 8, CemRule(), (0, 3, 6, 9, 12, 15, 17, 19)),
    (50, 10, CemRule(), (0, 6, 12, 18, 24, 30, 35, 40, 45, 49)),
    (50, 17, CemRule(), (0, 4, 8, 12, 16, 20, 23, 26, 29, 32, 35, 38, 41, 43, 45, 47, 49)),
    (50, 9, CemRule(cumulative=False), (0, 7, 12, 17, 22, 29, 36, 42, 49)),
    (28, 6, CemRule(cumulative=False), (0, 5, 10, 16, 21, 27)),
    (50, 15, CemRule(gap_rules=WARM_UP), (0, 2, 6, 10, 14, 18, 22, 26, 30, 34, 37, 40, 43, 46, 49)),
    (50, 19, CemRule(gap_rules=THREE_RULES), (0, 2, 5, 9, 13, 15, 17, 19, 23, 25, 27, 29, 31, 33, 35, 37, 41, 45, 49)),
    (50, 9, CemRule(gap_rules={range(1): {1}}), (0, 1, 8, 15, 22, 29, 36, 43, 49)),
    (28, 8, CemRule(gap_rules=WARM_UP), (0, 2, 7, 12, 16, 20, 24, 27)),
    (50, 7, CemRule(cumulative=False, relaxed_end=True), (0, 7, 14, 22, 29, 36, 44)),
    (50, 6, CemRule(cumulative=False, relaxed_end=True), (0, 9, 18, 26, 35, 43)),
    (28, 5, CemRule(cumulative=False, relaxed_end=True), (0, 7, 12, 18, 23)),
    (20, 3, CemRule(cumulative=False, relaxed_end=True), (0, 7, 14)),
]


@pytest.mark.parametrize(("steps", "budget", "rule", "full_steps"), GOLDEN)
def test_the_cem_rule_gives_the_schedules_of_the_release(steps, budget, rule, full_steps):
    assert rule.solve(exact_errors(steps)[:10], budget) == full_steps


# What they make of the priors they were released with. Those have no licence to be shipped here:
# CEM_RELEASE=a-clone-of-the-repository python -m pytest tests/test_schedule.py -k released_priors
RELEASED = [
    ("DiT", 18, CemRule(), "0 4 8 12 16 19 22 25 28 31 34 37 39 41 43 45 47 49"),
    ("DiT", 14, CemRule(), "0 5 10 15 20 24 28 31 34 37 40 43 46 49"),
    ("DiT", 12, CemRule(), "0 5 10 15 20 25 30 35 39 43 46 49"),
    ("DiT", 10, CemRule(), "0 6 12 18 24 30 35 40 45 49"),
    ("FLUX", 15, CemRule(gap_rules=WARM_UP), "0 2 6 10 14 18 22 26 30 34 37 40 43 46 49"),
    ("FLUX", 19, CemRule(gap_rules=THREE_RULES), "0 2 6 9 13 15 17 19 23 25 27 29 31 33 35 37 41 45 49"),
    ("Wan21", 9, CemRule(cumulative=False), "0 5 10 17 24 31 38 44 49"),
    ("Wan21", 9, CemRule(gap_rules={range(1): {1}}), "0 1 8 15 22 29 36 43 49"),
    ("Wan21", 7, CemRule(cumulative=False, relaxed_end=True), "0 6 12 20 28 36 44"),
]


@pytest.mark.skipif("CEM_RELEASE" not in os.environ, reason="CEM_RELEASE names no clone of CEM's repository")
@pytest.mark.parametrize(("model", "budget", "rule", "full_steps"), RELEASED)
def test_the_cem_rule_gives_the_schedules_of_the_released_priors(model, budget, rule, full_steps):
    import torch

    path = Path(os.environ["CEM_RELEASE"], model, "outputs", "priors", "priors.pt")
    rows = {name: row.numpy() for name, row in torch.load(path, weights_only=True).items()}
    assert rule.solve(published_errors(rows), budget) == tuple(map(int, full_steps.split()))


def test_a_published_prior_is_read_in_execution_order_whichever_way_it_counts():
    rows = {"C=1": [0.0, 0.1, 0.2, 0.3], "C=2": [0.0, 0.0, 0.4, 0.5]}
    table = published_errors(rows)
    assert table.tolist() == [[0, 0, 0, 0], [0, 0.1, 0.2, 0.3], [0, 0, 0.4, 0.5]]
    assert np.array_equal(published_errors({name: row[::-1] for name, row in rows.items()}), table)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"C=1": [0.0, 0.1], "C=3": [0.0, 0.0]}, "rows of one length for C=1, C=2, ..., found C=1, C=3"),
        ({"C=1": [0.0, 0.1, 0.2], "C=2": [0.0, 0.0]}, "rows of one length"),
        ({}, "found $"),
        ({"C=1": [0.1, 0.1, 0.2]}, "the first C entries of row C, or the last, should be 0"),
    ],
)
def test_what_is_no_published_prior_is_refused(rows, message):
    with pytest.raises(InputError, match=message):
        published_errors(rows)


@given(steps=st.integers(4, 40), seed=st.integers(0, 10**6), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_path_of_a_cem_rule_keeps_the_rule(steps, seed, data):
    budget, relaxed = data.draw(st.integers(2, steps)), data.draw(st.booleans())
    start = data.draw(st.integers(0, steps - 2))
    rules = {} if relaxed else {range(start, start + 2): {1, 3}}
    rule = CemRule(spread=data.draw(st.integers(0, 2)), gap_rules=rules, relaxed_end=relaxed)
    errors = np.triu(np.random.default_rng(seed).uniform(0.1, 1, (steps, steps)))
    try:
        path = rule.solve(errors, budget)
    except InfeasibleBudgetError:
        return
    gaps, centre = np.diff(path), round(steps / budget)
    low, high = max(1, centre - rule.spread), min(10, centre + rule.spread)
    assert (path[0], len(path)) == (0, budget)
    assert (steps - 1 - path[-1] < low) if relaxed else path[-1] == steps - 1
    for before, gap in zip(path[:-1], gaps, strict=True):
        assert gap in {1, 3} if any(before in where for where in rules) else low <= gap <= high


def test_the_cem_rule_cannot_spend_seven_of_fifty_steps():
    with pytest.raises(InfeasibleBudgetError, match="budget=7 on 50 steps with gaps of 6 to 8 and both ends full"):
        solve_cem(cem_costs(np.triu(np.ones((50, 50)))), 7)


def test_gap_rules_replace_the_window_where_they_apply():
    random = np.random.default_rng(3)
    rules = {range(8): {1, 2}, range(8, 14): {5}, range(12, 16): {2, 3}}
    solved = 0
    for _ in range(40):
        steps = int(random.integers(15, 30))
        budget = int(random.integers(4, 12))
        costs = cem_costs(np.triu(random.uniform(0, 1, (steps, steps))))
        expected = naive_solve(costs.tolist(), budget, rules)
        if expected is None:
            continue
        solved += 1
        full_steps, total = solve_cem(costs, budget, gap_rules=rules)
        assert (full_steps, total) == expected
        for before, landed in itertools.pairwise(full_steps):
            assert before >= 8 or landed - before in (1, 2)
            assert before not in range(8, 14) or landed - before == 5  # the first rule that holds the step
    assert solved >= 5


def test_a_wider_spread_allows_wider_gaps():
    full_steps, total = solve_cem(np.ones((50, 50)), 7, spread=2)
    assert (full_steps[0], full_steps[-1], len(full_steps), total) == (0, 49, 7, 6.0)
    assert set(np.diff(full_steps)) <= {5, 6, 7, 8, 9}


def test_the_cem_schedule_of_a_prior_keeps_both_ends():
    prior = prior_of(*trajectories(20))
    for budget in (5, 7, 10, 20):
        full_steps = plan_schedule(prior, budget, solver="cem").full_steps
        assert (full_steps[0], full_steps[-1], len(full_steps)) == (0, 19, budget)


def test_a_plan_takes_the_weighter_and_the_gap_rules_asked_for():
    prior = prior_of(*trajectories(20))
    rule = CemRule(weighter="none", gap_rules={range(2): {1}})
    plan = plan_schedule(prior, 9, solver="cem", cem=rule, predictor="reuse")
    assert plan.full_steps == rule.solve(prior.cosine_distances(), 9)
    assert plan.full_steps[:3] == (0, 1, 2)
    assert plan.full_steps != plan_schedule(prior, 9, solver="cem").full_steps


def test_planning_loads_no_torch():
    code = "import sys, cemq.schedule; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
