"""What a plan is asked for, and the constants that looking for it stands on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cemq.errors import InputError, choose
from cemq.predict.correctors import CORRECTORS, NO_CORRECTOR, WORTH_CORRECTING
from cemq.predict.predictors import PREDICTORS
from cemq.prior.error_prior import VIEWS
from cemq.schedule import AUTO, SEARCH, SOLVERS, check_budget
from cemq.schedule.rectify import METHODS

if TYPE_CHECKING:
    from cemq.recipe import Recipe

AUTO_BUDGET = "auto"


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What a build takes.

    Args:
        most: Of everything, in full generations of one sample at the build's step count.
        samples: To profile: a reference run each, which quantization is fitted to.
        forced: How many of them are run along with the quantized model, for the prior; 0 for all.
        planning_samples: To run schedules on; the profiled ones first, whose references are there already.
        check_samples: Others, for the fidelity that is written into the bundle.
        search: Full generations that running schedules may take, for each planning sample.
        search_auto: The same where the budget is to be found too; None: no more than that.
        search_elsewhere: And at another step count, in those of that step count.
        also_steps: Whether another step count is planned for, if none is named.
        fits: Whether it is first learnt from runs how errors reach the final sample, and then searched; else a few
            schedules are run. Too few runs teach what is not so.
    """

    most: int
    samples: int
    forced: int = 0
    planning_samples: int = 0
    check_samples: int = 0
    search: float = 2.0
    search_auto: float | None = None
    search_elsewhere: float = 1.0
    also_steps: bool = False
    fits: bool = False


EFFORTS = {
    "instant": Effort(most=2, samples=1),
    "quick": Effort(most=10, samples=5, forced=1, planning_samples=1, check_samples=1),
    "normal": Effort(
        most=40, samples=12, planning_samples=4, check_samples=2, search=1.5, search_auto=2.15, also_steps=True
    ),
    "thorough": Effort(
        most=250,
        samples=16,
        forced=10,
        planning_samples=16,
        check_samples=4,
        search=9.0,
        search_elsewhere=3.5,
        also_steps=True,
        fits=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Constants of the search in closed loop. Nobody has to set one; tests do, to search small.

    They were chosen on the two built-in models; ``docs/planning.md`` tells the experiments.
    """

    searched: int = 16  # samples that all but calibration runs and finalists run on
    calibrated: float = 1 / 8  # of the samples at the least, that a calibration run is run on
    finalists: int = 4
    retried: int = 2  # finalists that meet the target of budget=auto on all samples, or do not
    least_fitted: int = 6  # runs, below which the prior is taken as it was measured
    fitted_to: int = 40  # calibration runs of the budget at most, and a third as many of half of it
    fit_share: float = 0.5  # of the effort at most goes into calibration runs
    fit_share_auto: float = 0.35  # where the search is for a budget too
    rectified: float = 0.15  # of an effort that fits is kept for trying corrections
    branched: float = 0.2  # of the effort is kept for leaving out branches of guidance, where that can be
    repeated: float = 0.25  # what a run of the search counts in the prior that is kept: neighbours say much the same
    whole_predictors: tuple[str, ...] = ("taylor1", "taylor2")  # that candidates are made for
    branch_shares: tuple[float, ...] = (0.5, 0.75, 0.9)  # of full-compute steps that compute both branches of guidance
    corrector: str = "quadratic"  # of auto: on average no better than linear, but what it leaves is predicted better
    worth_correcting: float = WORTH_CORRECTING  # dB


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """How to plan: the fields of `Recipe` that say so.

    Args:
        budget: Full-compute steps, a compute ratio, or ``auto``: the fewest full-compute steps whose error stays
            within ``(1 + tolerance)`` of the quantized model's own at full compute, or reach ``target_psnr``.
        solver: ``search`` is everything that `cemq.search` does; another name takes that solver's schedule as it is.
        predictor: One for all, or ``auto``: the search chooses one for each segment.
        corrector: How skipped steps are put right later: ``quadratic``, ``linear`` or ``none``; ``auto`` is the first
            where the sampler and the cache allow it, the solver is one of this package, not a published one, and
            evenly spaced steps lose enough to full compute.
        rectify: Correction per channel; ``auto`` keeps the one that helps most on the planning samples, if any does.
        effort: One of `EFFORTS`.
        view: Of the prior; see `plan_schedule`.
        search: Constants of the search.
        allowed: Full generations that running schedules may take for each sample, at the step count that is planned
            for; None: what the effort says.
    """

    budget: int | str
    solver: str = SEARCH
    predictor: str = AUTO
    corrector: str = AUTO
    rectify: str = AUTO
    effort: str = "normal"
    view: str = "combined"
    tolerance: float = 0.15
    target_psnr: float | None = None
    search: SearchSettings = field(default_factory=SearchSettings)
    allowed: float | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> PlanSettings:
        """Those of a recipe."""
        return cls(**{name: getattr(recipe, name) for name in cls.__dataclass_fields__ if hasattr(recipe, name)})

    def check(self, steps: int | None) -> None:
        """What can be said before anything is run; without a step count, less.

        Raises:
            InputError: An unknown name.
            InfeasibleBudgetError: The budget is out of range.
        """
        choose("solver", self.solver, (SEARCH, *SOLVERS))
        choose("predictor", self.predictor, (AUTO, *PREDICTORS))
        choose("corrector", self.corrector, (AUTO, NO_CORRECTOR, *CORRECTORS))
        choose("rectify", self.rectify, (AUTO, "none", *METHODS))
        choose("effort", self.effort, EFFORTS)
        choose("view", self.view, VIEWS)
        if self.budget == AUTO_BUDGET:
            if self.solver != SEARCH:
                raise InputError(f"budget=auto is found by running schedules: leave --solver {self.solver} out")
        elif steps:
            self.full_steps(steps)

    def full_steps(self, num_steps: int) -> int | None:
        """The budget in full-compute steps, None for ``auto``. Raises InfeasibleBudgetError."""
        if self.budget == AUTO_BUDGET:
            return None
        return check_budget(self.budget, num_steps, "segment" if self.solver == SEARCH else self.solver)

    def elsewhere(self, budget: int | str) -> PlanSettings:
        """The same for another step count."""
        return replace(self, budget=budget, allowed=EFFORTS[self.effort].search_elsewhere)

    @property
    def fits(self) -> bool:
        """Whether it is learnt from runs how errors reach the final sample."""
        return EFFORTS[self.effort].fits

    def limit(self, samples: int) -> float:
        """Full generations that running schedules on so many samples may take."""
        if self.allowed is not None:
            return samples * self.allowed
        effort = EFFORTS[self.effort]
        return samples * (effort.search_auto or effort.search if self.budget == AUTO_BUDGET else effort.search)
