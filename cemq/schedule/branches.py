"""Skipping one branch of guidance: what it adds to the other changes less from step to step than either of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cemq.prior.error_prior import ErrorPrior
from cemq.schedule.cache_schedule import CacheSchedule
from cemq.schedule.solvers import parse_budget, plan_schedule


def skip_branches(schedule: CacheSchedule, budget: int) -> CacheSchedule:
    """The same steps for the cost of ``budget`` steps: one branch only on every other of the last full-compute steps,
    and on more of them where that is not enough. Late in a run guidance changes least; FasterCache begins there too.

    At least half of the steps are paid for; a schedule that costs no more as it is stays as it is.
    """
    full = schedule.full_steps
    count = min(max(2 * (len(full) - budget), 0), len(full) - 1)
    latest_first = (*full[:0:-2], *full[-2:0:-2])
    return replace(schedule, branch_steps=tuple(sorted(latest_first[:count])))


def paid_steps(budget: int, share: float, num_steps: int) -> int:
    """The full-compute steps that ``budget`` pays for where ``share`` of them compute both branches, the others one."""
    return min(max(round(2 * budget / (1 + share)), budget), num_steps)


def plan_branches(prior: ErrorPrior, budget: int | str, share: float, **settings: Any) -> CacheSchedule:
    """`plan_schedule` for more steps than ``budget`` pays for, of which ``share`` compute both branches of guidance.

    FasterCache's CFG-Cache (arXiv:2410.19355) on a schedule: there the other branch is rebuilt from the first and a
    cached difference whose frequencies are reweighted by hand; here the difference is continued by the predictor. The
    prior knows the guided prediction only, so the steps are planned as if both branches were computed on all of them.

    Raises:
        InfeasibleBudgetError: See `plan_schedule`.
    """
    count = parse_budget(budget, prior.num_steps)
    return skip_branches(plan_schedule(prior, paid_steps(count, share, prior.num_steps), **settings), count)
