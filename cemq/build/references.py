"""The first stages of a build: what is run in full precision, and what is learned there for quantization."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from cemq.build.fitting import Calls, fitting
from cemq.build.settings import BuildSettings
from cemq.build.within import PieceByPiece, open_within
from cemq.bundle.dtypes import Dtypes, tensor_dtypes
from cemq.errors import InputError, ReplayError
from cemq.memory.placement import format_bytes
from cemq.parallel import Processes
from cemq.pipelines.batches import (
    BUILD_LOG,
    Batch,
    Progress,
    check_conditions,
    check_drivable,
    check_steps,
    condition_argument,
    iterate,
    make_batches,
    read_conditions,
    run,
    split_conditions,
)
from cemq.pipelines.opening import denoisers, weight_bytes
from cemq.pipelines.trajectory import Trajectory
from cemq.recipe import find_calibration
from cemq.runtime import cache_checked
from cemq.runtime.runner import Outcome, Runner
from cemq.search.choose import check_correctable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from cemq.build.work import Work

PIPELINE, RUN, FITTED = "pipeline", "run-", "fitted-"  # what is kept is called so, or begins so


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What is run: to profile, to plan on (what was profiled first of all), and others to check the plan."""

    profiled: tuple[Batch, ...]
    planning: tuple[Batch, ...]
    check: tuple[Batch, ...]
    held_out: tuple[str | int, ...]  # conditions that nothing was profiled with

    @property
    def drawn(self) -> tuple[Batch, ...]:
        """What can be planned on at the step count of the build, where full precision has drawn all that is profiled:
        first what is planned on anyway."""
        return self.planning + self.profiled[len(self.planning) :]

    @property
    def seeds(self) -> tuple[int, ...]:
        batches = dict.fromkeys((*self.profiled, *self.planning, *self.check))
        return tuple(seed for batch in batches for seed in batch.seeds)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What the full-precision pipeline says before anything is run."""

    steps: int
    call: dict[str, Any]
    dtypes: Dtypes  # before a run: a pipeline may cast what it decodes with
    weight_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """One run at full precision: its trajectory where it is profiled, and how often it called the denoiser."""

    outcome: Outcome
    trajectory: Trajectory | None = None
    denoiser_calls: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """What quantization is fitted to, and how many calls this process has replayed to see whether they can be."""

    calls: Calls | ReplayError
    replayed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Originals:
    """What full precision made of this process's share of the samples; by step count those that can be planned on: at
    that of the build all that were `drawn`, at others the planning samples."""

    dtypes: Dtypes
    weight_bytes: int
    trajectories: list[Trajectory]
    planning: dict[int, list[Outcome]]
    check: list[Outcome]


class FullPrecision:
    """The full-precision pipeline: opened when a stage first needs it, as none may, and let go of once none will."""

    def __init__(self, settings: BuildSettings, progress: Progress | None, work: Work):
        self.settings: BuildSettings = settings
        self.progress: Progress | None = progress
        self.work: Work = work
        self._runner: Runner | None = None

    @property
    def runner(self) -> Runner:
        """What runs it.

        Raises:
            CemqError: As of `open_runner`.
        """
        if self._runner is None:
            self._runner = open_runner(self.settings, self.progress, self.work)
        return self._runner

    @cached_property
    def pieces(self) -> PieceByPiece | None:
        """What writes the quantized pipeline where not all of it may be in memory."""
        return PieceByPiece(self.settings, self.work.folder / "pieces") if self.settings.limit else None

    def describe(self) -> Opened:
        runner = self.runner
        return Opened(
            steps=runner.steps, call=dict(runner.call), dtypes=tensor_dtypes(runner.pipe),
            weight_bytes=weight_bytes(runner.pipe),
        )  # fmt: skip

    def let_go(self) -> None:
        self._runner = None
        self.__dict__.pop("pieces", None)
        gc.collect()  # pipelines refer to themselves, and another takes their place


def agree(settings: BuildSettings, processes: Processes) -> None:
    """Raises ProcessError unless all processes were asked for the same, and have the same libraries and threads."""
    fused = [lora.fused.sha256 for lora in settings.loras]
    processes.agree("settings", (settings.recipe.model_dump(), fused, library_versions(), torch.get_num_threads()))


def open_runner(settings: BuildSettings, progress: Progress | None, work: Work) -> Runner:
    """The full-precision pipeline, with all of the settings checked against it.

    Raises:
        CemqError: It cannot be opened or driven, or not as the settings ask for.
    """
    recipe, call, steps = settings.recipe, settings.call, settings.steps
    if settings.limit:
        if work.processes.count > 1:
            raise InputError("vram: one process places weights for itself: leave it out, or the others")
        pipe = open_within(settings, work.folder / "offloaded-original")
    else:
        pipe = settings.original.open(dtype=settings.dtype, device=settings.device)
    pipe.set_progress_bar_config(disable=True)
    if settings.policy is None:
        settings.planning.check(steps)
    check_drivable(pipe)
    check_steps(pipe, steps, *settings.other_steps(steps))
    if settings.policy is None:
        check_correctable(recipe.corrector, recipe.cache, pipe.scheduler, steps)
    settings.quantization.check_pipeline(pipe)
    return Runner(
        pipe=pipe, steps=steps, call=call, progress=progress, processes=work.processes, generations=work.generations
    )


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
    full: FullPrecision, opened: Opened, samples: Samples, *, fits: bool = True
) -> tuple[Originals, Fitted]:
    """Every run at full precision, kept by itself as it ends, and what quantization is fitted to, of all processes;
    nothing where all is quantized.

    Args:
        fits: Whether anything will be quantized.

    Raises:
        ModelError: The pipeline cannot be scheduled, or not with the cache asked for.
        ReplayError: The calls cannot be replayed, and what was asked for cannot do without.
    """
    settings, work = full.settings, full.work
    if settings.cache != "output":
        said = work.keep("cache", lambda: _check_cache(full.runner, samples.profiled[0], settings))
        if work.processes.is_main:
            logging.getLogger(BUILD_LOG).info(said)
    needed = fits and not work.has_folder(PIPELINE)
    profiled, fitted = _profiled(full, samples.profiled, opened.steps, needed=needed)
    trajectories = [each.trajectory for each in profiled if each.trajectory is not None]
    if trajectories:
        steps = sum(each.num_steps for each in trajectories)
        per_batch = sum(each.denoiser_calls for each in profiled) // steps
        work.generations.steps = trajectories[0].num_steps
        work.generations.calls_per_step = per_batch / settings.recipe.batch_size
    others = samples.planning[len(samples.profiled) :]
    before = len(samples.profiled)
    further = _references(full, others, opened.steps, "full-precision planning samples", before=before)
    planning = {opened.steps: [*profiled, *further]}
    for count in settings.other_steps(opened.steps):
        planning[count] = _references(full, samples.planning, count, f"full precision, {count} steps")
    check = _references(full, samples.check, opened.steps, "full-precision check")
    originals = Originals(
        dtypes=opened.dtypes,
        weight_bytes=opened.weight_bytes,
        trajectories=trajectories,
        planning={count: [each.outcome for each in references] for count, references in planning.items()},
        check=[each.outcome for each in check],
    )
    return originals, fitted


def count_references(samples: Samples, opened: Opened, settings: BuildSettings) -> int:
    """How many runs `run_originals` makes, in all processes together."""
    others = max(0, len(samples.planning) - len(samples.profiled))
    at_other_steps = len(samples.planning) * len(settings.other_steps(opened.steps))
    return len(samples.profiled) + others + at_other_steps + len(samples.check)


def _references(
    full: FullPrecision, batches: Sequence[Batch], steps: int, stage: str, *, before: int = 0
) -> list[Reference]:
    """Those of this process's share; what was not kept is run now.

    Args:
        before: How many batches come before these in the list that is shared.
    """
    work = full.work
    numbers = [number - before for number in work.processes.share(range(before + len(batches))) if number >= before]
    found = {number: work.kept(_name(stage, number)) for number in numbers}
    for number, batch, on_step in _missing(full, batches, steps, stage, found):
        found[number] = work.keep_own(
            _name(stage, number),
            lambda batch=batch, on_step=on_step: Reference(outcome=full.runner.at(steps).run_one(batch, on_step)),
        )
    return [found[number] for number in numbers]


def _profiled(
    full: FullPrecision, batches: Sequence[Batch], steps: int, *, needed: bool
) -> tuple[list[Reference], Fitted]:
    """References with their trajectories, and what quantization is fitted to, if that is ``needed``.

    What is known of that after a run is kept after the run itself: a run that it does not cover is made again.
    """
    work, stage = full.work, "reference runs"
    numbers = work.processes.share(range(len(batches)))
    state = f"{FITTED}{work.processes.rank}"
    known = work.kept(state) if needed else None
    covered = numbers[: known["runs"] if known else 0] if needed else numbers
    found: dict[int, Any] = {
        number: work.kept(_name(stage, number)) if number in covered else None for number in numbers
    }
    watching = fitting(full.runner, full.settings.quantization, batches, full.pieces) if needed else None
    replayed = known["replayed"] if known else 0
    if watching is not None and known:
        watching.restore(known["state"])

    def profile(number: int, batch: Batch, on_step: Callable[[], None]) -> Reference:
        nonlocal replayed
        runner = full.runner
        watched = nullcontext() if watching is None or number in covered else watching.watch(number)
        with counted_calls(runner.pipe) as calls, watched, counted_calls(runner.pipe) as own:
            trajectory, outcome = runner.record_one(batch, on_step)
        replayed += len(calls) - len(own)
        return Reference(outcome=outcome, trajectory=trajectory, denoiser_calls=len(own))

    for number, batch, on_step in _missing(full, batches, steps, stage, found):
        found[number] = work.keep_own(_name(stage, number), partial(profile, number, batch, on_step))
        if watching is not None and number not in covered:
            runs = numbers.index(number) + 1
            work.keep_own(state, partial(dict, runs=runs, replayed=replayed, state=watching.state()))
    calls = watching.found() if watching is not None else {}
    return [found[number] for number in numbers], Fitted(calls=calls, replayed=replayed)


def _name(stage: str, number: int) -> str:
    return f"{RUN}{stage.replace(' ', '-')}-{number}"


def _missing(
    full: FullPrecision, batches: Sequence[Batch], steps: int, stage: str, found: Mapping[int, Reference | None]
) -> Iterator[tuple[int, Batch, Callable[[], None]]]:
    """Number, batch and progress of every run that is not found."""
    missing = [number for number, each in found.items() if each is None]
    runs = iterate([batches[number] for number in missing], stage, full.progress, steps)
    for number, (batch, on_step) in zip(missing, runs, strict=True):
        yield number, batch, on_step


@contextmanager
def counted_calls(pipe: DiffusionPipeline) -> Iterator[list[None]]:
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


def library_versions() -> dict[str, str]:
    """Of those that a bundle's figures depend on."""
    found = {}
    for name in ("torch", "diffusers", "transformers", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # vendored or built in place
            continue
    return found
