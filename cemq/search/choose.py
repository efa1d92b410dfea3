"""Plans that are run before they are believed.

A plan is a prediction from recorded trajectories. Here schedules are run in closed loop on calibration samples that
were not profiled: first some to learn how errors reach the final sample (`propagation`), then what the search tries
(`explore`), then corrections of the best. What is kept is never worse on these samples than ``uniform`` or ``cem``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cemq.errors import InputError, choose
from cemq.metrics import middle_mean
from cemq.pipelines.noise_scheduler import is_linear
from cemq.predict.correctors import CORRECTORS, NO_CORRECTOR, WORTH_CORRECTING
from cemq.predict.predictors import PREDICTORS
from cemq.prior.error_prior import ErrorPrior
from cemq.schedule import (
    AUTO,
    SEARCH,
    SOLVERS,
    CacheSchedule,
    check_budget,
    plan_schedule,
    usual_budget,
)
from cemq.schedule.rectify import METHODS, Correction, make_correction
from cemq.search.explore import SEARCHED, Search, Wanted, is_certain
from cemq.search.propagation import sample_schedules
from cemq.search.trials import FULL, ClosedLoop, Trial

AUTO_BUDGET = "auto"
AUTO_CORRECTOR = "quadratic"  # on average no better than linear, but what it leaves is predicted better
_REPEATED = 0.25  # what a run of the search counts in the prior that is kept: its neighbours say much the same
_CORRECTIONS = 2.0  # runs at full compute that trying corrections may cost beyond the effort
_FIT_SHARE = 0.6  # of the effort at most goes into runs that only teach
_FIT_SHARE_AUTO = 0.35  # where the search is for a budget too


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What planning may cost, in runs at full compute of the planning samples."""

    full_runs: float
    fitted_to: int


EFFORTS = {
    "quick": Effort(full_runs=5, fitted_to=16),
    "normal": Effort(full_runs=8, fitted_to=40),
    "thorough": Effort(full_runs=24, fitted_to=64),
}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The plan that won, the prior it was made from, and the evidence: every trial and the predicted curve."""

    schedule: CacheSchedule
    correction: Correction | None
    prior: ErrorPrior
    evidence: dict[str, Any]


def check_planning(
    *, solver: str, predictor: str, corrector: str, correction: str, effort: str, budget: int | str, steps: int | None
) -> None:
    """What can be said before anything is run.

    Raises:
        InputError: An unknown name.
        InfeasibleBudgetError: The budget is out of range.
    """
    choose("solver", solver, (SEARCH, *SOLVERS))
    choose("predictor", predictor, (AUTO, *PREDICTORS))
    choose("corrector", corrector, (AUTO, NO_CORRECTOR, *CORRECTORS))
    choose("correction", correction, (AUTO, "none", *METHODS))
    choose("effort", effort, EFFORTS)
    if budget == AUTO_BUDGET:
        if solver != SEARCH:
            raise InputError(f"budget=auto is found by running schedules: leave --solver {solver} out")
    elif steps:
        check_budget(budget, steps, "segment" if solver == SEARCH else solver)


def check_correctable(corrector: str, cache: str, scheduler: Any, steps: int) -> None:
    """Raises InputError where a corrector is asked for by name and there is no room for it."""
    if corrector not in (AUTO, NO_CORRECTOR) and not _is_correctable(cache, scheduler, steps):
        raise InputError(
            f"corrector={corrector}: needs cache=output and a sampler whose steps are linear in what the denoiser "
            f"predicts, found cache={cache} and {type(scheduler).__name__}: choose auto or none"
        )


def _is_correctable(cache: str, scheduler: Any, steps: int) -> bool:
    return cache == "output" and is_linear(scheduler, steps)


def plan(
    loop: ClosedLoop,
    budget: int | str,
    *,
    solver: str = SEARCH,
    predictor: str = AUTO,
    corrector: str = AUTO,
    correction: str = AUTO,
    effort: str = "normal",
    view: str = "combined",
    tolerance: float = 0.15,
    target_psnr: float | None = None,
    known: CacheSchedule | None = None,
) -> Planned:
    """Find the schedule and the correction for a budget.

    Args:
        budget: Full-compute steps, a compute ratio, or ``auto``: the fewest full-compute steps whose error stays
            within ``(1 + tolerance)`` of the quantized model's own at full compute, or reach ``target_psnr``.
        solver: ``search`` is everything this module does; another name takes that solver's schedule as it is.
        predictor: One for all, or ``auto``: the search chooses one for each segment.
        corrector: How skipped steps are put right later: ``quadratic``, ``linear`` or ``none``; ``auto`` is the first
            where the sampler and the cache allow it, the solver is one of this package, not a published one, and
            evenly spaced steps lose enough to full compute.
        correction: ``auto`` keeps the one that helps most on the planning samples, if any does.
        view: Of the prior; see `plan_schedule`.
        known: A schedule that the search tries as well.

    Raises:
        InfeasibleBudgetError: The budget is out of range, or no budget reaches the target.
        InputError: The sampler or the cache leaves no room for the corrector asked for.
    """
    effort_limits = EFFORTS[effort]
    full = loop.run(CacheSchedule(num_steps=loop.num_steps, full_steps=range(loop.num_steps), solver=FULL))
    loop.spent = 0.0  # its error is what all others are measured by, not part of the search
    if budget == AUTO_BUDGET and target_psnr is None and not full.relative_l2:
        raise InputError("budget=auto: full compute has no error without quantization, so give a target PSNR")
    steps = None
    if budget != AUTO_BUDGET:
        steps = check_budget(budget, loop.num_steps, "segment" if solver == SEARCH else solver)
    settled = partial(_settled_corrector, loop, corrector, solver, predictor, full)
    corrector = settled(steps)
    taught = _teach(loop, steps, predictor, settled, effort_limits)
    search = Search(
        loop=loop, predictor=predictor, corrector=corrector, view=view, limit=effort_limits.full_runs, known=known
    )
    if steps is None:
        best = search.fewest(Wanted(full=full, tolerance=tolerance, psnr_db=target_psnr))
    elif steps == loop.num_steps:
        best = full
    elif solver == SEARCH:
        best = search.best(steps)
    else:
        settings = {"solver": solver, "predictor": predictor, "corrector": corrector, "view": view}
        best = loop.run(plan_schedule(loop.fit(view).prior, steps, **settings))
    chosen, fix = _corrected(loop, best, correction, effort_limits.full_runs + _CORRECTIONS)
    if solver == SEARCH and best is not full and correction in (AUTO, "none"):
        chosen, fix = search.with_skipped_branches(chosen, fix)
    fit = loop.fit(view, repeated=_REPEATED)
    curve = search.curve(fit.prior)
    evidence = {
        "solver": solver,
        "effort": effort,
        "full_run_equivalents": round(loop.spent, 2),
        "samples": loop.samples,
        "seeds": [seed for batch in loop.batches for seed in batch.seeds],
        "full_compute": full.to_dict(),
        "calls_per_step": loop.calls_per_step,
        "tolerance": tolerance if budget == AUTO_BUDGET and target_psnr is None else None,
        "target_psnr": target_psnr,
        "fit": {
            "teach": taught,
            "rms_log_error": fit.rms_log_error,
            "coherence_steps": fit.prior.coherence,
        },
        "winner": chosen.to_dict(),
        "trials": [trial.to_dict() for trial in loop.trials],
        "curve": curve,
    }
    return Planned(schedule=chosen.schedule, correction=fix, prior=fit.prior, evidence=evidence)


def _settled_corrector(
    loop: ClosedLoop, corrector: str, solver: str, predictor: str, full: Trial, budget: int | None
) -> str:
    """The one to plan a budget with."""
    if corrector != AUTO:
        check_correctable(corrector, loop.cache, loop.pipe.scheduler, loop.steps)
        return corrector
    own = solver in (SEARCH, "segment")
    if not own or not _is_correctable(loop.cache, loop.pipe.scheduler, loop.steps):
        return NO_CORRECTOR
    if budget in (None, loop.num_steps):
        budget = usual_budget(loop.num_steps)
    name = "taylor1" if predictor == AUTO else predictor
    even = loop.run(plan_schedule(loop.prior, budget, solver="uniform", predictor=name), samples=SEARCHED)
    lost = middle_mean(full.sample_psnr_db[: even.samples] - even.sample_psnr_db)
    return AUTO_CORRECTOR if lost > WORTH_CORRECTING else NO_CORRECTOR


def _teach(
    loop: ClosedLoop, budget: int | None, predictor: str, settled: Callable[[int | None], str], effort: Effort
) -> int:
    """Run what says how errors reach the final sample, and count all of it as spent, also what an earlier plan has run.

    Schedules of the budget that is planned for, since how errors spread depends on how many steps are skipped; and some
    of half as many, for the other budgets that are planned on this prior without running anything.

    Args:
        settled: The corrector to plan a budget with.

    Returns:
        How many runs there are to fit to.
    """
    most = (_FIT_SHARE if budget else _FIT_SHARE_AUTO) * effort.full_runs
    predictors = ("taylor1", "reuse") if predictor == AUTO else (predictor,)
    draw, corrector = partial(sample_schedules, loop.num_steps, predictors=predictors), settled(budget)
    if budget in (None, loop.num_steps):
        lessons = draw(effort.fitted_to, seed=0, corrector=corrector)
    else:
        half = max(2, budget // 2)
        of_half = settled(half) if corrector == NO_CORRECTOR else corrector  # what pays with more steps pays with fewer
        lessons = draw(effort.fitted_to // 3, seed=1, budget=half, corrector=of_half)
        lessons += draw(effort.fitted_to, seed=0, budget=budget, corrector=corrector)
    learned: dict[Any, float] = {}
    before = loop.spent
    for index, schedule in enumerate(lessons):
        if sum(learned.values()) >= most:
            break
        trial = loop.teach(schedule, index // 4)  # four are near uniform and at random, with each predictor
        learned[schedule.key, trial.lesson_from] = trial.samples / loop.samples / trial.compute_ratio
    loop.spent = before + sum(learned.values())
    return len(learned) + 1  # and full compute


def _corrected(loop: ClosedLoop, best: Trial, correction: str, limit: float) -> tuple[Trial, Correction | None]:
    """The trial with the correction asked for, or with the best one if it is worth having, of those tried until
    ``limit`` is spent."""
    if correction == "none":
        return best, None
    if correction != AUTO:
        fix = make_correction(correction, loop.prior, best.schedule)
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
        if trial.psnr_db > chosen.psnr_db and is_certain(trial.sample_psnr_db - best.sample_psnr_db):
            chosen, kept = trial, fix
    return chosen, kept
