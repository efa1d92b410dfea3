"""Settings of a build: from recipes/*.yaml, the command line or a call; what is given later wins."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cemq.errors import InputError, choose, first_line

_PACKAGE = Path(__file__).parent
RENAMED = {"correction": "rectify", "prior": "view"}  # what recipes and options of before called it
OF_WEIGHTS = frozenset(  # what a bundle that is planned again keeps; all other settings are of plans and samples
    {
        *("model", "variant", "scheme", "backend", "rounding", "smoothed", "low_rank", "bits_budget", "full_precision"),
        *("components", "lora", "dtype", "note"),
    }
)
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
    """How to build a bundle; every field is optional in a file, and a key that is not listed here is an error.

    A description makes a field an option of ``cemq quantize-and-schedule``, and is its help.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: str | None = None
    variant: str | None = Field(
        None, description="Of the model's files, e.g. fp16; default: the plain ones, or the only variant there is."
    )
    lora: list[str] | None = Field(
        None,
        description="A LoRA to fuse first: a file or a Hub id, and :SCALE if it is not 1; repeatable.",
        json_schema_extra={"metavar": "FILE|ID[:SCALE]", "repeated": True},
    )
    scheme: str = Field("w8a8", description="w8a8, w4a8, w8a8-fp8, w8a16, w4a16 or none")
    backend: str = Field("native", description="native, quanto, bitsandbytes or torchao; see cemq doctor")
    rounding: Literal["gptq", "nearest"] = Field("gptq", description="Of native weights: gptq or nearest")
    smoothed: bool = Field(False, description="Scale native 8-bit activations per channel.")
    low_rank: int = Field(0, ge=0, description="Rank of a bf16 correction of native 4-bit weights")
    bits_budget: float | None = Field(
        None, description="Average bits a native 4-bit weight; the last blocks take 8. Default: a fifth of weights."
    )
    full_precision: list[str] | None = Field(
        None, description="Patterns of layers to keep, e.g. 'proj_out,*.ff.*'; default: by model."
    )
    components: list[str] | None = Field(
        None, description="What to quantize, e.g. transformer,text_encoder_2; default: the denoiser."
    )
    steps: int | None = Field(None, ge=2, description="Denoising steps; default: the pipeline's.")
    also_steps: list[Annotated[int, Field(ge=2)]] | None = Field(
        None, description="Other step counts to plan for, e.g. 20,28, or none; default: two fifths of the steps."
    )
    budget: int | str = Field(
        "3x",
        description="Full-compute steps (15), a compute ratio (3x), or the fewest",
        json_schema_extra={"metavar": "N|Rx|auto"},
    )
    tolerance: float = Field(0.15, ge=0, description="Of --budget auto: share by which the error may grow")
    target_psnr: float | None = Field(None, description="Of --budget auto: decibels to reach instead.")
    solver: str = Field("search", description="search, segment, cem, cem-relaxed, threshold or uniform")
    predictor: str = Field("auto", description="auto, reuse, damped, taylor1, taylor2, goc, mean-velocity or chebyshev")
    corrector: str = Field("auto", description="What puts skipped steps right later: auto, none, linear or quadratic")
    rectify: str = Field("auto", description="Correction per channel: auto, none, drift, affine, eoc or erta")
    effort: str = Field("normal", description="Of the build: instant, quick, normal or thorough")
    view: str = Field("combined", description="Of the error prior, to plan by: combined, cache or self")
    cache: Literal["output", "residual", "modules"] = Field(
        "output", description="Predict skipped steps from: output, residual (of the blocks) or modules"
    )
    policy: str | None = Field(
        None, description="Decide while drawing, by no plan, e.g. teacache:threshold=0.2, or none; see cemq doctor."
    )
    calib: str | None = Field(
        None, description="Text file, one prompt or class label a line: beside the recipe, in calib_data/, or anywhere."
    )
    samples: int | None = Field(None, ge=1, description="Samples to profile on; default: by effort.")
    planning_samples: int | None = Field(
        None, ge=1, description="Samples to run schedules on, profiled ones first; default: by effort."
    )
    check_samples: int | None = Field(
        None, ge=1, description="Other samples, to measure what the bundle is worth; default: by effort."
    )
    batch_size: int = Field(1, ge=1, description="Samples drawn at once")
    seed: int = Field(0, ge=0, lt=SEEDS, description="First seed of the profiling samples")
    dtype: str | None = Field(None, description="float32, bfloat16 or float16; default: by device.")
    call: Annotated[dict[str, Any], AfterValidator(_plain)] = {}
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
        if key in RENAMED:
            raise InputError(f"{origin}: '{key}' is called '{RENAMED[key]}' by now: rename it")
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
