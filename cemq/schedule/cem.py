"""CEM's published rule (arXiv:2512.23258, dynamic caching strategy), as its released solvers compute it.

The edge that lands on step ``s`` after a gap ``g`` costs ``cost[g - 1][s]``, where ``cost[C]`` is the running sum of
the error of a C steps old feature, weighted by the interval. First and last step are full and count in the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cemq.errors import InfeasibleBudgetError, InputError, choose

WEIGHTERS: dict[str, Callable[[int], float]] = {
    "none": lambda c: 1.0,
    "linear": lambda c: float(c),
    "quadratic": lambda c: float(c * c),
}
MAX_GAP = 10

GapRules = Mapping[range, Collection[int]]


def published_errors(rows: Mapping[str, Sequence[float]]) -> np.ndarray:
    """The table [cache_interval, step_index] of a prior file of CEM's release, ``{"C=1": [...], "C=2": [...], ...}``.

    A feature cannot be ``C`` steps old in the first ``C`` steps, and the release stores 0 there. Its DiT prior counts
    timesteps down, so that these zeros end each row: it is turned into execution order.

    Raises:
        InputError: Intervals are missing, or the zeros are at neither end.
    """
    names = [f"C={interval}" for interval in range(1, len(rows) + 1)]
    if set(rows) != set(names) or len({len(row) for row in rows.values()}) != 1:
        raise InputError(f"CEM prior: expected rows of one length for C=1, C=2, ..., found {', '.join(map(str, rows))}")
    table = np.array([np.zeros(len(rows["C=1"])), *(np.asarray(rows[name], dtype=float) for name in names)])
    for ordered in (table, table[:, ::-1].copy()):
        if not any(ordered[interval, :interval].any() for interval in range(len(table))):
            return ordered
    raise InputError("CEM prior: the first C entries of row C, or the last, should be 0 and are not")


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


@dataclass(frozen=True, kw_only=True)
class CemRule:
    """The choices CEM's release leaves open; the defaults are those it runs DiT and FLUX with.

    ``weighter`` and ``cumulative`` say how errors become costs (`cem_costs`). Gaps lie within ``spread`` of the mean
    gap (DCS_interval in the release); ``gap_rules``, ``{range(2): {1, 2}}``, are the only gaps allowed to begin at
    steps in a range, the first range that holds the step. With ``relaxed_end`` the last step need not be full
    (`solve_relaxed_cem`); the release then charges errors as they are, ``cumulative=False``.
    """

    weighter: str = "quadratic"
    cumulative: bool = True
    spread: int = 1
    gap_rules: GapRules = field(default_factory=dict)
    relaxed_end: bool = False

    def solve(self, errors: np.ndarray, budget: int) -> tuple[int, ...]:
        """The full-compute steps, from errors [cache_interval, step_index].

        Raises:
            InfeasibleBudgetError: No path of ``budget`` steps keeps the rule.
        """
        costs = cem_costs(errors, self.weighter, self.cumulative)
        if self.relaxed_end:
            return solve_relaxed_cem(costs, budget, self.spread)[0]
        return solve_cem(costs, budget, self.spread, self.gap_rules)[0]


CEM_RULES = {"cem": CemRule(), "cem-relaxed": CemRule(cumulative=False, relaxed_end=True)}  # by solver


def solve_cem(
    costs: np.ndarray, budget: int, spread: int = 1, gap_rules: GapRules | None = None
) -> tuple[tuple[int, ...], float]:
    """CEM's dynamic program. Ties go to the smaller gap, with gap rules to the larger one, as in the release.

    Args:
        costs: [cache_interval, step_index], from `cem_costs`.
        spread: See `CemRule`.
        gap_rules: See `CemRule`.

    Raises:
        InfeasibleBudgetError: No path of ``budget`` steps has gaps in the window.
    """
    steps = costs.shape[1]
    low, high = _window(costs, budget, spread)
    window, rules = range(low, high + 1), gap_rules or {}
    allowed = [next((gaps for where, gaps in rules.items() if step in where), window) for step in range(steps)]
    best, came = _paths(costs, budget, allowed, larger_first=bool(rules))
    if not np.isfinite(best[-1, budget]):
        raise InfeasibleBudgetError(
            f"the CEM rule cannot spend budget={budget} on {steps} steps with gaps of {low} to {high} and both ends "
            "full: choose another budget or --solver segment"
        )
    return _trace(came, steps - 1, budget), float(best[-1, budget])


def solve_relaxed_cem(costs: np.ndarray, budget: int, spread: int = 1) -> tuple[tuple[int, ...], float]:
    """The variant released for few full steps: fewer steps than the smallest gap may follow the last full one, and are
    charged as one more gap. Ties go to the smaller gap and the later end.

    Raises:
        InfeasibleBudgetError: No path of ``budget`` steps has gaps in the window.
    """
    steps = costs.shape[1]
    low, high = _window(costs, budget, spread)
    best, came = _paths(costs, budget, [range(low, high + 1)] * steps)
    tails = np.arange(min(low, steps, len(costs) + 1))  # steps after the last full one
    totals = best[steps - 1 - tails, budget] + costs[np.maximum(tails - 1, 0), steps - 1]
    if not np.isfinite(totals).any():
        raise InfeasibleBudgetError(
            f"the relaxed CEM rule cannot spend budget={budget} on {steps} steps with gaps of {low} to {high}: "
            "choose another budget or --solver segment"
        )
    tail = int(totals.argmin())
    return _trace(came, steps - 1 - tail, budget), float(totals[tail])


def _window(costs: np.ndarray, budget: int, spread: int) -> tuple[int, int]:
    centre = round(costs.shape[1] / budget)
    return max(1, centre - spread), min(MAX_GAP, centre + spread, len(costs))


def _paths(
    costs: np.ndarray, budget: int, allowed: Sequence[Collection[int]], *, larger_first: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The least cost of reaching each step with each number of full steps, and the last gap of that path."""
    steps = costs.shape[1]
    best = np.full((steps, budget + 1), np.inf)
    came = np.zeros((steps, budget + 1), dtype=np.int64)
    best[0, 1] = 0.0
    for step in range(1, steps):
        gaps = range(1, min(MAX_GAP, step, len(costs)) + 1)
        for gap in reversed(gaps) if larger_first else gaps:
            if gap not in allowed[step - gap]:
                continue
            totals = best[step - gap, 1:-1] + costs[gap - 1, step]
            better = totals < best[step, 2:]
            best[step, 2:][better] = totals[better]
            came[step, 2:][better] = gap
    return best, came


def _trace(came: np.ndarray, step: int, budget: int) -> tuple[int, ...]:
    path = [step]
    for used in range(budget, 1, -1):
        step -= int(came[step, used])
        path.append(step)
    return tuple(reversed(path))
