"""What a build is asked for, settled and checked as far as that goes without opening the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cemq.bundle.manifest import MANIFEST
from cemq.bundle.original import Original
from cemq.errors import InputError, ModelError, choose
from cemq.evaluation.scores import check_metrics
from cemq.memory.placement import parse_bytes
from cemq.pipelines.batches import check_call, default_steps, read_call, read_conditions
from cemq.pipelines.lora import Lora, check_fusing, locate_lora, read_lora
from cemq.pipelines.opening import (
    DTYPES,
    ModelSource,
    check_device,
    class_of_folder,
    default_device,
    default_dtype,
    locate,
)
from cemq.quantize import QuantizationSettings
from cemq.recipe import Recipe, find_calibration, load_recipe, make_recipe, recipe_for
from cemq.runtime.policies import Policy
from cemq.runtime.policy_names import parse_policy
from cemq.schedule import SEARCH
from cemq.schedule.plan import CACHES, INSIDE
from cemq.search.choose import check_runs
from cemq.search.settings import AUTO_BUDGET, EFFORTS, Effort, PlanSettings

ALSO_STEPS = 0.4  # of the steps, which plans are made for as well: the fewer steps, the less predictions alone find
LEAST_ALSO_STEPS = 12  # of so many or more
OF_MEMORY = ("vram", "host_memory")  # settings of a build that no recipe has: they are this machine's
_OF_PLANS = {
    *("also_steps", "budget", "cache", "corrector", "effort", "planning_samples", "predictor", "rectify", "solver"),
    *("target_psnr", "tolerance", "view"),
}


_SHARE = 8  # of the limit: Hessians at a time, and as much of quantized layers before they are written


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Bytes that a build may take.

    Args:
        vram: On the device; on a CPU of memory, for weights and activations.
        host_memory: For weights that rest; None takes what is free when the build begins.
    """

    vram: int
    host_memory: int | None = None

    @classmethod
    def of(cls, vram: str | int | None, host_memory: str | int | None) -> Limit | None:
        """None without ``vram``. Raises InputError for what is no size, or host memory alone."""
        if vram is None:
            if host_memory is not None:
                raise InputError(f"host_memory={host_memory}: only with vram does a build limit memory: give both")
            return None
        return cls(vram=parse_bytes(vram), host_memory=None if host_memory is None else parse_bytes(host_memory))

    @property
    def hessian_bytes(self) -> int:
        """At a time; a layer whose Hessian is larger is rounded to nearest."""
        return self.vram // _SHARE

    @property
    def shard_bytes(self) -> int:
        """Of quantized layers that wait to be written."""
        return self.vram // _SHARE


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """A recipe with nothing left open but what the pipeline says: its step count and what its arguments mean."""

    recipe: Recipe
    source: ModelSource
    device: str
    dtype: str
    limit: Limit | None = None  # None: the weights are in memory as a whole
    loras: tuple[Lora, ...] = ()  # that are fused before anything is run

    @property
    def quantization(self) -> QuantizationSettings:
        return QuantizationSettings.of(self.recipe)

    @property
    def steps(self) -> int:
        """Of every run. Raises CemqError for a pipeline class that has no default, where none are asked for."""
        return self.recipe.steps or default_steps(class_of_folder(self.source.folder))

    @property
    def original(self) -> Original:
        """The model in full precision, with what is fused into it."""
        return Original(source=self.source, loras=self.loras, variant=self.recipe.variant)

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline, as its class wants them. Raises CemqError for one that is none, or unreadable."""
        kind = class_of_folder(self.source.folder)
        check_call(kind, self.recipe.call)
        return make_recipe({"call": read_call(kind, self.recipe.call)}).call

    @property
    def policy(self) -> Policy | None:
        """What decides while pictures are drawn, in place of a plan."""
        return parse_policy(self.recipe.policy) if self.recipe.policy else None

    @property
    def cache(self) -> str:
        """What skipped steps are served from."""
        return self.policy.cache if self.policy else self.recipe.cache

    @property
    def planning(self) -> PlanSettings:
        return PlanSettings.of(self.recipe)

    @property
    def effort(self) -> Effort:
        """What the build takes, by its effort and by what was asked for besides."""
        return effort_of(self.recipe)

    def other_steps(self, steps: int) -> tuple[int, ...]:
        """Step counts to plan for besides ``steps``."""
        asked = self.recipe.also_steps
        if self.recipe.policy:
            return ()
        if asked is not None:
            return tuple(dict.fromkeys(count for count in asked if count != steps))
        fewer = round(ALSO_STEPS * steps)
        searched = self.recipe.solver == SEARCH and self.effort.also_steps
        return (fewer,) if searched and fewer >= LEAST_ALSO_STEPS else ()


def effort_of(recipe: Recipe) -> Effort:
    """What is run, by the recipe's effort and by the counts that it names besides."""
    named = {
        "samples": recipe.samples,
        "forced": None if recipe.samples is None else 0,
        "planning_samples": 0 if recipe.policy else recipe.planning_samples,  # a policy plans nothing
        "check_samples": recipe.check_samples,
    }
    given = {name: count for name, count in named.items() if count is not None}
    return replace(EFFORTS[recipe.effort], **given)


def resolve_recipe(model: str | None, recipe: str | None, settings: dict[str, Any]) -> Recipe:
    """Defaults, then the recipe (the one shipped for this model if none is named), then ``settings``.

    Raises:
        InputError: No model, or a setting that is not valid.
    """
    name = recipe or (recipe_for(model) if model else None)
    base = load_recipe(name).model_dump(exclude_unset=True) if name else {}
    resolved = merged(base, settings | {"model": model or None})
    if not resolved.model:
        raise InputError("no model: name builtin:NAME, a pipeline folder or a Hub id, or a recipe that names one")
    return resolved


def merged(base: Mapping[str, Any], settings: Mapping[str, Any]) -> Recipe:
    """A recipe's fields, and over them those of ``settings`` that are not None.

    Raises:
        InputError: A setting is not valid, or does not go with the others.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    given["call"] = base.get("call", {}) | given.get("call", {})
    fields = {**base, **given}
    if fields.get("policy") == "none":  # in place of a recipe's
        del fields["policy"]
    resolved = make_recipe(fields)
    for name in ("tolerance", "target_psnr"):
        if name in given and resolved.budget != AUTO_BUDGET:
            raise InputError(f"{name}: only budget=auto looks at it, found budget={resolved.budget}: leave one out")
    if resolved.policy:
        for name in sorted(given.keys() & _OF_PLANS):
            raise InputError(f"policy={resolved.policy}: nothing is planned then, so leave {name} out")
    return resolved


def resolve(model: str | None, recipe: str | None, device: str | None, settings: dict[str, Any]) -> BuildSettings:
    """What `cemq.quantize_and_schedule` was asked for, the model and its LoRAs located.

    Raises:
        CemqError: Anything that can be said to be wrong without opening the model.
    """
    settled = resolve_recipe(model, recipe, {name: each for name, each in settings.items() if name not in OF_MEMORY})
    check_recipe(settled)
    limit = Limit.of(**{name: settings.get(name) for name in OF_MEMORY})
    if limit and settled.lora:
        raise InputError("vram: fused LoRAs are in memory as a whole: fuse them, save the pipeline, and build that")
    asked = [read_lora(text) for text in settled.lora or ()]
    place = device or default_device()
    check_device(place)
    assert settled.model is not None  # or it would have been refused
    source = locate(settled.model, variant=settled.variant)
    if (source.folder / MANIFEST).is_file():
        raise ModelError(f"'{settled.model}' is a cemq bundle already: give the full-precision model it was made from")
    loras = tuple(locate_lora(name, scale) for name, scale in asked)
    if loras:
        check_fusing(class_of_folder(source.folder), loras)
    dtype = choose("dtype", settled.dtype or default_dtype(place), DTYPES)
    return BuildSettings(recipe=settled, source=source, device=place, dtype=dtype, loras=loras, limit=limit)


def check_recipe(recipe: Recipe) -> None:
    """What can be said of settings without a model. Raises CemqError."""
    QuantizationSettings.of(recipe).check()
    check_metrics()
    if not recipe.policy:
        PlanSettings.of(recipe).check(recipe.steps)
        check_runs(PlanSettings.of(recipe), samples=effort_of(recipe).planning_samples)
    else:
        choose("effort", recipe.effort, EFFORTS)
        choose("cache", parse_policy(recipe.policy).cache, (*CACHES, INSIDE))
    if recipe.also_steps and recipe.solver != SEARCH:
        raise InputError(
            f"also_steps: other step counts are searched for, found --solver {recipe.solver}: leave one out"
        )
    if recipe.calib:
        read_conditions(find_calibration(recipe.calib))
