"""Published rules for full-compute steps, against all schedules there are on small cases and against hand work."""

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.schedules import all_schedules

from cemq.errors import InfeasibleBudgetError, InputError
from cemq.predict.predictors import serving_matrix
from cemq.schedule import CacheSchedule
from cemq.schedule.budcache import budcache_steps
from cemq.schedule.cachequant import cachequant_steps, group_lengths, l1_distances
from cemq.schedule.dpcache import dpcache_steps, extrapolation_costs
from cemq.schedule.fixed import spectrum_steps
from cemq.schedule.meancache import MEANS, plan_meancache, velocity_errors
from cemq.schedule.procache import nonincreasing_gaps, procache_steps

OUT_OF_RANGE = "is out of range for 8 steps: choose 2..8"
CASES = st.tuples(st.integers(4, 30), st.integers(0, 10**6))


def features(steps, seed=0, samples=2, elements=6):
    random = np.random.default_rng(seed)
    return np.cumsum(random.normal(size=(samples, steps, elements)), axis=1)


def grams(x):
    return np.einsum("sin,sjn->sij", x, x) / x.shape[2]


def is_schedule(path, steps, budget):
    return path[0] == 0 and len(path) == budget and list(path) == sorted(set(path)) and path[-1] < steps


# --- CacheQuant


@pytest.mark.parametrize(("steps", "seed"), [(7, 0), (8, 1), (9, 2)])
def test_cachequant_finds_the_cheapest_of_all_groupings_of_the_lengths_allowed(steps, seed):
    distances = np.random.default_rng(seed).uniform(size=(steps, steps))
    for budget in range(2, steps + 1):
        shortest, longest = group_lengths(steps, budget)

        def cost(path, steps=steps):
            return sum(distances[a, a:b].sum() for a, b in itertools.pairwise([*path, steps]))

        allowed = [
            path
            for path in all_schedules(steps, budget)
            if all(shortest <= gap <= longest for gap in np.diff([*path, steps]))
        ]
        found = cachequant_steps(distances, budget)
        assert found in allowed
        assert cost(found) == pytest.approx(min(map(cost, allowed)))


def test_cachequant_groups_what_is_alike():
    x = np.array([0.0, 0, 0, 5, 5, 9, 9, 9]).reshape(1, 8, 1)
    distances = l1_distances(x)
    assert distances[0].tolist() == [0, 0, 0, 5, 5, 9, 9, 9]
    assert cachequant_steps(distances, 3) == (0, 3, 5)
    assert group_lengths(8, 3) == (2, 6)


@given(case=CASES, data=st.data())
@settings(max_examples=40, deadline=None)
def test_cachequant_spends_every_budget_with_groups_of_the_lengths_allowed(case, data):
    steps, seed = case
    budget = data.draw(st.integers(2, steps))
    path = cachequant_steps(l1_distances(features(steps, seed)), budget)
    shortest, longest = group_lengths(steps, budget)
    gaps = np.diff([*path, steps])
    assert is_schedule(path, steps, budget)
    assert set(gaps) <= set(range(shortest, longest + 1))


def test_cachequant_refuses_what_it_cannot_spend():
    for budget in (1, 9):
        with pytest.raises(InfeasibleBudgetError, match=OUT_OF_RANGE):
            cachequant_steps(np.ones((8, 8)), budget)
    with pytest.raises(InfeasibleBudgetError, match=r"cannot part 8 steps into budget=3 groups of 2 to 6 with finite"):
        cachequant_steps(np.full((8, 8), np.inf), 3)


# --- DPCache


def extrapolated_cost(x, path, order=1):
    """Step by step, from the features themselves."""
    total, steps = 0.0, x.shape[1]
    for i, j, k in zip(path, path[1:], [*path[2:], steps], strict=False):
        for step in range(j + 1, k):
            guess = x[:, j] + order * (step - j) * (x[:, j] - x[:, i]) / (j - i)
            total += np.abs(guess - x[:, step]).mean()
    return total


@pytest.mark.parametrize("last_full", [False, True])
@pytest.mark.parametrize(("steps", "max_gap", "order"), [(8, 8, 1), (9, 3, 1), (9, 4, 0)])
def test_dpcache_finds_the_cheapest_of_all_schedules(steps, max_gap, order, last_full):
    x = features(steps, seed=steps)
    costs = extrapolation_costs(x, order)
    for budget in range(4, steps + 1):
        ends = [
            path
            for path in all_schedules(steps, budget)
            if path[:3] == (0, 1, 2) and (path[-1] == steps - 1 or not last_full)
        ]
        longest = max(max_gap, min(max(np.diff([*path, steps])) for path in ends))
        allowed = [path for path in ends if max(np.diff([*path, steps])) <= longest]
        found, total = dpcache_steps(costs, budget, max_gap=max_gap, last_full=last_full)
        assert found in allowed
        assert total == pytest.approx(extrapolated_cost(x, found, order))
        assert total == pytest.approx(min(extrapolated_cost(x, path, order) for path in allowed))


def test_dpcache_keeps_both_latest_steps_where_one_predecessor_misses_the_best_path():
    """The cheapest way to step 4 goes on dearly: (0, 1, 3, 4) is found only if it is kept beside (0, 1, 2, 4)."""
    costs = np.full((6, 6, 7), np.inf)
    for i, j, k, cost in [(0, 1, 2, 0), (0, 1, 3, 1), (1, 2, 4, 0), (1, 3, 4, 0), (2, 4, 6, 9), (3, 4, 6, 1)]:
        costs[i, j, k] = cost
    assert dpcache_steps(costs, 4, first_steps=2) == ((0, 1, 3, 4), 2.0)


def test_costs_of_extrapolation_are_those_done_in_the_head():
    costs = extrapolation_costs(np.array([0.0, 1, 4, 9]).reshape(1, 4, 1))
    assert costs[0, 1].tolist()[2:] == [0, 2, 2 + 6]  # 2 for 4, 3 for 9
    assert costs[0, 2, 3:].tolist() == [0, 3]  # 6 for 9
    known = [(i, j, k) for i, j, k in np.argwhere(np.isfinite(costs)).tolist() if i < j < k]
    assert len(known) == np.isfinite(costs).sum() == 10
    assert extrapolation_costs(np.array([0.0, 1, 4, 9]).reshape(1, 4, 1), order=0)[0, 1, 4] == 3 + 8
    with pytest.raises(InputError, match="DPCache order 2: two full-compute steps say order 0 or 1"):
        extrapolation_costs(features(4), 2)


def test_dpcache_skips_what_lies_on_a_line():
    x = np.array([0.0, 1, 2, 3, 4, 5, 9, 4, 2, 0]).reshape(1, 10, 1)
    assert dpcache_steps(extrapolation_costs(x), 5) == (
        (0, 1, 2, 7, 8),
        3,
    )  # but for 6, which is guessed to be 6 and is 9


@given(case=CASES, last_full=st.booleans(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_dpcache_spends_every_budget_with_the_first_steps_full(case, last_full, data):
    steps, seed = case
    budget = data.draw(st.integers(min(3 + last_full, steps), steps))
    path, total = dpcache_steps(extrapolation_costs(features(steps, seed)), budget, last_full=last_full)
    assert is_schedule(path, steps, budget)
    assert path[:3] == (0, 1, 2)
    assert not last_full or path[-1] == steps - 1
    assert total >= 0
    even = -(-(steps - 2 - last_full) // max(budget - 2 - last_full, 1))
    assert np.diff([*path, steps]).max() <= max(8, even)


def test_dpcache_refuses_what_it_cannot_spend():
    costs = extrapolation_costs(features(8))
    with pytest.raises(InfeasibleBudgetError, match=OUT_OF_RANGE):
        dpcache_steps(costs, 9)
    with pytest.raises(InfeasibleBudgetError, match=r"DPCache computes 3 of 8 steps in full anyway: choose 3\.\.8"):
        dpcache_steps(costs, 2)
    with pytest.raises(InfeasibleBudgetError, match=r"DPCache computes 4 of 8 steps in full anyway: choose 4\.\.8"):
        dpcache_steps(costs, 3, last_full=True)
    with pytest.raises(InfeasibleBudgetError, match="DPCache has no path of budget=4 steps of 8 with finite costs"):
        dpcache_steps(np.full((8, 8, 9), np.nan), 4)
    with pytest.raises(InputError, match="first_steps=1: DPCache extrapolates from two"):
        dpcache_steps(costs, 4, first_steps=1)


# --- MeanCache


def average_errors(x, start, end, name):
    """What the average over a gap is off by, by the served steps themselves; a run in full up to its start."""
    served = serving_matrix(x.shape[1], (*range(start + 1), *range(end, x.shape[1])), (name,) * (start + 1 + 99))
    off = (served[start:end] - np.eye(x.shape[1])[start:end]).mean(0)
    return np.mean([np.sqrt(np.mean((off @ each) ** 2)) for each in x])


@cache
def mean_case(steps):
    x = features(steps, seed=steps)
    gaps = itertools.combinations(range(steps), 2)
    costs = {gap: [average_errors(x, *gap, name) for name in MEANS] for gap in gaps}
    return velocity_errors(grams(x)), costs


@pytest.mark.parametrize("steps", [7, 9])
def test_errors_of_average_velocity_are_those_of_the_steps_that_are_served(steps):
    errors, costs = mean_case(steps)
    for (start, end), expected in costs.items():
        assert errors[:, start, end] == pytest.approx(expected, abs=1e-7)
    assert np.isfinite(errors).sum() == len(MEANS) * len(costs)


@pytest.mark.parametrize("gamma", [1.0, 4.0])
@pytest.mark.parametrize("steps", [7, 9])
def test_meancache_finds_the_path_of_least_peaks_of_all(steps, gamma):
    errors, costs = mean_case(steps)

    def total(path):
        return sum(min(costs[gap]) ** gamma for gap in itertools.pairwise(path))

    for budget in range(2, steps + 1):
        paths = [p for count in range(2, budget + 1) for p in all_schedules(steps, count) if p[-1] == steps - 1]
        plan = plan_meancache(errors, budget, gamma=gamma)
        assert plan.full_steps in paths
        assert total(plan.full_steps) == pytest.approx(min(map(total, paths)), abs=1e-9)
        for gap, name in zip(itertools.pairwise(plan.full_steps), plan.predictors, strict=False):
            assert min(costs[gap]) == pytest.approx(costs[gap][MEANS.index(name)], abs=1e-7)


def test_meancache_needs_no_more_steps_than_pay():
    errors = np.where(np.triu(np.ones((5, 8, 8)), 1) > 0, 0.0, np.inf)  # nothing ever changes
    assert plan_meancache(errors, 6) == CacheSchedule(
        num_steps=8, full_steps=(0, 7), predictor="reuse", solver="meancache"
    )


def test_longer_steps_count_more_in_an_average():
    gram = np.diag([0.0, 0, 1, 0])  # step 2 alone is served wrongly: by nothing, and not by 1
    errors = velocity_errors(gram, np.array([1.0, 1, 2, 1]))
    assert errors[0, 0, 2:].tolist() == [0, 0.5]
    assert errors[0, 1, 3] == pytest.approx(2 / 3)


@given(case=CASES, data=st.data())
@settings(max_examples=25, deadline=None)
def test_meancache_computes_both_ends_and_no_more_than_its_budget(case, data):
    steps, seed = case
    budget = data.draw(st.integers(2, steps))
    plan = plan_meancache(velocity_errors(grams(features(steps, seed))), budget)
    assert is_schedule(plan.full_steps, steps, plan.budget)
    assert plan.budget <= budget
    assert plan.full_steps[-1] == steps - 1
    assert CacheSchedule.from_dict(plan.to_dict()) == plan


def test_meancache_refuses_what_it_cannot_spend():
    with pytest.raises(InfeasibleBudgetError, match=OUT_OF_RANGE):
        plan_meancache(np.ones((5, 8, 8)), 1)


# --- BudCache


def unevenness(path, steps=12):
    return float(np.square(np.diff([*path, steps])).sum()) / 100


@given(case=st.tuples(st.integers(4, 20), st.integers(0, 999)), data=st.data())
@settings(max_examples=20, deadline=None)
def test_budcache_evaluates_schedules_of_its_budget_once_each_within_its_limit(case, data):
    steps, seed = case
    budget, most = data.draw(st.integers(2, steps)), data.draw(st.sampled_from([1, 7, 40, None]))
    seen = {}

    def loss(path):
        assert path not in seen
        assert is_schedule(path, steps, budget)
        assert path[: max(1, budget // 4)] == tuple(range(max(1, budget // 4)))
        seen[path] = unevenness(path, steps)
        return seen[path]

    found, least = budcache_steps(loss, steps, budget, seed=seed, annealing_steps=30, evaluations=most)
    assert seen[found] == least == min(seen.values())
    assert most is None or len(seen) <= most


def test_budcache_ends_where_no_near_move_is_better():
    found, least = budcache_steps(unevenness, 12, 4, seed=1)
    assert (found, least) == ((0, 3, 6, 9), 0.36)
    climbed, _ = budcache_steps(unevenness, 12, 4, annealing_steps=0)
    assert unevenness(climbed) <= 0.38
    _, unclimbed = budcache_steps(unevenness, 12, 4, annealing_steps=0, sweeps=0)
    assert unclimbed > unevenness(climbed)


def test_budcache_of_one_seed_is_one_search():
    def losses(seed):
        seen = []
        found = budcache_steps(lambda path: seen.append(path) or unevenness(path), 12, 5, seed=seed)
        return found, seen

    assert losses(3) == losses(3)
    assert losses(3)[1] != losses(4)[1]


def test_budcache_takes_a_loss_that_is_no_number_for_the_worst():
    found, least = budcache_steps(lambda path: 1.0 if path == (0, 2, 4) else np.nan, 6, 3)
    assert (found, least) == ((0, 2, 4), 1.0)


def test_budcache_refuses_what_it_cannot_spend():
    with pytest.raises(InfeasibleBudgetError, match=OUT_OF_RANGE):
        budcache_steps(unevenness, 8, 9)


# --- ProCache


@given(case=st.tuples(st.integers(4, 60), st.integers(0, 999)), data=st.data())
@settings(max_examples=30, deadline=None)
def test_procache_draws_gaps_that_never_grow(case, data):
    steps, seed = case
    budget = data.draw(st.integers(max(2, -(-steps // 5)), steps // 2))
    drawn = nonincreasing_gaps(steps, budget, seed=seed)
    assert 1 <= len(drawn) == len(set(drawn)) <= 5
    for gaps in drawn:
        assert (len(gaps), sum(gaps)) == (budget, steps)
        assert list(gaps) == sorted(gaps, reverse=True)
        assert set(gaps) <= {2, 3, 4, 5}
    assert drawn == nonincreasing_gaps(steps, budget, seed=seed)


def test_procache_takes_the_best_of_what_it_drew():
    seen = {}

    def loss(path):
        assert is_schedule(path, 50, 13)
        return seen.setdefault(path, float(path[6]))

    found, least = procache_steps(loss, 50, 13, seed=2)
    assert len(seen) == 5
    assert least == seen[found] == min(seen.values())


def test_procache_with_one_way_to_spend_its_budget_takes_that():
    assert procache_steps(len, 8, 4) == ((0, 2, 4, 6), 4.0)
    assert nonincreasing_gaps(10, 2) == [(5, 5)]


@pytest.mark.parametrize("budget", [2, 7])
def test_procache_refuses_what_it_cannot_spend(budget):
    with pytest.raises(InfeasibleBudgetError, match=rf"budget={budget} on 12 steps: choose 3\.\.6"):
        procache_steps(len, 12, budget)


# --- published as they are


def test_gaps_of_spectrum_grow():
    full = spectrum_steps(50)
    assert full == (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46)  # 3.6x
    assert len(spectrum_steps(50, flex=3.0)) == 10  # 5x
    assert spectrum_steps(3) == (0, 1, 2)
    with pytest.raises(InputError, match="warmup=0"):
        spectrum_steps(50, warmup=0)
