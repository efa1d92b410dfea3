"""What a build will take, told before anything is run: from its settings, and from the headers of the model's files."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from cemq.build.arithmetic import Arithmetic, RunArithmetic, run_arithmetic
from cemq.build.pace import Pace, measure_pace
from cemq.build.settings import BuildSettings
from cemq.build.sizes import Sketch, bundle_bytes, fitted_calls, host_memory_bytes, sketch
from cemq.build.within import plan_build
from cemq.families import DENOISERS
from cemq.memory.footprint import ANY_FLOAT, read_footprint, read_headers
from cemq.memory.placement import MemoryPlan, format_bytes
from cemq.pipelines.opening import class_of_folder
from cemq.schedule import SEARCH

QUANTIZATION = "quantization"
ROUGHLY = 2.0  # by which factor minutes from headers may be off either way, docs/benchmarks/estimate.md
_UNKNOWN_SHARE = 0.5  # of the steps, that runs compute whose budget is to be found
_FACTORED, _UPDATED = 2.0, 20.0  # how much slower than a product a Cholesky factor and GPTQ's columns are, on a CPU


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One that a build tells its progress of, by the name that it has there.

    Args:
        full_precision: Full generations of one sample at the build's step count: as many, or up to as many where
            schedules are tried.
        runs: Of one sample, in full or not.
        seconds: What all of it takes, about.
    """

    name: str
    full_precision: float = 0.0
    quantized: float = 0.0
    at_most: bool = False
    runs: float = 0.0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "full_precision": round(self.full_precision, 2),
            "quantized": round(self.quantized, 2),
            "at_most": self.at_most,
            "minutes": _rounded(self.seconds / 60),
        }


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a build takes: generations are exact where none are at most, disk near, minutes rough.

    ``memory_bytes`` is what its device must hold: all weights of the full-precision pipeline, and the activations of
    the largest model. What GPTQ keeps comes on top. ``host_memory_bytes`` is what the process holds at the least,
    ``disk_bytes`` what the bundle takes. Within a limit, ``placement`` is where the weights are instead.
    """

    stages: tuple[Stage, ...]
    memory_bytes: int
    host_memory_bytes: int
    disk_bytes: int
    placement: MemoryPlan | None = None

    @property
    def generations(self) -> dict[str, float]:
        return generations_of(self.stages)

    @property
    def minutes(self) -> float:
        return sum(stage.seconds for stage in self.stages) / 60

    def to_dict(self) -> dict[str, Any]:
        return {
            "generations": self.generations,
            "stages": [stage.to_dict() for stage in self.stages],
            "minutes": _rounded(self.minutes),
            "memory_bytes": self.memory_bytes,
            "host_memory_bytes": self.host_memory_bytes,
            "disk_bytes": self.disk_bytes,
            "placement": self.placement and self.placement.to_dict(),
        }

    def summary(self) -> str:
        """For people, a line a stage."""
        width = max(len(stage.name) for stage in self.stages) + 2
        heading = f"{'full generations of one sample':<{width}}{'full precision':>16}{'quantized':>12}{'minutes':>10}"
        lines = [heading]
        for stage in self.stages:
            counts = [f"{count:.4g}" if count else "-" for count in (stage.full_precision, stage.quantized)]
            up_to = "  at most" if stage.at_most else ""
            minutes = f"{_rounded(stage.seconds / 60):g}"
            lines.append(f"{stage.name:<{width}}{counts[0]:>16}{counts[1]:>12}{minutes:>10}{up_to}")
        total, minutes = self.generations, self.minutes
        counts = f"{total['full_precision']:>16.4g}{total['quantized']:>12.4g}{_rounded(minutes):>10g}"
        lines += [
            f"{'in all':<{width}}{counts}",
            f"time: {_rounded(minutes / ROUGHLY):g} to {_rounded(minutes * ROUGHLY):g} minutes, roughly; a build says "
            "it anew once it has timed a step",
            f"device memory: {self.placement.summary()}"
            if self.placement
            else f"device memory: {format_bytes(self.memory_bytes)} and what GPTQ keeps",
            f"host memory: at least {format_bytes(self.host_memory_bytes)}",
            f"disk: {format_bytes(self.disk_bytes)} for the bundle",
        ]
        return "\n".join(lines)


def estimate(settings: BuildSettings, *, clock: Callable[[], float] = time.perf_counter) -> Estimate:
    """What a build with these settings takes, in one process. A block is run to time it, for less than a second.

    Raises:
        CemqError: The model's folder cannot be read, or the settings do not suit it.
    """
    recipe, folder = settings.recipe, settings.source.folder
    steps = settings.steps
    stages = planned_stages(settings, steps)
    headers = read_headers(folder, call=settings.call, samples=recipe.batch_size, variant=recipe.variant)
    settings.quantization.check_components(class_of_folder(folder).__name__, headers.tensors)
    components = read_footprint(headers, dtype=settings.dtype, stored_dtype=ANY_FLOAT, full_steps=steps)
    work, device, dtype = run_arithmetic(headers), settings.device, settings.dtype
    with torch.random.fork_rng(devices=[]):  # models and blocks draw weights as they are made
        sketched = sketch(settings, headers)
        paces = measure_pace(work, sketched.config_of_denoiser(), device=device, dtype=dtype, clock=clock)
    observing, fitting = _quantization_seconds(sketched, work, paces[0], settings, steps)
    timed = [replace(stage, seconds=_seconds(stage, work, paces, steps)) for stage in stages]
    timed[0] = replace(timed[0], seconds=timed[0].seconds + observing)  # of the reference runs
    place = next(number for number, stage in enumerate(timed) if stage.quantized)
    timed.insert(place, Stage(name=QUANTIZATION, seconds=fitting))
    trials = sum(stage.runs for stage in stages if stage.name.startswith("planning"))
    sizes = {"components": components, "sketched": sketched, "steps": steps}
    return Estimate(
        stages=tuple(stage for stage in timed if stage.seconds),
        memory_bytes=sum(each.weight_bytes for each in components) + max(each.activation_bytes for each in components),
        host_memory_bytes=host_memory_bytes(settings, headers, **sizes),
        disk_bytes=bundle_bytes(settings, headers, runs=trials, **sizes),
        placement=plan_build(settings) if settings.limit else None,
    )


def planned_stages(settings: BuildSettings, steps: int) -> tuple[Stage, ...]:
    """What is run of a pipeline of so many steps, by the settings alone."""
    recipe, effort = settings.recipe, settings.effort
    budget = None if recipe.policy else settings.planning.full_steps(steps)
    share = (budget or steps) / steps  # of a run: what a policy or budget=auto skips is not known before
    planned, checked = effort.planning_samples, effort.check_samples
    others = settings.other_steps(steps)
    searched = recipe.solver == SEARCH or settings.planning.fits  # what is learnt from runs is so for any solver
    searched = searched and (planned > 1 or budget is None)  # else the first schedule is the only one
    corrected = 1 + (recipe.rectify not in ("auto", "none"))
    further, forced = max(0, planned - effort.samples), effort.forced or effort.samples
    found = [
        Stage(name="reference runs", full_precision=effort.samples, runs=effort.samples),
        Stage(name="full-precision planning samples", full_precision=further, runs=further),
        *(
            Stage(name=f"full precision, {count} steps", full_precision=planned * count / steps, runs=planned)
            for count in others
        ),
        Stage(name="full-precision check", full_precision=checked, runs=checked),
        Stage(name="forced runs", quantized=forced, runs=forced),
        _planning(
            "planning",
            settings.planning.limit(planned) if searched else planned * share * corrected,
            share=share if budget else _UNKNOWN_SHARE,
            at_most=searched,
        ),
        *(
            _planning(
                f"planning {count} steps",
                settings.planning.elsewhere(2).limit(planned) * count / steps,
                share=(share if budget else _UNKNOWN_SHARE) * count / steps,
                at_most=True,
            )
            for count in others
        ),
        Stage(name="scheduled check", quantized=checked * share, runs=checked, at_most=budget is None),
    ]
    return tuple(stage for stage in found if stage.full_precision or stage.quantized)


def generations_of(stages: tuple[Stage, ...]) -> dict[str, float]:
    """In all, as a build says them at its end but for what is replayed to quantize."""
    full_precision = sum(stage.full_precision for stage in stages)
    quantized = sum(stage.quantized for stage in stages)
    found = {"full_precision": full_precision, "quantized": quantized, "total": full_precision + quantized}
    return {kind: round(count, 2) for kind, count in found.items()}


def _planning(name: str, generations: float, *, share: float, at_most: bool) -> Stage:
    return Stage(name=name, quantized=generations, runs=generations / share, at_most=at_most)


def _seconds(stage: Stage, work: RunArithmetic, paces: tuple[Pace, Pace], steps: int) -> float:
    full_precision, quantized = paces
    return (
        full_precision.seconds(work.step) * stage.full_precision * steps
        + quantized.seconds(work.step) * stage.quantized * steps
        + full_precision.seconds(work.around) * stage.runs
    )


def _quantization_seconds(
    sketched: Sketch, work: RunArithmetic, pace: Pace, settings: BuildSettings, steps: int
) -> tuple[float, float]:
    """For summing up Hessians while references are run, and for quantization itself: layers are rounded column by
    column. Text encoders and weights that are rounded to nearest take no time to speak of."""
    calls = fitted_calls(settings, steps)
    if not calls:
        return 0.0, 0.0
    shapes = [tuple(layer.linear.weight.shape) for layer in sketched.layers if layer.component in DENOISERS]
    numbers = sum(columns**2 for _, columns in shapes) / 2  # q, k and v share their Hessian
    rows = work.inputs * work.tokens / settings.recipe.batch_size
    summing = calls * pace.seconds(Arithmetic(operations=2 * rows * numbers, layers=len(shapes)))
    if not settings.quantization.gptq:
        return summing, 0.0
    found = 0.0
    for outputs, columns in shapes:
        factors = Arithmetic(operations=_FACTORED * 4 / 3 * columns**3)
        updates = Arithmetic(
            operations=_UPDATED * 2 * 64 * outputs * columns + 2 * outputs * columns**2, layers=columns
        )
        found += pace.seconds(factors) + pace.seconds(updates)
    return summing, found


def _rounded(minutes: float) -> float:
    """Two digits, which is more than can be known."""
    return float(f"{minutes:.2g}")
