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
    """What planning may cost, in runs at full compute of the planning samples."""

    full_runs: float
    fitted_to: int


EFFORTS = {
    "quick": Effort(full_runs=5, fitted_to=16),
    "normal": Effort(full_runs=8, fitted_to=40),
    "thorough": Effort(full_runs=24, fitted_to=64),
}


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Constants of the search in closed loop. Nobody has to set one; tests do, to search small.

    They were chosen on the two built-in models; ``docs/planning.md`` tells the experiments.
    """

    searched: int = 16  # samples that all but calibration runs and finalists run on
    calibrated: int = 8  # samples at the least that a calibration run is run on
    finalists: int = 4
    retried: int = 2  # finalists that meet the target of budget=auto on all samples, or do not
    fit_share: float = 0.6  # of the effort at most goes into calibration runs
    fit_share_auto: float = 0.35  # where the search is for a budget too
    rectified: float = 2.0  # runs at full compute that trying corrections may cost beyond the effort
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

    @classmethod
    def of(cls, recipe: Recipe) -> PlanSettings:
        """Those of a recipe."""
        return cls(**{name: getattr(recipe, name) for name in cls.__dataclass_fields__ if name != "search"})

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

    def with_budget(self, budget: int | str) -> PlanSettings:
        return replace(self, budget=budget)

    @property
    def effort_limits(self) -> Effort:
        return EFFORTS[self.effort]
