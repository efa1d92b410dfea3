"""Run the full-precision, uncached pipeline and another on the same seeds, and say how far apart they are."""

from __future__ import annotations

import dataclasses
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np

from cemq.bundle.checksums import Verify
from cemq.bundle.load import from_pretrained
from cemq.bundle.manifest import read_bundle
from cemq.bundle.original import find_original
from cemq.errors import InputError, check_keywords
from cemq.evaluation.pictures import TINY, sheet
from cemq.evaluation.scores import METRICS, check_metrics, score, summary
from cemq.evaluation.within import at_once, free_device_memory, opening_original, plan_bundle
from cemq.files import absolute, check_writable, written_whole
from cemq.metrics import relative_l2
from cemq.parallel import ALONE, Processes
from cemq.pipelines.batches import EVALUATION_SEED_OFFSET, Batch, Progress, iterate, make_batches
from cemq.pipelines.opening import component_bytes, default_device, weight_bytes
from cemq.pipelines.outputs import as_bytes, as_pictures, kind_of, output_kind, rate_of
from cemq.runtime import schedule_hook
from cemq.runtime.runner import Outcome, Runner, said_of_steps

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_MOST, _MOST_TINY = 2, 8  # images of a sheet


class Running(TypedDict, total=False):
    """How a bundle is loaded, where samples are run, and who hears of it and takes a share; each may be left out."""

    device: str | None
    vram: str | int | None
    verify: Verify | bool
    progress: Progress | None
    processes: Processes


class Judging(Running, total=False):
    """What samples a bundle is judged on, and against what; each may be left out. `evaluate` says what they are."""

    reference: str | None
    samples: int
    seed: int
    steps: int | None
    budget: int | str | None
    batch_size: int | None


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Distance to the full-precision, uncached run of the same seeds; means over samples, and the spread of PSNR.

    ``scores`` has every metric of `cemq.evaluation.scores` with its fifth percentile and its worst sample.

    ``num_steps`` and ``full_steps`` are those that were run, and run in full, a mean over samples too: not what was
    planned.
    """

    psnr_db: float
    psnr_db_std: float
    ssim: float
    relative_l2: float
    samples: int
    num_steps: float
    full_steps: float
    scores: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the bundle cost and what it saved; ``wall_ratio`` is reference seconds / bundle seconds of this run.

    ``scores`` has the mean of every metric, its fifth percentile and its worst sample. ``full_steps`` were counted;
    with one branch of guidance a step is half a one.
    """

    psnr_db: float
    psnr_db_std: float
    ssim: float
    relative_l2: float
    num_steps: float
    full_steps: float
    compute_ratio: float
    wall_ratio: float
    model_bytes: int
    reference_bytes: int
    samples: int
    seeds: tuple[int, ...]
    device: str
    dtype: str
    scores: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class SideBySide:
    """What `evaluate` ran: what full precision and the bundle made of each of this process's batches, and how far apart
    that is.

    Args:
        component_bytes: Parameters and buffers of every component, in full precision and in the bundle.
        frame_rate: Frames a second of videos; 0 of what is none.
    """

    evaluation: Evaluation
    batches: Sequence[Batch]
    references: Sequence[Outcome]
    outcomes: Sequence[Outcome]
    component_bytes: dict[str, tuple[int, int]]
    frame_rate: float
    scheme: str
    strip: str  # of the schedule; empty where a policy decides


def measure_fidelity(
    references: Sequence[Outcome],
    outcomes: Sequence[Outcome],
    processes: Processes = ALONE,
    batches: Sequence[Batch] = (),
) -> Fidelity:
    """Fidelity of outcomes to references, batch by batch; of all processes' samples, each giving its share.

    Args:
        batches: Of all processes, which say whose the worst sample is.

    Raises:
        ProcessError: Another process has failed.
    """
    conditions = [each.conditions for each in processes.share(batches)] or [()] * len(outcomes)
    found = [
        score(a.images, b.images, asked)
        | {"relative_l2": relative_l2(a.latents, b.latents)}
        | {name: np.full(len(b.images), getattr(b, name)) for name in ("num_steps", "full_steps")}
        for a, b, asked in zip(references, outcomes, conditions, strict=True)
    ]
    gathered = processes.gather(found)
    values = {name: np.concatenate([each[name] for each in gathered]) for name in gathered[0]}
    samples = [pair for batch in batches for pair in zip(batch.seeds, batch.conditions, strict=True)]
    return Fidelity(
        psnr_db=float(values["psnr_db"].mean()),
        psnr_db_std=float(values["psnr_db"].std()),
        ssim=float(values["ssim"].mean()),
        relative_l2=float(values["relative_l2"].mean()),
        samples=len(values["psnr_db"]),
        num_steps=_whole(values["num_steps"].mean()),
        full_steps=_whole(values["full_steps"].mean()),
        scores={name: summary(name, each, samples) for name, each in values.items() if name in METRICS},
    )


def _whole(count: float) -> float:
    """An integer where it is one."""
    rounded = round(float(count), 3)
    return int(rounded) if rounded.is_integer() else rounded


def evaluate(bundle: str | Path, *, picture: str | Path | None = None, **judging: Unpack[Judging]) -> Evaluation:
    """Compare a bundle with its full-precision, uncached original on seeds and prompts not used for profiling.

    Args:
        picture: Write a PNG: images in full precision, below them the bundle's, figures and schedule; of videos four
            frames and of audio spectrograms, full precision on the left and the bundle on the right.
        reference: The original, into which the bundle's LoRAs are fused; None takes the model the bundle was made from.
        samples: To judge by; 16 by default.
        seed: Samples use the seeds 1000000 + seed, 1000000 + seed + 1, ...; profiling used others. 0 by default.
        steps: Denoising steps of both; None takes the bundle's.
        budget: Full-compute steps of as many steps as the bundle was made for, or a ratio such as ``"3x"``; None takes
            the bundle's own schedule.
        batch_size: Samples run together; None takes that of the bundle's recipe, or 4.
        device: Where both run; None takes CUDA where there is one.
        vram: Device memory to stay within, such as ``"8GiB"`` or a number of bytes: full precision draws all samples,
            then the bundle does, one at a time, each under the cheapest placement that fits.
        verify: When checksums are compared: ``always``, ``once`` on this machine, which is the default, or ``never``.
        progress: Told the name of what is being run, and the share of it done.
        processes: Those that `cemq.parallel.launched` gives, to run a share of the samples each; all return the same.

    Raises:
        CemqError: The bundle or the reference cannot be used, or a seed was used for profiling.
        PlacementError: One of them does not fit into ``vram``, and how much the least placement needs.
    """
    check_keywords("evaluate", judging, Judging)
    if picture is not None:
        check_picture_path(Path(picture))
        picture = absolute(picture)
    found = run_both(bundle, **judging)
    if picture is not None:
        _draw(picture, found, judging.get("processes", ALONE))
    return found.evaluation


def run_both(bundle: str | Path, **judging: Unpack[Judging]) -> SideBySide:
    """What `evaluate` runs, whose arguments these are, and all that was made on the way.

    Raises:
        CemqError: As `evaluate` does.
    """
    check_metrics()
    manifest = read_bundle(Path(bundle), verify=judging.get("verify", "once"))
    place, processes = judging.get("device") or default_device(), judging.get("processes", ALONE)
    vram, budget = judging.get("vram"), judging.get("budget")
    batches = make_batches(
        manifest.held_out_conditions,
        samples=judging.get("samples", 16),
        first_seed=EVALUATION_SEED_OFFSET + judging.get("seed", 0),
        batch_size=at_once(judging.get("batch_size"), vram, usual=(manifest.recipe or {}).get("batch_size", 4)),
    )
    seeds = tuple(seed for batch in batches for seed in batch.seeds)
    if used := set(seeds) & set(manifest.profiled_seeds):
        raise InputError(f"seed {min(used)} was used to profile this bundle: choose another --seed")
    steps, share = judging.get("steps") or manifest.num_inference_steps, processes.share(batches)
    calls = {"steps": steps, "call": manifest.call}
    loaded = {"device": place, "budget": budget, "vram": vram, "verify": "never"}  # it is verified by now
    scheduled = _Side("bundle", partial(from_pretrained, bundle, **loaded))
    plan_bundle(bundle, vram, place, budget=budget)  # or it is refused after full precision has drawn
    original = find_original(manifest, judging.get("reference"))
    placed = {"dtype": manifest.dtype, "device": place, "call": manifest.call, "steps": manifest.num_inference_steps}
    with opening_original(original, vram, **placed) as opening:
        reference = _Side("reference", opening)
        run_all = _take_turns if vram is None else _one_after_the_other
        run_all((reference, scheduled), share, calls, judging.get("progress"))
    references, outcomes = reference.made, scheduled.made
    fidelity = measure_fidelity(references, outcomes, processes, batches)
    wall_ratios = processes.gather([a.seconds / b.seconds for a, b in zip(references, outcomes, strict=True)])
    schedule = schedule_hook(scheduled.pipe).schedule
    note = said_of_steps(schedule, fidelity.num_steps, fidelity.full_steps)
    if note:
        warnings.warn(f"cemq: {note}", stacklevel=3)
    evaluation = Evaluation(
        **dataclasses.asdict(fidelity),
        compute_ratio=fidelity.num_steps / fidelity.full_steps,
        wall_ratio=statistics.median(wall_ratios),
        model_bytes=scheduled.denoiser_bytes,
        reference_bytes=reference.denoiser_bytes,
        seeds=seeds,
        device=place,
        dtype=manifest.dtype,
    )
    return SideBySide(
        evaluation=evaluation,
        batches=share,
        references=references,
        outcomes=outcomes,
        component_bytes={
            name: (count, scheduled.component_bytes.get(name, 0)) for name, count in reference.component_bytes.items()
        },
        frame_rate=rate_of(scheduled.pipe, manifest.call) if output_kind(scheduled.pipe) == "video" else 0.0,
        scheme=manifest.scheme,
        strip="" if manifest.policy else schedule.strip(),
    )


class _Side:
    """One of the two that are compared: how it is opened, what it takes, and what it made of each batch."""

    def __init__(self, name: str, opening: Callable[[], DiffusionPipeline]):
        self.name: str = name
        self.made: list[Outcome] = []
        self._opening = opening
        self._pipe: DiffusionPipeline | None = None
        self.denoiser_bytes: int = 0
        self.component_bytes: dict[str, int] = {}

    @property
    def pipe(self) -> DiffusionPipeline:
        if self._pipe is None:
            self._pipe = self._opening()
            self._pipe.set_progress_bar_config(disable=True)
            self.denoiser_bytes, self.component_bytes = weight_bytes(self._pipe), component_bytes(self._pipe)
        return self._pipe

    def let_go(self) -> None:
        self._pipe = None
        free_device_memory()  # another takes its place


def _take_turns(
    sides: Sequence[_Side], batches: Sequence[Batch], calls: Mapping[str, Any], progress: Progress | None
) -> None:
    """Batch by batch, so that what else the machine does slows down both."""
    # the last one is opened first: a budget that the bundle does not have is refused before full precision is loaded
    runners = [(side, Runner(pipe=side.pipe, **calls)) for side in reversed(sides)][::-1]
    for batch, on_step in iterate(batches, "reference and bundle", progress, len(sides) * calls["steps"]):
        for side, runner in runners:
            side.made.append(runner.run_one(batch, on_step))


def _one_after_the_other(
    sides: Sequence[_Side], batches: Sequence[Batch], calls: Mapping[str, Any], progress: Progress | None
) -> None:
    """Never two in memory; the last one stays."""
    for side in sides:
        runner = Runner(pipe=side.pipe, **calls)
        for batch, on_step in iterate(batches, side.name, progress, calls["steps"]):
            side.made.append(runner.run_one(batch, on_step))
        if side is not sides[-1]:
            del runner
            side.let_go()


def check_picture_path(path: Path, what: str = "picture") -> None:
    """Raises InputError unless a PNG can be written there."""
    if path.suffix.lower() != ".png":
        raise InputError(f"{what} '{path}': the name must end in .png")
    check_writable(path, what)


def _draw(path: Path, found: SideBySide, processes: Processes) -> None:
    """The picture of `evaluate`, by the process that is the first; of images it shows all processes'."""
    pairs = [
        tuple(each.images[: _MOST_TINY if each.images.shape[1] < TINY else _MOST] for each in pair)
        for pair in zip(found.references, found.outcomes, strict=True)
        if kind_of(pair[0].images) == "image"
    ]
    gathered = processes.gather(pairs[:_MOST_TINY])
    if not processes.is_main:
        return
    if gathered:
        references, images = (np.concatenate(batches) for batches in zip(*gathered, strict=True))
        write_sheet(path, references, images, found)
    else:
        write_side_by_side(path, found.references[0].images, found.outcomes[0].images)


def write_sheet(path: Path, references: np.ndarray, images: np.ndarray, found: SideBySide) -> None:
    """A PNG of images in full precision, below them the bundle's, with figures, and the schedule; eight tiny ones, or
    two.

    Args:
        references: (n, height, width, 3) in [0, 1].
        images: Likewise.
    """
    told, most = found.evaluation, _MOST_TINY if references.shape[1] < TINY else _MOST
    share = told.model_bytes / told.reference_bytes
    texts = (
        f"full precision, {told.num_steps} of {told.num_steps} steps computed",
        f"{found.scheme.upper()} ({share:.0%} of the bytes), {told.full_steps} of {told.num_steps} steps computed: "
        f"{told.psnr_db:.1f} dB to full precision",
    )
    rows = [as_bytes(row[:most]) for row in (references, images)]
    with written_whole(path, "picture") as partial:
        sheet(list(zip(texts, rows, strict=True)), found.strip).save(partial, optimize=True)


def write_side_by_side(path: Path, references: np.ndarray, images: np.ndarray, rows: int = 4) -> None:
    """A PNG with one row a sample: full precision | other; tiny images are enlarged without smoothing."""
    from PIL import Image

    references, images = (_in_a_row(as_pictures(values)) for values in (references, images))
    gap, zoom = 4, max(1, TINY // references.shape[1])
    lines = []
    for left, right in list(zip(references, images, strict=True))[:rows]:
        left, right = (x.repeat(zoom, 0).repeat(zoom, 1) for x in (left, right))
        lines.append(np.concatenate([left, np.ones((left.shape[0], gap, 3)), right], axis=1))
        lines.append(np.ones((gap, lines[0].shape[1], 3)))
    sheet = np.concatenate(lines[:-1])
    with written_whole(path, "picture") as partial:
        Image.fromarray(as_bytes(sheet)).save(partial)


def _in_a_row(pictures: np.ndarray, most: int = 4) -> np.ndarray:
    """Up to four pictures of each sample, spread evenly over all of them, side by side: (n, height, width, 3)."""
    chosen = np.unique(np.linspace(0, pictures.shape[1] - 1, most).round().astype(int))
    return np.concatenate([pictures[:, number] for number in chosen], axis=2)
