"""CEM's published rule (arXiv:2512.23258, dynamic caching strategy), as its released solver computes it.

The edge that lands on step ``s`` after a gap ``g`` costs ``cost[g - 1][s]``, where ``cost[C]`` is the running sum of
the error of a C steps old feature, weighted by the interval. First and last step are full and count in the budget.
"""

from __future__ import annotations

import numpy as np

from cemq.errors import InfeasibleBudgetError, choose

WEIGHTERS = {"none": lambda c: 1.0, "linear": lambda c: float(c), "quadratic": lambda c: float(c * c)}
MAX_GAP = 10


def cem_costs(errors: np.ndarray, weighter: str = "quadratic", cumulative: bool = True) -> np.ndarray:
    """Costs [cache_interval, step_index] from errors of the same shape, whose first C entries of row C are 0.

    Zeros become infinite, except in row 0, which is free: a step that follows a full step reuses nothing.
    """
    weigh = WEIGHTERS[choose("CEM weighter", weighter, WEIGHTERS)]
    running = np.cumsum(errors, axis=1) if cumulative else errors.astype(float)
    costs = running * np.array([weigh(c) for c in range(len(errors))])[:, None]
    costs[costs == 0] = np.inf
    costs[0] = 0.0
    return costs


def solve_cem(
    costs: np.ndarray, budget: int, spread: int = 1, gap_rules: dict[tuple[int, int], set[int]] | None = None
) -> tuple[tuple[int, ...], float]:
    """CEM's dynamic program; ties go to the smaller gap.

    Args:
        costs: [cache_interval, step_index], from `cem_costs`.
        spread: Gaps lie within this of ``round(num_steps / budget)`` (DCS_interval in the release).
        gap_rules: ``{(first, last): gaps}``: the only gaps allowed where the full step landed on lies in that range.

    Raises:
        InfeasibleBudgetError: No path of ``budget`` steps has gaps in the window.
    """
    steps = costs.shape[1]
    centre = round(steps / budget)
    low, high = max(1, centre - spread), min(MAX_GAP, centre + spread, len(costs))
    best = np.full((steps, budget + 1), np.inf)
    came = np.zeros((steps, budget + 1), dtype=np.int64)
    best[0, 1] = 0.0
    for step in range(1, steps):
        allowed = range(low, high + 1)
        for (first, last), gaps in (gap_rules or {}).items():
            if first <= step <= last:
                allowed = sorted(gaps)
        for gap in allowed:
            if gap > step:
                break
            totals = best[step - gap, 1:-1] + costs[gap - 1, step]
            better = totals < best[step, 2:]
            best[step, 2:][better] = totals[better]
            came[step, 2:][better] = gap
    if not np.isfinite(best[-1, budget]):
        raise InfeasibleBudgetError(
            f"the CEM rule cannot spend budget={budget} on {steps} steps with gaps of {low} to {high} and both ends "
            "full: choose another budget or --solver segment"
        )
    path, step = [steps - 1], steps - 1
    for used in range(budget, 1, -1):
        step -= came[step, used]
        path.append(int(step))
    return tuple(reversed(path)), float(best[-1, budget])


def solve_relaxed_cem(costs: np.ndarray, budget: int, spread: int = 1) -> tuple[tuple[int, ...], float]:
    """The variant released for few full steps: the last full step may lie anywhere, and what follows it is charged as
    one more gap. Ties go to the later end.

    Raises:
        InfeasibleBudgetError: No path of ``budget`` steps has gaps in the window.
    """
    steps = costs.shape[1]
    if budget == 1:
        return (0,), float(costs[min(steps, len(costs)) - 1, steps - 1])
    centre = round(steps / budget)
    low, high = max(1, centre - spread), max(1, centre + spread)
    best = np.full((steps, budget + 1), np.inf)
    came = np.zeros((steps, budget + 1), dtype=np.int64)
    best[0, 1] = 0.0
    for step in range(1, steps):
        for gap in range(low, min(high, step, len(costs)) + 1):
            totals = best[step - gap, 1:-1] + costs[gap - 1, step]
            better = totals < best[step, 2:]
            best[step, 2:][better] = totals[better]
            came[step, 2:][better] = gap
    tails = np.array([costs[min(steps - 1 - end, len(costs) - 1), steps - 1] for end in range(steps)])
    totals = best[:, budget] + tails
    if not np.isfinite(totals).any():
        raise InfeasibleBudgetError(
            f"the relaxed CEM rule cannot spend budget={budget} on {steps} steps with gaps of {low} to {high}: "
            "choose another budget or --solver segment"
        )
    end = int(steps - 1 - totals[::-1].argmin())
    path, step = [end], end
    for used in range(budget, 1, -1):
        step -= came[step, used]
        path.append(int(step))
    return tuple(reversed(path)), float(totals[end])
