"""The later stages of a build, from quantizing on. What each returns is frozen, and `stored` can keep it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from cemq import __version__
from cemq.build.fitting import Calls
from cemq.build.references import Fitted, FullPrecision, Opened, Originals, Samples, counted_calls, library_versions
from cemq.build.settings import BuildSettings
from cemq.build.within import open_within
from cemq.bundle.dtypes import as_loaded, restore_dtypes, tensor_dtypes
from cemq.bundle.manifest import EVIDENCE, MANIFEST, PICTURE, PRIOR, Manifest, OtherRun, seal, write_pipeline
from cemq.errors import ReplayError
from cemq.evaluation.compare import Fidelity, measure_fidelity
from cemq.evaluation.pictures import few_of, light_webp, sheet
from cemq.families import DENOISERS
from cemq.pipelines.batches import BUILD_LOG
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.pipelines.opening import denoisers, open_pipeline, weight_bytes
from cemq.prior.error_prior import ErrorPrior
from cemq.quantize import Observer, QuantizationSettings, quantize_pipeline
from cemq.runtime import attached
from cemq.runtime.policy_names import describe_policy
from cemq.runtime.runner import Runner, said_of_steps
from cemq.schedule import full_compute
from cemq.schedule.plan import Plan
from cemq.search.choose import Planned, plan, predicted
from cemq.search.trials import ClosedLoop

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

MAX_HELD_OUT = 64  # held-out conditions kept in the bundle for later evaluation
Journal = MutableMapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Plans:
    """What the quantized pipeline is to follow, by step count, with the prior and the evidence of each."""

    own: Plan
    planned: Planned
    others: dict[int, tuple[Planned, SamplerFingerprint]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Checked:
    """How far the plan's samples are from full precision's, and what a few of them look like.

    Args:
        pictures: Of a few samples, in full precision and of the plan, (n, height, width, 3) and 0 to 255 each; None of
            audio.
    """

    fidelity: Fidelity
    pictures: tuple[np.ndarray, np.ndarray] | None


def open_quantized(folder: Path, opened: Opened, full: FullPrecision) -> Runner:
    """What was written of the quantized pipeline, in place of the original: what is measured is what will be loaded.

    Raises:
        ModelError: It cannot be loaded.
    """
    full.let_go()
    settings, work = full.settings, full.work
    if settings.limit:
        pipe = open_within(settings, work.folder / "offloaded-quantized", folder)
    else:
        pipe = open_pipeline(folder, dtype=settings.dtype, device=settings.device)
    pipe.set_progress_bar_config(disable=True)
    return Runner(
        pipe=pipe, steps=opened.steps, call=opened.call, progress=full.progress, processes=work.processes,
        quantized=True, generations=work.generations,
    )  # fmt: skip


def write_quantized(full: FullPrecision, opened: Opened, fitted: Fitted, folder: Path) -> None:
    """The quantized pipeline as a folder, which the main process writes.

    Raises:
        CemqError: What `quantize` raises.
    """
    settings = full.settings
    if full.pieces:
        observers = cast("Mapping[str, Observer]", fitted.calls)  # a limit leaves nothing else to fit to
        full.pieces.finish(folder, settings.quantization, observers, full.progress)
        return
    runner = full.runner
    runner.generations.replayed += fitted.replayed / runner.generations.calls_per_step
    runner = quantize(runner, settings.quantization, fitted.calls)
    if runner.processes.is_main:
        restore_dtypes(runner.pipe, opened.dtypes, but_for={*DENOISERS, *settings.quantization.components})
        write_pipeline(runner.pipe, folder, settings.source.folder)


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
    with counted_calls(runner.pipe) as replayed:
        quantize_pipeline(runner.pipe, settings, calls, runner.progress)
    if processes.is_main:  # all replay the same, which is counted once
        runner.generations.replayed += len(replayed) / runner.generations.calls_per_step
    if processes.count > 1:
        processes.agree("the quantized weights", _digest(runner.pipe))
    return replace(runner, quantized=True)


def profile(runner: Runner, samples: Samples, originals: Originals, settings: BuildSettings) -> ErrorPrior:
    """The error prior, of forced runs along trajectories of full precision: of the first samples, where not of all."""
    forced = settings.effort.forced or settings.effort.samples
    batches = samples.profiled[: math.ceil(forced / settings.recipe.batch_size)]
    trajectories = originals.trajectories[: len(runner.processes.share(batches))]
    return runner.profile(batches, trajectories, scheme=settings.recipe.scheme, dtype=settings.dtype)


def choose_plans(
    runner: Runner,
    prior: ErrorPrior,
    samples: Samples,
    originals: Originals,
    settings: BuildSettings,
    journal: Callable[[str], Journal] = lambda _: {},
) -> Plans:
    """The plan for the step count of the build, and for every other one that its prior carries over to.

    Args:
        journal: Of a step count, what `ClosedLoop` keeps of its runs.

    Raises:
        InfeasibleBudgetError: No schedule meets what the budget asks for.
    """
    recipe = settings.recipe
    if settings.policy is not None:
        return _unplanned(prior, settings)
    planned = _plan(runner, prior, samples, originals, settings, journal)
    own = Plan(
        schedule=planned.schedule, sampler=prior.sampler, prior=planned.prior, correction=planned.correction,
        view=recipe.view, cache=recipe.cache, solver=recipe.solver, predictor=recipe.predictor,
    )  # fmt: skip
    others = {}
    for count in settings.other_steps(runner.steps):
        references = originals.planning[count]
        sampler = runner.processes.gather([references[0].sampler] if references else [])[0]
        assert sampler is not None  # a run that ends knows what it stepped
        carried = own.carried_over(sampler)
        if carried is not None and carried.prior is not None:
            there = runner.at(count)
            others[count] = _plan(there, carried.prior, samples, originals, settings, journal, carried), sampler
        elif runner.processes.is_main:
            logging.getLogger(BUILD_LOG).info(
                f"not planned for {count} steps: what was measured at {runner.steps} does not carry over with "
                f"{sampler.scheduler}"
            )
    return Plans(own=own, planned=planned, others=others)


def check(
    runner: Runner, plans: Plans, samples: Samples, originals: Originals, settings: BuildSettings
) -> Checked | None:
    """Run the plan, or the policy, on samples that it has never seen; None where there are none."""
    if not samples.check:
        return None
    with attached(runner.pipe, settings.policy or plans.own):
        found = runner.run(samples.check, "scheduled check")
    fidelity = measure_fidelity(originals.check, found, runner.processes, samples.check)
    note = said_of_steps(plans.own.schedule, fidelity.num_steps, fidelity.full_steps)
    if note and runner.processes.is_main:
        logging.getLogger(BUILD_LOG).warning(note)
    pairs = ([each.images for each in made] for made in (originals.check, found))
    shown = few_of(*pairs, total=sum(len(batch.seeds) for batch in samples.check), processes=runner.processes)
    return Checked(fidelity=fidelity, pictures=shown)


def describe(
    runner: Runner,
    settings: BuildSettings,
    samples: Samples,
    originals: Originals,
    plans: Plans,
    checked: Checked | None,
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
        sampler=own.own_sampler,
        policy=describe_policy(settings.policy) if settings.policy is not None else None,
        call=dict(runner.call),
        profiled_seeds=samples.seeds,
        held_out_conditions=samples.held_out[:MAX_HELD_OUT],
        fidelity=checked and asdict(checked.fidelity),
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


def write_bundle(
    folder: Path,
    plans: Plans,
    manifest: Manifest,
    checked: Checked | None,
    checksums: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """What makes a bundle of the pipeline that the folder holds: prior, evidence, model card with its picture and,
    last, cemq.json.

    Args:
        checksums: Of files of the pipeline, where they are known.
    """
    (folder / MANIFEST).unlink(missing_ok=True)  # of a build that was ended before the bundle was in its place
    plans.planned.prior.save(folder / PRIOR)
    others = [other.evidence | {"num_inference_steps": count} for count, (other, _) in plans.others.items()]
    evidence = plans.planned.evidence | {"other_runs": others, "generations": manifest.generations}
    (folder / EVIDENCE).write_text(json.dumps(evidence, indent=1) + "\n", encoding="utf-8")
    if checked is not None and checked.pictures is not None:
        (folder / PICTURE).write_bytes(light_webp(_picture(manifest, checked.pictures)))
    seal(folder, manifest, checksums)


def _picture(manifest: Manifest, pictures: tuple[np.ndarray, np.ndarray]) -> Image:
    """Of the model card."""
    steps = f"{manifest.full_steps:g} of {manifest.schedule.num_steps} steps"
    texts = "full precision", f"this bundle: {manifest.scheme}, {steps}"
    marks = "" if manifest.policy else manifest.schedule.strip()
    return sheet(list(zip(texts, pictures, strict=True)), marks)


def _unplanned(prior: ErrorPrior, settings: BuildSettings) -> Plans:
    """Nothing but the prior, which says what a policy has to cope with."""
    schedule = full_compute(prior.num_steps)
    planned = Planned(schedule=schedule, correction=None, prior=prior, evidence={"policy": settings.recipe.policy})
    own = Plan(schedule=schedule, sampler=prior.sampler, prior=prior, cache=settings.cache)
    return Plans(own=own, planned=planned, others={})


def _plan(
    runner: Runner,
    prior: ErrorPrior,
    samples: Samples,
    originals: Originals,
    settings: BuildSettings,
    journal: Callable[[str], Journal],
    carried: Plan | None = None,
) -> Planned:
    """One step count's; ``carried`` is another's carried over, with the budget to plan and a schedule to try."""
    planning, stage, known, batches = settings.planning, "planning", None, samples.drawn
    if carried is not None:
        planning, known = planning.elsewhere(carried.schedule.budget), carried.schedule
        stage, batches = f"planning {runner.steps} steps", samples.planning
    if not samples.planning:
        return predicted(prior, planning, cache=settings.cache, scheduler=runner.pipe.scheduler, steps=runner.steps)
    most = planning.limit(sum(len(batch.seeds) for batch in samples.planning))

    def show(spent: float) -> None:  # people see how many generations it may take
        if runner.progress:
            runner.progress(f"{stage}, {most:g} generations' worth", min(spent / most, 1.0))

    show(0.0)
    loop = ClosedLoop(
        runner=runner, prior=prior, batches=batches, references=originals.planning[runner.steps],
        planned=len(samples.planning), cache=settings.recipe.cache, on_spent=show, journal=journal(str(runner.steps)),
    )  # fmt: skip
    return plan(loop, planning, known=known)


def _digest(pipe: DiffusionPipeline) -> str:
    """Of all weights, bit by bit."""
    found = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        for key, value in component.state_dict().items() if isinstance(component, torch.nn.Module) else ():
            found.update(f"{name}.{key}".encode())
            if torch.is_tensor(value):
                found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
