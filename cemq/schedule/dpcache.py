"""DPCache's planned full-compute steps (arXiv:2602.22654), solved exactly.

Skipped steps are extrapolated from the two latest full-compute steps ``i < j`` up to the next one ``k``, so that a path
costs the sum of ``C[i, j, k]``. The state of the program is the latest two steps, as in SGLang; the paper keeps one
predecessor of each step, which can miss the best path.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from cemq.errors import InfeasibleBudgetError, InputError
from cemq.schedule.solvers import parse_budget

FIRST_STEPS = 3  # full from the start on, in the paper and in SGLang
MAX_GAP = 8  # what SGLang calibrates with


def extrapolation_costs(features: np.ndarray, order: int = 1) -> np.ndarray:
    """``C[i, j, k]``, (steps, steps, steps + 1): the mean L1 errors of the steps between ``j`` and ``k``, added up.

    ``k == steps`` is the end of the run. NaN where not ``i < j < k``.

    Args:
        features: What is extrapolated, of runs in full, (samples, steps, elements).
        order: 1 continues the line through both full-compute steps, 0 reuses the later.
    """
    if order not in (0, 1):
        raise InputError(f"DPCache order {order}: two full-compute steps say order 0 or 1")
    steps = features.shape[1]
    costs = np.full((steps, steps, steps + 1), np.nan)
    for i, j in combinations(range(steps), 2):
        last, ahead = features[:, j, None], np.arange(1, steps - j)
        slope = order * (last - features[:, i, None]) / (j - i)
        errors = np.abs(last + ahead[:, None] * slope - features[:, j + 1 :]).mean((0, 2), dtype=float)
        costs[i, j, j + 1 :] = np.r_[0.0, np.cumsum(errors)]
    return costs


def dpcache_steps(
    costs: np.ndarray,
    budget: int,
    *,
    first_steps: int = FIRST_STEPS,
    max_gap: int = MAX_GAP,
    last_full: bool = False,
) -> tuple[tuple[int, ...], float]:
    """Exactly ``budget`` full-compute steps of the least cost, and that cost.

    Ties go to the smaller predecessor. A gap too short for the budget is lengthened until it is not.

    Args:
        costs: Of `extrapolation_costs`; what is not finite is not allowed.
        first_steps: So many are full at the start; two at least.
        max_gap: The longest gap, that to the end of the run included.
        last_full: Whether the last step is full too; in SGLang it need not be.

    Raises:
        InfeasibleBudgetError: Fewer steps than are full anyway, more than there are, or no path of finite cost.
    """
    steps = len(costs)
    if first_steps < 2:
        raise InputError(f"first_steps={first_steps}: DPCache extrapolates from two full-compute steps")
    count, lead = parse_budget(budget, steps), min(first_steps, steps)
    least = lead + (last_full and steps > lead)
    if count < least:
        raise InfeasibleBudgetError(
            f"DPCache computes {least} of {steps} steps in full anyway: choose {least}..{steps}"
        )
    span, gaps = (steps - lead, count - lead) if last_full else (steps - lead + 1, count - lead + 1)
    longest = max(max_gap, -(-span // max(gaps, 1)))
    allowed = np.where(np.arange(steps + 1) - np.arange(steps)[:, None] <= longest, 0.0, np.inf)  # [from, to]
    charged = np.where(np.isfinite(costs), costs, np.inf) + allowed
    best = np.full((steps, steps), np.inf)  # [the full-compute step before, this one]
    best[lead - 2, lead - 1] = 0.0
    history = []
    for _ in range(lead, count):
        totals = best[:, :, None] + charged[:, :, :steps]
        history.append(totals.argmin(0))
        best = totals.min(0)
    closing = best + charged[:, :, steps]
    if last_full:
        closing[:, :-1] = np.inf
    before, step = divmod(int(closing.argmin()), steps)
    total = float(closing[before, step])
    if not np.isfinite(total):
        raise InfeasibleBudgetError(f"DPCache has no path of budget={count} steps of {steps} with finite costs")
    path = [step, before]
    for came in reversed(history):
        path.append(int(came[path[-1], path[-2]]))
    return tuple(sorted({*path, *range(lead)})), total
