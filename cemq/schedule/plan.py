"""From an error prior and a budget to a schedule."""

from __future__ import annotations

import re

import numpy as np

from cemq.errors import InfeasibleBudgetError, InputError, choose
from cemq.predict import get_predictor
from cemq.prior import ErrorPrior
from cemq.schedule.cache_schedule import CacheSchedule
from cemq.schedule.cem import cem_costs, solve_cem
from cemq.schedule.segment import segment_costs, solve_segments

SOLVERS = ("segment", "cem", "uniform")
GAMMA = 2.0


def parse_budget(budget: int | str, num_steps: int) -> int:
    """Full-compute steps from ``15``, ``"15"`` or a compute ratio such as ``"3x"``.

    Raises:
        InfeasibleBudgetError: Not within 2..num_steps.
        InputError: Neither an integer nor a ratio.
    """
    text = str(budget).strip()
    if re.fullmatch(r"\d+", text):
        steps = int(text)
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?)x", text):
        ratio = float(match[1])
        if ratio < 1:
            raise InfeasibleBudgetError(f"budget={text}: a compute ratio is at least 1x")
        steps = max(2, round(num_steps / ratio))
    else:
        raise InputError(f"budget {text!r} is neither a number of full-compute steps nor a compute ratio such as 3x")
    if not 2 <= steps <= num_steps:
        raise InfeasibleBudgetError(f"budget={text} is out of range for {num_steps} steps: choose 2..{num_steps}")
    return steps


def check_budget(budget: int | str, num_steps: int, solver: str) -> int:
    """`parse_budget`, and whether ``solver`` can spend it: known before anything is profiled.

    Raises:
        InfeasibleBudgetError: Out of range, or the CEM rule has no path of so many steps.
    """
    steps = parse_budget(budget, num_steps)
    if choose("solver", solver, SOLVERS) == "cem":
        solve_cem(cem_costs(np.ones((num_steps, num_steps))), steps)
    return steps


def uniform_steps(num_steps: int, budget: int) -> tuple[int, ...]:
    """``budget`` steps with gaps as equal as integers allow, beginning with step 0."""
    return tuple(i * num_steps // budget for i in range(budget))


def plan_schedule(
    prior: ErrorPrior,
    budget: int | str,
    *,
    solver: str = "segment",
    predictor: str = "taylor1",
    view: str = "combined",
    gamma: float = GAMMA,
    max_gap: int | None = None,
) -> CacheSchedule:
    """Choose the full-compute steps with the least predicted error.

    ``segment`` minimises the summed signed error of each segment
    (`segment_costs`), ``cem`` is the published rule on cosine distances, ``uniform`` spaces evenly.

    Args:
        budget: Full-compute steps to spend, counting step 0, or a compute ratio such as ``"3x"``.
        view: Which errors of the prior to minimise: ``combined``, ``cache`` or ``self``.
        gamma: Exponent on each segment's error.
        max_gap: Longest gap between full-compute steps; None allows any.

    Raises:
        InfeasibleBudgetError: The budget is out of range, or no path fits the gaps allowed.

    >>> import numpy as np
    >>> angles = np.linspace(0, 1, 9)
    >>> gram = np.cos(angles[:, None] - angles)  # predictions that turn at a constant rate
    >>> prior = ErrorPrior(qq=gram, qv=gram, vv=gram, step_sizes=np.ones(9))
    >>> plan_schedule(prior, budget=3, predictor="reuse").full_steps
    (0, 3, 6)
    """
    steps = check_budget(budget, prior.num_steps, solver)
    if solver == "uniform":
        full_steps = uniform_steps(prior.num_steps, steps)
    elif solver == "cem":
        full_steps, _ = solve_cem(cem_costs(prior.cosine_distances(view)), steps)
    else:
        if max_gap is not None and max_gap < 1:
            raise InputError(f"max_gap={max_gap}: a gap between full-compute steps is at least 1")
        longest = min(max_gap or prior.num_steps, prior.num_steps)
        costs = segment_costs(prior.view(view), prior.step_weights, get_predictor(predictor), gamma, longest)
        full_steps, total = solve_segments(costs, steps)
        if not np.isfinite(total):
            raise InfeasibleBudgetError(
                f"budget={steps} cannot cover {prior.num_steps} steps with gaps of at most {longest}: "
                f"choose {-(-prior.num_steps // longest)}..{prior.num_steps}, or a larger max_gap"
            )
    return CacheSchedule(num_steps=prior.num_steps, full_steps=full_steps, predictor=predictor, solver=solver)
