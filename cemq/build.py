"""The whole build, every stage in order: record, quantize, profile, plan in closed loop, check, write."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cemq import __version__
from cemq.bundle.dtypes import as_loaded, tensor_dtypes
from cemq.bundle.manifest import (
    EVIDENCE,
    MANIFEST,
    PRIOR,
    Manifest,
    OtherRun,
    seal,
    staging,
    write_pipeline,
)
from cemq.errors import InputError, ModelError, ReplayError, choose
from cemq.evaluation import measure_fidelity
from cemq.files import absolute
from cemq.memory.placement import format_bytes
from cemq.parallel import ALONE, Processes
from cemq.pipelines.batches import (
    BUILD_LOG,
    Batch,
    Progress,
    check_call,
    check_conditions,
    check_drivable,
    check_steps,
    condition_argument,
    iterate,
    make_batches,
    read_call,
    read_conditions,
    run,
    split_conditions,
)
from cemq.pipelines.opening import (
    check_device,
    default_device,
    default_dtype,
    denoisers,
    locate,
    open_pipeline,
    weight_bytes,
)
from cemq.prior.error_prior import VIEWS
from cemq.prior.profile import profile, record_references
from cemq.quantize import RECORDED_BYTES, QuantizationPlan, quantize_pipeline, record_calls
from cemq.recipe import Recipe, find_calibration, load_recipe, make_recipe, recipe_for
from cemq.runtime import attached, cache_checked
from cemq.runtime.outcome import run_batch, said_of_steps
from cemq.schedule import SEARCH
from cemq.schedule.plan import Plan
from cemq.search.choose import AUTO_BUDGET, check_correctable, check_planning
from cemq.search.planner import Planner, other_step_counts, planning_settings

CHECK_SAMPLES = 4  # held-out samples for the fidelity that is written into the bundle
CALIBRATION_CALLS = 48  # calls of the denoiser that quantization is fitted to, spread over all trajectories
MAX_HELD_OUT = 64  # held-out conditions kept in the bundle for later evaluation


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
    if not resolved.model:
        raise InputError("no model: name builtin:NAME, a pipeline folder or a Hub id, or a recipe that names one")
    return resolved


def quantize_and_schedule(
    model: str | None = None,
    output: str | Path = "bundle",
    *,
    recipe: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    processes: Processes = ALONE,
    **settings: Any,
) -> Manifest:
    """Quantize a pipeline, plan its schedule for its own quantization noise, and write the bundle.

    Args:
        model: ``builtin:NAME``, a pipeline folder or a Hub id; None takes the recipe's.
        output: The bundle's folder.
        recipe: Name of a shipped recipe or a YAML file; None takes the one shipped for this model, if any.
        device: Where to run; None takes CUDA where there is one.
        overwrite: Replace a bundle of that name once the new one is whole.
        progress: Called with the stage's name and the share of it done.
        processes: Those that `cemq.parallel.launched` gives, to run a share of the samples each. The main one writes
            the bundle, which is there when this returns in any of them.
        **settings: Fields of `Recipe`, which win over the recipe's: scheme, steps, budget, solver, predictor, prior,
            calib, samples, seed, call, ...

    Raises:
        CemqError: Anything asked for cannot be done; nothing is written.
    """
    settled = resolve_recipe(model, recipe, settings)
    quantization = QuantizationPlan(
        scheme=settled.scheme,
        backend=settled.backend,
        full_precision=settled.full_precision,
        gptq=settled.rounding == "gptq",
        smoothed=settled.smoothed,
        low_rank=settled.low_rank,
        bits_budget=settled.bits_budget,
        components=tuple(settled.components or ()),
    )
    quantization.check()
    choose("prior", settled.prior, VIEWS)
    check_planning(**planning_settings(settled), budget=settled.budget, steps=settled.steps)
    if settled.also_steps and settled.solver != SEARCH:
        raise InputError(
            f"also_steps: other step counts are searched for, found --solver {settled.solver}: leave one out"
        )
    if settled.calib:
        read_conditions(find_calibration(settled.calib))
    place = device or default_device()
    check_device(place)
    dtype = settled.dtype or default_dtype(place)
    source = locate(settled.model)
    if (source.folder / MANIFEST).is_file():
        raise ModelError(f"'{settled.model}' is a cemq bundle already: give the full-precision model it was made from")

    with staging(Path(output), overwrite=overwrite) if processes.is_main else nullcontext() as folder:
        processes.agree("settings", (settled.model_dump(), _library_versions(), torch.get_num_threads()))
        pipe = open_pipeline(source.folder, dtype=dtype, device=place)
        opened = tensor_dtypes(pipe)
        pipe.set_progress_bar_config(disable=True)
        steps = settled.steps or _default_steps(pipe)
        check_planning(**planning_settings(settled), budget=settled.budget, steps=steps)
        check_call(type(pipe), settled.call)
        read = read_call(type(pipe), settled.call)
        settled = make_recipe(settled.model_dump(exclude_unset=True) | {"call": read})
        check_drivable(pipe)
        check_steps(pipe, steps, *other_step_counts(settled, steps))
        check_correctable(settled.corrector, settled.cache, pipe.scheduler, steps)
        quantization.check_pipeline(pipe)
        profiled, held_out = _conditions(pipe, settled)
        # three sets of samples, with seeds of their own: to profile, to plan on, to check the plan
        counts = settled.samples, settled.planning_samples, CHECK_SAMPLES
        turned = settled.planning_samples % len(held_out)
        batches, planning, check = (
            make_batches(
                conditions,
                samples=counts[index],
                first_seed=settled.seed + sum(counts[:index]),
                batch_size=settled.batch_size,
            )
            for index, conditions in enumerate((profiled, held_out, held_out[turned:] + held_out[:turned]))
        )
        if settled.cache != "output":
            said = _check_cache(pipe, batches[0], steps, settled)
            if processes.is_main:
                logging.getLogger(BUILD_LOG).info(said)

        # Every process quantizes, from all calls: as long a wait as for one that does, and nothing to send afterwards.
        recorded: list[dict[str, Any] | ReplayError] = []
        every, limit = _stride(len(batches) * steps), RECORDED_BYTES // (len(batches) * len(denoisers(pipe)))

        def watch(batch: Batch) -> Any:
            return _recorded_calls(
                pipe, quantization, recorded, every=every, before=batches.index(batch) * steps, limit_bytes=limit
            )

        shares = [processes.share(each) for each in (batches, planning, check)]
        references = record_references(
            pipe, shares[0], steps=steps, call=settled.call, progress=progress, watch=watch
        )  # fmt: skip
        aims = _outcomes(pipe, shares[1], "full-precision planning samples", steps, settled, progress)
        other_aims = {
            count: _outcomes(pipe, shares[1], f"full precision, {count} steps", count, settled, progress)
            for count in other_step_counts(settled, steps)
        }
        wanted = _outcomes(pipe, shares[2], "full-precision check", steps, settled, progress)
        reference_bytes = weight_bytes(pipe)

        gathered = processes.gather(recorded)
        recorded.clear()
        if failed := next((each for each in gathered if isinstance(each, ReplayError)), None):
            quantization = quantization.without_calls(failed)
            if processes.is_main:
                logging.getLogger(BUILD_LOG).warning("%s: weights are rounded to nearest", failed)
        calls = {} if failed else _in_one(gathered)
        del gathered
        quantize_pipeline(pipe, quantization, calls, progress)
        del calls
        if processes.count > 1:
            processes.agree("the quantized weights", _digest(pipe))
        prior = profile(
            pipe,
            batches,
            references,
            steps=steps,
            call=settled.call,
            scheme=settled.scheme,
            dtype=dtype,
            progress=progress,
            processes=processes,
        )
        planner = Planner(pipe=pipe, batches=planning, settings=settled, progress=progress, processes=processes)
        planned = planner.plan(prior, aims, steps, settled.budget)
        own = Plan(
            schedule=planned.schedule, sampler=prior.metadata.sampler, prior=planned.prior,
            correction=planned.correction, view=settled.prior, cache=settled.cache, solver=settled.solver,
            predictor=settled.predictor,
        )  # fmt: skip
        others = {count: other for count in other_aims if (other := planner.plan_too(own, other_aims[count], count))}
        with attached(pipe, own):
            found = _outcomes(pipe, shares[2], "scheduled check", steps, settled, progress)

        fidelity = measure_fidelity(wanted, found, processes)
        note = said_of_steps(own.schedule, fidelity.num_steps, fidelity.full_steps)
        if note and processes.is_main:
            logging.getLogger(BUILD_LOG).warning(note)

        manifest = Manifest(
            cemq_version=__version__,
            model=source.name,
            revision=source.revision,
            pipeline_class=type(pipe).__name__,
            denoisers=tuple(name for name, _ in denoisers(pipe)),
            scheme=settled.scheme,
            backend=settled.backend,
            dtype=dtype,
            view=settled.prior,
            num_inference_steps=steps,
            schedule=own.schedule,
            correction=own.correction and own.correction.method,
            cache=settled.cache,
            sampler=own.sampler,
            call=settled.call,
            profiled_seeds=tuple(seed for batch in (*batches, *planning, *check) for seed in batch.seeds),
            held_out_conditions=held_out[:MAX_HELD_OUT],
            fidelity=dataclasses.asdict(fidelity),
            model_bytes=weight_bytes(pipe),
            reference_bytes=reference_bytes,
            libraries=_library_versions(),
            recipe=settled.model_dump(exclude_unset=True),
            other_runs=tuple(
                OtherRun(
                    num_inference_steps=count,
                    schedule=other.schedule,
                    correction=other.correction and other.correction.method,
                    sampler=sampler,
                )
                for count, (other, sampler) in others.items()
            ),
            dtypes=as_loaded(opened, tensor_dtypes(pipe)),
        )
        if folder is not None:
            write_pipeline(pipe, folder, source.folder)
            planned.prior.save(folder / PRIOR)
            evidence = planned.evidence | {
                "other_runs": [other.evidence | {"num_inference_steps": count} for count, (other, _) in others.items()]
            }
            (folder / EVIDENCE).write_text(json.dumps(evidence, indent=1) + "\n", encoding="utf-8")
            seal(folder, manifest)
    processes.wait()  # until the bundle is there
    return manifest


@contextmanager
def bundle_of(
    name: str | Path,
    *,
    check: Callable[[int | None], None],
    scheme: str | None = None,
    recipe: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> Iterator[Path]:
    """The folder itself where it is a bundle's; for a model's name one made of it, for as long as the block lasts.

    Args:
        check: Called with a model's step count, None where its recipe says none, before anything long.

    Raises:
        InputError: A scheme or a recipe for a bundle, or what ``check`` raises.
        CemqError: What `quantize_and_schedule` raises.
    """
    if os.path.isfile(absolute(name) / MANIFEST):
        if scheme or recipe:
            raise InputError(f"'{name}' is a bundle already: leave scheme and recipe out, or give the model")
        yield absolute(name)
        return
    check(resolve_recipe(str(name), recipe, {}).steps)
    with tempfile.TemporaryDirectory(prefix="cemq-") if processes.is_main else nullcontext() as mine:
        folder = Path(processes.gather([mine])[0]) / "bundle"
        quantize_and_schedule(
            str(name), folder, scheme=scheme, recipe=recipe, device=device, progress=progress, processes=processes,
            also_steps=[],
        )  # fmt: skip
        yield folder
        processes.wait()  # until all have read it


def _conditions(pipe: Any, plan: Recipe) -> tuple[tuple[str | int, ...], tuple[str | int, ...]]:
    """Conditions to profile with and, apart from them where there are enough, held-out ones."""
    labelled = condition_argument(pipe) == "class_labels"
    default = "imagenet_labels.txt" if labelled else "prompts.txt"
    lines = read_conditions(find_calibration(plan.calib or default))
    return split_conditions(check_conditions(pipe, lines), profiled=plan.samples, seed=plan.seed)


class _EnoughError(Exception):
    """A run was only to begin."""


def _check_cache(pipe: Any, batch: Batch, steps: int, plan: Recipe) -> str:
    """One step of one sample, before hours of work; returns how much memory the cache takes, in words.

    Raises:
        ModelError: This pipeline cannot be cached so.
    """

    def stop() -> None:
        raise _EnoughError

    one = Batch(conditions=batch.conditions[:1], seeds=batch.seeds[:1])
    with cache_checked(pipe, plan.cache) as memory, suppress(_EnoughError):
        run(pipe, one, steps=steps, call=plan.call, on_step=stop)
    return (
        f"the cache keeps {format_bytes(memory.step_bytes)} a sample ({memory.contents}) of every full-compute step "
        f"that is looked back to: one with reuse, two with taylor1, three with taylor2; {plan.batch_size} samples are "
        "drawn at once"
    )


def _stride(steps: int) -> int:
    """Which share of the calls to keep for calibration; odd, so that two calls a step (guidance) are kept alike."""
    return max(1, steps // CALIBRATION_CALLS) | 1


@contextmanager
def _recorded_calls(
    pipe: Any,
    quantization: QuantizationPlan,
    found: list[dict[str, Any] | ReplayError],
    *,
    every: int,
    before: int,
    limit_bytes: int,
) -> Iterator[None]:
    """Add to ``found`` each ``every``-th call of a run, by denoiser; ``before`` steps were run in earlier batches.

    Calls that cannot be replayed are none: what there is of each batch is why, and nothing is recorded from there on.

    Raises:
        ReplayError: Nor can be done without.
    """
    if found and isinstance(found[-1], ReplayError):
        yield
        found.append(found[-1])
        return
    try:
        with ExitStack() as recording:
            calls = {
                name: recording.enter_context(
                    record_calls(denoiser, every=every, first=-before % every, limit_bytes=limit_bytes)
                )
                for name, denoiser in denoisers(pipe)
                if quantization.needs_calls(denoiser)
            }
            yield
    except ReplayError as error:
        quantization.without_calls(error)  # now, and not after the other runs
        found[:] = [error] * (len(found) + 1)
    else:
        found.append(calls)


def _in_one(recorded: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The calls of every denoiser, from those of all batches."""
    return {name: [call for calls in recorded for call in calls[name]] for name in recorded[0]}


def _digest(pipe: Any) -> str:
    """Of all weights, bit by bit."""
    found = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        for key, value in component.state_dict().items() if isinstance(component, torch.nn.Module) else ():
            found.update(f"{name}.{key}".encode())
            if torch.is_tensor(value):
                found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _outcomes(pipe: Any, batches: Any, stage: str, steps: int, plan: Recipe, progress: Progress | None) -> list[Any]:
    return [
        run_batch(pipe, batch, steps=steps, call=plan.call, on_step=on_step)
        for batch, on_step in iterate(batches, stage, progress, steps)
    ]


def _default_steps(pipe: Any) -> int:
    parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    if parameter is None or not isinstance(parameter.default, int):
        raise InputError(f"{type(pipe).__name__} has no default step count: give --steps")
    return parameter.default


def _library_versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "diffusers", "transformers", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # vendored or built in place
            continue
    return found
