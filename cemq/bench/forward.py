"""One forward of a denoiser of real size: full precision against quantized, all in memory, taking turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import psutil
import torch

from cemq.bench.answers import predict, relative_error
from cemq.bench.architectures import ARCHITECTURES, Architecture, Inputs
from cemq.bench.machine import compile_obstacle, describe_machine
from cemq.bench.measure import busy_note, make_rows, measure
from cemq.bench.random_models import (
    empty_model,
    needs_float_model,
    parse_scheme,
    planned_bytes,
    quantization_config,
    random_model,
    tensor_bytes,
)
from cemq.errors import CemqError, InputError, choose, first_line
from cemq.pipelines.batches import Progress
from cemq.pipelines.opening import DTYPES, check_device, default_device

FULL_PRECISION = "full precision"
_USABLE = 0.9  # of the free memory may go into weights; the rest is for what they work on


def bench_architecture(
    architecture: str | Architecture = "dit-small",
    *,
    schemes: Sequence[str] = ("w8a8", "w4a8"),
    dtype: str = "bfloat16",
    batch: int | None = None,
    rounds: int = 15,
    device: str | None = None,
    full_precision: bool = True,
    compiled: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time forwards of one architecture with random weights, the same ones in every variant.

    Args:
        schemes: Names such as ``w8a8``, of another backend as ``quanto:w8a8``.
        dtype: Of everything that is not quantized.
        batch: Inputs of one forward; None takes what one picture needs.
        full_precision: Time the model that is not quantized as well, first.
        compiled: Put every variant through torch.compile.

    Returns:
        Plain data: machine, settings, notes and tables of rows (`measure.make_rows`).

    Raises:
        CemqError: Something is unknown, not installed or does not fit in memory; before anything is built.
    """
    if isinstance(architecture, str):
        architecture = ARCHITECTURES[choose("architecture", architecture, ARCHITECTURES)]
    choose("dtype", dtype, DTYPES)
    wanted = {scheme: parse_scheme(scheme) for scheme in schemes}
    if not wanted and not full_precision:
        raise InputError("nothing to time: name --schemes, or keep full precision")
    device = device or default_device()
    place = check_device(device)
    if compiled and (obstacle := compile_obstacle(device)):
        raise InputError(f"torch.compile cannot be used here: {obstacle}")
    kind, batch = getattr(torch, dtype), batch or architecture.batch

    empty = empty_model(architecture)
    configs = {FULL_PRECISION: None} if full_precision else {}
    configs |= {name: quantization_config(empty, *pair) for name, pair in wanted.items()}
    free = _free_memory(place)
    needs = {name: planned_bytes(empty, kind, config) for name, config in configs.items()}
    calibrated = {name for name, config in configs.items() if config is not None and needs_float_model(empty, config)}
    _check_fit(architecture.name, needs, dict.fromkeys(calibrated, planned_bytes(empty, kind)), _USABLE * free, device)

    def report(stage: str, done: int, total: int) -> None:
        if progress:
            progress(stage, done / total)

    try:
        inputs = architecture.inputs(batch, dtype=kind, device=place)
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:  # torch has all of them for a huge size
        raise InputError(f"batch={batch}: inputs of that size cannot be made: {first_line(error)}") from error
    notes, reference = [], None
    exact_fits = planned_bytes(empty, torch.float32) <= _USABLE * free
    if exact_fits and not (full_precision and kind == torch.float32):
        report("float32 reference", 0, 1)
        exact = random_model(architecture, dtype=torch.float32, device=place, weights_rounded_to=kind)
        reference = predict(exact, _cast(inputs, torch.float32))
        del exact
        report("float32 reference", 1, 1)
    elif not exact_fits:
        other = f"the {dtype} output instead" if full_precision else "nothing, so there is no error"
        notes.append(f"a float32 model does not fit in memory: outputs are compared with {other}")

    models = {}
    for done, (name, config) in enumerate(configs.items()):
        report("building", done, len(configs))
        models[name] = random_model(architecture, dtype=kind, device=place, config=config, batch=batch)
    report("building", 1, 1)
    calls = {
        name: partial(predict, torch.compile(model) if compiled else model, inputs) for name, model in models.items()
    }
    errors: dict[str, float | None] = {}
    for name, call in calls.items():
        output = _output(name, call)
        reference = output if reference is None and name == FULL_PRECISION else reference
        error = math.nan if reference is None else relative_error(reference, output)
        errors[name] = None if math.isnan(error) else error
        if not output.isfinite().all():
            notes.append(f"{name}: the output is not finite")
    timings = measure(
        calls, rounds=rounds, device=place, progress=(lambda share: progress("timing", share)) if progress else None
    )
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    return {
        "machine": describe_machine(),
        "settings": {
            "architecture": architecture.name,
            "model_class": architecture.model_class,
            "parameters": parameters,
            "dtype": dtype,
            "batch": batch,
            "inputs": {key: list(value.shape) for key, value in inputs.items() if torch.is_tensor(value)},
            "rounds": rounds,
            "device": device,
            "compiled": compiled,
        },
        "notes": notes + busy_note(timings),
        "tables": [
            {
                "title": f"{architecture.name} ({parameters / 1e6:,.0f} M parameters), one forward, batch {batch}, "
                f"{dtype} on {device}{', torch.compile' if compiled else ''}, median of {rounds}",
                "rows": make_rows(timings, {name: tensor_bytes(model) for name, model in models.items()}, errors),
            }
        ],
    }


def _output(name: str, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The first call, which compiles where that is asked for. Raises CemqError where the variant does not run."""
    try:
        return call()
    except Exception as error:  # libraries raise many unrelated types
        raise CemqError(f"{name} does not run here: {first_line(error)}; cemq doctor shows what does") from error


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _check_fit(what: str, kept: dict[str, int], passing: Mapping[str, int], usable: float, device: str) -> None:
    """Raises InputError, naming what to leave out, unless all variants fit in memory together.

    Args:
        kept: Bytes of each variant.
        passing: Bytes of the float model that must be there, too, while some of them are calibrated one by one.
    """

    def needed(names: Mapping[str, int]) -> int:
        return sum(names.values()) + max((passing.get(name, 0) for name in names), default=0)

    total, kept, left_out = needed(kept), dict(kept), []
    while needed(kept) > usable and len(kept) > 1:
        name = max(kept, key=lambda name: kept[name] + passing.get(name, 0))
        size = kept.pop(name) + passing.get(name, 0)
        flag = ", --no-full-precision" if name == FULL_PRECISION else ""
        left_out.append(f"{name} ({size / 1e9:.1f} GB{flag})")
    found = f"{what} needs {total / 1e9:.1f} GB for its variants, and {device} has {usable / 1e9:.1f} GB to give"
    if needed(kept) > usable:
        raise InputError(f"{found}: not even {next(iter(kept))} fits, take a smaller --arch")
    if left_out:
        raise InputError(f"{found}: leave out {' and '.join(left_out)}")
