"""What a pipeline follows: a schedule and a correction for the sampler they were made for, and how they carry over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cemq.errors import InfeasibleBudgetError, InputError, ModelError, choose
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.predict.correctors import NO_CORRECTOR
from cemq.prior.error_prior import ErrorPrior
from cemq.schedule import (
    AUTO,
    SEARCH,
    CacheSchedule,
    parse_budget,
    plan_branches,
    plan_predicted,
    stretched,
    suited_corrector,
)
from cemq.schedule.rectify import Correction
from cemq.schedule.solvers import Aims

CACHES = ("output", "residual", "modules")
INSIDE = "inside"  # of policies that answer calls of blocks and modules themselves


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """``prior`` was measured under ``sampler``; without one nothing can be planned anew. No sampler means any.

    ``others`` are what the bundle was planned with for other step counts.

    ``cache`` says what skipped steps are predicted from: the denoiser's ``output``, the ``residual`` of its blocks, or
    the outputs of their attention and feed-forward ``modules``; the rest of the denoiser is computed. Raises InputError
    for anything else, and for anything but the output where the schedule skips branches of guidance. A policy may have
    ``inside`` too, see `cemq.runtime.policies.Inside`.
    """

    schedule: CacheSchedule
    sampler: SamplerFingerprint | None
    prior: ErrorPrior | None = None
    correction: Correction | None = None
    view: str = "combined"
    cache: str = "output"
    solver: str = SEARCH
    predictor: str = AUTO
    others: tuple[Plan, ...] = ()

    def __post_init__(self) -> None:
        if self.cache != INSIDE:
            choose("cache", self.cache, CACHES)
        if self.schedule.branch_steps and self.cache != "output":
            raise InputError(f"cache={self.cache}: branches of guidance are skipped one by one with cache=output only")
        if self.schedule.corrects and self.cache != "output":
            raise InputError(f"cache={self.cache}: skipped steps are corrected later with cache=output only")

    @property
    def own_sampler(self) -> SamplerFingerprint:
        """That of a plan that was made for one."""
        assert self.sampler is not None
        return self.sampler

    def with_budget(self, budget: int | str) -> Plan:
        """The same with a schedule of that budget; as it is, if it has that budget: its schedule may have been run.

        Raises:
            ModelError: There is no prior to plan from.
            InfeasibleBudgetError: The budget is out of range.
        """
        if self.prior is None or self.sampler is None:
            raise ModelError("this schedule came without an error prior: load a bundle to plan another budget")
        if parse_budget(budget, self.prior.num_steps) == self.schedule.budget:
            return self
        return self._planned(self.prior, self.sampler, budget)

    def lean(self) -> Plan:
        """The same without what only corrections are made of, if it has none: at many steps most of a prior."""
        if self.prior is None or self.correction is not None:
            return self
        nothing = {"channel_means": np.zeros((2, 0, 0)), "channel_grams": np.zeros((2, 0, 0, 0))}
        return replace(self, prior=replace(self.prior, **nothing))

    def carried_over(self, sampler: SamplerFingerprint) -> Plan | None:
        """The plan for other timesteps of the same sampler, at the same compute ratio; None where it says nothing.

        One of ``others`` if it was made for these timesteps, else planned from the prior.
        """
        for other in self.others:
            if sampler.ends_like(other.own_sampler):
                return other
        if self.prior is None or self.sampler is None or not self.sampler.carries_over(sampler):
            return None
        prior = self.prior.resampled(sampler)
        budget = min(max(2, round(prior.num_steps / self.schedule.compute_ratio)), prior.num_steps)
        try:
            return self._planned(prior, sampler, budget)
        except InfeasibleBudgetError:  # the CEM rule has holes
            return self._planned(prior, sampler, budget, solver="segment")

    def _planned(
        self, prior: ErrorPrior, sampler: SamplerFingerprint, budget: int | str, solver: str | None = None
    ) -> Plan:
        corrector = self.schedule.corrector
        if corrector == NO_CORRECTOR and self.cache == "output":  # it may pay at this budget
            corrector = suited_corrector(prior, budget, predictor=self.predictor, view=self.view)
        aims: Aims = {"corrector": corrector, "view": self.view}
        solver, predictor = solver or self.solver, self.predictor
        if solver == SEARCH and not prior.is_fitted:  # local search then believes what is not so, by up to 7 dB
            solver, predictor = "segment", "taylor1" if predictor == AUTO else predictor
        share = 1 - len(self.schedule.branch_steps) / len(self.schedule.full_steps)
        if solver == SEARCH and share == 1:
            count = parse_budget(budget, prior.num_steps)
            full_steps = list(self.schedule.full_steps)
            places: Sequence[float] = full_steps
            if sampler is not self.sampler:
                places = self.own_sampler.places_in(sampler)[full_steps].tolist()
            known = replace(stretched(self.schedule, places, prior.num_steps, count), corrector=corrector)
            schedule = plan_predicted(prior, count, predictor=predictor, known=known, **aims)
        else:
            solver = "segment" if solver == SEARCH else solver
            schedule = plan_branches(prior, budget, share, solver=solver, predictor=predictor, **aims)
        correction = self.correction and self.correction.carried_over(prior, schedule)
        return replace(self, schedule=schedule, sampler=sampler, prior=prior, correction=correction, others=())
