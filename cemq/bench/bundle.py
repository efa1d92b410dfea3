"""A bundle against its full-precision original: one forward of the denoiser, and the whole run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from accelerate.utils import send_to_device

from cemq.bench.answers import relative_error
from cemq.bench.forward import FULL_PRECISION, kernels_taken
from cemq.bench.machine import describe_machine
from cemq.bench.measure import Timing, busy_note, make_rows, measure, of_stage
from cemq.bench.random_models import tensor_bytes
from cemq.bundle.checksums import Verify
from cemq.bundle.load import from_pretrained
from cemq.bundle.manifest import Manifest, read_bundle
from cemq.bundle.original import find_original
from cemq.errors import ModelError, check_keywords, choose
from cemq.pipelines.batches import EVALUATION_SEED_OFFSET, Batch, Progress, make_batches, run
from cemq.pipelines.opening import DTYPES, check_device, default_device, denoisers
from cemq.pipelines.outputs import first_tensor
from cemq.quantize import record_calls
from cemq.quantize.calls import Call, replay
from cemq.quantize.kernels import AUTO
from cemq.runtime import attached, detach, schedule_hook
from cemq.runtime.policies import Policy
from cemq.runtime.runner import said_of_steps
from cemq.schedule import CacheSchedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_RECORDED_STEPS = 2  # of the short run that one call of the denoiser is taken from


class Loaded(TypedDict, total=False):
    """Whether the original is timed as well, and how the bundle is loaded; each may be left out."""

    full_precision: bool
    verify: Verify | bool
    kernel: str


def bench_bundle(
    bundle: str | Path,
    *,
    dtype: str | None = None,
    batch: int = 1,
    rounds: int = 5,
    device: str | None = None,
    progress: Progress | None = None,
    **loaded: Unpack[Loaded],
) -> dict[str, Any]:
    """Time a bundle, and the model it was made from where that can be found.

    Args:
        dtype: Of everything that is not quantized; None takes the bundle's.
        batch: Samples of a run.
        full_precision: Look for the original and time it as well; this is done unless it is False.
        verify: When checksums are compared: ``always``, ``once`` on this machine, which is the default, or ``never``.
        kernel: What multiplies integers (`cemq.from_pretrained`).

    Returns:
        Plain data, as `forward.bench_architecture` returns it, with two tables.

    Raises:
        CemqError: The bundle cannot be used, or a setting is unknown.
    """
    check_keywords("bench_bundle", loaded, Loaded)
    kernel = loaded.get("kernel", AUTO)
    manifest = read_bundle(Path(bundle), verify=loaded.get("verify", "once"))
    dtype = choose("dtype", dtype or manifest.dtype, DTYPES)
    place = check_device(device := device or default_device())
    pipes, notes = _open_original(manifest, dtype, device) if loaded.get("full_precision", True) else ({}, [])
    quantized = from_pretrained(bundle, device=device, torch_dtype=dtype, verify="never", kernel=kernel)
    pipes[manifest.scheme] = quantized
    schedule, policy = manifest.schedule, schedule_hook(quantized).run.policy
    detach(quantized)
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    samples = _samples(manifest, batch)
    component = denoisers(quantized)[0][0]
    models = {name: getattr(pipe, component) for name, pipe in pipes.items()}
    call = _recorded_call(quantized, manifest, samples, place)
    in_turn = partial(measure, rounds=3 * rounds, device=place, progress=of_stage(progress, "one forward"))
    errors = _relative_errors(models, call)
    forwards = in_turn({name: partial(replay, model, call) for name, model in models.items()})
    in_turn = partial(measure, rounds=rounds, warm_up=1, device=place, progress=of_stage(progress, "whole run"))
    runs, (num_steps, full_steps) = _time_runs(pipes, policy or schedule, manifest, samples, in_turn)
    cached = f"{manifest.scheme}, {full_steps:g} of {num_steps} steps in full"
    runs = {name or cached: timing for name, timing in runs.items()}
    if note := said_of_steps(schedule, num_steps, full_steps):
        notes.append(note)
    weights = {name: tensor_bytes(model) for name, model in models.items()}
    where = f"batch {batch}, {dtype} on {device}"
    titles = (
        f"{bundle}: one forward of the {component}, {where}, median of {3 * rounds}",
        f"{bundle}: whole run of {manifest.num_inference_steps} steps, {where}, median of {rounds}",
    )
    return {
        "machine": describe_machine(),
        "settings": {
            "bundle": str(bundle), "model": manifest.model, "backend": manifest.backend, "dtype": dtype, "batch": batch,
            "rounds": rounds, "device": device, "steps": manifest.num_inference_steps, "full_steps": full_steps,
            "kernel": kernel,
        },
        "notes": notes + (busy_note(forwards) or busy_note(runs)),
        "tables": [
            {"title": titles[0], "rows": make_rows(forwards, weights, errors)},
            {"title": titles[1], "rows": make_rows(runs, weights | {cached: weights[manifest.scheme]}, {})},
        ],
        "kernels": kernels_taken(kernel),
    }  # fmt: skip


def _samples(manifest: Manifest, batch: int) -> Batch:
    (samples,) = make_batches(
        manifest.held_out_conditions, samples=batch, first_seed=EVALUATION_SEED_OFFSET, batch_size=batch
    )
    return samples


def _open_original(manifest: Manifest, dtype: str, device: str) -> tuple[dict[str, DiffusionPipeline], list[str]]:
    """The full-precision pipeline by its name; where it is not at hand, nothing, and a note that says so."""
    try:
        return {FULL_PRECISION: find_original(manifest).open(dtype=dtype, device=device)}, []
    except ModelError as error:
        return {}, [f"the bundle alone is timed, its original is not at hand: {error}"]


def _recorded_call(pipe: DiffusionPipeline, manifest: Manifest, samples: Batch, device: torch.device) -> Call:
    """The first call of the denoiser in a short run."""
    with record_calls(denoisers(pipe)[0][1], every=1) as recorded:
        run(pipe, samples, steps=min(_RECORDED_STEPS, manifest.num_inference_steps), call=manifest.call)
    return Call(*send_to_device((recorded[0].arguments, recorded[0].keywords), device))


def _relative_errors(models: Mapping[str, torch.nn.Module], call: Call) -> dict[str, float]:
    """Of each denoiser's output to full precision's; none where that is not at hand."""
    outputs = {name: first_tensor(replay(model, call)) for name, model in models.items()}
    exact = outputs.get(FULL_PRECISION)
    return {name: relative_error(exact, output) for name, output in outputs.items() if exact is not None}


def _time_runs(
    pipes: Mapping[str, DiffusionPipeline],
    followed: CacheSchedule | Policy,
    manifest: Manifest,
    samples: Batch,
    in_turn: Callable[[Mapping[str, Callable[[], Any]]], dict[str, Timing]],
) -> tuple[dict[str, Timing], tuple[int, float]]:
    """Whole runs of every pipeline, and of the bundle's under what it follows, which has no name yet: it is to say how
    many of its steps were computed, and these are counted here, the steps and those in full."""
    whole = partial(run, batch=samples, steps=manifest.num_inference_steps, call=manifest.call)
    steps_run: tuple[int, float] = manifest.schedule.num_steps, manifest.schedule.full_count

    def scheduled() -> None:
        nonlocal steps_run
        quantized = pipes[manifest.scheme]
        with attached(quantized, followed, manifest.sampler, cache=manifest.cache) as hook:
            whole(quantized)
            steps_run = hook.steps_run

    runs = in_turn({name: partial(whole, pipe) for name, pipe in pipes.items()} | {"": scheduled})
    return runs, steps_run
