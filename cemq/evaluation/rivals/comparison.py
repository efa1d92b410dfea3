"""`cemq compare`: every method on one model, the same seeds, near equal compute; one table and one plot."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import cemq.evaluation.rivals.libraries
import cemq.evaluation.rivals.planned
import cemq.evaluation.rivals.watching  # noqa: F401  all three of which enter their methods
from cemq.bundle.load import from_pretrained
from cemq.bundle.manifest import MANIFEST, Manifest, lora_text, read_bundle
from cemq.bundle.original import Original, find_original
from cemq.errors import InputError, check_keywords, choose
from cemq.evaluation.rivals.contest import Contest, Row
from cemq.evaluation.rivals.methods import METHODS, Bench, Method
from cemq.evaluation.scores import check_metrics
from cemq.evaluation.within import at_once, free_device_memory, opening_original, plan_bundle, room_of
from cemq.parallel import ALONE, Processes
from cemq.pipelines.batches import (
    EVALUATION_SEED_OFFSET,
    Batch,
    Progress,
    check_call,
    check_conditions,
    check_drivable,
    check_steps,
    default_steps,
    make_batches,
    read_call,
    read_conditions,
    split_conditions,
)
from cemq.pipelines.opening import (
    DTYPES,
    check_device,
    class_of_folder,
    default_device,
    default_dtype,
    denoisers,
    locate,
)
from cemq.quantize import QuantizationSettings, quantize_pipeline, record_calls
from cemq.quantize.schemes import NO_SCHEME
from cemq.recipe import find_calibration, load_recipe, make_recipe, recipe_for
from cemq.runtime import detach
from cemq.runtime.runner import Outcome, Runner

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from cemq.pipelines.trajectory import Trajectory

RATIOS = ("2x", "3.3x", "5x")
_PROFILED, _PLANNED = 12, 4  # samples, as in builds of the default effort
_USUAL_BATCH = 4  # samples
_CALLS = 5  # one call of the denoiser in so many is recorded for its weights


class Settings(TypedDict, total=False):
    """The finer settings of `compare`; each may be left out."""

    samples: int
    seed: int
    steps: int | None
    calib: str | None
    call: Mapping[str, Any] | None
    batch_size: int | None
    device: str | None
    dtype: str | None
    vram: str | int | None
    progress: Progress | None
    processes: Processes


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was found: a row for each method, scheme and compute ratio asked for, those that failed among them.

    ``original`` is the model that fidelity is to: of a bundle the one it was made from.
    """

    model: str
    original: str
    num_steps: int
    samples: int
    device: str
    dtype: str
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Course:
    """What is run: the model, how, and on which samples."""

    model: str
    manifest: Manifest | None  # of a bundle
    folder: Path
    original: Original
    steps: int | None
    call: Mapping[str, Any]
    device: str
    dtype: str
    conditions: tuple[str | int, ...] | None  # None: the bundle's
    samples: int
    seed: int
    batch_size: int
    vram: str | int | None
    progress: Progress | None
    processes: Processes

    @property
    def num_steps(self) -> int:
        """Of every run. Raises CemqError for a pipeline class that has no default, where none are asked for."""
        return self.steps or default_steps(class_of_folder(self.folder))


@dataclass(frozen=True, kw_only=True, eq=False)
class _References:
    """Samples that methods are fitted to and planned on and those that they are judged by, and what full precision made
    of them."""

    calibration: Sequence[Batch]
    recorded: Sequence[tuple[Trajectory, Outcome]]
    judged: Sequence[Batch]
    outcomes: Sequence[Outcome]


def compare(
    model: str | Path,
    *,
    schemes: Sequence[str] | None = None,
    ratios: Sequence[str | float] = RATIOS,
    methods: Sequence[str] | None = None,
    **settings: Unpack[Settings],
) -> Comparison:
    """Put every method on one model, at near equal compute and on the same seeds, and say what each is worth.

    Fidelity is to the full-precision, uncached run. Compute is counted in multiply-accumulates of the denoiser's layers
    for all alike; thresholds and intervals are set on samples that nothing is judged by, so that each method computes
    as nearly as it can what was asked for. A method that fails is a row that says so.

    Args:
        model: A bundle, or a model as in `cemq.quantize_and_schedule`.
        schemes: Of weights and activations, ``none``, ``w8a8``, ``quanto:w4a8`` and so on; None takes ``none``. A
            bundle has its own.
        ratios: Compute ratios, ``"3.3x"`` or 3.3, above 1.
        methods: Names in `METHODS`; None takes all of them.
        samples: To judge by; 16 by default.
        seed: Shifts their seeds, which begin at 1000000.
        steps: Denoising steps; None takes the bundle's, the recipe's or the pipeline's.
        calib: Prompts or class labels, as of a build; None takes those of the bundle or the recipe.
        call: Other arguments of the pipeline.
        batch_size: Samples run together; None takes 4.
        device: Where it runs; None takes CUDA where there is one.
        dtype: None takes the bundle's, else that of the device.
        vram: Device memory to stay within, such as ``"8GiB"`` or a number of bytes: full precision draws all samples,
            then methods take turns on the bundle, one sample at a time, each under the cheapest placement that fits.
            Of a model, on full precision alone. A method whose cache does not fit is a row that says so; what those of
            other libraries keep is not known.
        progress: Told the name of what is being run, and the share of it done.
        processes: Those that `cemq.parallel.launched` gives, to try some of the methods each; all return the same.

    Raises:
        CemqError: The model cannot be used, there is no such method or scheme, or a method left the pipeline other than
            it was.
        PlacementError: Full precision or the bundle does not fit into ``vram``, and how much the least placement needs.
    """
    check_keywords("compare", settings, Settings)
    for name, given in (("ratios", ratios), ("methods", methods), ("schemes", schemes)):
        if given is not None and not given:
            raise InputError(f"{name}: none is named; leave it out for the default")
    check_metrics()
    targets = [_ratio(each) for each in ratios]
    chosen = [METHODS[choose("method", name, METHODS)] for name in (methods or METHODS)]
    course = _course(str(model), settings)
    if course.manifest is not None and schemes is not None:
        raise InputError(f"schemes: '{model}' is a bundle, which has its own: {course.manifest.scheme}")
    kinds = [_scheme(name) for name in (schemes or ("none",))]
    _check_within(course, kinds)
    course.processes.agree("what to compare", (kinds, targets, [each.name for each in chosen]))
    rows: list[Row] = []
    with closing(_contests(course, kinds)) as contests:
        for number, contest in enumerate(contests):

            def report(share: float, number: int = number) -> None:
                if course.progress is not None:
                    course.progress("methods", (number + share) / len(kinds))

            rows += _try_all(contest, chosen, targets, course.processes, report)
            steps = contest.bench.num_steps
    if course.progress is not None:
        course.progress("methods", 1.0)
    original = course.model if course.manifest is None else name_of_original(course.manifest)
    return Comparison(
        model=course.model, original=original, num_steps=steps, samples=course.samples, device=course.device,
        dtype=course.dtype, rows=tuple(rows),
    )  # fmt: skip


def _try_all(
    contest: Contest,
    methods: Sequence[Method],
    targets: Sequence[float],
    processes: Processes,
    report: Callable[[float], None],
) -> list[Row]:
    """Full compute and every method, each tried by the process that is free first; the rows of all.

    Args:
        report: Told the share that is begun.
    """
    found: dict[int, list[Row]] = {}
    for place in processes.deal(1 + len(methods)):
        report(place / (1 + len(methods)))
        with processes.apart():
            found[place] = contest.rows(methods[place - 1], targets) if place else [contest.uncached()]
    of_all = [item for part in processes.gather([found]) for item in part.items()]
    return [row for _, of_one in sorted(of_all) for row in of_one]


def name_of_original(manifest: Manifest) -> str:
    """What a bundle was made from, with the LoRAs that were fused into it."""
    loras = lora_text(vars(each) for each in manifest.lora)
    return f"{manifest.model} with {loras}" if manifest.lora else manifest.model


def name_of_scheme(scheme: str, backend: str) -> str:
    """As options and rows have it."""
    return scheme if backend == "native" else f"{backend}:{scheme}"


def _ratio(given: str | float) -> float:
    try:
        found = float(str(given).strip().removesuffix("x"))
    except ValueError:
        found = math.nan
    if not 1 < found < math.inf:
        raise InputError(f"compute ratio {given!r}: give one above 1, such as 3.3x")
    return found


def _scheme(name: str) -> QuantizationSettings:
    backend, _, scheme = name.rpartition(":")
    settings = QuantizationSettings(scheme=scheme, backend=backend or "native")
    if scheme != NO_SCHEME:
        settings.check()
    return settings


def _course(model: str, settings: Settings) -> _Course:
    """Raises CemqError for what cannot be run, before anything is loaded."""
    vram = settings.get("vram")
    shared = {
        "samples": settings.get("samples", 16),
        "seed": settings.get("seed", 0),
        "batch_size": at_once(settings.get("batch_size"), vram, usual=_USUAL_BATCH),
        "device": settings.get("device") or default_device(),
        "vram": vram,
        "progress": settings.get("progress"),
        "processes": settings.get("processes", ALONE),
    }
    check_device(shared["device"])
    call, calib = dict(settings.get("call") or {}), settings.get("calib")
    if (Path(model) / MANIFEST).is_file():
        folder = Path(model)
        manifest = read_bundle(folder, verify="once")
        return _Course(
            model=model, manifest=manifest, folder=folder, original=find_original(manifest),
            call=_read(folder, manifest.call | call), steps=settings.get("steps") or manifest.num_inference_steps,
            dtype=manifest.dtype, conditions=read_conditions(find_calibration(calib)) if calib else None, **shared,
        )  # fmt: skip
    source, named = locate(model), recipe_for(model)
    recipe = load_recipe(named) if named else make_recipe({})
    calib = calib or recipe.calib
    if calib is None:
        raise InputError(f"'{model}': give prompts or class labels with --calib, one a line")
    return _Course(
        model=source.name, manifest=None, folder=source.folder,
        original=Original(source=source, loras=(), variant=None), call=_read(source.folder, recipe.call | call),
        steps=settings.get("steps") or recipe.steps,
        dtype=choose("dtype", settings.get("dtype") or recipe.dtype or default_dtype(shared["device"]), DTYPES),
        conditions=read_conditions(find_calibration(calib)), **shared,
    )  # fmt: skip


def _check_within(course: _Course, schemes: Sequence[QuantizationSettings]) -> None:
    """What can be said of a limit before anything is loaded.

    Raises:
        InputError: A model would have to be quantized within it.
        PlacementError: The bundle does not fit; of full precision it is said when that is opened.
    """
    if course.manifest is not None:
        plan_bundle(course.folder, course.vram, course.device, call=course.call)
        return
    for each in schemes:
        if course.vram is not None and each.scheme != NO_SCHEME:
            name = name_of_scheme(each.scheme, each.backend)
            raise InputError(
                f"vram={course.vram}: compare quantizes a model to {name} in memory as a whole: build a bundle with "
                "cemq quantize-and-schedule --vram first, and compare that"
            )


def _read(folder: Path, call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as the pipeline in a folder wants them. Raises InputError."""
    kind = class_of_folder(folder)
    check_call(kind, call)
    return read_call(kind, call)


def _contests(course: _Course, schemes: Sequence[QuantizationSettings]) -> Generator[Contest]:
    """One after the other, so that one quantized pipeline is held at a time."""
    limits = {"dtype": course.dtype, "device": course.device, "call": course.call, "steps": course.num_steps}
    with opening_original(course.original, course.vram, **limits) as opening:
        original = opening()
        references = _references(course, original)
        if course.manifest is None:
            for number, scheme in enumerate(schemes):
                pipe = original if number == len(schemes) - 1 or scheme.scheme == NO_SCHEME else opening()
                _quantize(_runner(course, pipe), scheme, references.calibration)
                yield _contest(course, pipe, name_of_scheme(scheme.scheme, scheme.backend), references)
            return
        del original
        free_device_memory()  # the bundle takes its place
    pipe = from_pretrained(course.folder, device=course.device, call=course.call, verify="never", vram=course.vram)
    detach(pipe)
    yield _contest(course, pipe, name_of_scheme(course.manifest.scheme, course.manifest.backend), references)


def _references(course: _Course, original: DiffusionPipeline) -> _References:
    """Raises CemqError for a pipeline that cannot be driven, or conditions or steps that it does not take."""
    check_drivable(original)
    calibration, judged = _samples(course, original)
    runner = _runner(course, original)
    check_steps(original, runner.steps)
    recorded = [runner.record_one(batch) for batch in calibration]
    outcomes = runner.run(judged, "reference runs")
    drawn = [hashlib.sha256(each.images.tobytes()).hexdigest() for each in outcomes]
    course.processes.agree("what full precision draws", drawn)
    return _References(calibration=calibration, recorded=recorded, judged=judged, outcomes=outcomes)


def _runner(course: _Course, pipe: DiffusionPipeline) -> Runner:
    pipe.set_progress_bar_config(disable=True)
    return Runner(pipe=pipe, steps=course.num_steps, call=course.call)


def _samples(course: _Course, pipe: DiffusionPipeline) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """Those that methods are fitted to and planned on, and those that they are judged by."""
    if course.conditions is not None:
        profiled, held_out = split_conditions(check_conditions(pipe, course.conditions), profiled=_PROFILED, seed=0)
    else:
        assert course.manifest is not None  # a model has no conditions but those that were asked for
        profiled = held_out = course.manifest.held_out_conditions
    first = EVALUATION_SEED_OFFSET + course.seed
    drawn = ((profiled, _PROFILED, 0), (held_out, course.samples, first))
    fitted_to, judged_by = (
        make_batches(conditions, samples=samples, first_seed=seed, batch_size=course.batch_size)
        for conditions, samples, seed in drawn
    )
    return fitted_to, judged_by


def _quantize(runner: Runner, settings: QuantizationSettings, batches: Sequence[Batch]) -> None:
    calls = {}
    for name, denoiser in denoisers(runner.pipe):
        if settings.scheme != NO_SCHEME and settings.is_fitted(denoiser):
            with record_calls(denoiser, every=_CALLS) as calls[name]:
                runner.run(batches)
    quantize_pipeline(runner.pipe, settings, calls)


def _contest(course: _Course, pipe: DiffusionPipeline, scheme: str, references: _References) -> Contest:
    runner, calibration = _runner(course, pipe), references.calibration
    trajectories, outcomes = zip(*references.recorded, strict=True)
    dtype = str(next(iter(denoisers(pipe)))[1].dtype).removeprefix("torch.")
    prior = runner.profile(calibration, trajectories, scheme=scheme, dtype=dtype)
    planned = -(-_PLANNED // len(calibration[0].seeds))
    bench = Bench(
        runner=runner, batches=calibration, references=outcomes, trajectories=trajectories, prior=prior, planned=planned
    )
    return Contest(
        bench=bench, scheme=scheme, batches=references.judged, references=references.outcomes,
        room=room_of(pipe, course.folder, dtype=course.dtype, call=course.call),
    )  # fmt: skip
