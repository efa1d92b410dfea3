"""Plans that are run before they are believed.

A plan is a prediction from recorded trajectories. Here schedules are run in closed loop on planning samples: first
some to learn how errors reach the final sample (`propagation`), then what the search tries (`explore`), then
corrections of the best. What is kept is never worse on these samples than ``uniform`` or ``cem``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from cemq.errors import InputError
from cemq.metrics import middle_mean
from cemq.pipelines.noise_scheduler import is_linear
from cemq.predict.correctors import NO_CORRECTOR
from cemq.prior.error_prior import ErrorPrior
from cemq.schedule import (
    AUTO,
    SEARCH,
    CacheSchedule,
    plan_schedule,
    suited_corrector,
    usual_budget,
)
from cemq.schedule.rectify import METHODS, Correction, make_correction
from cemq.schedule.solvers import Aims
from cemq.search.explore import Search, Wanted, beats, planned
from cemq.search.propagation import sample_schedules
from cemq.search.settings import AUTO_BUDGET, PlanSettings
from cemq.search.trials import ClosedLoop, Trial


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The plan that won, the prior it was made from, and the evidence: every trial and the predicted curve."""

    schedule: CacheSchedule
    correction: Correction | None
    prior: ErrorPrior
    evidence: dict[str, Any]


def check_runs(settings: PlanSettings, *, samples: int) -> None:
    """Raises InputError where runs are asked for and there are no samples to run on."""
    if settings.budget == AUTO_BUDGET and not samples:
        raise InputError(
            f"budget=auto is found by running schedules, and effort={settings.effort} runs none: name a budget, or "
            "take effort=normal"
        )


def check_correctable(corrector: str, cache: str, scheduler: Any, steps: int) -> None:
    """Raises InputError where a corrector is asked for by name and there is no room for it."""
    if corrector not in (AUTO, NO_CORRECTOR) and not _is_correctable(cache, scheduler, steps):
        raise InputError(
            f"corrector={corrector}: needs cache=output and a sampler whose steps are linear in what the denoiser "
            f"predicts, found cache={cache} and {type(scheduler).__name__}: choose auto or none"
        )


def _is_correctable(cache: str, scheduler: Any, steps: int) -> bool:
    return cache == "output" and is_linear(scheduler, steps)


def plan(loop: ClosedLoop, settings: PlanSettings, *, known: CacheSchedule | None = None) -> Planned:
    """Find the schedule and the correction for a budget.

    Args:
        known: A schedule that the search tries as well.

    Raises:
        InfeasibleBudgetError: The budget is out of range, or no budget reaches the target.
        InputError: The sampler or the cache leaves no room for the corrector asked for.
    """
    budget, solver, view = settings.full_steps(loop.num_steps), settings.solver, settings.view
    full = loop.full() if settings.fits or budget in (None, loop.num_steps) else None
    if budget is None and settings.target_psnr is None and not loop.full().relative_l2:
        raise InputError("budget=auto: full compute has no error without quantization, so give a target PSNR")
    corrector = _chosen_corrector(loop, settings, budget)
    calibrated = _calibrate(loop, settings, budget, corrector) if settings.fits else 0
    search = Search(loop=loop, settings=settings, corrector=corrector, known=known)
    if budget is None:
        wanted = Wanted(full=loop.full(), tolerance=settings.tolerance, psnr_db=settings.target_psnr)
        best = search.fewest(wanted) if settings.fits else search.fewest_picked(wanted)
    elif budget == loop.num_steps:
        best = loop.full()
    elif solver == SEARCH:
        best = search.best(budget) if settings.fits else search.picked(budget)
    else:
        aims: Aims = {"corrector": corrector, "view": view}
        fitted = loop.fit(view).prior
        best = loop.run(plan_schedule(fitted, budget, solver=solver, predictor=settings.predictor, **aims))
    chosen, fix = _rectified(loop, settings, best, loop.spent + search.kept_for_corrections)
    if best is not full:
        chosen, fix = search.with_skipped_branches(chosen, fix)
    fit = loop.fit(view, repeated=settings.search.repeated)
    prior = fit.prior
    if not prior.is_fitted:  # nor does it know of any corrector
        settled = _settled_corrector(settings, loop.cache, loop.runner.pipe.scheduler, loop.runner.steps)
        prior = prior.with_corrector(settled or settings.search.corrector)
    evidence = {
        "solver": solver,
        "effort": settings.effort,
        "search_generations": round(loop.spent, 2),
        "samples": loop.samples,
        "seeds": [seed for batch in loop.batches for seed in batch.seeds],
        "full_compute": full and full.to_dict(),
        "calls_per_step": loop.calls_per_step,
        "tolerance": settings.tolerance if budget is None and settings.target_psnr is None else None,
        "target_psnr": settings.target_psnr,
        "fit": {
            "runs": calibrated,
            "rms_log_error": _finite(fit.rms_log_error),
            "coherence_steps": _finite(fit.prior.coherence),
        },
        "winner": chosen.to_dict(),
        "trials": [trial.to_dict() for trial in loop.trials],
        "curve": search.curve(fit.prior),
    }
    return Planned(schedule=chosen.schedule, correction=fix, prior=prior, evidence=evidence)


def _finite(value: float) -> float | None:
    """For JSON; None where nothing was fitted."""
    return value if math.isfinite(value) else None


def predicted(prior: ErrorPrior, settings: PlanSettings, *, cache: str, scheduler: Any, steps: int) -> Planned:
    """A plan that nothing was run for.

    Raises:
        InfeasibleBudgetError: The budget is out of range.
        InputError: As of `plan`; or the budget is ``auto``, which only runs can find.
    """
    check_runs(settings, samples=0)
    budget = settings.full_steps(prior.num_steps)
    assert budget is not None  # ``auto`` was refused
    settled = _settled_corrector(settings, cache, scheduler, steps)
    corrector = settled or _expected_corrector(prior, settings, budget)
    aims: Aims = {"corrector": corrector, "view": settings.view}
    if settings.solver == SEARCH:
        schedule = next(planned(prior, budget, predictor=settings.predictor, **aims))
    else:
        schedule = plan_schedule(prior, budget, solver=settings.solver, predictor=settings.predictor, **aims)
    asked = settings.rectify
    fix = None if asked in (AUTO, "none") else make_correction(asked, prior, schedule)
    prior = prior.with_corrector(settled or settings.search.corrector)
    evidence = {"solver": settings.solver, "effort": settings.effort, "search_generations": 0.0, "samples": 0}
    return Planned(schedule=schedule, correction=fix, prior=prior, evidence=evidence)


def _settled_corrector(settings: PlanSettings, cache: str, scheduler: Any, steps: int) -> str | None:
    """The one that is asked for, or none where there is room or use for none; None: it is to be found out.

    Raises:
        InputError: There is no room for the one asked for.
    """
    if settings.corrector != AUTO:
        check_correctable(settings.corrector, cache, scheduler, steps)
        return settings.corrector
    own = settings.solver in (SEARCH, "segment")
    return None if own and _is_correctable(cache, scheduler, steps) else NO_CORRECTOR


def _expected_corrector(prior: ErrorPrior, settings: PlanSettings, budget: int) -> str:
    """The one to plan a budget with, by what is predicted of evenly spaced steps."""
    return suited_corrector(
        prior, budget, predictor=settings.predictor, view=settings.view, corrector=settings.search.corrector
    )


def _chosen_corrector(loop: ClosedLoop, settings: PlanSettings, budget: int | None) -> str:
    """The one to plan a budget with."""
    if settled := _settled_corrector(settings, loop.cache, loop.runner.pipe.scheduler, loop.runner.steps):
        return settled
    if budget in (None, loop.num_steps):
        budget = usual_budget(loop.num_steps)
    if not settings.fits:
        return _expected_corrector(loop.prior, settings, budget)
    name = "taylor1" if settings.predictor == AUTO else settings.predictor
    uniform = plan_schedule(loop.prior, budget, solver="uniform", predictor=name)
    even = loop.run(uniform, samples=min(settings.search.searched, loop.samples))
    lost = middle_mean(loop.full().sample_psnr_db[: even.samples] - even.sample_psnr_db)
    return settings.search.corrector if lost > settings.search.worth_correcting else NO_CORRECTOR


def _calibrate(loop: ClosedLoop, settings: PlanSettings, budget: int | None, corrector: str) -> int:
    """Run what says how errors reach the final sample, and count all of it as spent, also what an earlier plan has run.

    Schedules of the budget that is planned for, since how errors spread depends on how many steps are skipped; and some
    of half as many, for the other budgets that are planned on this prior without running anything.

    Args:
        corrector: That of the budget.

    Returns:
        How many runs there are to fit to.
    """
    search = settings.search
    most = (search.fit_share if budget else search.fit_share_auto) * settings.limit(loop.samples)
    predictors = ("taylor1", "reuse") if settings.predictor == AUTO else (settings.predictor,)
    draw = partial(sample_schedules, loop.num_steps, predictors=predictors)
    if budget in (None, loop.num_steps):
        drawn = draw(search.fitted_to, seed=0, corrector=corrector)
    else:
        half = max(2, budget // 2)
        of_half = corrector  # what pays with more steps pays with fewer
        if corrector == NO_CORRECTOR:
            of_half = _chosen_corrector(loop, settings, half)
        own = draw(search.fitted_to, seed=0, budget=budget, corrector=corrector)
        other = draw(search.fitted_to // 3, seed=1, budget=half, corrector=of_half)
        drawn = []
        for index, schedule in enumerate(other):  # one of four has half the budget
            drawn += [*own[3 * index : 3 * index + 3], schedule]
        drawn += own[3 * len(other) :]
    cost: dict[Any, float] = {}
    before = loop.spent
    for index, schedule in enumerate(drawn):
        if sum(cost.values()) >= most:
            break
        # four are near uniform and at random, with each predictor
        trial = loop.calibrate(schedule, index // 4, share=search.calibrated)
        cost[schedule.key, trial.part_from] = trial.samples / trial.compute_ratio
    loop.spent = before + sum(cost.values())
    return len(cost) + 1  # and full compute


def _rectified(loop: ClosedLoop, settings: PlanSettings, best: Trial, limit: float) -> tuple[Trial, Correction | None]:
    """The trial with the correction asked for, or with the best one if it is worth having, of those tried until
    ``limit`` is spent."""
    asked = settings.rectify
    if asked == "none":
        return best, None
    if asked != AUTO:
        fix = make_correction(asked, loop.prior, best.schedule)
        return loop.run(best.schedule, fix), fix
    chosen, kept = best, None
    for method in METHODS:
        try:
            fix = make_correction(method, loop.prior, best.schedule)
        except InputError:  # the prior has no statistics for it
            continue
        if loop.spent + loop.cost(best.budget) > limit:
            break
        trial = loop.run(best.schedule, fix)
        if beats(trial, chosen, best):
            chosen, kept = trial, fix
    return chosen, kept
