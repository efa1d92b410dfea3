"""Schedules: which denoising steps run in full. NumPy only; importing this loads no torch."""

from cemq.schedule.cache_schedule import CacheSchedule
from cemq.schedule.cem import cem_costs, solve_cem
from cemq.schedule.plan import SOLVERS, check_budget, parse_budget, plan_schedule, uniform_steps
from cemq.schedule.segment import segment_costs, solve_segments

__all__ = [
    "SOLVERS",
    "CacheSchedule",
    "cem_costs",
    "check_budget",
    "parse_budget",
    "plan_schedule",
    "segment_costs",
    "solve_cem",
    "solve_segments",
    "uniform_steps",
]
