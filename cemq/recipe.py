"""Settings of a build: from recipes/*.yaml, the command line or a call; what is given later wins."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cemq.errors import InputError, choose, first_line

_PACKAGE = Path(__file__).parent
SEEDS = 1 << 63  # of them, from 0; torch would take as many again


def _plain(call: dict[str, Any]) -> dict[str, Any]:
    """What a bundle's JSON gives back as it was. Raises ValueError for anything else, before it is built."""
    for name, value in call.items():
        try:
            same = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError, RecursionError):  # no JSON; NaN or a circle; too deep
            same = False
        if not same:
            raise ValueError(f"{name} must be text, a finite number, or lists and named values of them")
    return call


class Recipe(BaseModel):
    """How to build a bundle; every field is optional in a file, and a key that is not listed here is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: str | None = None
    scheme: str = "w8a8"
    backend: str = "native"
    steps: int | None = None  # None: the pipeline's own default
    also_steps: list[Annotated[int, Field(ge=2)]] | None = None  # None: two fifths of the steps; []: no other
    budget: int | str = "3x"  # full-compute steps, a compute ratio, or auto
    tolerance: float = Field(default=0.15, ge=0)  # of budget: auto; share by which the error may grow
    target_psnr: float | None = None  # of budget: auto; decibels to reach instead
    solver: str = "search"
    predictor: str = "auto"
    corrector: str = "auto"
    correction: str = "auto"
    effort: str = "normal"
    prior: str = "combined"
    cache: Literal["output", "residual", "modules"] = "output"  # what skipped steps are predicted from
    calib: str | None = None  # a file beside the recipe, in calib_data/, or anywhere
    samples: int = Field(default=16, ge=1)
    batch_size: int = Field(default=4, ge=1)
    planning_samples: int = Field(default=64, ge=1)  # that candidates are run on; others than those profiled
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    dtype: str | None = None
    call: Annotated[dict[str, Any], AfterValidator(_plain)] = {}
    full_precision: list[str] | None = None  # patterns of layers to keep; None: those of `families`
    rounding: Literal["gptq", "nearest"] = "gptq"  # of weights, native backend
    smoothed: bool = False  # scale the inputs of 8-bit activations per channel, native backend
    low_rank: int = Field(default=0, ge=0)  # rank of a bfloat16 correction beside every 4-bit weight, native backend
    bits_budget: float | None = None  # average stored bits a weight; the layers that gain most take 8 bits
    components: list[str] | None = None  # what to quantize; None: the denoiser
    note: str = ""


def shipped(folder: str) -> Path:
    """``recipes`` or ``calib_data``: inside the installed package, or at the top of a checkout."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def recipe_names() -> Iterator[str]:
    yield from sorted(path.stem for path in shipped("recipes").glob("*.yaml"))


def load_recipe(name_or_file: str) -> Recipe:
    """A shipped recipe by name, or a YAML file.

    Raises:
        InputError: No such recipe, not YAML, an unknown key or a value of the wrong type.
    """
    path = Path(os.path.expanduser(name_or_file))
    if path.suffix not in (".yaml", ".yml"):
        path = shipped("recipes") / f"{choose('recipe', name_or_file, recipe_names())}.yaml"
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe '{path}' cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the latter two: no such date, too deep
        raise InputError(f"recipe '{path}' is not YAML: {first_line(error)}") from None
    if not isinstance(fields, dict):
        raise InputError(f"recipe '{path}' holds no settings: write 'key: value' lines")
    return make_recipe(fields, f"recipe '{path}'")


def make_recipe(fields: dict[str, Any], origin: str = "settings") -> Recipe:
    """Validate settings. Raises InputError, naming the key and the nearest known one."""
    for key in fields:
        choose(f"key in {origin}", str(key), Recipe.model_fields)
    try:
        return Recipe(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][:1])
        said = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{origin}: {place}={reprlib.repr(first['input'])} is wrong: {said.lower()}") from None


def recipe_for(model: str) -> str | None:
    """The name of the shipped recipe made for this model, if there is one."""
    return next((name for name in recipe_names() if load_recipe(name).model == model), None)


def find_calibration(name: str) -> Path:
    """A calibration file: as given, else in calib_data/."""
    given, packaged = Path(os.path.expanduser(name)), shipped("calib_data") / name
    return packaged if not os.path.isfile(given) and os.path.isfile(packaged) else given
