"""What a build is asked for, settled and checked as far as that goes without opening the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cemq.bundle.manifest import MANIFEST
from cemq.errors import InputError, ModelError, choose
from cemq.memory.placement import parse_bytes
from cemq.pipelines.batches import read_conditions
from cemq.pipelines.opening import ModelSource, check_device, default_device, default_dtype, locate
from cemq.quantize import QuantizationSettings
from cemq.recipe import Recipe, find_calibration, load_recipe, make_recipe, recipe_for
from cemq.runtime.policies import Policy
from cemq.runtime.policy_names import parse_policy
from cemq.schedule import SEARCH
from cemq.schedule.plan import CACHES
from cemq.search.choose import check_runs
from cemq.search.settings import AUTO_BUDGET, EFFORTS, Effort, PlanSettings

ALSO_STEPS = 0.4  # of the steps, which plans are made for as well: the fewer steps, the less predictions alone find
LEAST_ALSO_STEPS = 12  # of so many or more
_OF_MEMORY = ("vram", "host_memory")  # settings of a build that no recipe has: they are this machine's
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

    @property
    def quantization(self) -> QuantizationSettings:
        return QuantizationSettings.of(self.recipe)

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
        named = {
            "samples": self.recipe.samples,
            "planning_samples": 0 if self.recipe.policy else self.recipe.planning_samples,  # a policy plans nothing
            "check_samples": self.recipe.check_samples,
        }
        given = {name: count for name, count in named.items() if count is not None}
        return replace(EFFORTS[self.recipe.effort], **given)

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


def resolve_recipe(model: str | None, recipe: str | None, settings: dict[str, Any]) -> Recipe:
    """Defaults, then the recipe (the one shipped for this model if none is named), then ``settings``.

    Raises:
        InputError: No model, or a setting that is not valid.
    """
    name = recipe or (recipe_for(model) if model else None)
    base = load_recipe(name).model_dump(exclude_unset=True) if name else {}
    given = {key: value for key, value in settings.items() if value is not None}
    given["call"] = base.get("call", {}) | given.get("call", {})
    if model:
        given["model"] = model
    resolved = make_recipe(base | given)
    for name in ("tolerance", "target_psnr"):
        if name in given and resolved.budget != AUTO_BUDGET:
            raise InputError(f"{name}: only budget=auto looks at it, found budget={resolved.budget}: leave one out")
    if resolved.policy:
        for name in sorted(given.keys() & _OF_PLANS):
            raise InputError(f"policy={resolved.policy}: nothing is planned then, so leave {name} out")
    if not resolved.model:
        raise InputError("no model: name builtin:NAME, a pipeline folder or a Hub id, or a recipe that names one")
    return resolved


def resolve(model: str | None, recipe: str | None, device: str | None, settings: dict[str, Any]) -> BuildSettings:
    """What `cemq.quantize_and_schedule` was asked for, the model located.

    Raises:
        CemqError: Anything that can be said to be wrong without opening the model.
    """
    settled = resolve_recipe(model, recipe, {name: each for name, each in settings.items() if name not in _OF_MEMORY})
    limit = Limit.of(**{name: settings.get(name) for name in _OF_MEMORY})
    if limit and settled.bits_budget is not None:
        raise InputError("vram: a bits budget tries layers in the whole model in memory: leave one of them out")
    QuantizationSettings.of(settled).check()
    if not settled.policy:
        PlanSettings.of(settled).check(settled.steps)
    else:
        choose("cache", parse_policy(settled.policy).cache, CACHES)
    if settled.also_steps and settled.solver != SEARCH:
        raise InputError(
            f"also_steps: other step counts are searched for, found --solver {settled.solver}: leave one out"
        )
    if settled.calib:
        read_conditions(find_calibration(settled.calib))
    place = device or default_device()
    check_device(place)
    source = locate(settled.model, variant=settled.variant)
    if (source.folder / MANIFEST).is_file():
        raise ModelError(f"'{settled.model}' is a cemq bundle already: give the full-precision model it was made from")
    dtype = settled.dtype or default_dtype(place)
    found = BuildSettings(recipe=settled, source=source, device=place, dtype=dtype, limit=limit)
    if not settled.policy:
        check_runs(found.planning, samples=found.effort.planning_samples)
    return found
