import functools
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cemq.errors import InfeasibleBudgetError, InputError
from cemq.predict import PREDICTORS, get_predictor
from cemq.prior import VIEWS, ErrorPrior
from cemq.schedule import (
    SOLVERS,
    CacheSchedule,
    cem_costs,
    parse_budget,
    plan_schedule,
    segment_costs,
    solve_cem,
    solve_segments,
    uniform_steps,
)

INF = math.inf


def trajectories(steps, seed=0, elements=5, noise=0.3):
    random = np.random.default_rng(seed)
    v = 3 + np.cumsum(random.normal(size=(steps, elements)), axis=0)
    return v + noise * random.normal(size=v.shape), v, random.uniform(0.5, 2.0, steps)


def prior_of(q, v, step_sizes):
    elements = q.shape[1]
    return ErrorPrior(qq=q @ q.T / elements, qv=q @ v.T / elements, vv=v @ v.T / elements, step_sizes=step_sizes)


def totals_by_budget(prior, predictor="taylor1", view="combined", gamma=2.0):
    costs = segment_costs(prior.view(view), prior.step_sizes, get_predictor(predictor), gamma, prior.num_steps)
    return [solve_segments(costs, budget)[1] for budget in range(2, prior.num_steps + 1)]


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
def brute_force_case(steps, view, predictor):
    """Norm of the summed error vector of every segment (older full step or None, this full step, end)."""
    q, v, weights = trajectories(steps)
    x, y = {"combined": (q, v), "cache": (v, v), "self": (q, q)}[view]
    norms = {}
    for start in range(steps):
        for older in [None] if start == 0 else range(start):
            summed = np.zeros(x.shape[1])
            for step in range(start, steps):
                served = x[start]
                if predictor == "taylor1" and older is not None:
                    served = x[start] + (step - start) / (start - older) * (x[start] - x[older])
                summed = summed + weights[step] * (served - y[step])
                norms[older, start, step + 1] = math.sqrt(np.mean(summed**2))
    return prior_of(q, v, weights), norms


def brute_force_total(norms, steps, full_steps, gamma):
    bounds = [None, *full_steps, steps]
    return sum(norms[bounds[i - 1], bounds[i], bounds[i + 1]] ** gamma for i in range(1, len(bounds) - 1))


@pytest.mark.parametrize("gamma", [1, 2, 4])
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("view", VIEWS)
def test_the_segment_solver_finds_the_best_of_all_schedules(view, predictor, gamma):
    steps = 7
    prior, norms = brute_force_case(steps, view, predictor)
    costs = segment_costs(prior.view(view), prior.step_sizes, get_predictor(predictor), gamma, steps)
    for budget in range(1, steps + 1):
        schedules = [(0, *rest) for rest in itertools.combinations(range(1, steps), budget - 1)]
        least = min(brute_force_total(norms, steps, schedule, gamma) for schedule in schedules)
        found, total = solve_segments(costs, budget)
        assert found in schedules
        assert total == pytest.approx(least, rel=1e-6, abs=1e-6)
        assert brute_force_total(norms, steps, found, gamma) == pytest.approx(least, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("max_gap", [2, 3])
def test_with_a_longest_gap_the_segment_solver_finds_the_best_of_what_is_left(max_gap):
    steps = 7
    prior, norms = brute_force_case(steps, "combined", "taylor1")
    for budget in range(2, steps + 1):
        schedules = [(0, *rest) for rest in itertools.combinations(range(1, steps), budget - 1)]
        schedules = [s for s in schedules if np.diff([*s, steps]).max() <= max_gap]
        if not schedules:
            with pytest.raises(InfeasibleBudgetError, match=f"gaps of at most {max_gap}"):
                plan_schedule(prior, budget, max_gap=max_gap)
            continue
        found = plan_schedule(prior, budget, max_gap=max_gap).full_steps
        assert found in schedules
        least = min(brute_force_total(norms, steps, schedule, 2) for schedule in schedules)
        assert brute_force_total(norms, steps, found, 2) == pytest.approx(least, rel=1e-6)


@given(steps=st.integers(2, 12), seed=st.integers(0, 10**6), data=st.data())
@settings(max_examples=25, deadline=None)
def test_every_budget_is_feasible_and_spent(steps, seed, data):
    prior = prior_of(*trajectories(steps, seed))
    options = {"view": data.draw(st.sampled_from(VIEWS)), "predictor": data.draw(st.sampled_from(list(PREDICTORS)))}
    for budget in range(2, steps + 1):
        schedule = plan_schedule(prior, budget, **options)
        assert schedule.budget == budget
        assert schedule.num_steps == steps
    assert schedule.full_steps == tuple(range(steps))


@given(steps=st.integers(2, 12), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_a_larger_budget_never_predicts_more_error_where_predictions_drift_one_way(steps, seed):
    random = np.random.default_rng(seed)
    v = np.cumsum(random.uniform(0, 1, (steps, 5)), axis=0)
    totals = totals_by_budget(prior_of(v, v, random.uniform(0.5, 2, steps)), "reuse")
    assert all(more <= less * (1 + 1e-6) + 1e-9 for less, more in itertools.pairwise(totals))


def test_a_larger_budget_can_predict_more_error_where_signed_errors_cancel():
    # from step 1 on, serving 0 errs by 0, -1 and +1: nothing in sum, so a third full step can only do harm
    v = np.array([[100.0], [0.0], [1.0], [-1.0]])
    assert totals_by_budget(prior_of(v, v, np.ones(4)), "reuse") == pytest.approx([0.0, 1.0, 0.0], abs=1e-9)


def test_a_longest_gap_too_short_for_the_budget_names_the_budgets_that_fit():
    prior = prior_of(*trajectories(11))
    with pytest.raises(InfeasibleBudgetError, match=r"cannot cover 11 steps with gaps of at most 3: choose 4\.\.11"):
        plan_schedule(prior, 3, max_gap=3)
    assert plan_schedule(prior, 4, max_gap=3).budget == 4


def test_a_schedule_records_how_it_was_planned():
    for solver in SOLVERS:
        schedule = plan_schedule(prior_of(*trajectories(12)), "3x", solver=solver, predictor="reuse")
        assert (schedule.solver, schedule.predictor, schedule.budget) == (solver, "reuse", 4)


def test_an_unknown_solver_names_the_nearest_one():
    with pytest.raises(InputError, match=r"unknown solver 'segments'.*did you mean 'segment'"):
        plan_schedule(prior_of(*trajectories(6)), 3, solver="segments")


def test_planning_for_quantization_noise_changes_the_schedule():
    q, v, weights = trajectories(10)
    q[4] += 50  # the quantized model is bad at one step, the cache alone cannot know
    prior = prior_of(q, v, weights)
    assert 4 not in plan_schedule(prior, 4, predictor="reuse", view="combined").full_steps
    assert plan_schedule(prior, 4, view="cache") == plan_schedule(prior_of(v, v, weights), 4, view="combined")


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
    for step in range(1, steps):
        gaps = range(max(1, centre - 1), min(10, centre + 1) + 1)
        for (first, last), allowed in (rules or {}).items():
            if first <= step <= last:
                gaps = sorted(allowed)
        for used in range(2, budget + 1):
            for gap in gaps:
                if gap > step:
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


GOLDEN = {
    (20, 5): ((0, 5, 10, 15, 19), 182.6875),
    (20, 8): ((0, 3, 6, 9, 12, 15, 17, 19), 68.125),
    (50, 10): ((0, 6, 12, 18, 24, 30, 35, 40, 45, 49), 1519.0625),
    (50, 17): ((0, 4, 8, 12, 16, 20, 23, 26, 29, 32, 35, 38, 41, 43, 45, 47, 49), 546.6875),
}


@pytest.mark.parametrize("key", GOLDEN)
def test_the_cem_solver_gives_the_known_schedules(key):
    steps, budget = key
    c, s = np.mgrid[:steps, :steps]
    errors = np.where(s >= c, ((7 * c + 5 * s) % 11 + 1) / 16, 0.0)  # exact in binary
    assert solve_cem(cem_costs(errors), budget) == GOLDEN[key]


def test_the_cem_rule_cannot_spend_seven_of_fifty_steps():
    with pytest.raises(InfeasibleBudgetError, match="budget=7 on 50 steps with gaps of 6 to 8 and both ends full"):
        solve_cem(cem_costs(np.triu(np.ones((50, 50)))), 7)


def test_gap_rules_replace_the_window_where_they_apply():
    random = np.random.default_rng(3)
    rules = {(1, 8): {1, 2}, (9, 14): {5}, (12, 13): {2, 3}}
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
            assert landed > 8 or landed - before in (1, 2)
            assert landed not in (9, 10, 11, 14) or landed - before == 5
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


def test_planning_loads_no_torch():
    code = "import sys, cemq.schedule, cemq.prior; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
