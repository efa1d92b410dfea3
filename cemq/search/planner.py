"""Plans a quantized pipeline as a recipe asks: for its own step count, then for others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cemq.parallel import Processes
from cemq.pipelines.batches import BUILD_LOG, Batch, Progress
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.prior.error_prior import ErrorPrior
from cemq.recipe import Recipe
from cemq.runtime.outcome import Outcome
from cemq.schedule import SEARCH, CacheSchedule
from cemq.schedule.plan import Plan
from cemq.search.choose import EFFORTS, Planned, plan
from cemq.search.trials import ClosedLoop

ALSO_STEPS = 0.4  # of the steps, which plans are made for as well: the fewer steps, the less predictions alone find
LEAST_ALSO_STEPS = 12  # of so many or more


def planning_settings(settings: Recipe) -> dict[str, Any]:
    """What `plan` and `check_planning` both want to know of a recipe, but the budget."""
    return {name: getattr(settings, name) for name in ("solver", "predictor", "corrector", "correction", "effort")}


def other_step_counts(settings: Recipe, steps: int) -> tuple[int, ...]:
    """Step counts to plan for besides."""
    if settings.also_steps is not None:
        return tuple(dict.fromkeys(count for count in settings.also_steps if count != steps))
    fewer = round(ALSO_STEPS * steps)
    searched = settings.solver == SEARCH and settings.effort != "quick"
    return (fewer,) if searched and fewer >= LEAST_ALSO_STEPS else ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Planner:
    """Plans a pipeline, once quantized, on the planning samples."""

    pipe: Any
    batches: Sequence[Batch]
    settings: Recipe
    progress: Progress | None
    processes: Processes

    def plan(
        self,
        prior: ErrorPrior,
        aims: Sequence[Outcome],
        steps: int,
        budget: int | str,
        *,
        stage: str = "planning",
        known: CacheSchedule | None = None,
    ) -> Planned:
        """`cemq.search.choose.plan` with the settings of the build; ``aims`` are full-precision outcomes."""
        settings, full_runs = self.settings, EFFORTS[self.settings.effort].full_runs

        def show(spent: float) -> None:  # people see how many runs at full compute of all samples it may take
            self.progress(f"{stage}, {full_runs:g} runs' worth", min(spent / full_runs, 1.0))

        loop = ClosedLoop(
            pipe=self.pipe, prior=prior, batches=self.batches, references=aims, steps=steps, call=settings.call,
            cache=settings.cache, processes=self.processes, progress=self.progress and show,
        )  # fmt: skip
        return plan(
            loop,
            budget,
            **planning_settings(settings),
            view=settings.prior,
            tolerance=settings.tolerance,
            target_psnr=settings.target_psnr,
            known=known,
        )

    def plan_too(self, own: Plan, aims: Sequence[Outcome], steps: int) -> tuple[Planned, SamplerFingerprint] | None:
        """The same for another step count, and the sampler there; None where the bundle's own plan does not carry over.

        Its prior does, so that nothing is profiled there.
        """
        sampler = self.processes.gather([aims[0].sampler] if aims else [])[0]
        carried = own.carried_over(sampler)
        if carried is None:
            if self.processes.is_main:
                logging.getLogger(BUILD_LOG).info(
                    f"not planned for {steps} steps: what was measured at {own.schedule.num_steps} does not carry "
                    f"over with {sampler.scheduler}"
                )
            return None
        planned = self.plan(
            carried.prior,
            aims,
            steps,
            carried.schedule.budget,
            stage=f"planning {steps} steps",
            known=carried.schedule,
        )
        return planned, sampler
