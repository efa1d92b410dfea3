"""Plans that are run before they are believed.

A plan is a prediction from recorded trajectories. Here schedules are run in closed loop on calibration samples that
were not profiled: first a few to learn how errors reach the final sample (`cemq.propagation`), then the candidates of
several solvers, then the neighbours of the best one, most promising first. Every run sharpens the predictions for the
next. The best that was run is kept, so it is never worse on these samples than ``uniform`` or ``cem``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cemq.correction import METHODS, Correction, make_correction
from cemq.errors import InfeasibleBudgetError, InputError, choose
from cemq.evaluation import Outcome, run_batch
from cemq.evaluation.metrics import PSNR_CEILING_DB, error_of, psnr_db, psnr_of, relative_l2
from cemq.predict import PREDICTORS
from cemq.prior import ErrorPrior
from cemq.processes import ALONE, Processes
from cemq.propagation import Fit, fit_propagation, sample_schedules
from cemq.runtime import Plan, attached
from cemq.sampling import Batch
from cemq.schedule import (
    AUTO,
    SOLVERS,
    CacheSchedule,
    check_budget,
    improve,
    neighbours,
    plan_all,
    plan_schedule,
    skip_branches,
)

SEARCH = "search"  # the solver that is all of this module
AUTO_BUDGET = "auto"
PUBLISHED = ("uniform", "cem")  # solvers that no plan may be worse than
DB_PER_LOG = 20 / math.log(10)  # decibels of a factor e in error
SEGMENT_PREDICTORS = ("reuse", "damped", "taylor1", "taylor2")  # that the search gives to single segments
WHOLE_PREDICTORS = ("taylor1", "taylor2")  # that candidates are made for
BRANCH_SHARES = (0.5, 0.75, 0.9)  # of the full-compute steps that compute both branches of guidance
_FIT_SHARE = 0.45  # of the effort goes into runs that only teach
_TAUGHT_SHARE = 2 / 3  # of the samples for those: more runs teach more than more samples do


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What planning may cost, in runs at full compute of the planning samples."""

    full_runs: float
    fitted_to: int


EFFORTS = {
    "quick": Effort(full_runs=5, fitted_to=8),
    "normal": Effort(full_runs=15, fitted_to=27),
    "thorough": Effort(full_runs=60, fitted_to=40),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """One schedule that was run: relative L2 error of the final latents, and PSNR of each image, to full precision."""

    schedule: CacheSchedule
    correction: str | None
    relative_l2: float
    sample_psnr_db: np.ndarray

    @property
    def psnr_db(self) -> float:
        return float(self.sample_psnr_db.mean())

    @property
    def samples(self) -> int:
        return len(self.sample_psnr_db)

    @property
    def is_plain(self) -> bool:
        """Whether its error is one that the prior predicts."""
        return self.correction is None and not self.schedule.branch_steps

    @property
    def error(self) -> float:
        """Of the images, for a peak of 1: the mean over samples is one of logarithms, as PSNR's is."""
        return error_of(self.psnr_db)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule.to_dict(),
            "correction": self.correction,
            "samples": self.samples,
            "relative_l2": self.relative_l2,
            "psnr_db": self.psnr_db,
        }


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The plan that won, the prior it was made from, and the evidence: every trial and the predicted curve."""

    schedule: CacheSchedule
    correction: Correction | None
    prior: ErrorPrior
    evidence: dict[str, Any]


@dataclass(kw_only=True, eq=False)
class ClosedLoop:
    """Runs schedules on the planning samples and remembers every outcome.

    Args:
        pipe: The quantized pipeline.
        prior: Its error prior.
        batches: The planning samples.
        references: What the full-precision pipeline made of this process's share of them.
        steps: ``num_inference_steps`` of every run.
        cache: What skipped steps are predicted from; the prior's predictions are those of outputs all the same.
    """

    pipe: Any
    prior: ErrorPrior
    batches: Sequence[Batch]
    references: Sequence[Outcome]
    steps: int
    call: Mapping[str, Any]
    cache: str = "output"
    progress: Callable[[float], None] | None = None
    processes: Processes = ALONE
    trials: list[Trial] = field(default_factory=list)
    spent: float = 0.0  # runs at full compute
    calls_per_step: float = math.nan  # of the denoiser, in the latest run

    @property
    def num_steps(self) -> int:
        """What the sampler makes of ``steps``: PNDM adds one, image-to-image strength takes some away."""
        return self.prior.num_steps

    def teach(self, schedule: CacheSchedule) -> Trial:
        """A run on some of the samples only, to learn from."""
        return self._run(schedule, None, self.batches[: math.ceil(_TAUGHT_SHARE * len(self.batches))])

    def run(self, schedule: CacheSchedule, correction: Correction | None = None) -> Trial:
        """The trial of a schedule on all samples, run unless it was run before."""
        return self._run(schedule, correction, self.batches)

    def _run(self, schedule: CacheSchedule, correction: Correction | None, batches: Sequence[Batch]) -> Trial:
        method, samples = None if correction is None else correction.method, _count(batches)
        for known in self.trials:
            if _same(known.schedule, schedule) and known.correction == method and known.samples >= samples:
                return known
        # each process plans for itself, from the same numbers; on unequal machines they might come to differ
        self.processes.agree("the schedule to run", (schedule.to_dict(), method))
        mine = self.processes.share(batches)
        sampler = self.prior.metadata.sampler
        followed = Plan(schedule=schedule, sampler=sampler, correction=correction, cache=self.cache)
        with attached(self.pipe, followed) as hook:
            outcomes = [run_batch(self.pipe, batch, steps=self.steps, call=self.call) for batch in mine]
        calls = np.full(1, (hook.full_evaluations + hook.skipped_evaluations) / self.num_steps)
        scores = [
            (relative_l2(reference.latents, outcome.latents), psnr_db(reference.images, outcome.images), calls)
            for reference, outcome in zip(self.references[: len(mine)], outcomes, strict=True)
        ]
        errors, qualities, calls = (np.concatenate(each) for each in zip(*self.processes.gather(scores), strict=True))
        self.calls_per_step = float(calls[0])
        trial = Trial(
            schedule=schedule, correction=method, relative_l2=float(errors.mean()), sample_psnr_db=qualities
        )  # fmt: skip
        self.trials.append(trial)
        self.spent += self.cost(trial)
        if self.progress:
            self.progress(self.spent)
        return trial

    @property
    def samples(self) -> int:
        return _count(self.batches)

    def cost(self, trial: Trial) -> float:
        """In runs of all samples at full compute."""
        return trial.samples / self.samples * trial.schedule.budget / trial.schedule.num_steps

    @property
    def candidates(self) -> list[Trial]:
        """What plans are chosen from: without a correction, on all samples, with both branches of guidance."""
        return [trial for trial in self.trials if trial.is_plain and trial.samples == self.samples]

    def fit(self, view: str) -> Fit:
        """What all uncorrected trials so far say about how errors reach the final image."""
        plain = [t for t in self.trials if t.is_plain and t.psnr_db < PSNR_CEILING_DB]
        samples = min((t.samples for t in plain), default=0)  # that all of them were run on
        errors = [error_of(t.sample_psnr_db[:samples].mean()) for t in plain]
        return fit_propagation(self.prior, [t.schedule for t in plain], errors, view=view)


def _count(batches: Sequence[Batch]) -> int:
    return sum(len(batch.seeds) for batch in batches)


def _same(one: CacheSchedule, other: CacheSchedule) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ("full_steps", "predictors", "branch_steps"))


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
    full = loop.run(CacheSchedule(num_steps=loop.num_steps, full_steps=range(loop.num_steps), solver="full"))
    loop.spent = 0.0  # its error is what all others are measured by, not part of the search
    if budget == AUTO_BUDGET and target_psnr is None and not full.relative_l2:
        raise InputError("budget=auto: full compute has no error without quantization, so give a target PSNR")
    taught = ("taylor1", "reuse") if predictor == AUTO else (predictor,)
    samples = sample_schedules(loop.num_steps, effort_limits.fitted_to, taught, seed=0)
    learned: list[Trial] = []
    for schedule in samples:
        if sum(map(loop.cost, learned)) < _FIT_SHARE * effort_limits.full_runs:
            trial = loop.teach(schedule)
            learned += [trial] if trial not in learned else []
    loop.spent = sum(map(loop.cost, learned))  # also where an earlier plan has run them
    search = _Search(loop=loop, predictor=predictor, view=view, limit=effort_limits.full_runs)
    if budget == AUTO_BUDGET:
        wanted = _Wanted(relative_l2=(1 + tolerance) * full.relative_l2, psnr_db=target_psnr)
        best = search.fewest(wanted)
        steps = best.schedule.budget
    else:
        wanted = None
        steps = check_budget(budget, loop.num_steps, "segment" if solver == SEARCH else solver)
        if steps == loop.num_steps:
            best = full
        elif solver == SEARCH:
            best = search.best(steps)
        else:
            prior = loop.fit(view).prior
            best = loop.run(plan_schedule(prior, steps, solver=solver, predictor=predictor, view=view))
    chosen, fix = _corrected(loop, best, correction)
    if solver == SEARCH and best is not full and correction in (AUTO, "none"):
        chosen, fix = search.with_skipped_branches(chosen, fix)
    fit = loop.fit(view)
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
            "runs": sum(trial.correction is None for trial in loop.trials),
            "rms_log_error": fit.rms_log_error,
            "coherence_steps": fit.prior.coherence,
        },
        "winner": chosen.to_dict(),
        "trials": [trial.to_dict() for trial in loop.trials],
        "curve": curve,
    }
    return Planned(schedule=chosen.schedule, correction=fix, prior=fit.prior, evidence=evidence)


def _corrected(loop: ClosedLoop, best: Trial, correction: str) -> tuple[Trial, Correction | None]:
    """The trial with the correction asked for, or with the best one if it is worth having."""
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
        trial = loop.run(best.schedule, fix)
        if trial.psnr_db > chosen.psnr_db and _is_certain(trial.sample_psnr_db - best.sample_psnr_db):
            chosen, kept = trial, fix
    return chosen, kept


def _is_certain(gains: np.ndarray) -> bool:
    """Whether a gain is greater than its own standard error; of a single sample there is none."""
    return len(gains) == 1 or gains.mean() > _standard_error(gains)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    relative_l2: float
    psnr_db: float | None

    def met_by(self, trial: Trial) -> bool:
        if self.psnr_db is not None:
            return trial.psnr_db >= self.psnr_db
        return trial.relative_l2 <= self.relative_l2


@dataclass(frozen=True, kw_only=True, eq=False)
class _Search:
    loop: ClosedLoop
    predictor: str
    view: str
    limit: float

    def candidates(self, prior: ErrorPrior, budget: int) -> Iterator[CacheSchedule]:
        """What the solvers propose, what was published first."""
        names = WHOLE_PREDICTORS if self.predictor == AUTO else (self.predictor,)
        for solver, name in itertools.product(PUBLISHED, names):
            try:
                yield plan_schedule(prior, budget, solver=solver, predictor=name, view=self.view)
            except InfeasibleBudgetError:  # the CEM rule has holes
                continue
        own = SEGMENT_PREDICTORS if self.predictor == AUTO else ()
        for name in dict.fromkeys((self.predictor, *names)):
            planned = plan_schedule(prior, budget, predictor=name, view=self.view)
            yield planned
            yield improve(prior, planned, predictors=own if name == AUTO else (), view=self.view)

    def best(self, budget: int, limit: float | None = None) -> Trial:
        """The best trial of a budget once the effort is spent."""
        limit, loop = limit or self.limit, self.loop
        cost = budget / loop.num_steps
        reserved = 0.0 if loop.spent + 2 * cost > limit else cost
        prior = loop.fit(self.view).prior
        own = 0
        for schedule in self.candidates(prior, budget):
            own += schedule.solver not in PUBLISHED
            if own <= 1 or loop.spent + reserved < limit:  # at the least what was published, and one of our own
                loop.run(schedule)
        while loop.spent + cost <= limit:
            incumbent = self._incumbent(budget)
            prior = loop.fit(self.view).prior
            own = SEGMENT_PREDICTORS if self.predictor == AUTO else ()
            moves = {move.full_steps + move.predictors: move for move in neighbours(incumbent.schedule, own)}
            further = improve(prior, incumbent.schedule, predictors=own, view=self.view, rounds=4)
            moves[further.full_steps + further.predictors] = further
            for trial in loop.trials:
                moves.pop(trial.schedule.full_steps + trial.schedule.predictors, None)
            if not moves:
                break
            ranked = sorted(moves.values(), key=lambda move: prior.final_error(move.served, self.view))
            loop.run(ranked[0])
        return self._incumbent(budget)

    def _incumbent(self, budget: int) -> Trial:
        """The trial that is best by what was measured and what is predicted together.

        The best of many measured on a few samples is partly lucky. Both are noisy estimates of the same thing, so each
        weighs as much as the other is uncertain; but none is chosen that measured worse than what was published.
        """
        tried = [trial for trial in self.loop.candidates if trial.schedule.budget <= budget]
        allowed = [trial for trial in tried if self._is_allowed(trial.schedule)]
        published = [trial.psnr_db for trial in allowed if trial.schedule.solver in PUBLISHED]
        allowed = [trial for trial in allowed if trial.psnr_db >= max(published, default=-math.inf)]
        found = np.array([trial.sample_psnr_db for trial in allowed])
        if found.size == len(found):  # one trial or one sample says nothing about its noise
            return allowed[int(found.mean(1).argmax())]
        fit = self.loop.fit(self.view)
        predicted = np.array([psnr_of(fit.prior.final_error(trial.schedule.served, self.view)) for trial in allowed])
        centered = found - found.mean(0)
        noise = np.mean([_standard_error(row) for row in centered]) ** 2
        misfit = (DB_PER_LOG * fit.rms_log_error) ** 2
        share = noise / (noise + misfit) if noise + misfit else 0.0
        measured = centered.mean(1)
        return allowed[int(((1 - share) * measured + share * (predicted - predicted.mean())).argmax())]

    def _is_allowed(self, schedule: CacheSchedule) -> bool:
        return self.predictor == AUTO or set(schedule.predictors) == {self.predictor}

    def with_skipped_branches(self, chosen: Trial, fix: Correction | None) -> tuple[Trial, Correction | None]:
        """What is better at the same compute: ``chosen``, or more steps of which some compute one branch of guidance.

        Where one call of the denoiser holds both branches there is none to skip: which rows of which arguments belong
        to which branch is the pipeline's secret.
        """
        loop, budget = self.loop, chosen.schedule.budget
        kept, prior = chosen, loop.fit(self.view).prior
        own = SEGMENT_PREDICTORS if self.predictor == AUTO else ()
        for share in BRANCH_SHARES if loop.calls_per_step >= 2 else ():
            more = min(round(2 * budget / (1 + share)), loop.num_steps)
            planned = plan_schedule(prior, more, predictor=self.predictor, view=self.view)
            better = improve(prior, planned, predictors=own, view=self.view)
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
        loop = self.loop
        full = loop.trials[0]
        if not wanted.met_by(full):
            raise InfeasibleBudgetError(
                f"target_psnr={wanted.psnr_db}: full compute reaches {full.psnr_db:.1f} dB; choose less, or a scheme "
                "with more bits"
            )
        low, high, found = 2, loop.num_steps, full
        rounds = max(1, math.ceil(math.log2(loop.num_steps)))
        while low < high:
            middle = self._likely(low, high, wanted, full)
            share = loop.spent + (self.limit - loop.spent) / rounds
            trial = self.best(middle, limit=share)
            rounds = max(1, rounds - 1)
            if wanted.met_by(trial):
                found, high = trial, trial.schedule.budget
            else:
                low = middle + 1
        return found

    def _likely(self, low: int, high: int, wanted: _Wanted, full: Trial) -> int:
        """The budget to try next: where the fitted prior expects to meet the target, kept within the inner range."""
        fit = self.loop.fit(self.view).prior
        if wanted.psnr_db is None:
            limit = full.error * wanted.relative_l2 / full.relative_l2
        else:
            limit = 10 ** (-wanted.psnr_db / 20)
        planned = plan_all(fit, high - 1, predictor=self.predictor, view=self.view) if high > 2 else []
        meets = [
            budget
            for budget, schedule in enumerate(planned, start=2)
            if budget >= low and fit.final_error(schedule.served, self.view) <= limit
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
            tried = [t for t in self.loop.trials if t.schedule.budget == budget and t.schedule.solver != "sample"]
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
