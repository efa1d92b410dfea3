"""Which samples are run: conditions (prompts or class labels), seeds, and the call of the pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cemq.errors import InputError, ModelError, choose
from cemq.families import PICTURE_ARGUMENTS
from cemq.models import denoisers
from cemq.outputs import output_kind
from cemq.sampler import Call, intercepted

Progress = Callable[[str, float], None]  # told a stage's name and the share of it done
BUILD_LOG = "cemq.build"  # the logger of what a build says beside its progress
EVALUATION_SEED_OFFSET = 1_000_000  # evaluation seeds start here, so that none was ever used for profiling


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples run together; each has its own seed, so that its noise does not depend on the batch."""

    conditions: tuple[str | int, ...]
    seeds: tuple[int, ...]


def condition_argument(pipe: Any) -> str:
    """The pipeline argument that takes what to draw: ``class_labels`` or ``prompt``. Raises InputError for neither."""
    known = inspect.signature(type(pipe).__call__).parameters
    for name in ("class_labels", "prompt"):
        if name in known:
            return name
    raise InputError(f"{type(pipe).__name__} takes neither prompts nor class labels: cemq cannot run it yet")


def read_conditions(path: Path) -> tuple[str, ...]:
    """Prompts or class labels, one per line; lines that begin with # are comments.

    Raises:
        InputError: No such file, or nothing in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(
            f"calibration file '{path}' cannot be read ({reason}): give a text file, one line each"
        ) from None
    found = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not found:
        raise InputError(f"calibration file '{path}' holds no prompt or label: write one per line")
    return found


def check_conditions(pipe: Any, conditions: Sequence[str | int]) -> tuple[str | int, ...]:
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
        elif text.isdigit() and (not classes or int(text) < classes) and (not names or int(text) in names.values()):
            numbers.append(int(text))
        else:
            known = f"one of {', '.join(list(names)[:12])}" if names else f"a class number in 0..{classes - 1}"
            raise InputError(f"label {text!r} is not known to this model: give {known}")
    return tuple(numbers)


def make_batches(
    conditions: Sequence[str | int], *, samples: int, first_seed: int, batch_size: int
) -> tuple[Batch, ...]:
    """``samples`` samples, conditions in turn, seeds counting up from ``first_seed``."""
    if samples < 1:
        raise InputError(f"samples={samples}: at least one sample is needed")
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
    """Shuffle, then part into those for profiling and those held out; with too few to part, both get all of them."""
    order = np.random.default_rng(seed).permutation(len(conditions))
    shuffled = tuple(conditions[i] for i in order)
    if len(shuffled) < 2 * profiled:
        return shuffled, shuffled
    return shuffled[:profiled], shuffled[profiled:]


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Raises InputError for an argument that the pipeline does not take, or that cemq sets itself."""
    known = inspect.signature(type(pipe).__call__).parameters
    ours = {"self", "generator", "num_inference_steps", "output_type", "return_dict", condition_argument(pipe)}
    for name in call:
        if name in ours - {"self"}:
            raise InputError(f"--call {name}=...: cemq sets this argument itself; use its own option instead")
        choose(f"argument of {type(pipe).__name__}", name, [n for n in known if n not in ours])


def check_drivable(pipe: Any) -> None:
    """Raises ModelError or InputError, before any run, for a pipeline that cemq cannot drive, and says why."""
    name, known = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    denoisers(pipe)
    condition_argument(pipe)
    output_kind(pipe)
    scheduler = getattr(pipe, "scheduler", None)
    for method in ("set_timesteps", "step"):
        if not callable(getattr(scheduler, method, None)):
            raise ModelError(f"{name} has no scheduler with {method}(): cemq has nothing to count its steps by")
    for argument in ("num_inference_steps", "generator", "output_type"):
        if argument not in known:
            raise InputError(f"{name} takes no {argument}: cemq cannot run it yet")


def run(
    pipe: Any,
    batch: Batch,
    *,
    steps: int,
    call: Mapping[str, Any],
    output_type: str = "np",
    on_step: Callable[[], None] | None = None,
) -> Any:
    """Run one batch and return what the pipeline calls images, frames or audios (`cemq.outputs` knows their shapes).

    Two runs of one batch are identical, even where the pipeline forgets to hand its generator on and draws from torch's
    global one: that is seeded too, and left as it was afterwards.
    """

    def step(original: Any, call: Call) -> Any:
        result = original(*call.args, **call.kwargs)
        on_step()
        return result

    generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]  # CPU noise: the same on every device
    with ExitStack() as around:
        around.enter_context(torch.random.fork_rng(devices=_cuda_devices(pipe)))
        torch.manual_seed(batch.seeds[0])
        if on_step:
            around.enter_context(intercepted(pipe.scheduler, "step", step))
        arguments = _for_batch(call, len(batch.conditions))
        try:
            output = pipe(
                **{condition_argument(pipe): list(batch.conditions)},
                num_inference_steps=steps,
                generator=generators,
                output_type=output_type,
                **arguments,
            )
        except (IndexError, RuntimeError, ValueError) as error:
            if len(batch.conditions) == 1 or not arguments.keys() & set(PICTURE_ARGUMENTS):
                raise
            found = f"{type(pipe).__name__} fails on {len(batch.conditions)} samples of one picture ({error})"
            raise InputError(
                f"{found}: some pipelines want a picture for each; set batch_size: 1 in a recipe"
            ) from error
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))


def _cuda_devices(pipe: Any) -> list[torch.device]:
    device = getattr(pipe, "_execution_device", torch.device("cpu"))
    return [torch.device("cuda", device.index or 0)] if device.type == "cuda" else []


def _for_batch(call: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """Call arguments from what JSON can hold: pictures are read, and one negative prompt becomes one per sample."""
    arguments = dict(call)
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


def iterate(batches: Sequence[Batch], stage: str, progress: Progress | None, steps: int) -> Iterator:
    """Yield (batch, on_step) and report the share of all steps done under the name ``stage``."""
    done, total = 0, len(batches) * steps

    def on_step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(stage, min(done / total, 1.0))

    for batch in batches:
        yield batch, on_step
