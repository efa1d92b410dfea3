"""Skipping one branch of guidance: what it adds to the other changes less from step to step than either of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cemq.prior import ErrorPrior
from cemq.schedule.cache_schedule import CacheSchedule
from cemq.schedule.plan import parse_budget, plan_schedule


def skip_branches(schedule: CacheSchedule, budget: int) -> CacheSchedule:
    """The same steps for the cost of ``budget`` steps: both branches on some of them, evenly spread, else the first.

    At least half of the steps are paid for; a schedule that costs no more as it is stays as it is.
    """
    full = schedule.full_steps
    both = max(2 * budget - len(full), 1)
    kept = {full[index * len(full) // both] for index in range(both)}
    return (
        replace(schedule, branch_steps=tuple(step for step in full if step not in kept))
        if both < len(full)
        else schedule
    )


def plan_branches(prior: ErrorPrior, budget: int | str, share: float, **settings: Any) -> CacheSchedule:
    """`plan_schedule` for more steps than ``budget`` pays for, of which ``share`` compute both branches of guidance.

    FasterCache's CFG-Cache (arXiv:2410.19355) on a schedule: there the other branch is rebuilt from the first and a
    cached difference whose frequencies are reweighted by hand; here the difference is continued by the predictor. The
    prior knows the guided prediction only, so the steps are planned as if both branches were computed on all of them.

    Raises:
        InfeasibleBudgetError: See `plan_schedule`.
    """
    count = parse_budget(budget, prior.num_steps)
    more = min(max(round(2 * count / (1 + share)), count), prior.num_steps)
    return skip_branches(plan_schedule(prior, more, **settings), count)
