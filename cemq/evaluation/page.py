"""One page of HTML to look at: what a bundle does to pictures, where its steps are computed, and what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cemq import __version__
from cemq.bundle.manifest import PRIOR, Manifest, lora_text, policy_text, read_bundle
from cemq.errors import InputError
from cemq.evaluation.charts import Axis, Chart, Series, as_colours
from cemq.evaluation.compare import Evaluation, SideBySide, run_both
from cemq.evaluation.pictures import embedded, moving, still_of
from cemq.evaluation.report import describe
from cemq.evaluation.scores import METRICS
from cemq.evaluation.templates import rendered
from cemq.files import absolute, check_writable, written_whole
from cemq.metrics import psnr_of
from cemq.pipelines.batches import Progress
from cemq.pipelines.outputs import Kind, as_pictures, kind_of
from cemq.prior.error_prior import VIEWS, ErrorPrior
from cemq.schedule import CacheSchedule

if TYPE_CHECKING:
    from cemq.evaluation.rivals.comparison import Comparison
    from cemq.evaluation.rivals.contest import Row

_TEMPLATE = "page.html.jinja"
_TINY = 256  # pixels; smaller pictures are enlarged


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One sample on the page.

    Args:
        files: Data URIs of full precision and of the bundle; of videos one in which both move side by side, and its
            first frame.
        width: In pixels, of one of the two.
        rank: ``worst``, ``median`` or nothing.
    """

    seed: int
    condition: str | int
    psnr_db: float
    kind: Kind
    files: tuple[str, str]
    width: int
    height: int
    rank: str = ""

    @property
    def is_tiny(self) -> bool:
        return self.kind != "audio" and max(self.width, self.height) < _TINY


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Steps of a run in their order: of each the mark that `CacheSchedule.strip` has for it, and its timestep."""

    name: str
    marks: str
    timesteps: Sequence[float]

    @property
    def computed(self) -> list[int]:
        return [step for step, mark in enumerate(self.marks) if mark != "·"]

    @property
    def ticks(self) -> list[float]:
        """Some timesteps, evenly spread over the steps."""
        places = np.linspace(0, len(self.timesteps) - 1, min(5, len(self.timesteps))).round().astype(int)
        return [self.timesteps[place] for place in places]


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that the template shows; charts that there is no data for are None."""

    name: str
    description: dict[str, Any]
    evaluation: Evaluation
    samples: Sequence[Shown]
    strips: Sequence[Strip]
    views: Sequence[Chart]
    colours: tuple[str, float, float]  # the scale of the views, and its ends
    steps: Chart
    curve: Chart | None
    trials: Chart | None
    component_bytes: dict[str, tuple[int, int]]
    provenance: dict[str, str]
    compared: Comparison | None = None  # other methods on the same model

    @property
    def rivals(self) -> list[Row]:
        """What was run of other methods, at each compute ratio that was asked for the nearest to full precision first;
        then what failed."""
        rows = self.compared.rows if self.compared else ()
        return sorted(rows, key=lambda row: (row.target, row.status != "ok", -(row.psnr_db or 0)))

    @property
    def is_fitted(self) -> bool:
        """Whether what the prior predicts is as high as what is measured, and not only in the same order."""
        return math.isfinite(self.description["prior"]["coherence"])


def report(
    bundle: str | Path,
    output: str | Path,
    *,
    samples: int = 8,
    reference: str | None = None,
    compare: str | Path | None = None,
    device: str | None = None,
    vram: str | int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Draw samples of a bundle and of its original, as `evaluate` does, and write a page of HTML that shows both, the
    schedule, the error prior, and what was measured when the bundle was built. It needs no other file and no network.

    Args:
        output: A file whose name ends in .html; it is replaced.
        samples: How many; they have the seeds of `evaluate`.
        reference: The original, into which the bundle's LoRAs are fused; None takes the model the bundle was made from.
        compare: A file of what ``cemq compare --json`` printed of this bundle or of its model; its methods are shown
            beside the bundle.
        device: Where both run; None takes CUDA where there is one.
        vram: Device memory to stay within, as `evaluate` does.
        progress: Told the name of what is being run, and the share of it done.

    Returns:
        What `evaluate` says of the same samples.

    Raises:
        InputError: The page cannot be written there, a seed was used for profiling, or ``compare`` is of another
            model, step count or scheme.
        CemqError: The bundle or the reference cannot be used.
        PlacementError: One of them does not fit into ``vram``, and how much the least placement needs.
    """
    path, folder = absolute(output), absolute(bundle)
    if path.suffix.lower() != ".html":
        raise InputError(f"report '{output}': the name must end in .html")
    check_writable(path, "report")
    description, manifest = describe(folder), read_bundle(folder)  # the first of which has verified it
    others = None
    if compare is not None:
        from cemq.evaluation.rivals.saved import read_comparison  # loads every library that methods come from

        others = read_comparison(compare, manifest)
    found = run_both(
        folder, reference=reference, samples=samples, device=device, vram=vram, verify="never", progress=progress
    )
    page = page_of(folder, manifest, description, found, others)
    with written_whole(path, "report") as partial:
        partial.write_text(render(page), encoding="utf-8")
    return page.evaluation


def render(page: Page) -> str:
    """The page as HTML."""
    return rendered(_TEMPLATE, page=page)


def page_of(
    folder: Path,
    manifest: Manifest,
    description: dict[str, Any],
    found: SideBySide,
    compared: Comparison | None = None,
) -> Page:
    """What a bundle's files say, what was drawn, and what was compared with it."""
    prior, schedule = ErrorPrior.load(folder / PRIOR), manifest.schedule
    views, colours = view_charts(prior, schedule)
    return Page(
        name=folder.name,
        description=description,
        evaluation=found.evaluation,
        samples=worst_first(list(samples_of(found))),
        strips=list(strips_of(manifest)),
        views=views,
        colours=colours,
        steps=step_chart(description),
        curve=curve_chart(description) if compared is None else rival_chart(description, compared, found.evaluation),
        trials=trial_chart(description, prior),
        component_bytes=found.component_bytes,
        provenance=provenance_of(manifest, found.evaluation),
        compared=compared,
    )


# --- samples


def samples_of(found: SideBySide) -> Iterator[Shown]:
    """Every sample as it is shown, in the order in which they were drawn."""
    for batch, made, other in zip(found.batches, found.references, found.outcomes, strict=True):
        kind, psnrs = kind_of(made.images), METRICS["psnr_db"].compare(made.images, other.images)
        pairs = zip(
            batch.seeds, batch.conditions, psnrs, as_pictures(made.images), as_pictures(other.images), strict=True
        )
        for seed, condition, psnr, left, right in pairs:
            if kind == "video":
                files = moving(np.concatenate([left, right], axis=2), found.frame_rate)
                height, width = left.shape[1:3]
            else:
                stills = still_of(left, kind), still_of(right, kind)
                files, (width, height) = (embedded(stills[0]), embedded(stills[1])), stills[0].size
            yield Shown(
                seed=seed, condition=condition, psnr_db=float(psnr), kind=kind, files=files, width=width, height=height
            )


def worst_first(samples: Sequence[Shown]) -> list[Shown]:
    """The sample with the lowest PSNR, the median one where there are three or more, then the others as they come."""
    ranked = sorted(samples, key=lambda each: -math.inf if math.isnan(each.psnr_db) else each.psnr_db)
    ranks = {id(ranked[0]): "worst"} | ({id(ranked[len(ranked) // 2]): "median"} if len(ranked) > 2 else {})
    told = [replace(each, rank=ranks.get(id(each), "")) for each in samples]
    return sorted(told, key=lambda each: ("worst", "median", "").index(each.rank))


# --- files of the bundle


def strips_of(manifest: Manifest) -> Iterator[Strip]:
    """That of the bundle's schedule and those of other step counts; none where a policy decides."""
    if manifest.policy is None:
        for run in (manifest, *manifest.other_runs):
            times = run.sampler.timesteps
            yield Strip(name=f"{run.num_inference_steps} steps", marks=run.schedule.strip(), timesteps=times)


def view_charts(prior: ErrorPrior, schedule: CacheSchedule) -> tuple[list[Chart], tuple[str, float, float]]:
    """Heat maps of the error of reuse, over them what the schedule takes; and the scale of their colours."""
    full, steps = np.array(schedule.full_steps), np.arange(prior.num_steps)
    ages = steps - full[np.searchsorted(full, steps, side="right") - 1]
    rows = min(prior.num_steps, max(2 * int(ages.max()), prior.num_steps // 3, 4) + 1)
    tables, low, high = as_colours([prior.reuse_errors(view)[:rows] for view in VIEWS])
    x = Axis(label="step", low=-0.5, high=prior.num_steps - 0.5)
    y = Axis(label="steps since computed", low=-0.5, high=rows - 0.5)
    taken = Series(name="this schedule", points=list(zip(steps.tolist(), ages.tolist(), strict=True)))
    lines = () if schedule.budget == prior.num_steps else (taken,)
    charts = [
        Chart(title=view, x=x, y=y, lines=lines, background=_pixels(table[::-1]))
        for view, table in zip(VIEWS, tables, strict=True)
    ]
    (scale,), *_ = as_colours([np.geomspace(1e-3, 1, 64)[None]])
    return charts, (_pixels(scale), low, high)


def _pixels(colours: np.ndarray) -> str:
    from PIL import Image

    return embedded(Image.fromarray(colours, "RGBA"), "PNG")


def step_chart(description: dict[str, Any]) -> Chart:
    """The error of each step's prediction: all computed, and by the schedule."""
    prior = description["prior"]
    floor, predicted = prior["quantization_floor"], prior["predicted_error"]
    lines = [Series(name="every step computed", points=list(enumerate(floor)))]
    if description["policy"] is None:
        lines.append(Series(name="by the schedule", points=list(enumerate(predicted))))
    return Chart(
        title="Predicted error of each step",
        x=Axis.over("step", 0, len(floor) - 1),
        y=Axis.over("relative L2", *floor, *predicted, logarithmic=True),
        lines=[_drawable(line) for line in lines],
    )


def _drawable(line: Series) -> Series:
    """Without what has no place on a logarithmic axis: without quantization the floor is 0."""
    return Series(name=line.name, points=[point for point in line.points if point[1] > 0])


def curve_chart(description: dict[str, Any]) -> Chart | None:
    """PSNR over budget: predicted, and the best that was measured."""
    points = description["planning"].get("curve")
    if not points:
        return None
    predicted = [(point["budget"], psnr_of(point["predicted_error"])) for point in points]
    measured = [(p["budget"], found) for p in points if (found := p.get("measured_psnr_db")) is not None]
    winner = description["planning"].get("winner") or {}
    chosen = None
    if {"psnr_db", "full_steps"} <= winner.keys():
        chosen = (winner["full_steps"], winner["psnr_db"])
    values = [y for _, y in (*predicted, *measured, *([chosen] if chosen else ()))]
    return Chart(
        title="PSNR over budget",
        x=Axis.over("full-compute steps", predicted[0][0], predicted[-1][0]),
        y=Axis.over("PSNR, dB", *values),
        lines=[Series(name="predicted", points=predicted)],
        dots=[Series(name="best that was run", points=measured, titles=_told(measured))],
        chosen=chosen,
    )


def rival_chart(description: dict[str, Any], compared: Comparison, evaluation: Evaluation) -> Chart:
    """`curve_chart` with what other methods were measured to give; the bundle is where the samples of this page have
    it, which like those of `cemq compare` no plan has seen."""
    curve, steps = curve_chart(description), compared.num_steps
    rows = [row for row in compared.rows if row.status == "ok" and row.target > 1]
    chosen = (float(evaluation.full_steps), evaluation.psnr_db)
    dots = list(curve.dots) if curve else [Series(name="best that was run", points=())]
    for name, ours in (("other methods", False), ("planned anew by cemq compare", True)):
        points, titles = [], []
        for row in rows:
            if row.method.startswith("cemq") is ours:
                ratio, _, mean, _, worst = row.figures
                points.append((steps / ratio, mean))
                titles.append(f"{row.method}, compute ratio {ratio:.2f}: {mean:.1f} dB, worst {worst:.1f}")
        dots.append(Series(name=name, points=points, titles=titles))
    fitted = math.isfinite(description["prior"]["coherence"])  # else what is predicted has an order and no height
    lines = list(curve.lines) if curve and fitted else []
    every = [point for series in (*lines, *dots) for point in series.points] + [chosen]
    xs, ys = zip(*every, strict=True)
    return Chart(
        title="PSNR over budget", x=Axis.over("full-compute steps", *xs), y=Axis.over("PSNR, dB", *ys), lines=lines,
        dots=dots, chosen=chosen,
    )  # fmt: skip


def trial_chart(description: dict[str, Any], prior: ErrorPrior) -> Chart | None:
    """Of the schedules that were run, measured over predicted PSNR; but for those whose error no prior predicts: under
    a rectification, or with one branch of guidance."""
    points, titles, winner = [], [], (description["planning"].get("winner") or {}).get("schedule")
    chosen = None
    for trial in description["planning"].get("trials") or ():
        try:
            schedule = CacheSchedule.from_dict(trial["schedule"])
            plain = trial.get("correction") is None and not schedule.branch_steps
            if not plain or schedule.num_steps != prior.num_steps:
                continue
            error = prior.final_error(schedule.served, schedule.integrated, description["prior"]["view"])
            points.append((psnr_of(error), float(trial["psnr_db"])))
        except (InputError, KeyError):  # as evidence of before has it, or by a predictor that nobody registered
            continue
        titles.append(f"{schedule.full_count:g} steps, {schedule.solver}")
        if trial["schedule"] == winner:
            chosen = points[-1]
    if not points:
        return None
    both = [[value for point in points for value in point]] * 2 if prior.is_fitted else list(zip(*points, strict=True))
    x, y = Axis.over("predicted PSNR, dB", *both[0]), Axis.over("measured PSNR, dB", *both[1])
    told = [f"{title}: {text}" for title, text in zip(titles, _told(points, "predicted", "measured"), strict=True)]
    return Chart(
        title="Schedules that were run",
        x=x,
        y=y,
        lines=[Series(name="as predicted", points=[(x.low, x.low), (x.high, x.high)])] if prior.is_fitted else (),
        dots=[Series(name="a schedule", points=points, titles=told)],
        chosen=chosen,
    )


def _told(points: Sequence[tuple[float, float]], x: str = "budget", y: str = "PSNR") -> list[str]:
    return [f"{x} {left:.4g}, {y} {right:.4g} dB" for left, right in points]


def provenance_of(manifest: Manifest, evaluation: Evaluation) -> dict[str, str]:
    """What it would take to make the same again."""
    schedule = manifest.schedule
    told = {
        "model": manifest.model,
        "revision": manifest.revision,
        "fused LoRA": lora_text([vars(each) for each in manifest.lora]),
        "pipeline": manifest.pipeline_class,
        "scheme": f"{manifest.scheme} ({manifest.backend}), else {manifest.dtype}",
        "schedule": f"{schedule.solver} on the {manifest.view} prior, {schedule.predictor_text()}",
        "corrector": schedule.corrector,
        "rectification": manifest.correction,
        "policy": policy_text(manifest.policy),
        "cache": manifest.cache,
        "call": json.dumps(manifest.call, default=str),
        "sampler": f"{manifest.sampler.scheduler} {json.dumps(manifest.sampler.config, default=str)}",
        "profiled seeds": ", ".join(map(str, manifest.profiled_seeds)),
        "seeds of this page": ", ".join(map(str, evaluation.seeds)),
        "recipe": manifest.recipe and json.dumps(manifest.recipe, default=str),
        "libraries": ", ".join(f"{name} {version}" for name, version in manifest.libraries.items()),
        "written by": f"cemq {manifest.cemq_version}, this page by cemq {__version__}",
    }
    return {name: str(value or "none") for name, value in told.items()}
