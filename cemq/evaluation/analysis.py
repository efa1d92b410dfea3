"""Which predicted cost tells good schedules from bad ones? Measured by running them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from cemq.bundle.load import from_pretrained
from cemq.bundle.manifest import PRIOR, Manifest, read_bundle
from cemq.bundle.original import find_original
from cemq.errors import InputError, check_keywords
from cemq.evaluation.compare import Running
from cemq.evaluation.within import Room, at_once, free_device_memory, opening_original, plan_bundle
from cemq.files import absolute, written_whole
from cemq.metrics import error_of, middle_mean
from cemq.parallel import ALONE
from cemq.pipelines.batches import EVALUATION_SEED_OFFSET, Batch, make_batches
from cemq.pipelines.opening import default_device
from cemq.predict.correctors import check_corrector
from cemq.predict.predictors import check_predictor
from cemq.prior.error_prior import VIEWS, ErrorPrior
from cemq.runtime import detach
from cemq.runtime.runner import Outcome, Runner
from cemq.schedule import CacheSchedule, cem_costs, parse_budget, suited_corrector, usual_budget
from cemq.search.propagation import sample_schedules
from cemq.search.trials import ClosedLoop, Trial

_USUAL_BATCH = 8  # samples
_FIRST_SEED = 12345  # of the schedules that predictions are tested with


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's; 0 where all values of one of them are equal."""
    import torch
    from torchmetrics.functional import spearman_corrcoef

    values = [torch.tensor(list(each), dtype=torch.float64, device="cpu") for each in (one, other)]
    if any(each.eq(each[0]).all() for each in values):
        return 0.0
    return float(spearman_corrcoef(*values))


def cem_cost(prior: ErrorPrior, schedule: CacheSchedule, view: str) -> float:
    """What CEM's rule charges a schedule: the cost of each gap where it lands, the tail as one more gap."""
    costs = cem_costs(prior.cosine_distances(view))
    ends = (*schedule.full_steps[1:], schedule.num_steps - 1)
    total = 0.0
    for start, end in zip(schedule.full_steps, ends, strict=True):
        if end > start:
            cost = costs[end - start - 1, end]
            total += cost if np.isfinite(cost) else 0.0
    return total


def unweighted(prior: ErrorPrior) -> ErrorPrior:
    """The same prior with the step sizes as its only weights; what steps answer to a strayed sample stays as fitted."""
    return replace(prior, sensitivity=np.ones(prior.num_steps), coherence=np.inf)


def costs_of(prior: ErrorPrior) -> dict[str, Callable[[CacheSchedule], float]]:
    """Every cost by name: CEM's, the error with step sizes as the only weights, and the fitted one, for each view."""
    found: dict[str, Callable[[CacheSchedule], float]] = {}
    plain = unweighted(prior)
    for view in VIEWS:
        found[f"cem, {view}"] = lambda s, view=view: cem_cost(prior, s, view)
        found[f"unweighted, {view}"] = lambda s, view=view: plain.final_error(s.served, s.integrated, view)
        found[f"fitted, {view}"] = lambda s, view=view: prior.final_error(s.served, s.integrated, view)
    return found


def analyze(
    bundle: str | Path,
    *,
    schedules: int = 60,
    predictors: Sequence[str] = ("taylor1", "reuse"),
    samples: int = 16,
    seed: int = 0,
    budget: int | None = None,
    corrector: str | None = None,
    **running: Unpack[Running],
) -> dict[str, Any]:
    """Run random and near-uniform schedules of a bundle on evaluation seeds and compare with what is predicted.

    Args:
        schedules: How many for each predictor, none of which the bundle was fitted to; half of them near uniform.
        budget: Full-compute steps of all of them, at least 2; None takes 3 in 10 of the steps.
        corrector: Of all of them; None takes what a plan of that budget would have (`suited_corrector`).
        device: Where they run; None takes CUDA where there is one.
        vram: Device memory to stay within, such as ``"8GiB"`` or a number of bytes: full precision draws all samples,
            then the bundle runs the schedules, one sample at a time, each under the cheapest placement that fits.
        verify: When checksums are compared: ``always``, ``once`` on this machine, which is the default, or ``never``.
        progress: Told the name of what is being run, and the share of it done.
        processes: Those that `cemq.parallel.launched` gives, to run a share of the samples each; all return the same.

    Returns:
        ``spearman``: predictor to cost to Spearman's correlation with the error found (`errors_found`); ``points``:
        predictor to one record for each schedule, with its error, its mean PSNR and every cost.

    Raises:
        CemqError: The bundle or the model it was made from cannot be used.
        PlacementError: One of them does not fit into ``vram``, and how much the least placement needs.
    """
    check_keywords("analyze", running, Running)
    if not predictors:
        raise InputError("predictors: none is named; taylor1,reuse are the default")
    folder, progress = absolute(bundle), running.get("progress")
    manifest, prior = read_bundle(folder, verify=running.get("verify", "once")), ErrorPrior.load(folder / PRIOR)
    num_steps = prior.num_steps
    check_analysis(num_steps, schedules=schedules, predictors=predictors, budget=budget, corrector=corrector)
    budget = parse_budget(budget or usual_budget(num_steps), num_steps)
    corrector = corrector or suited_corrector(prior, budget)
    tested = {name: test_schedules(num_steps, schedules, name, budget, corrector) for name in predictors}
    _check_room(folder, manifest, [each for made in tested.values() for each in made], running)
    batches = make_batches(
        manifest.held_out_conditions, samples=samples, first_seed=EVALUATION_SEED_OFFSET + seed,
        batch_size=at_once(None, running.get("vram"), usual=_USUAL_BATCH),
    )  # fmt: skip
    runner, references = _runner_and_references(folder, manifest, batches, running)
    loop = ClosedLoop(runner=runner, prior=prior, batches=batches, references=references, cache=manifest.cache)
    result: dict[str, Any] = {"bundle": str(bundle), "model": manifest.model, "scheme": manifest.scheme}
    result |= {"samples": samples, "corrector": corrector, "spearman": {}, "points": {}}
    for name, made in tested.items():
        trials: list[Trial] = []
        for schedule in made:
            trials.append(loop.run(schedule))
            if progress:
                progress(f"schedules, {name}", len(trials) / len(made))
        result["spearman"][name], result["points"][name] = _ranked(prior, made, trials)
    return result


def _check_room(folder: Path, manifest: Manifest, schedules: Sequence[CacheSchedule], running: Running) -> None:
    """Raises PlacementError, before anything is run, where the bundle does not fit with what is cached of these."""
    plan = plan_bundle(folder, running.get("vram"), running.get("device") or default_device())
    if plan is not None:
        room = Room(plan=plan, folder=folder, dtype=manifest.dtype, call=manifest.call)
        room.check(manifest.cache, max(schedule.most_kept for schedule in schedules))


def _runner_and_references(
    folder: Path, manifest: Manifest, batches: Sequence[Batch], running: Running
) -> tuple[Runner, list[Outcome]]:
    """What runs the bundle, nothing attached, and what full precision made of the batches, which is gone by then."""
    place, vram = running.get("device") or default_device(), running.get("vram")
    calls: dict[str, Any] = {"steps": manifest.num_inference_steps, "call": manifest.call}
    processes = running.get("processes", ALONE)
    with opening_original(find_original(manifest), vram, dtype=manifest.dtype, device=place, **calls) as opening:
        pipe = opening()
        pipe.set_progress_bar_config(disable=True)
        runner = Runner(pipe=pipe, progress=running.get("progress"), processes=processes, **calls)
        references = runner.run(batches, "reference")
        del pipe, runner
        free_device_memory()  # the bundle takes its place
    pipe = from_pretrained(folder, device=place, vram=vram, verify="never")  # it is verified by now
    detach(pipe)
    pipe.set_progress_bar_config(disable=True)
    return Runner(pipe=pipe, processes=processes, **calls), references


def _ranked(
    prior: ErrorPrior, tested: Sequence[CacheSchedule], trials: Sequence[Trial]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """How well each cost ranks the schedules, and a record of each schedule."""
    table = {cost: [predict(schedule) for schedule in tested] for cost, predict in costs_of(prior).items()}
    errors = errors_found(trials)
    points = [
        {"full_steps": list(schedule.full_steps), "error": error, "psnr_db": trial.psnr_db}
        | {cost: values[index] for cost, values in table.items()}
        for index, (schedule, error, trial) in enumerate(zip(tested, errors, trials, strict=True))
    ]
    return {cost: rank_correlation(values, errors) for cost, values in table.items()}, points


def check_analysis(
    num_steps: int | None, *, schedules: int, predictors: Sequence[str], budget: int | None, corrector: str | None
) -> None:
    """What can be said of `analyze` before anything is loaded or run; without the step count, less.

    Raises:
        InputError: An unknown name, or too few schedules, or more than there are.
        InfeasibleBudgetError: The budget is out of range.
    """
    for name in predictors:
        check_predictor(name)
    if corrector is not None:
        check_corrector(corrector)
    if schedules < 5:
        raise InputError(f"schedules={schedules}: a rank correlation needs at least 5")
    if num_steps is not None:
        full_steps = parse_budget(budget or usual_budget(num_steps), num_steps)
        if schedules > (ways := math.comb(num_steps - 1, full_steps - 1)):
            raise InputError(
                f"schedules={schedules}: {full_steps} of {num_steps} steps can be chosen in {ways} ways only"
            )


def errors_found(trials: Sequence[Trial]) -> list[float]:
    """Of each trial, on the same samples, for a peak of 1: PSNR, what sets it apart from the others being averaged over
    the middle two thirds of the samples, as the search does that compares them."""
    found = np.array([trial.sample_psnr_db for trial in trials])
    usual = found.mean(0)
    return [error_of(psnr) for psnr in usual.mean() + middle_mean(found - usual)]


def test_schedules(num_steps: int, count: int, predictor: str, budget: int, corrector: str) -> list[CacheSchedule]:
    """Different schedules of one budget, near uniform and random in turn, drawn with seeds that planning does not use.

    There must be as many.
    """
    found: dict[tuple[int, ...], CacheSchedule] = {}
    seeds = itertools.count(_FIRST_SEED)
    while len(found) < count:
        for schedule in sample_schedules(num_steps, count, (predictor,), next(seeds), budget, corrector):
            found.setdefault(schedule.full_steps, schedule)
    return list(found.values())[:count]


def draw(analysis: dict[str, Any], path: Path) -> None:
    """A PNG: for each predictor and view, predicted against measured error of every schedule, both in logarithms."""
    from matplotlib.figure import Figure

    names = list(analysis["points"])
    figure = Figure(figsize=(3 * len(VIEWS), 3 * len(names)), layout="constrained")
    figure.supxlabel("predicted error")
    figure.supylabel("measured error")
    for row, name in zip(figure.subplots(len(names), len(VIEWS), squeeze=False), names, strict=True):
        points = analysis["points"][name]
        for axes, view in zip(row, VIEWS, strict=True):
            cost = f"fitted, {view}"
            axes.scatter([point[cost] for point in points], [point["error"] for point in points], s=8)
            axes.set(xscale="log", yscale="log")
            axes.set_title(f"{name}, {view}: {analysis['spearman'][name][cost]:.3f}", fontsize="medium")
    with written_whole(path, "plot") as partial:
        figure.savefig(partial, format="png")
