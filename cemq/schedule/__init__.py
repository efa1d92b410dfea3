"""Schedules: which denoising steps run in full. NumPy only; importing this loads no torch."""

from cemq.schedule.branches import paid_steps, plan_branches, skip_branches
from cemq.schedule.cache_schedule import FULL, CacheSchedule, full_compute
from cemq.schedule.cem import CemRule, cem_costs, published_errors, solve_cem, solve_relaxed_cem
from cemq.schedule.local_search import SEARCH, SEGMENT_PREDICTORS, improve, neighbours, plan_predicted, stretched
from cemq.schedule.segment import segment_costs, solve_segments
from cemq.schedule.solvers import (
    AUTO,
    SOLVERS,
    check_budget,
    check_predictors,
    parse_budget,
    plan_all,
    plan_schedule,
    suited_corrector,
    uniform_steps,
    usual_budget,
)

__all__ = [
    "AUTO",
    "FULL",
    "SEARCH",
    "SEGMENT_PREDICTORS",
    "SOLVERS",
    "CacheSchedule",
    "CemRule",
    "cem_costs",
    "check_budget",
    "check_predictors",
    "full_compute",
    "improve",
    "neighbours",
    "paid_steps",
    "parse_budget",
    "plan_all",
    "plan_branches",
    "plan_predicted",
    "plan_schedule",
    "published_errors",
    "segment_costs",
    "skip_branches",
    "solve_cem",
    "solve_relaxed_cem",
    "solve_segments",
    "stretched",
    "suited_corrector",
    "uniform_steps",
    "usual_budget",
]
