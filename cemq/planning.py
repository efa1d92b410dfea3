"""Plans that are run before they are believed.

A plan is a prediction from recorded trajectories. Here schedules are run in closed loop on calibration samples that
were not profiled: first some to learn how errors reach the final sample (`cemq.propagation`), then what several solvers
propose, then the neighbours of the best one, most promising first. Every run sharpens the predictions for the next.
All this is done on two thirds of the samples; the few best then meet what was published on all of them, and the best
is kept: never worse on these samples than ``uniform`` or ``cem``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cemq.closed_loop import FULL, ClosedLoop, Trial
from cemq.correction import METHODS, Correction, make_correction
from cemq.errors import InfeasibleBudgetError, InputError, choose
from cemq.evaluation.metrics import error_of, psnr_of
from cemq.predict import PREDICTORS
from cemq.prior import ErrorPrior
from cemq.propagation import SAMPLE, sample_schedules
from cemq.schedule import (
    AUTO,
    SEARCH,
    SEGMENT_PREDICTORS,
    SOLVERS,
    CacheSchedule,
    check_budget,
    improve,
    neighbours,
    paid_steps,
    plan_all,
    plan_predicted,
    plan_schedule,
    skip_branches,
)

AUTO_BUDGET = "auto"
PUBLISHED = ("uniform", "cem")  # solvers that no plan may be worse than
DB_PER_LOG = 20 / math.log(10)  # decibels of a factor e in error
WHOLE_PREDICTORS = ("taylor1", "taylor2")  # that candidates are made for
BRANCH_SHARES = (0.5, 0.75, 0.9)  # of the full-compute steps that compute both branches of guidance
SEARCHED = 0.5  # share of the samples that all but the finals run on
FINALISTS = 4
_REPEATED = 0.25  # what a run of the search counts in the prior that is kept: its neighbours say much the same
_RETRIED = 2  # of them meet the target of budget=auto on all samples, or do not
_CORRECTIONS = 2.0  # runs at full compute that trying corrections may cost beyond the effort
_FIT_SHARE = 0.6  # of the effort goes into runs that only teach
_FIT_SHARE_AUTO = 0.35  # where the search is for a budget too


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What planning may cost, in runs at full compute of the planning samples."""

    full_runs: float
    fitted_to: int


EFFORTS = {
    "quick": Effort(full_runs=5, fitted_to=16),
    "normal": Effort(full_runs=13, fitted_to=40),
    "thorough": Effort(full_runs=40, fitted_to=64),
}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The plan that won, the prior it was made from, and the evidence: every trial and the predicted curve."""

    schedule: CacheSchedule
    correction: Correction | None
    prior: ErrorPrior
    evidence: dict[str, Any]


def check_planning(
    *, solver: str, predictor: str, correction: str, effort: str, budget: int | str, steps: int | None
) -> None:
    """What can be said before anything is run.

    Raises:
        InputError: An unknown name.
        InfeasibleBudgetError: The budget is out of range.
    """
    choose("solver", solver, (SEARCH, *SOLVERS))
    choose("predictor", predictor, (AUTO, *PREDICTORS))
    choose("correction", correction, (AUTO, "none", *METHODS))
    choose("effort", effort, EFFORTS)
    if budget == AUTO_BUDGET:
        if solver != SEARCH:
            raise InputError(f"budget=auto is found by running schedules: leave --solver {solver} out")
    elif steps:
        check_budget(budget, steps, "segment" if solver == SEARCH else solver)


def plan(
    loop: ClosedLoop,
    budget: int | str,
    *,
    solver: str = SEARCH,
    predictor: str = AUTO,
    correction: str = AUTO,
    effort: str = "normal",
    view: str = "combined",
    tolerance: float = 0.15,
    target_psnr: float | None = None,
) -> Planned:
    """Find the schedule and the correction for a budget.

    Args:
        budget: Full-compute steps, a compute ratio, or ``auto``: the fewest full-compute steps whose error stays
            within ``(1 + tolerance)`` of the quantized model's own at full compute, or reach ``target_psnr``.
        solver: ``search`` is everything this module does; another name takes that solver's schedule as it is.
        predictor: One for all, or ``auto``: the search chooses one for each segment.
        correction: ``auto`` keeps the one that helps most on the planning samples, if any does.
        view: Of the prior; see `plan_schedule`.

    Raises:
        InfeasibleBudgetError: The budget is out of range, or no budget reaches the target.
    """
    effort_limits = EFFORTS[effort]
    full = loop.run(CacheSchedule(num_steps=loop.num_steps, full_steps=range(loop.num_steps), solver=FULL))
    loop.spent = 0.0  # its error is what all others are measured by, not part of the search
    if budget == AUTO_BUDGET and target_psnr is None and not full.relative_l2:
        raise InputError("budget=auto: full compute has no error without quantization, so give a target PSNR")
    steps = None
    if budget != AUTO_BUDGET:
        steps = check_budget(budget, loop.num_steps, "segment" if solver == SEARCH else solver)
    taught = _teach(loop, steps, predictor, effort_limits)
    search = _Search(loop=loop, predictor=predictor, view=view, limit=effort_limits.full_runs)
    if steps is None:
        best = search.fewest(_Wanted(full=full, tolerance=tolerance, psnr_db=target_psnr))
    elif steps == loop.num_steps:
        best = full
    elif solver == SEARCH:
        best = search.best(steps)
    else:
        best = loop.run(plan_schedule(loop.fit(view).prior, steps, solver=solver, predictor=predictor, view=view))
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


def _teach(loop: ClosedLoop, budget: int | None, predictor: str, effort: Effort) -> int:
    """Run what says how errors reach the final sample, and count all of it as spent, also what an earlier plan has run.

    Schedules of the budget that is planned for, since how errors spread depends on how many steps are skipped; and some
    of half as many, without which the prior says too little about long gaps once it is carried over.

    Returns:
        How many runs there are to fit to.
    """
    most = (_FIT_SHARE if budget else _FIT_SHARE_AUTO) * effort.full_runs
    draw = partial(
        sample_schedules, loop.num_steps, predictors=("taylor1", "reuse") if predictor == AUTO else (predictor,)
    )
    if budget in (None, loop.num_steps):
        lessons = draw(effort.fitted_to, seed=0)
    else:
        lessons = draw(effort.fitted_to // 3, seed=1, budget=max(2, budget // 2))
        lessons += draw(effort.fitted_to, seed=0, budget=budget)
    learned: dict[Any, float] = {}
    for schedule in lessons:
        if sum(learned.values()) >= most:
            break
        loop.run(schedule, share=SEARCHED)
        learned[schedule.key] = loop.cost(schedule.budget, SEARCHED)
    loop.spent = sum(learned.values())
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
        if loop.spent + loop.cost(best.schedule.budget) > limit:
            break
        trial = loop.run(best.schedule, fix)
        if trial.psnr_db > chosen.psnr_db and _is_certain(trial.sample_psnr_db - best.sample_psnr_db):
            chosen, kept = trial, fix
    return chosen, kept


def _is_certain(gains: np.ndarray) -> bool:
    """Whether a gain is greater than its own standard error."""
    return gains.mean() > _standard_error(gains)


def _standard_error(values: np.ndarray) -> float:
    """Of the mean; of a single value nothing is known, and 0 said."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _middle_mean(values: np.ndarray) -> np.ndarray:
    """Of the last axis, without the sixth that is highest and the sixth that is lowest.

    A sample that takes another turn is off by ten times what the others are; the mean of all says less about others.
    """
    cut = values.shape[-1] // 6
    return np.sort(values)[..., cut : values.shape[-1] - cut].mean(-1)


def _middle_error(values: np.ndarray) -> np.ndarray:
    """The standard error of `_middle_mean` (Tukey and McLaughlin 1963): that of the mean of values whose outer sixths
    are moved to where the middle ends, over the share that is left; 0 for a single one."""
    count = values.shape[-1]
    cut, ordered = count // 6, np.sort(values)
    held = ordered.clip(ordered[..., cut, None], ordered[..., count - cut - 1, None])
    return held.std(-1, ddof=min(1, count - 1)) / math.sqrt(count) / (1 - 2 * cut / count)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """Of ``budget=auto``: either a target, or an error within ``1 + tolerance`` of the same samples at full compute."""

    full: Trial
    tolerance: float
    psnr_db: float | None

    def met_by(self, trial: Trial) -> bool:
        if self.psnr_db is not None:
            return trial.psnr_db >= self.psnr_db
        excess = trial.sample_relative_l2 - (1 + self.tolerance) * self.full.sample_relative_l2[: trial.samples]
        # with a standard error to spare: what only just passes here fails on half of all other samples
        return _middle_mean(excess) + _middle_error(excess) <= 0

    @property
    def error(self) -> float:
        """Of the images, that the fitted prior is to stay below."""
        return error_of(self.psnr_db) if self.psnr_db is not None else (1 + self.tolerance) * self.full.error


@dataclass(frozen=True, kw_only=True, eq=False)
class _Search:
    """The search for one budget: on some of the samples, and the finalists on all of them."""

    loop: ClosedLoop
    predictor: str
    view: str
    limit: float

    def published(self, prior: ErrorPrior, budget: int) -> Iterator[CacheSchedule]:
        for solver, name in itertools.product(PUBLISHED, self._names):
            try:
                yield plan_schedule(prior, budget, solver=solver, predictor=name, view=self.view)
            except InfeasibleBudgetError:  # the CEM rule has holes
                continue

    def own(self, prior: ErrorPrior, budget: int) -> Iterator[CacheSchedule]:
        for name in dict.fromkeys((self.predictor, *self._names)):
            planned = plan_schedule(prior, budget, predictor=name, view=self.view)
            yield planned
            yield improve(prior, planned, predictors=self._choices if name == AUTO else (), view=self.view)
        yield plan_predicted(prior, budget, predictor=self.predictor, view=self.view)

    @property
    def _names(self) -> tuple[str, ...]:
        return WHOLE_PREDICTORS if self.predictor == AUTO else (self.predictor,)

    @property
    def _choices(self) -> tuple[str, ...]:
        return SEGMENT_PREDICTORS if self.predictor == AUTO else ()

    def best(self, budget: int) -> Trial:
        """The best trial of a budget once the effort is spent: never worse on the samples than what was published."""
        loop, prior = self.loop, self.loop.fit(self.view).prior
        published = [loop.run(schedule) for schedule in self.published(prior, budget)]
        self.explore(budget, self.limit - self._finals(budget))
        floor = max((trial.psnr_db for trial in published), default=-math.inf)
        return self._ranked([t for t in self._finalists(budget) + published if t.psnr_db >= floor])[0]

    def explore(self, budget: int, limit: float) -> Trial:
        """Search on the searched samples until ``limit`` is spent; the best of them so far."""
        loop = self.loop
        cost = loop.cost(budget, SEARCHED)
        prior = loop.fit(self.view).prior
        for index, schedule in enumerate(self.own(prior, budget)):
            if index == 0 or loop.spent + cost <= limit:
                loop.run(schedule, share=SEARCHED)
        while loop.spent + cost <= limit and (move := self._next(budget)):
            loop.run(move, share=SEARCHED)
        return self._ranked(self._tried(budget))[0]

    def _next(self, budget: int) -> CacheSchedule | None:
        """The most promising neighbour of the best schedule that has any which were not run."""
        prior = self.loop.fit(self.view).prior
        known = {trial.schedule.key for trial in self.loop.plain()}
        for incumbent in self._ranked(self._tried(budget)):
            start = incumbent.schedule
            further = improve(prior, start, predictors=self._choices, view=self.view, moves=4)
            moves = [move for move in (*neighbours(start, self._choices), further) if move.key not in known]
            if moves:
                return min(moves, key=lambda move: prior.final_error(move.served, self.view))
        return None

    def _finals(self, budget: int) -> float:
        """What it costs to run the finalists on the samples that the search has not run them on."""
        return FINALISTS * (self.loop.cost(budget) - self.loop.cost(budget, SEARCHED))

    def _finalists(self, budget: int, count: int = FINALISTS) -> list[Trial]:
        return [self.loop.run(trial.schedule) for trial in self._ranked(self._tried(budget))[:count]]

    def _tried(self, budget: int) -> list[Trial]:
        """What a plan of this budget may be."""
        return [
            trial
            for trial in self.loop.plain()
            if trial.schedule.budget <= budget
            and (self.predictor == AUTO or set(trial.schedule.predictors) == {self.predictor})
        ]

    def _ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """Best first, by what was measured on the samples they share and what is predicted together.

        The best of many measured on a few samples is partly lucky. Both are noisy estimates of the same thing, so each
        weighs as much as the other is uncertain.
        """
        samples = min(trial.samples for trial in trials)
        found = np.array([trial.sample_psnr_db[:samples] for trial in trials])
        centered = found - found.mean(0)
        score = _middle_mean(centered)
        if samples > 1:  # one sample says nothing about its noise
            fit = self.loop.fit(self.view)
            predicted = np.array([psnr_of(fit.prior.final_error(t.schedule.served, self.view)) for t in trials])
            noise = _middle_error(centered).mean() ** 2
            misfit = (DB_PER_LOG * fit.rms_log_error) ** 2
            share = noise / (noise + misfit) if noise + misfit else 0.0
            score = (1 - share) * score + share * (predicted - predicted.mean())
        return [trials[index] for index in np.argsort(-score, kind="stable")]

    def with_skipped_branches(self, chosen: Trial, fix: Correction | None) -> tuple[Trial, Correction | None]:
        """What is better at the same compute: ``chosen``, or more steps of which some compute one branch of guidance.

        Where one call of the denoiser holds both branches there is none to skip: which rows of which arguments belong
        to which branch is the pipeline's secret.
        """
        loop, budget = self.loop, chosen.schedule.budget
        kept, prior = chosen, loop.fit(self.view).prior
        skippable = loop.calls_per_step >= 2 and loop.cache == "output"
        for share in BRANCH_SHARES if skippable else ():
            more = paid_steps(budget, share, loop.num_steps)
            planned = plan_schedule(prior, more, predictor=self.predictor, view=self.view)
            better = improve(prior, planned, predictors=self._choices, view=self.view)
            for schedule in (skip_branches(each, budget) for each in (planned, better)):
                trial = loop.run(schedule) if schedule.branch_steps else chosen
                gains = trial.sample_psnr_db - chosen.sample_psnr_db
                if trial.psnr_db > kept.psnr_db and _is_certain(gains):
                    kept, fix = trial, None
        return kept, fix

    def fewest(self, wanted: _Wanted) -> Trial:
        """The trial with the fewest full-compute steps that meets what is wanted, by bisection over budgets.

        Raises:
            InfeasibleBudgetError: Not even full compute does.
        """
        loop, full = self.loop, wanted.full
        if wanted.psnr_db is not None and not wanted.met_by(full):
            raise InfeasibleBudgetError(
                f"target_psnr={wanted.psnr_db}: full compute reaches {full.psnr_db:.1f} dB; choose less, or a scheme "
                "with more bits"
            )
        low, high = 2, loop.num_steps
        rounds = math.ceil(math.log2(loop.num_steps))
        while low < high:
            middle = self._likely(low, high, wanted)
            left = self.limit - self._finals(middle) - len(PUBLISHED) * len(self._names) * loop.cost(middle)
            trial = self.explore(middle, loop.spent + (left - loop.spent) / rounds)
            rounds = max(1, rounds - 1)
            if wanted.met_by(trial):
                high = trial.schedule.budget
            else:
                low = middle + 1
        for budget in range(high, loop.num_steps):  # what some samples promised, all of them may not keep
            met = [trial for trial in self._finalists(budget, _RETRIED) if wanted.met_by(trial)]
            if met:
                best = self.best(budget)
                return best if wanted.met_by(best) else self._ranked(met)[0]
        return full

    def _likely(self, low: int, high: int, wanted: _Wanted) -> int:
        """The budget to try next: where the fitted prior expects to meet the target, kept within the inner range."""
        fit = self.loop.fit(self.view).prior
        planned = plan_all(fit, high - 1, predictor=self.predictor, view=self.view) if high > 2 else []
        meets = [
            budget
            for budget, schedule in enumerate(planned, start=2)
            if budget >= low and fit.final_error(schedule.served, self.view) <= wanted.error
        ]
        likely = meets[0] if meets else high - 1
        return min(max(likely, low + (high - low) // 4), high - 1)

    def curve(self, prior: ErrorPrior) -> list[dict[str, Any]]:
        """For every budget, the predicted error of the plan relative to that of full compute, and what was measured."""
        planned = plan_all(prior, self.loop.num_steps - 1, predictor=self.predictor, view=self.view)
        base = prior.final_error(np.eye(self.loop.num_steps), self.view)
        full = self.loop.trials[0]
        points = []
        for budget, schedule in enumerate(planned, start=2):
            tried = [t for t in self.loop.trials if t.schedule.budget == budget and t.schedule.solver != SAMPLE]
            best = max(tried, key=lambda trial: trial.psnr_db, default=None)
            points.append(
                {
                    "budget": budget,
                    "predicted_error": prior.final_error(schedule.served, self.view),
                    "measured_psnr_db": best and best.psnr_db,
                    "measured_relative_l2": best and best.relative_l2,
                }
            )
        points.append(
            {
                "budget": self.loop.num_steps,
                "predicted_error": base,
                "measured_psnr_db": full.psnr_db,
                "measured_relative_l2": full.relative_l2,
            }
        )
        return points
