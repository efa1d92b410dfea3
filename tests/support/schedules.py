"""Schedules of `pipelines.STEPS` steps, their plans for a pipeline's own sampler, and all schedules there are."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.pipelines.noise_scheduler import fingerprint
from cemq.pipelines.trajectory import record
from cemq.schedule import CacheSchedule
from cemq.schedule.plan import Plan
from support.pipelines import STEPS, run_flux

EVERY = CacheSchedule(num_steps=STEPS, full_steps=tuple(range(STEPS)))
HALF = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 4), predictor="taylor1")
# computes one of the two calls of step 2
HALVED = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 2, 4), predictor="taylor1", branch_steps=(2,))


def sampler_of(pipe, steps: int = STEPS) -> SamplerFingerprint:
    pipe.scheduler.set_timesteps(steps)
    return fingerprint(pipe.scheduler)


def flux_sampler(pipe) -> SamplerFingerprint:
    """FLUX sets sigmas of its own."""
    with record(pipe) as plain:
        run_flux(pipe)
    return plain.sampler


def plan_of(pipe, schedule: CacheSchedule = HALF, **fields) -> Plan:
    return Plan(schedule=schedule, sampler=sampler_of(pipe), **fields)


def all_schedules(steps: int, budget: int) -> list[tuple[int, ...]]:
    return [(0, *rest) for rest in itertools.combinations(range(1, steps), budget - 1)]


@st.composite
def full_steps_of(draw, at_least: int = 1) -> tuple[int, tuple[int, ...]]:
    """A number of steps, and full-compute steps among them."""
    steps = draw(st.integers(at_least + 1, 40))
    rest = draw(st.sets(st.integers(1, steps - 1), min_size=at_least - 1))
    return steps, (0, *sorted(rest))
