"""Which samples are run: conditions (prompts or class labels), seeds, and the call of the pipeline."""

from __future__ import annotations

import copy
import inspect
import math
import numbers
import os
import reprlib
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import yaml
from torch.utils._pytree import tree_map

from cemq.errors import InputError, ModelError, PipelineError, choose, first_line
from cemq.families import PICTURE_ARGUMENTS
from cemq.files import absolute
from cemq.pipelines.noise_scheduler import Call, intercepted
from cemq.pipelines.opening import denoisers
from cemq.pipelines.outputs import output_kind
from cemq.recipe import SEEDS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Progress = Callable[[str, float], None]  # told a stage's name and the share of it done
BUILD_LOG = "cemq.build"  # the logger of what a build says beside its progress
# What pipelines raise on arguments that they cannot use, some by checking them and most by stumbling.
_REFUSALS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError),
    *(TypeError, ValueError),
)
EVALUATION_SEED_OFFSET = 1_000_000  # evaluation seeds start here, so that none was ever used for profiling


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples run together; each has its own seed, so that its noise does not depend on the batch."""

    conditions: tuple[str | int, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for seed in self.seeds:
            if not 0 <= seed < SEEDS:
                raise InputError(f"seed={seed}: seeds are whole numbers from 0 to {SEEDS - 1}")


def condition_argument(pipe: DiffusionPipeline) -> str:
    """The pipeline argument that takes what to draw: ``class_labels`` or ``prompt``. Raises InputError for neither."""
    return _condition_argument(type(pipe))


def _condition_argument(kind: type) -> str:
    known = inspect.signature(kind.__call__).parameters
    for name in ("class_labels", "prompt"):
        if name in known:
            return name
    raise InputError(f"{kind.__name__} takes neither prompts nor class labels: cemq cannot run it yet")


def read_conditions(path: Path) -> tuple[str, ...]:
    """Prompts or class labels, one per line; lines that begin with #, after blanks or not, are comments.

    Raises:
        InputError: No such file, or nothing in it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a byte order mark is no part of a prompt
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(
            f"calibration file '{path}' cannot be read ({reason}): give a text file, one line each"
        ) from None
    found = tuple(text for line in lines if (text := line.strip()) and not text.startswith("#"))
    if not found:
        raise InputError(f"calibration file '{path}' holds no prompt or label: write one per line")
    return found


def check_conditions(pipe: DiffusionPipeline, conditions: Sequence[str | int]) -> tuple[str | int, ...]:
    """The conditions as the pipeline wants them: prompts as they are, labels as class numbers.

    Raises:
        InputError: An empty prompt, or a label the model does not know.
    """
    if condition_argument(pipe) == "prompt":
        for text in conditions:
            if not str(text).strip():
                raise InputError("the prompt is empty: describe what to draw")
        return tuple(str(text) for text in conditions)
    names = getattr(pipe, "labels", None) or {}
    classes = getattr(pipe.transformer.config, "num_embeds_ada_norm", None) or 0
    numbers = []
    for label in conditions:
        text = str(label).strip()
        if text in names:
            numbers.append(names[text])
        elif text.isdecimal() and (not classes or int(text) < classes) and (not names or int(text) in names.values()):
            numbers.append(int(text))
        else:
            known = f"one of {', '.join(list(names)[:12])}" if names else f"a class number in 0..{classes - 1}"
            raise InputError(f"label {text!r} is not known to this model: give {known}")
    return tuple(numbers)


def make_batches(
    conditions: Sequence[str | int], *, samples: int, first_seed: int, batch_size: int
) -> tuple[Batch, ...]:
    """``samples`` samples, conditions in turn, seeds counting up from ``first_seed``."""
    if not 1 <= samples <= EVALUATION_SEED_OFFSET:  # beyond, seeds of a build would meet those of its evaluation
        raise InputError(f"samples={samples}: choose 1..{EVALUATION_SEED_OFFSET}")
    chosen = [conditions[i % len(conditions)] for i in range(samples)]
    return tuple(
        Batch(
            conditions=tuple(chosen[start : start + batch_size]),
            seeds=tuple(range(first_seed + start, first_seed + min(start + batch_size, samples))),
        )
        for start in range(0, samples, batch_size)
    )


def split_conditions(
    conditions: Sequence[str | int], *, profiled: int, seed: int
) -> tuple[tuple[str | int, ...], tuple[str | int, ...]]:
    """Shuffle, then part into those for profiling and those held out; with too few to part, both get all of them.

    One that comes twice counts once: it would be held out from itself.
    """
    conditions = tuple(dict.fromkeys(conditions))
    order = np.random.default_rng(seed).permutation(len(conditions))
    shuffled = tuple(conditions[i] for i in order)
    if len(shuffled) < 2 * profiled:
        return shuffled, shuffled
    return shuffled[:profiled], shuffled[profiled:]


def check_call(kind: type, call: Mapping[str, Any]) -> None:
    """Raises InputError for an argument that a pipeline class does not take, or that cemq sets itself."""
    known = inspect.signature(kind.__call__).parameters
    ours = {"self", "generator", "num_inference_steps", "output_type", "return_dict", _condition_argument(kind)}
    for name in call:
        if name in ours - {"self"}:
            raise InputError(f"--call {name}=...: cemq sets this argument itself; use its own option instead")
        choose(f"argument of {kind.__name__}", name, [n for n in known if n not in ours])


def read_call(kind: type, call: Mapping[str, Any]) -> dict[str, Any]:
    """Call arguments as a pipeline class wants them, which its signature tells.

    Text for an argument that takes text stays as it is, 1984 and ``a: b`` too. Text for any other is read as YAML, so
    that 2.0 is a number and true a truth value. Pictures are named by paths that stay true in another working folder.

    Raises:
        InputError: An argument that takes numbers alone is given something else, NaN or infinity; or there is no
            picture of that name.
    """
    try:
        hints = typing.get_type_hints(kind.__call__)
    except (NameError, TypeError):  # some annotation in diffusers that cannot be evaluated
        hints = {}
    known = inspect.signature(kind.__call__).parameters
    found = {}
    for name, value in call.items():
        hint = hints.get(name)
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = set(typing.get_args(hint) if union else [hint])
        if isinstance(value, str) and name in PICTURE_ARGUMENTS:
            value = _picture_path(name, value)
        elif isinstance(value, str) and str not in kinds and typing.get_origin(hint) is not typing.Literal:
            value = _from_text(value)
        if kinds <= {int, float, bool, types.NoneType}:
            optional = types.NoneType in kinds or known[name].default is None
            value = _number(name, value, kind, optional=optional)
        found[name] = value
    return found


def _picture_path(name: str, text: str) -> str:
    if "://" in text:
        return text
    if not os.path.isfile(absolute(text)):
        raise InputError(f"--call {name}={text}: no picture can be read there (no such file)")
    return str(absolute(text))


def _from_text(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # the latter two: a 13th month; too deep
        return text


def _number(name: str, value: Any, kind: type, *, optional: bool) -> Any:
    if value is None and optional:
        return value
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)  # 1e-3 and nan, which are text to YAML
    if not isinstance(value, numbers.Real):
        raise InputError(f"--call {name}={reprlib.repr(value)}: {kind.__name__} takes a number there")
    if not math.isfinite(value):
        raise InputError(f"--call {name}={value}: give a finite number")
    return value


def default_steps(kind: type) -> int:
    """Of a pipeline class. Raises InputError for one that has none."""
    parameter = inspect.signature(kind.__call__).parameters.get("num_inference_steps")
    if parameter is None or not isinstance(parameter.default, int):
        raise InputError(f"{kind.__name__} has no default step count: give --steps")
    return parameter.default


def check_steps(pipe: DiffusionPipeline, *counts: int) -> None:
    """Raises InputError, before any run, for a step count that the pipeline's noise scheduler does not take."""

    def refusal(steps: int) -> Exception | None:
        twin = copy.deepcopy(pipe.scheduler)
        try:
            twin.set_timesteps(steps)
        except (ArithmeticError, MemoryError, ValueError) as error:
            return error
        except (AttributeError, RuntimeError, TypeError):  # one that wants more to be told: only a run can say
            return None
        return None

    for steps in counts:
        if (found := refusal(steps)) and not refusal(2):
            raise InputError(f"steps={steps}: {type(pipe.scheduler).__name__} does not take it: {first_line(found)}")


def check_drivable(pipe: DiffusionPipeline) -> None:
    """Raises ModelError or InputError, before any run, for a pipeline that cemq cannot drive, and says why."""
    name, known = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    denoisers(pipe)
    condition_argument(pipe)
    output_kind(pipe)
    scheduler = getattr(pipe, "scheduler", None)
    for method in ("set_timesteps", "step"):
        if not callable(getattr(scheduler, method, None)):
            raise ModelError(f"{name} has no scheduler with {method}(): cemq has nothing to count its steps by")
    parts = getattr(pipe, "components", {})
    if "vae" in parts and parts["vae"] is None:
        raise ModelError(f"{name} was loaded without a vae: there is nothing to decode its samples with")
    encoders = [part for part in parts if part.startswith("text_encoder")]
    if encoders and condition_argument(pipe) == "prompt" and all(parts[part] is None for part in encoders):
        raise ModelError(f"{name} was loaded without {' or '.join(encoders)}: there is nothing to read a prompt with")
    for argument in ("num_inference_steps", "generator", "output_type"):
        if argument not in known:
            raise InputError(f"{name} takes no {argument}: cemq cannot run it yet")


def run(
    pipe: DiffusionPipeline,
    batch: Batch,
    *,
    steps: int,
    call: Mapping[str, Any],
    output_type: str = "np",
    on_step: Callable[[], None] | None = None,
) -> Any:
    """Run one batch and return what the pipeline calls images, frames or audios (`outputs` knows their shapes).

    Two runs of one batch are identical, even where the pipeline forgets to hand its generator on and draws from torch's
    global one: that is seeded too, and left as it was afterwards.

    Raises:
        PipelineError: The pipeline refuses its arguments, or fails; the cause is its own exception.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]  # CPU noise: the same on every device
    with ExitStack() as around:
        around.enter_context(torch.random.fork_rng(devices=_cuda_devices(pipe)))
        torch.manual_seed(batch.seeds[0])
        if on_step is not None:

            def step(original: Any, call: Call) -> Any:
                result = original(*call.args, **call.kwargs)
                on_step()
                return result

            around.enter_context(intercepted(pipe.scheduler, "step", step))
        arguments = _for_batch(call, len(batch.conditions))
        try:
            output = cast("Callable[..., Any]", pipe)(  # all pipelines are, but for their base class
                **{condition_argument(pipe): list(batch.conditions)},
                num_inference_steps=steps,
                generator=generators,
                output_type=output_type,
                **arguments,
            )
        except _REFUSALS as error:
            raise _refused(pipe, batch, {"num_inference_steps": steps, **call}, error) from error
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))


def _refused(pipe: DiffusionPipeline, batch: Batch, arguments: Mapping[str, Any], error: Exception) -> PipelineError:
    """One line for what a pipeline raised: how it was called, why it failed, and where."""
    name, reason = type(pipe).__name__, first_line(error)
    if len(batch.conditions) > 1 and arguments.keys() & set(PICTURE_ARGUMENTS):
        return PipelineError(
            f"{name} fails on {len(batch.conditions)} samples of one picture ({reason}): some pipelines want a picture "
            "for each; set batch_size: 1 in a recipe"
        )
    given = ", ".join(f"{key}={reprlib.repr(value)}" for key, value in arguments.items())
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"
    return PipelineError(f"{name} cannot be run with {given}: {reason} ({where})")


def _cuda_devices(pipe: DiffusionPipeline) -> list[torch.device]:
    device = getattr(pipe, "_execution_device", torch.device("cpu"))
    return [torch.device("cuda", device.index or 0)] if device.type == "cuda" else []


def _for_batch(call: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """Call arguments from what JSON can hold: pictures are read, and one negative prompt becomes one per sample."""
    arguments = tree_map(lambda value: value, dict(call))  # new lists and dicts, which a pipeline may empty
    for name, value in call.items():
        if not isinstance(value, str):
            continue
        if name in PICTURE_ARGUMENTS:
            arguments[name] = _read_picture(name, value)
        elif name.startswith("negative_prompt"):  # some pipelines want the type and the length of the prompts
            arguments[name] = [value] * samples
    return arguments


def _read_picture(name: str, path: str) -> Any:
    from diffusers.utils import load_image

    try:
        return load_image(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--call {name}={path}: no picture can be read there ({error})") from None


def iterate(
    batches: Sequence[Batch], stage: str, progress: Progress | None, steps: int
) -> Iterator[tuple[Batch, Callable[[], None]]]:
    """Yield (batch, on_step) and report the share of all steps done under the name ``stage``, from 0 on."""
    done, total = 0, len(batches) * steps
    if progress and batches:
        progress(stage, 0.0)

    def on_step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(stage, min(done / total, 1.0))

    for batch in batches:
        yield batch, on_step
