"""What a build will take, told before anything is run: from its settings, and from the headers of the model's files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cemq.build.settings import BuildSettings
from cemq.memory.footprint import ANY_FLOAT, read_footprint
from cemq.memory.placement import format_bytes
from cemq.pipelines.batches import default_steps
from cemq.pipelines.opening import class_of_folder
from cemq.schedule import SEARCH


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Full generations of one sample at the build's step count: as many, or up to as many where schedules are tried."""

    name: str
    full_precision: float = 0.0
    quantized: float = 0.0
    at_most: bool = False


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a build takes.

    ``memory_bytes`` is what its device must hold: all weights of the full-precision pipeline, and the activations of
    the largest model. What GPTQ replays and keeps of calls comes on top.
    """

    stages: tuple[Stage, ...]
    memory_bytes: int

    @property
    def generations(self) -> dict[str, float]:
        full_precision = sum(stage.full_precision for stage in self.stages)
        quantized = sum(stage.quantized for stage in self.stages)
        found = {"full_precision": full_precision, "quantized": quantized, "total": full_precision + quantized}
        return {kind: round(count, 2) for kind, count in found.items()}

    def to_dict(self) -> dict[str, Any]:
        stages = [
            {
                "name": stage.name,
                "full_precision": round(stage.full_precision, 2),
                "quantized": round(stage.quantized, 2),
                "at_most": stage.at_most,
            }
            for stage in self.stages
        ]
        return {"generations": self.generations, "stages": stages, "memory_bytes": self.memory_bytes}

    def summary(self) -> str:
        """For people, a line a stage."""
        width = max(len(stage.name) for stage in self.stages) + 2
        lines = [f"{'full generations of one sample':<{width}}{'full precision':>16}{'quantized':>12}"]
        for stage in self.stages:
            counts = [f"{count:.4g}" if count else "-" for count in (stage.full_precision, stage.quantized)]
            up_to = "  at most" if stage.at_most else ""
            lines.append(f"{stage.name:<{width}}{counts[0]:>16}{counts[1]:>12}{up_to}")
        total = self.generations
        lines.append(f"{'in all':<{width}}{total['full_precision']:>16.4g}{total['quantized']:>12.4g}")
        return "\n".join((*lines, f"memory for it: {format_bytes(self.memory_bytes)} and what GPTQ keeps of calls"))


def estimate(settings: BuildSettings) -> Estimate:
    """What a build with these settings takes.

    Raises:
        CemqError: The model's folder cannot be read, or the settings do not suit it.
    """
    recipe, effort, folder = settings.recipe, settings.effort, settings.source.folder
    steps = recipe.steps or default_steps(class_of_folder(folder))
    budget = None if recipe.policy else settings.planning.full_steps(steps)
    share = (budget or steps) / steps  # of a run: what a policy or budget=auto skips is not known before
    planned, checked = effort.planning_samples, effort.check_samples
    others = settings.other_steps(steps)
    searched = recipe.solver == SEARCH or settings.planning.fits  # what is learnt from runs is so for any solver
    runs = 1 + (recipe.rectify not in ("auto", "none"))
    stages = [
        Stage(name="reference runs", full_precision=effort.samples),
        Stage(name="further planning samples", full_precision=max(0, planned - effort.samples)),
        *(Stage(name=f"planning samples, {count} steps", full_precision=planned * count / steps) for count in others),
        Stage(name="check samples", full_precision=checked),
        Stage(name="forced runs", quantized=effort.samples),
        Stage(
            name="planning",
            quantized=settings.planning.limit(planned) if searched else planned * share * runs,
            at_most=searched,
        ),
        *(
            Stage(
                name=f"planning, {count} steps",
                quantized=settings.planning.elsewhere(2).limit(planned) * count / steps,
                at_most=True,
            )
            for count in others
        ),
        Stage(name="scheduled check", quantized=checked * share, at_most=budget is None),
    ]
    components = read_footprint(
        folder, dtype=settings.dtype, stored_dtype=ANY_FLOAT, call=recipe.call, full_steps=steps,
        samples=recipe.batch_size,
    )  # fmt: skip
    weights = sum(component.weight_bytes for component in components)
    largest = max(component.activation_bytes for component in components)
    kept = tuple(stage for stage in stages if stage.full_precision or stage.quantized)
    return Estimate(stages=kept, memory_bytes=weights + largest)
