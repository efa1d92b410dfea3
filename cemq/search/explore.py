"""The search for the best schedule of a budget, or for the fewest steps that will do, in closed loop.

Candidates first, then the neighbours of the best, most promising first; every run sharpens the predictions for the
next. All this is done on some of the samples. What they say is partly luck, so trials are ranked by what was measured
and what is predicted together, and the few best then meet what was published on all samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from cemq.errors import InfeasibleBudgetError
from cemq.metrics import error_of, middle_error, middle_mean, psnr_of
from cemq.predict.correctors import NO_CORRECTOR
from cemq.prior.error_prior import ErrorPrior
from cemq.schedule import (
    AUTO,
    FULL,
    SEARCH,
    SEGMENT_PREDICTORS,
    CacheSchedule,
    improve,
    neighbours,
    paid_steps,
    plan_all,
    plan_predicted,
    plan_schedule,
    skip_branches,
)
from cemq.schedule.rectify import Correction
from cemq.schedule.solvers import Aims
from cemq.search.propagation import SAMPLE
from cemq.search.settings import PlanSettings
from cemq.search.trials import ClosedLoop, Trial

PUBLISHED = ("uniform", "cem")  # solvers that no plan may be worse than
_FURTHER = 1.6  # how much more, or less, is expected of the next budget to try
DB_PER_LOG = 20 / math.log(10)  # decibels of a factor e in error


def is_certain(gains: np.ndarray) -> bool:
    """Whether gains of the same samples are more than luck: Student's t-test, one-sided, at 95 %.

    >>> is_certain(np.array([3.0, 9.0])), is_certain(np.array([3.0, 9.0, 4.0, 8.0]))
    (False, True)
    """
    if len(gains) < 2:
        return False  # of a single value nothing is known
    error = gains.std(ddof=1) / math.sqrt(len(gains))
    return bool(gains.mean() > stats.t.ppf(0.95, len(gains) - 1) * error)


def gained(trial: Trial, other: Trial) -> np.ndarray:
    """PSNR of one trial over another's, of the samples that both were run on."""
    shared = min(trial.samples, other.samples)
    return trial.sample_psnr_db[:shared] - other.sample_psnr_db[:shared]


def beats(trial: Trial, best: Trial, first: Trial) -> bool:
    """Whether a trial is better than the best so far, and than the first by more than can be luck."""
    return gained(trial, best).mean() > 0 and is_certain(gained(trial, first))


def affordable(trials: Sequence[Trial], budget: int) -> list[Trial]:
    """Trials that cost no more than a budget, by what was computed; those that cost least, where all cost more."""
    least = min((trial.budget for trial in trials), default=budget)
    return [trial for trial in trials if trial.budget <= max(budget, least)]


def planned(prior: ErrorPrior, budget: int, *, predictor: str, corrector: str, view: str) -> Iterator[CacheSchedule]:
    """What a prior says without any runs, the most reliable first: the dynamic program's schedule for one predictor,
    and what local search on the predicted error makes of it."""
    settings: Aims = {"corrector": corrector, "view": view}
    yield plan_schedule(prior, budget, predictor="taylor1" if predictor == AUTO else predictor, **settings)
    yield plan_predicted(prior, budget, predictor=predictor, **settings)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Of ``budget=auto``: either a target, or an error within ``1 + tolerance`` of the same samples at full compute."""

    full: Trial
    tolerance: float
    psnr_db: float | None

    def met_by(self, trial: Trial) -> bool:
        if self.psnr_db is not None:
            return trial.psnr_db >= self.psnr_db
        excess = trial.sample_relative_l2 - (1 + self.tolerance) * self.full.sample_relative_l2[: trial.samples]
        # with a standard error to spare: what only just passes here fails on half of all other samples
        return bool(middle_mean(excess) + middle_error(excess) <= 0)

    def check(self) -> None:
        """Raises InfeasibleBudgetError where not even full compute is good enough."""
        if self.psnr_db is not None and not self.met_by(self.full):
            raise InfeasibleBudgetError(
                f"target_psnr={self.psnr_db}: full compute reaches {self.full.psnr_db:.1f} dB; choose less, or a "
                "scheme with more bits"
            )

    @property
    def error(self) -> float:
        """Of the images, that the fitted prior is to stay below."""
        return error_of(self.psnr_db) if self.psnr_db is not None else (1 + self.tolerance) * self.full.error


@dataclass(frozen=True, kw_only=True, eq=False)
class Search:
    """Runs schedules in ``loop``, where some were run already, until the effort is spent.

    Args:
        corrector: Of all that is tried but what was published.
        known: A schedule to try as well.
    """

    loop: ClosedLoop
    settings: PlanSettings
    corrector: str
    known: CacheSchedule | None = None

    @property
    def predictor(self) -> str:
        """One for all segments, or ``auto``."""
        return self.settings.predictor

    @property
    def view(self) -> str:
        return self.settings.view

    @property
    def searched(self) -> int:
        """Samples, of those to plan on, that all but calibration runs and finalists run on."""
        return min(self.settings.search.searched, self.loop.samples)

    @property
    def limit(self) -> float:
        """What schedules may take, in full generations of one sample; corrections and branches are tried with the
        rest."""
        kept = self.settings.search.branched if self._skips_branches else 0.0
        return self.everything * (1 - kept) - self.kept_for_corrections

    @property
    def everything(self) -> float:
        """The same with corrections and branches."""
        return self.settings.limit(self.loop.samples)

    @property
    def kept_for_corrections(self) -> float:
        asked, steps = self.settings.rectify, self.loop.num_steps
        if asked == AUTO:
            return self.settings.search.rectified * self.everything if self.settings.fits else 0.0
        return 0.0 if asked == "none" else self.loop.cost(self.settings.full_steps(steps) or steps)

    @property
    def _skips_branches(self) -> bool:
        asked = self.settings.rectify in (AUTO, "none") and self.settings.solver == SEARCH
        return asked and self.loop.calls_per_step >= 2 and self.loop.cache == "output"

    def published(self, prior: ErrorPrior, budget: int, corrector: str = NO_CORRECTOR) -> Iterator[CacheSchedule]:
        for solver, name in itertools.product(PUBLISHED, self._names):
            try:
                yield plan_schedule(prior, budget, solver=solver, predictor=name, corrector=corrector, view=self.view)
            except InfeasibleBudgetError:  # the CEM rule has holes
                continue

    def own(self, prior: ErrorPrior, budget: int) -> Iterator[CacheSchedule]:
        if self.known is not None and self.known.budget <= budget:
            yield self.known
        settings: Aims = {"corrector": self.corrector, "view": self.view}
        for name in dict.fromkeys((self.predictor, *self._names)):
            # taylor2 begins with taylor1's steps, and goes on from there by local search
            planned = plan_schedule(prior, budget, predictor="taylor1" if name == "taylor2" else name, **settings)
            planned = planned if name in (AUTO, "taylor1") else replace(planned, predictor=name)
            yield planned
            yield improve(prior, planned, predictors=self._choices if name == AUTO else (), view=self.view)
        yield plan_predicted(prior, budget, predictor=self.predictor, **settings)
        if self.corrector != NO_CORRECTOR:
            yield from self.published(prior, budget, self.corrector)

    @property
    def _names(self) -> tuple[str, ...]:
        return self.settings.search.whole_predictors if self.predictor == AUTO else (self.predictor,)

    @property
    def _choices(self) -> tuple[str, ...]:
        """Predictors that a segment may be served by instead: without a corrector, for with one such moves exploit what
        is predicted of how the sample strays."""
        return SEGMENT_PREDICTORS if self.predictor == AUTO and self.corrector == NO_CORRECTOR else ()

    def best(self, budget: int) -> Trial:
        """The best trial of a budget once the effort is spent, where it is better than what the prior alone says by
        more than can be luck; never worse on the samples than evenly spaced steps or CEM's, where the effort suffices
        to run these on all of them."""
        fitted = self.loop.fit(self.view).prior
        floors = self._afforded(each for each in self.published(fitted, budget) if each.predictor == self._names[0])
        untaught = self._afforded([next(self._untaught(budget))])
        self.explore(budget, self.limit - self._finalist_cost(budget))
        last = affordable([*self._finalists(budget), *floors, *untaught], budget)
        floor = max((trial.psnr_db for trial in floors if trial in last), default=-math.inf)
        eligible = [trial for trial in last if trial.psnr_db >= floor]
        best, *_ = self.ranked(eligible)
        return next((each for each in untaught if each in eligible and not is_certain(gained(best, each))), best)

    def _afforded(self, schedules: Iterable[CacheSchedule]) -> list[Trial]:
        """Those that the effort suffices to run on all samples, run."""
        loop = self.loop
        return [loop.run(each) for each in schedules if loop.spent + loop.cost(each.budget) <= self.limit]

    def _untaught(self, budget: int) -> Iterator[CacheSchedule]:
        """What the prior says before any run has taught it better."""
        return planned(self.loop.prior, budget, predictor=self.predictor, corrector=self.corrector, view=self.view)

    def picked(self, budget: int) -> Trial:
        """The best of a few schedules that are run while the effort lasts: the first of them, which is what the prior
        alone says, unless another is better by more than can be luck."""
        loop, own = self.loop, self._untaught(budget)
        known = [self.known] if self.known is not None and self.known.budget <= budget else []
        corrected = self.published(loop.prior, budget, self.corrector) if self.corrector != NO_CORRECTOR else ()
        best = first = loop.run(next(own))
        if loop.samples < 2:  # which no other can be certain to be better on
            return first
        for schedule in (*known, *own, *corrected, *self.published(loop.prior, budget)):
            if loop.spent + loop.cost(schedule.budget) <= self.limit:
                trial = self._surer(loop.run(schedule), first.schedule)
                first = loop.run(first.schedule)
                if beats(trial, best, first) and trial.budget <= max(budget, first.budget):
                    best = trial
        return loop.run(best.schedule)  # which others may have had run further

    def _surer(self, trial: Trial, other: CacheSchedule) -> Trial:
        """A trial; where it looks better than another schedule, and that may be luck, both are run on twice as many
        samples, and again, while the effort lasts."""
        loop = self.loop
        while trial.samples < loop.most_samples:
            rival, twice = loop.run(other), 2 * trial.samples
            gains = gained(trial, rival)
            further = [loop.cost(each.budget, twice) - loop.cost(each.budget, each.samples) for each in (trial, rival)]
            cost = sum(max(0.0, each) for each in further)  # the other may have been run on them already
            if gains.mean() <= 0 or is_certain(gains) or loop.spent + cost > self.limit:
                break
            loop.run(other, samples=twice)
            trial = loop.run(trial.schedule, samples=twice)
        return trial

    def fewest_picked(self, wanted: Wanted) -> Trial:
        """What the prior alone plans for the fewest steps that meet what is wanted: for as many as it expects to, then
        for more or fewer, while the effort lasts; on fewer samples where it does not last for all.

        Raises:
            InfeasibleBudgetError: Not even full compute does.
        """
        loop, prior, steps = self.loop, self.loop.prior, self.loop.num_steps
        wanted.check()
        predictor = "taylor1" if self.predictor == AUTO else self.predictor
        plans = plan_all(prior, steps - 1, predictor=predictor, corrector=self.corrector, view=self.view)
        errors = [self._predicted(prior, plan) for plan in plans]
        unskipped = prior.final_error(np.eye(steps), view=self.view)
        best, low, high, most = wanted.full, 2, steps, wanted.error / wanted.full.error - 1
        while low < high:
            # without quantization full compute has no error that others could be set against
            expected = [n for n in range(low, high) if errors[n - 2] <= (1 + most) * unskipped] if unskipped else []
            middle = expected[0] if expected else (low + high) // 2
            left = self.limit - loop.spent
            samples = max((n for n in range(1, loop.samples + 1) if loop.cost(middle, n) <= left), default=0)
            if samples < min(2, loop.samples):  # a single one says nothing about its noise
                break
            trial = loop.run(plans[middle - 2], samples=samples)
            if wanted.met_by(trial):
                best, high, most = trial, middle, most * _FURTHER
            else:
                low, most = middle + 1, most / _FURTHER
        return best

    def explore(self, budget: int, limit: float) -> None:
        """Search on the searched samples until ``limit`` is spent."""
        fitted = self.loop.fit(self.view).prior
        first, *others = self.own(fitted, budget)
        self.loop.run(first, samples=self.searched)  # or nothing would be known of this budget
        for schedule in (*others, *self.published(fitted, budget)):
            self._race(schedule, budget, limit)
        while (move := self._next(budget)) and self._race(move, budget, limit):
            pass

    def _race(self, schedule: CacheSchedule, budget: int, limit: float) -> bool:
        """Run a schedule on more and more of the searched samples: for as long as it is no worse there than the best so
        far, and ``limit`` is not spent. Returns whether it was run at all."""
        loop, tried = self.loop, self._tried(budget)
        best = self.ranked(tried)[0] if tried else None
        samples = self.searched if best is None else -(-self.searched // 4)
        cost, trial = 0.0, None
        while trial is None or trial.samples < self.searched:
            further = loop.cost(budget, samples) - cost
            if loop.spent + further > limit:
                break
            trial, cost, samples = loop.run(schedule, samples=samples), cost + further, 2 * samples
            if best and middle_mean(gained(trial, best)) < 0:
                break
        return trial is not None

    def _predicted(self, prior: ErrorPrior, schedule: CacheSchedule) -> float:
        return prior.final_error(schedule.served, schedule.integrated, self.view)

    def _next(self, budget: int) -> CacheSchedule | None:
        """The most promising neighbour of the best schedule that has any which were not run."""
        prior = self.loop.fit(self.view).prior
        known = {trial.schedule.key for trial in self.loop.plain()}
        for incumbent in self.ranked(self._tried(budget)):
            start = incumbent.schedule
            further = improve(prior, start, predictors=self._choices, view=self.view, moves=4)
            moves = [move for move in (*neighbours(start, self._choices), further) if move.key not in known]
            if moves:
                return min(moves, key=lambda move: self._predicted(prior, move))
        return None

    def _finalist_cost(self, budget: int) -> float:
        """What it costs to run the finalists on the samples that the search has not run them on."""
        return self.settings.search.finalists * (self.loop.cost(budget) - self.loop.cost(budget, self.searched))

    def _finalists(self, budget: int) -> list[Trial]:
        return [
            self.loop.run(trial.schedule)
            for trial in self.ranked(self._tried(budget))[: self.settings.search.finalists]
        ]

    def _tried(self, budget: int) -> list[Trial]:
        """What a plan of this budget may be: of what was run on the searched samples."""
        tried = [
            trial
            for trial in self.loop.plain()
            if trial.schedule.budget <= budget
            and trial.samples >= self.searched
            and (self.predictor == AUTO or set(trial.schedule.predictors) == {self.predictor})
        ]
        return affordable(tried, budget)

    def ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """Best first, by what was measured on the samples they share and what is predicted together.

        The best of many measured on a few samples is partly lucky. Both are noisy estimates of the same thing, so each
        weighs as much as the other is uncertain.
        """
        samples = min(trial.samples for trial in trials)
        found = np.array([trial.sample_psnr_db[:samples] for trial in trials])
        centered = found - found.mean(0)
        score = middle_mean(centered)
        if samples > 1:  # one sample says nothing about its noise
            fit = self.loop.fit(self.view)
            predicted = np.array([psnr_of(self._predicted(fit.prior, t.schedule)) for t in trials])
            noise = middle_error(centered).mean() ** 2
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
        for share in self.settings.search.branch_shares if self._skips_branches else ():
            more = paid_steps(budget, share, loop.num_steps)
            planned = plan_schedule(
                prior, more, predictor=self.predictor, corrector=chosen.schedule.corrector, view=self.view
            )
            better = improve(prior, planned, predictors=self._choices, view=self.view)
            for schedule in (skip_branches(each, budget) for each in (planned, better)):
                affordable = loop.spent + loop.cost(budget) <= self.everything
                trial = loop.run(schedule) if schedule.branch_steps and affordable else chosen
                if beats(trial, kept, chosen):
                    kept, fix = trial, None
        return kept, fix

    def fewest(self, wanted: Wanted) -> Trial:
        """The trial with the fewest full-compute steps that meets what is wanted, also on all samples.

        Raises:
            InfeasibleBudgetError: Not even full compute does.
        """
        loop, full = self.loop, wanted.full
        wanted.check()
        budget = self._least(2, wanted)
        while budget < loop.num_steps:  # what some samples promised, all of them may not keep
            promising = self.ranked(self._meeting(wanted, budget, budget))[: self.settings.search.retried]
            met = [trial for trial in (loop.run(each.schedule) for each in promising) if wanted.met_by(trial)]
            if met:
                best = self.best(budget)
                return best if wanted.met_by(best) else self.ranked(met)[0]
            budget = self._least(budget + 1, wanted)
        return full

    def _least(self, low: int, wanted: Wanted) -> int:
        """The smallest budget from ``low`` on with a schedule that meets what is wanted on the samples it was run on,
        by bisection; that of full compute where there is none."""
        loop = self.loop
        high = self._smallest(wanted, low, loop.num_steps)
        rounds = math.ceil(math.log2(high - low + 1))
        while low < high:
            middle = self._likely(low, high, wanted)
            left = self.limit - self._finalist_cost(middle) - len(PUBLISHED) * len(self._names) * loop.cost(middle)
            self.explore(middle, loop.spent + (left - loop.spent) / rounds)
            rounds = max(1, rounds - 1)
            found = self._smallest(wanted, low, middle)
            low, high = (low, found) if found <= middle else (middle + 1, high)
        return high

    def _meeting(self, wanted: Wanted, low: int, high: int) -> list[Trial]:
        return [t for t in self._tried(high) if low <= t.budget <= high and wanted.met_by(t)]

    def _smallest(self, wanted: Wanted, low: int, high: int) -> int:
        """Budget of a trial from ``low`` to ``high`` that meets what is wanted; that of full compute if none does."""
        budgets = (trial.budget for trial in self._meeting(wanted, low, high))
        return min(budgets, default=self.loop.num_steps)

    def _likely(self, low: int, high: int, wanted: Wanted) -> int:
        """The budget to try next: where the fitted prior expects to meet the target, kept within the inner range."""
        fit = self.loop.fit(self.view).prior
        planned = self._planned(fit, high - 1) if high > 2 else []
        meets = [
            budget
            for budget, schedule in enumerate(planned, start=2)
            if budget >= low and self._predicted(fit, schedule) <= wanted.error
        ]
        likely = meets[0] if meets else high - 1
        return min(max(likely, low + (high - low) // 4), high - 1)

    def _planned(self, prior: ErrorPrior, largest: int) -> list[CacheSchedule]:
        return plan_all(prior, largest, predictor=self.predictor, corrector=self.corrector, view=self.view)

    def curve(self, prior: ErrorPrior) -> list[dict[str, Any]]:
        """For every budget, the predicted error of the plan relative to that of full compute, and what was measured."""
        planned = self._planned(prior, self.loop.num_steps - 1)
        base = prior.final_error(np.eye(self.loop.num_steps), view=self.view)
        points = []
        for budget, schedule in enumerate(planned, start=2):
            tried = [t for t in self.loop.trials if t.budget == budget and t.schedule.solver != SAMPLE]
            best = max(tried, key=lambda trial: trial.psnr_db, default=None)
            points.append(
                {
                    "budget": budget,
                    "predicted_error": self._predicted(prior, schedule),
                    "measured_psnr_db": best and best.psnr_db,
                    "measured_relative_l2": best and best.relative_l2,
                }
            )
        full = next((trial for trial in self.loop.trials if trial.schedule.solver == FULL), None)
        points.append(
            {
                "budget": self.loop.num_steps,
                "predicted_error": base,
                "measured_psnr_db": full and full.psnr_db,
                "measured_relative_l2": full and full.relative_l2,
            }
        )
        return points
