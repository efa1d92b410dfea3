"""Methods that settle before a picture is drawn which steps are computed: our plans, and published schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from cemq.errors import InfeasibleBudgetError
from cemq.evaluation.rivals.methods import Bench, Steps, Threshold, add_method
from cemq.runtime import attached
from cemq.schedule import CacheSchedule, plan_schedule, uniform_steps
from cemq.schedule.budcache import budcache_steps
from cemq.schedule.cachequant import cachequant_steps, l1_distances
from cemq.schedule.dpcache import dpcache_steps, extrapolation_costs
from cemq.schedule.fixed import spectrum_steps
from cemq.schedule.meancache import plan_meancache, velocity_errors
from cemq.schedule.plan import Plan
from cemq.schedule.procache import procache_steps
from cemq.schedule.rectify import Correction, make_correction
from cemq.search.choose import plan, predicted
from cemq.search.settings import PlanSettings

_BUDCACHE_RUNS = 300  # schedules: 200 of them are its annealing, as released
_COOLED = 2e-4  # of the temperature at the end over that at the beginning, as released

Scheduled = Callable[[Bench, int], CacheSchedule]


def follow(
    bench: Bench, schedule: CacheSchedule, *, cache: str = "output", fix: Correction | None = None
) -> AbstractContextManager[Any]:
    """A schedule, and a correction of it, on the pipeline of a bench."""
    followed = Plan(schedule=schedule, sampler=bench.prior.sampler, correction=fix, cache=cache)
    return attached(bench.runner.pipe, followed)


@add_method("cemq", "cemq, effort normal", Steps())
def _cemq(bench: Bench, knob: float) -> AbstractContextManager[Any]:
    planned = bench.fitted(f"cemq-{knob}", lambda: plan(bench.new_loop(), PlanSettings(budget=int(knob))))
    return follow(bench, planned.schedule, fix=planned.correction)


def _predicted(bench: Bench, budget: int) -> CacheSchedule:
    settings, scheduler = PlanSettings(budget=budget, effort="instant"), bench.runner.pipe.scheduler
    return predicted(bench.prior, settings, cache="output", scheduler=scheduler, steps=bench.num_steps).schedule


def _uniform(predictor: str) -> Scheduled:
    def schedule(bench: Bench, budget: int) -> CacheSchedule:
        return CacheSchedule(
            num_steps=bench.num_steps, full_steps=uniform_steps(bench.num_steps, budget), predictor=predictor,
            solver="uniform",
        )  # fmt: skip

    return schedule


def _solved(solver: str, predictor: str) -> Scheduled:
    def schedule(bench: Bench, budget: int) -> CacheSchedule:
        try:
            return plan_schedule(bench.prior, budget, solver=solver, predictor=predictor)
        except InfeasibleBudgetError:
            if solver != "cem":
                raise
            return plan_schedule(bench.prior, budget, solver="cem-relaxed", predictor=predictor)

    return schedule


def _add(name: str, source: str, scheduled: Scheduled, *, cache: str = "output", rectify: str | None = None) -> None:
    @add_method(name, source, Steps())
    def _(bench: Bench, knob: float) -> AbstractContextManager[Any]:
        schedule = bench.fitted(f"{name}-{knob}", lambda: scheduled(bench, int(knob)))
        fix = make_correction(rectify, bench.prior, schedule) if rectify else None
        return follow(bench, schedule, cache=cache, fix=fix)


def _cachequant(bench: Bench, budget: int) -> CacheSchedule:
    distances = bench.fitted("cachequant", lambda: l1_distances(bench.features))
    return _reusing(bench, cachequant_steps(distances, budget), "cachequant")


def _dpcache(bench: Bench, budget: int) -> CacheSchedule:
    costs = bench.fitted("dpcache", lambda: extrapolation_costs(bench.features))
    return _reusing(bench, dpcache_steps(costs, budget)[0], "dpcache", predictor="taylor1")


def _meancache(bench: Bench, budget: int) -> CacheSchedule:
    def errors() -> np.ndarray:
        grams = np.einsum("nif,njf->nij", bench.features, bench.features)
        return velocity_errors(grams, bench.prior.step_sizes)

    return plan_meancache(bench.fitted("meancache", errors), budget)


def _budcache(bench: Bench, budget: int) -> CacheSchedule:
    """As released on a single sample; the loss is the squared error of its final latents, and the temperatures, which
    are published in units of FLUX's, begin at that of even spacing."""
    loss = bench.loss_of_one("reuse")
    start = loss(uniform_steps(bench.num_steps, budget))
    temperatures = (start, start * _COOLED)
    steps, _ = budcache_steps(loss, bench.num_steps, budget, temperatures=temperatures, evaluations=_BUDCACHE_RUNS)
    return _reusing(bench, steps, "budcache")


def _procache(bench: Bench, budget: int) -> CacheSchedule:
    steps, _ = procache_steps(bench.loss_of_one("reuse"), bench.num_steps, budget, seed=0)
    return _reusing(bench, steps, "procache")


def _reusing(bench: Bench, steps: Sequence[int], solver: str, *, predictor: str = "reuse") -> CacheSchedule:
    return CacheSchedule(num_steps=bench.num_steps, full_steps=tuple(steps), predictor=predictor, solver=solver)


@add_method("spectrum", "Spectrum, arXiv:2603.01623", Threshold(low=1e-2, high=8.0))
def _spectrum(bench: Bench, knob: float) -> AbstractContextManager[Any]:
    steps = spectrum_steps(bench.num_steps, flex=knob)
    return follow(bench, _reusing(bench, steps, "spectrum", predictor="chebyshev"))


_add("cemq-predicted", "cemq, planned on the same prior, and nothing is run", _predicted)
_add("uniform", "even spacing, the latest output again", _uniform("reuse"))
_add("uniform-taylor1", "even spacing, first-order extrapolation of the output", _uniform("taylor1"))
_add("uniform-residual", "even spacing, the latest residual of the blocks again", _uniform("reuse"), cache="residual")
_add("fora", "FORA, arXiv:2407.01425", _uniform("reuse"), cache="modules")
_add("taylorseer", "TaylorSeer, arXiv:2503.06923, order 1", _uniform("taylor1"), cache="modules")
_add("taylorseer-2", "TaylorSeer, arXiv:2503.06923, order 2", _uniform("taylor2"), cache="modules")
_add("goc", "GOC, arXiv:2503.05156", _uniform("goc"), cache="modules")
_add("eoc", "EOC, arXiv:2501.19243", _uniform("reuse"), rectify="eoc")
_add("ertacache", "ERTACache, arXiv:2508.21091", _solved("threshold", "reuse"), rectify="affine")
_add("cem", "CEM, arXiv:2512.23258", _solved("cem", "taylor1"))
_add("cem-relaxed", "CEM, arXiv:2512.23258, relaxed end", _solved("cem-relaxed", "taylor1"))
_add("cachequant", "CacheQuant, arXiv:2503.01323", _cachequant, rectify="affine")
_add("dpcache", "DPCache, arXiv:2602.22654", _dpcache)
_add("meancache", "MeanCache, arXiv:2601.19961", _meancache)
_add("budcache", "BudCache, arXiv:2606.13496", _budcache)
_add("procache", "ProCache, arXiv:2512.17298", _procache)
