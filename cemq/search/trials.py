"""Schedules run in closed loop on the planning samples, and what each run gave."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cemq.metrics import PSNR_CEILING_DB, error_of, psnr_db, relative_l2
from cemq.pipelines.batches import Batch
from cemq.predict.correctors import NO_CORRECTOR
from cemq.prior.error_prior import ErrorPrior
from cemq.runtime import attached
from cemq.runtime.runner import Outcome, Runner
from cemq.schedule import FULL, CacheSchedule, full_compute
from cemq.schedule.plan import Plan
from cemq.schedule.rectify import Correction
from cemq.search.propagation import SAMPLE, Fit, fit_propagation
from cemq.search.settings import SearchSettings

if TYPE_CHECKING:
    from cemq.runtime.attach import ScheduleHook


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """One schedule that was run: of each sample, the relative L2 error of the final latents and the image's PSNR.

    Both are to full precision. Trials on fewer samples were run on the first ones, but calibration runs on those
    from ``part_from`` on. ``full_steps`` is how many steps were computed, the mean over samples: not always as planned,
    for there may be nothing to serve one from.
    """

    schedule: CacheSchedule
    correction: str | None
    sample_relative_l2: np.ndarray
    sample_psnr_db: np.ndarray
    full_steps: float
    part_from: int | None = None

    @property
    def budget(self) -> int:
        """What it costs, in full-compute steps; a part of one counts as one."""
        return math.ceil(self.full_steps)

    @property
    def compute_ratio(self) -> float:
        return self.schedule.num_steps / self.full_steps

    @property
    def relative_l2(self) -> float:
        return float(self.sample_relative_l2.mean())

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
            "first_sample": self.part_from or 0,
            "full_steps": self.full_steps,
            "relative_l2": self.relative_l2,
            "psnr_db": self.psnr_db,
        }


class _Scores(NamedTuple):
    """Of each sample of a batch its error and its PSNR; how many steps were computed, and how often the denoiser was
    called."""

    relative_l2: list[float]
    psnr_db: list[float]
    full_steps: float
    evaluations: int

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first three, one number a sample."""
        return np.array(self.relative_l2), np.array(self.psnr_db), np.full(len(self.psnr_db), self.full_steps)


@dataclass(kw_only=True, eq=False)
class ClosedLoop:
    """Runs schedules on the planning samples and remembers every outcome.

    Args:
        runner: The quantized pipeline.
        prior: Its error prior.
        batches: The planning samples, and others that a schedule is run on only where more samples are asked for.
        references: What the full-precision pipeline made of this process's share of them.
        planned: How many of the batches are the planning samples; None: all.
        cache: What skipped steps are predicted from; the prior's predictions are those of outputs all the same.
        on_spent: Told after each trial what has been spent so far.
        journal: What this process's runs gave, by what was run, as plain data. The search follows from it alone, so
            that one which is begun again with the journal of one that was broken off is soon where that was.
    """

    runner: Runner
    prior: ErrorPrior
    batches: Sequence[Batch]
    references: Sequence[Outcome]
    planned: int | None = None
    cache: str = "output"
    on_spent: Callable[[float], None] | None = None
    journal: MutableMapping[str, Any] = field(default_factory=dict)
    spent: float = 0.0  # full generations of one sample
    calls_per_step: float = math.nan  # of the denoiser, in the latest run
    _trials: dict[Any, Trial] = field(default_factory=dict)
    _batches_run: dict[Any, int] = field(default_factory=dict)
    _fits: dict[Any, Fit] = field(default_factory=dict)  # to all that has been run so far

    @property
    def num_steps(self) -> int:
        """What the sampler makes of the runner's steps: PNDM adds one, image-to-image strength takes some away."""
        return self.prior.num_steps

    @property
    def samples(self) -> int:
        """To plan on."""
        return _count(self.batches[: self.planned])

    @property
    def most_samples(self) -> int:
        """With those that are run on only where more are asked for."""
        return _count(self.batches)

    @property
    def trials(self) -> list[Trial]:
        """In the order in which they were first run."""
        return list(self._trials.values())

    def run(
        self, schedule: CacheSchedule, correction: Correction | None = None, *, samples: int | None = None
    ) -> Trial:
        """The trial of a schedule on the first ``samples`` at the least, in whole batches; None takes those to plan on.

        Only what was not run before is run now.
        """
        return self._run(schedule, correction, range(self._batches_of(samples)))

    def full(self) -> Trial:
        """The trial of full compute on the samples to plan on."""
        return self.run(full_compute(self.num_steps))

    def calibrate(self, schedule: CacheSchedule, number: int, *, share: float = SearchSettings.calibrated) -> Trial:
        """Run a schedule for what it says about how errors spread, on a ``share`` of the samples or more.

        How errors spread differs from sample to sample, so a few samples for each calibration run, but all of them in
        turn by its ``number``, say as much as twice as many that are always the same.
        """
        count = self._batches_of(None)
        parts = min(max(1, round(1 / share)), count)
        part = number % parts
        return self._run(schedule, None, range(part * count // parts, (part + 1) * count // parts), calibrates=True)

    def _run(
        self, schedule: CacheSchedule, correction: Correction | None, wanted: range, calibrates: bool = False
    ) -> Trial:
        part_from = _count(self.batches[: wanted.start]) if calibrates else None
        key = (schedule.key, correction and correction.method, part_from)
        known = self._trials.get(key)
        missing = range(self._batches_run.get(key, wanted.start), wanted.stop)
        if known is not None and not missing:
            return known
        # each process plans for itself, from the same numbers; on unequal machines they might come to differ
        self.runner.processes.agree("the schedule to run", key)
        references = dict(zip(self.runner.processes.share(range(len(self.batches))), self.references, strict=True))
        followed = Plan(schedule=schedule, sampler=self.prior.sampler, correction=correction, cache=self.cache)
        with attached(self.runner.pipe, followed) as hook:
            mine = {
                index: self._scores(index, references[index], key, hook) for index in missing if index in references
            }
        found = self.runner.processes.gather([mine])
        self.calls_per_step = max(theirs[max(theirs)].evaluations for theirs in found if theirs) / self.num_steps
        scores = {index: each for theirs in found for index, each in theirs.items()}
        errors, qualities, counts = (
            np.concatenate(each) for each in zip(*(scores[index].arrays for index in missing), strict=True)
        )
        full_steps = float(counts.mean())
        self.spent += len(counts) * full_steps / self.num_steps
        if known:
            errors = np.concatenate([known.sample_relative_l2, errors])
            qualities = np.concatenate([known.sample_psnr_db, qualities])
            full_steps = float(np.average([known.full_steps, full_steps], weights=[known.samples, len(counts)]))
        trial = self._trials[key] = Trial(
            schedule=known.schedule if known else schedule,
            correction=correction and correction.method,
            sample_relative_l2=errors,
            sample_psnr_db=qualities,
            full_steps=full_steps,
            part_from=part_from,
        )
        self._batches_run[key] = missing.stop
        self._fits.clear()
        if self.on_spent:
            self.on_spent(self.spent)
        return trial

    def _scores(self, index: int, reference: Outcome, key: Any, hook: ScheduleHook) -> _Scores:
        """Those of a batch, which is run unless the journal says what that gave."""
        name = hashlib.sha256(repr((key, index)).encode()).hexdigest()[:24]
        if name in self.journal:
            scores = _Scores(*self.journal[name])
            self.runner.count(scores.full_steps * len(self.batches[index].seeds))
            return scores
        outcome = self.runner.run_one(self.batches[index])
        scores = _Scores(
            relative_l2=relative_l2(reference.latents, outcome.latents).tolist(),
            psnr_db=psnr_db(reference.images, outcome.images).tolist(),
            full_steps=float(outcome.full_steps),
            evaluations=hook.full_evaluations + hook.skipped_evaluations,
        )
        self.journal[name] = [*scores]
        return scores

    def _batches_of(self, samples: int | None) -> int:
        """How many batches hold the first ``samples``, all if there are no more; of None those to plan on."""
        if samples is None:
            return len(self.batches[: self.planned])
        held = np.cumsum([len(batch.seeds) for batch in self.batches])
        return min(int(np.searchsorted(held, samples)) + 1, len(held))

    def cost(self, budget: int, samples: int | None = None) -> float:
        """Of one run with that many full-compute steps, in full generations of one sample."""
        return _count(self.batches[: self._batches_of(samples)]) * budget / self.num_steps

    def plain(self) -> list[Trial]:
        """Trials, calibration runs apart, whose error is one that the prior predicts."""
        return [trial for trial in self.trials if trial.is_plain and trial.part_from is None]

    def fit(self, view: str, *, repeated: float = 1.0) -> Fit:
        """What all plain trials so far say about how errors reach the final image.

        Those that were not drawn to calibrate count ``repeated`` each. With a corrector errors spread otherwise: where
        all calibration runs had one, trials without say nothing, and the other way round. What was run on the same
        samples is compared with each other, and with full compute where that was run.
        """
        if (view, repeated) not in self._fits:
            self._fits[view, repeated] = self._fitted(view, repeated)
        return self._fits[view, repeated]

    def _fitted(self, view: str, repeated: float) -> Fit:
        drawn = [trial.schedule.corrector for trial in self.trials if trial.schedule.solver == SAMPLE]
        corrects = {name != NO_CORRECTOR for name in drawn or [NO_CORRECTOR]}
        alike = [
            trial
            for trial in self.trials
            if trial.is_plain
            and trial.psnr_db < PSNR_CEILING_DB
            and (trial.schedule.solver == FULL or trial.schedule.corrects in corrects)
        ]
        schedules, errors, counts, groups = [], [], [], []
        full = [trial for trial in alike if trial.schedule.solver == FULL]
        for number, (start, shared) in enumerate(dict.fromkeys((trial.part_from, trial.samples) for trial in alike)):
            group = [(trial, 0) for trial in alike if (trial.part_from, trial.samples) == (start, shared)]
            group += [(trial, start or 0) for trial in full if (trial, 0) not in group]
            for trial, first in group:
                schedules.append(trial.schedule)
                errors.append(error_of(trial.sample_psnr_db[first : first + shared].mean()))
                counts.append(1.0 if trial.schedule.solver in (FULL, SAMPLE) else repeated)
                groups.append(number)
        corrector = next((name for name in drawn if name != NO_CORRECTOR), NO_CORRECTOR)
        prior = self.prior.with_corrector(corrector)
        if len(schedules) < SearchSettings.least_fitted:
            return Fit(prior=prior, rms_log_error=math.inf)
        return fit_propagation(prior, schedules, errors, counts=counts, groups=groups, view=view)


def _count(batches: Sequence[Batch]) -> int:
    return sum(len(batch.seeds) for batch in batches)
