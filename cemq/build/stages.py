"""The stages of a build, in the order in which they run. What each returns is frozen, and `stored` can keep it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cemq import __version__
from cemq.build.fitting import Calls, fitting
from cemq.build.settings import BuildSettings
from cemq.bundle.dtypes import Dtypes, as_loaded, tensor_dtypes
from cemq.bundle.manifest import EVIDENCE, PRIOR, Manifest, OtherRun, seal, write_pipeline
from cemq.errors import ReplayError
from cemq.evaluation.compare import Fidelity, measure_fidelity
from cemq.memory.placement import format_bytes
from cemq.parallel import Processes
from cemq.pipelines.batches import (
    BUILD_LOG,
    Batch,
    Progress,
    check_call,
    check_conditions,
    check_drivable,
    check_steps,
    condition_argument,
    default_steps,
    make_batches,
    read_call,
    read_conditions,
    run,
    split_conditions,
)
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.pipelines.lora import fuse_loras
from cemq.pipelines.opening import denoisers, open_pipeline, weight_bytes
from cemq.pipelines.trajectory import Trajectory
from cemq.prior.error_prior import ErrorPrior
from cemq.quantize import NO_SCHEME, QuantizationSettings, quantize_pipeline
from cemq.recipe import find_calibration, make_recipe
from cemq.runtime import attached, cache_checked
from cemq.runtime.policy_names import describe_policy
from cemq.runtime.runner import Outcome, Runner, said_of_steps
from cemq.schedule import full_compute
from cemq.schedule.plan import Plan
from cemq.search.choose import Planned, check_correctable, plan, predicted
from cemq.search.trials import ClosedLoop

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MAX_HELD_OUT = 64  # held-out conditions kept in the bundle for later evaluation


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What is run: to profile, to plan on (what was profiled first of all), and others to check the plan."""

    profiled: tuple[Batch, ...]
    planning: tuple[Batch, ...]
    check: tuple[Batch, ...]
    held_out: tuple[str | int, ...]  # conditions that nothing was profiled with

    @property
    def seeds(self) -> tuple[int, ...]:
        batches = dict.fromkeys((*self.profiled, *self.planning, *self.check))
        return tuple(seed for batch in batches for seed in batch.seeds)


@dataclass(frozen=True, kw_only=True, eq=False)
class Originals:
    """What full precision made of this process's share of the samples; planning samples by step count."""

    dtypes: Dtypes
    weight_bytes: int
    trajectories: list[Trajectory]
    planning: dict[int, list[Outcome]]
    check: list[Outcome]


@dataclass(frozen=True, kw_only=True, eq=False)
class Plans:
    """What the quantized pipeline is to follow, by step count, with the prior and the evidence of each."""

    own: Plan
    planned: Planned
    others: dict[int, tuple[Planned, SamplerFingerprint]]


def open_runner(settings: BuildSettings, progress: Progress | None, processes: Processes) -> Runner:
    """The full-precision pipeline, with all of the settings checked against it.

    Raises:
        CemqError: It cannot be opened or driven, or not as the settings ask for.
    """
    recipe = settings.recipe
    fused = [lora.fused.sha256 for lora in settings.loras]
    processes.agree("settings", (recipe.model_dump(), fused, library_versions(), torch.get_num_threads()))
    pipe = open_pipeline(settings.source.folder, dtype=settings.dtype, device=settings.device, variant=recipe.variant)
    fuse_loras(pipe, settings.loras)
    pipe.set_progress_bar_config(disable=True)
    steps = recipe.steps or default_steps(type(pipe))
    if settings.policy is None:
        settings.planning.check(steps)
    check_call(type(pipe), recipe.call)
    call = make_recipe({"call": read_call(type(pipe), recipe.call)}).call
    check_drivable(pipe)
    check_steps(pipe, steps, *settings.other_steps(steps))
    if settings.policy is None:
        check_correctable(recipe.corrector, recipe.cache, pipe.scheduler, steps)
    settings.quantization.check_pipeline(pipe)
    return Runner(pipe=pipe, steps=steps, call=call, progress=progress, processes=processes)


def draw_samples(runner: Runner, settings: BuildSettings) -> Samples:
    """Conditions of what is profiled apart from the others, where there are enough, and seeds that never meet.

    Schedules are run on what was profiled, which full precision has drawn anyway, and on more only where that is not
    enough; the plan is checked on others.

    Raises:
        InputError: The calibration file cannot be used, or a condition in it.
    """
    recipe, pipe = settings.recipe, runner.pipe
    labelled = condition_argument(pipe) == "class_labels"
    default = "imagenet_labels.txt" if labelled else "prompts.txt"
    lines = check_conditions(pipe, read_conditions(find_calibration(recipe.calib or default)))
    effort = settings.effort
    conditions, held_out = split_conditions(lines, profiled=effort.samples, seed=recipe.seed)
    further = max(0, effort.planning_samples - effort.samples)
    turned = further % len(held_out)
    seed, sets = recipe.seed, []
    for chosen, count in (
        (conditions, effort.samples),
        (held_out, further),
        (held_out[turned:] + held_out[:turned], effort.check_samples),
    ):
        sets.append(make_batches(chosen, samples=count, first_seed=seed, batch_size=recipe.batch_size) if count else ())
        seed += count
    profiled, others, check = sets
    shared = math.ceil(min(effort.planning_samples, effort.samples) / recipe.batch_size)
    return Samples(profiled=profiled, planning=profiled[:shared] + others, check=check, held_out=held_out)


def run_originals(
    runner: Runner, samples: Samples, settings: BuildSettings, *, fits: bool = True
) -> tuple[Originals, Calls | ReplayError]:
    """Every run at full precision, and what quantization is fitted to, of all processes.

    Args:
        fits: Whether anything will be quantized.

    Raises:
        ModelError: The pipeline cannot be scheduled, or not with the cache asked for.
        ReplayError: The calls cannot be replayed, and what was asked for cannot do without.
    """
    dtypes = tensor_dtypes(runner.pipe)  # of before any run: a pipeline may cast what it decodes with
    if settings.cache != "output":
        said = _check_cache(runner, samples.profiled[0], settings)
        if runner.processes.is_main:
            logging.getLogger(BUILD_LOG).info(said)
    quantization = settings.quantization if fits else QuantizationSettings(scheme=NO_SCHEME)
    fitted = fitting(runner, quantization, samples.profiled)
    with _counted_calls(runner.pipe) as calls:
        recorded = list(runner.recorded(samples.profiled, watch=fitted.watch))
    trajectories, drawn = [each for each, _ in recorded], [outcome for _, outcome in recorded]
    if trajectories:
        steps = sum(each.num_steps for each in trajectories)
        per_batch = len(calls) // steps  # what was replayed at once is less than a step's
        runner.generations.calls_per_step = per_batch / settings.recipe.batch_size
        runner.generations.replayed += (len(calls) - per_batch * steps) / runner.generations.calls_per_step
    others = samples.planning[len(samples.profiled) :]
    shared = len(runner.processes.share(samples.planning[: len(samples.profiled)]))
    planning = {runner.steps: drawn[:shared] + runner.run(others, "full-precision planning samples")}
    for count in settings.other_steps(runner.steps):
        planning[count] = runner.at(count).run(samples.planning, f"full precision, {count} steps")
    originals = Originals(
        dtypes=dtypes,
        weight_bytes=weight_bytes(runner.pipe),
        trajectories=trajectories,
        planning=planning,
        check=runner.run(samples.check, "full-precision check"),
    )
    return originals, fitted.found()


def quantize(runner: Runner, settings: QuantizationSettings, calls: Calls | ReplayError) -> Runner:
    """Quantize the pipeline in place: every process all of it, as long a wait as for one that does.

    Returns:
        What runs it from now on.

    Raises:
        CemqError: What `quantize_pipeline` raises, or processes that came to different weights.
    """
    processes = runner.processes
    if isinstance(calls, ReplayError):
        settings = settings.without_calls(calls)
        if processes.is_main:
            logging.getLogger(BUILD_LOG).warning("%s: weights are rounded to nearest", calls)
        calls = {}
    with _counted_calls(runner.pipe) as replayed:
        quantize_pipeline(runner.pipe, settings, calls, runner.progress)
    if processes.is_main:  # all replay the same, which is counted once
        runner.generations.replayed += len(replayed) / runner.generations.calls_per_step
    if processes.count > 1:
        processes.agree("the quantized weights", _digest(runner.pipe))
    return replace(runner, quantized=True)


def choose_plans(
    runner: Runner, prior: ErrorPrior, samples: Samples, originals: Originals, settings: BuildSettings
) -> Plans:
    """The plan for the step count of the build, and for every other one that its prior carries over to.

    Raises:
        InfeasibleBudgetError: No schedule meets what the budget asks for.
    """
    recipe = settings.recipe
    if settings.policy is not None:
        return _unplanned(prior, settings)
    planned = _plan(runner, prior, samples, originals, settings)
    own = Plan(
        schedule=planned.schedule, sampler=prior.metadata.sampler, prior=planned.prior, correction=planned.correction,
        view=recipe.view, cache=recipe.cache, solver=recipe.solver, predictor=recipe.predictor,
    )  # fmt: skip
    others = {}
    for count in settings.other_steps(runner.steps):
        references = originals.planning[count]
        sampler = runner.processes.gather([references[0].sampler] if references else [])[0]
        carried = own.carried_over(sampler)
        if carried is not None:
            others[count] = _plan(runner.at(count), carried.prior, samples, originals, settings, carried), sampler
        elif runner.processes.is_main:
            logging.getLogger(BUILD_LOG).info(
                f"not planned for {count} steps: what was measured at {runner.steps} does not carry over with "
                f"{sampler.scheduler}"
            )
    return Plans(own=own, planned=planned, others=others)


def check(
    runner: Runner, plans: Plans, samples: Samples, originals: Originals, settings: BuildSettings
) -> Fidelity | None:
    """Run the plan, or the policy, on samples that it has never seen; None where there are none."""
    if not samples.check:
        return None
    with attached(runner.pipe, settings.policy or plans.own):
        found = runner.run(samples.check, "scheduled check")
    fidelity = measure_fidelity(originals.check, found, runner.processes)
    note = said_of_steps(plans.own.schedule, fidelity.num_steps, fidelity.full_steps)
    if note and runner.processes.is_main:
        logging.getLogger(BUILD_LOG).warning(note)
    return fidelity


def describe(
    runner: Runner,
    settings: BuildSettings,
    samples: Samples,
    originals: Originals,
    plans: Plans,
    fidelity: Fidelity | None,
) -> Manifest:
    """What cemq.json says of a build."""
    pipe, recipe, own = runner.pipe, settings.recipe, plans.own
    return Manifest(
        cemq_version=__version__,
        model=settings.source.name,
        revision=settings.source.revision,
        pipeline_class=type(pipe).__name__,
        denoisers=tuple(name for name, _ in denoisers(pipe)),
        scheme=recipe.scheme,
        backend=recipe.backend,
        dtype=settings.dtype,
        view=recipe.view,
        num_inference_steps=runner.steps,
        schedule=own.schedule,
        correction=own.correction and own.correction.method,
        cache=settings.cache,
        sampler=own.sampler,
        policy=settings.policy and describe_policy(settings.policy),
        call=dict(runner.call),
        profiled_seeds=samples.seeds,
        held_out_conditions=samples.held_out[:MAX_HELD_OUT],
        fidelity=fidelity and asdict(fidelity),
        generations=runner.generations.told(runner.processes),
        model_bytes=weight_bytes(pipe),
        reference_bytes=originals.weight_bytes,
        libraries=library_versions(),
        recipe=recipe.model_dump(exclude_unset=True) | {"call": dict(runner.call)},
        other_runs=tuple(
            OtherRun(
                num_inference_steps=count,
                schedule=other.schedule,
                correction=other.correction and other.correction.method,
                sampler=sampler,
            )
            for count, (other, sampler) in plans.others.items()
        ),
        dtypes=as_loaded(originals.dtypes, tensor_dtypes(pipe)),
        lora=tuple(each.fused for each in settings.loras),
    )


def write_bundle(folder: Path, runner: Runner, settings: BuildSettings, plans: Plans, manifest: Manifest) -> None:
    """All files of the bundle, cemq.json last."""
    write_pipeline(runner.pipe, folder, settings.source.folder)
    write_plans(folder, plans, manifest)


def write_plans(folder: Path, plans: Plans, manifest: Manifest) -> None:
    """What goes with the pipeline that the folder holds: prior, evidence, model card and, last, cemq.json."""
    plans.planned.prior.save(folder / PRIOR)
    others = [other.evidence | {"num_inference_steps": count} for count, (other, _) in plans.others.items()]
    evidence = plans.planned.evidence | {"other_runs": others, "generations": manifest.generations}
    (folder / EVIDENCE).write_text(json.dumps(evidence, indent=1) + "\n", encoding="utf-8")
    seal(folder, manifest)


def _unplanned(prior: ErrorPrior, settings: BuildSettings) -> Plans:
    """Nothing but the prior, which says what a policy has to cope with."""
    schedule = full_compute(prior.num_steps)
    planned = Planned(schedule=schedule, correction=None, prior=prior, evidence={"policy": settings.recipe.policy})
    own = Plan(schedule=schedule, sampler=prior.metadata.sampler, prior=prior, cache=settings.cache)
    return Plans(own=own, planned=planned, others={})


def _plan(
    runner: Runner,
    prior: ErrorPrior,
    samples: Samples,
    originals: Originals,
    settings: BuildSettings,
    carried: Plan | None = None,
) -> Planned:
    """One step count's; ``carried`` is another's carried over, with the budget to plan and a schedule to try."""
    planning, stage, known = settings.planning, "planning", None
    if carried is not None:
        planning, known = planning.elsewhere(carried.schedule.budget), carried.schedule
        stage = f"planning {runner.steps} steps"
    if not samples.planning:
        return predicted(prior, planning, cache=settings.cache, scheduler=runner.pipe.scheduler, steps=runner.steps)
    most = planning.limit(sum(len(batch.seeds) for batch in samples.planning))

    def show(spent: float) -> None:  # people see how many generations it may take
        if runner.progress:
            runner.progress(f"{stage}, {most:g} generations' worth", min(spent / most, 1.0))

    show(0.0)
    loop = ClosedLoop(
        runner=runner, prior=prior, batches=samples.planning, references=originals.planning[runner.steps],
        cache=settings.recipe.cache, on_spent=show,
    )  # fmt: skip
    return plan(loop, planning, known=known)


@contextmanager
def _counted_calls(pipe: DiffusionPipeline) -> Iterator[list[None]]:
    """One for every call of a denoiser in the block."""
    calls: list[None] = []
    handles = [denoiser.register_forward_pre_hook(lambda *_: calls.append(None)) for _, denoiser in denoisers(pipe)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class _EnoughError(Exception):
    """A run was only to begin."""


def _check_cache(runner: Runner, batch: Batch, settings: BuildSettings) -> str:
    """One step of one sample, before hours of work; returns how much memory the cache takes, in words.

    Raises:
        ModelError: This pipeline cannot be cached so.
    """

    def stop() -> None:
        raise _EnoughError

    one = Batch(conditions=batch.conditions[:1], seeds=batch.seeds[:1])
    runner.generations.full_precision += runner.processes.is_main
    with cache_checked(runner.pipe, settings.cache) as memory, suppress(_EnoughError):
        run(runner.pipe, one, steps=runner.steps, call=runner.call, on_step=stop)
    return (
        f"the cache keeps {format_bytes(memory.step_bytes)} a sample ({memory.contents}) of every full-compute step "
        f"that is looked back to: one with reuse, two with taylor1, three with taylor2; {settings.recipe.batch_size} "
        "samples are drawn at once"
    )


def _digest(pipe: DiffusionPipeline) -> str:
    """Of all weights, bit by bit."""
    found = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        for key, value in component.state_dict().items() if isinstance(component, torch.nn.Module) else ():
            found.update(f"{name}.{key}".encode())
            if torch.is_tensor(value):
                found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def library_versions() -> dict[str, str]:
    """Of those that a bundle's figures depend on."""
    found = {}
    for name in ("torch", "diffusers", "transformers", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # vendored or built in place
            continue
    return found
