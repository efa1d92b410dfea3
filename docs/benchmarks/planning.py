"""What the plans are worth, on both built-in models: ``python docs/benchmarks/planning.py``.

Every part is measured on evaluation seeds that no plan has seen, against full precision at 50 of 50 steps:

* ranking: Spearman of every predicted cost with the error found in closed loop (`cemq analyze`)
* cells: plans of the default effort against `uniform` and `cem`, for each scheme and budget
* ceiling: what a closed-loop local search of ``--minutes`` for each budget finds (half an hour a bundle more; not
  measured by default)
* caches: even spacing served from the output, from the blocks' residual and from their modules (not by default)
* ablation: the schedule planned on each view of the prior, run on the quantized model
* auto: the budget that `--budget auto` finds, and its error on evaluation seeds
* steps: a prior of 50 steps carried over to 20, 28 and 100, against a bundle planned there
* quanto: the default plans against quanto's layers of the same scheme with every step computed
* solver: milliseconds of the dynamic program

Writes planning.md and planning.json beside itself; ``--parts``, ``--models`` and ``--schemes`` measure some of it anew
and keep the rest.
About two hours on a CPU core of one's own (``OMP_NUM_THREADS=1``), two more with the ceiling; models and schemes can
be measured side by side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from planning_page import BUDGETS, CACHES, MODELS, RANKED, SAMPLES, SCHEMES, page

import cemq
from cemq.bench.machine import describe_machine
from cemq.bundle.manifest import EVIDENCE, PRIOR, read_bundle
from cemq.errors import InfeasibleBudgetError
from cemq.evaluation.analysis import analyze, rank_correlation
from cemq.metrics import middle_mean, psnr_db
from cemq.pipelines.batches import EVALUATION_SEED_OFFSET, make_batches
from cemq.pipelines.opening import denoisers, locate, open_pipeline
from cemq.prior.error_prior import VIEWS, ErrorPrior
from cemq.quantize import QuantizationSettings, quantize_pipeline, record_calls
from cemq.runtime import attached, detach
from cemq.runtime.runner import Runner
from cemq.schedule import (
    CacheSchedule,
    full_compute,
    neighbours,
    plan_all,
    plan_predicted,
    plan_schedule,
    segment_costs,
    solve_segments,
)
from cemq.schedule.plan import Plan
from cemq.schedule.rectify import make_correction
from cemq.search.explore import PUBLISHED
from cemq.search.propagation import sample_schedules
from cemq.search.trials import ClosedLoop, Trial

STEPS = (20, 28, 100)
PARTS = ("ranking", "cells", "ablation", "auto", "steps", "quanto", "solver")
# As published: no predictor but the first, nothing corrected
PLAIN = {"predictor": "taylor1", "corrector": "none", "rectify": "none"}
HERE = Path(__file__).with_suffix("")


class Lab:
    """One model under one scheme: full-precision references of the evaluation seeds, and the quantized pipeline."""

    def __init__(self, model: str, scheme: str, bundle: Path):
        self.model, self.scheme, self.bundle = model, scheme, bundle
        self.manifest, self.prior = read_bundle(bundle), ErrorPrior.load(bundle / PRIOR)
        self.original = open_pipeline(locate(self.manifest.model).folder, dtype="float32", device="cpu")
        self.pipe = cemq.from_pretrained(bundle, device="cpu")
        detach(self.pipe)
        for pipe in (self.original, self.pipe):
            pipe.set_progress_bar_config(disable=True)
        self._references: dict[tuple[int, int, int], list] = {}

    def batches(self, first: int, samples: int = SAMPLES) -> Any:
        return make_batches(self.manifest.held_out_conditions, samples=samples, first_seed=first, batch_size=8)

    def outcomes(self, pipe: Any, steps: int, batches: Any) -> list:
        return Runner(pipe=pipe, steps=steps, call=self.manifest.call).run(batches)

    def references(self, steps: int, first: int = EVALUATION_SEED_OFFSET, samples: int = SAMPLES) -> list:
        key = steps, first, samples
        if key not in self._references:
            self._references[key] = self.outcomes(self.original, steps, self.batches(first, samples))
        return self._references[key]

    def psnr_as_is(self, pipe: Any, steps: int = 50) -> np.ndarray:
        """PSNR of every evaluation sample, (SAMPLES,), with whatever is attached to the pipeline."""
        found = self.outcomes(pipe, steps, self.batches(EVALUATION_SEED_OFFSET))
        pairs = zip(self.references(steps), found, strict=True)
        return np.concatenate([psnr_db(a.images, b.images) for a, b in pairs])

    def psnr(self, planned: Plan, steps: int = 50) -> np.ndarray:
        with attached(self.pipe, planned):
            return self.psnr_as_is(self.pipe, steps)

    def replanned(self, **settings: Any) -> tuple[Plan, dict[str, Any]]:
        """What ``cemq replan`` makes of the bundle by the default effort, and its evidence."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "bundle"
            made = cemq.replan(self.bundle, folder, device="cpu", also_steps=[], **settings)
            prior, evidence = ErrorPrior.load(folder / PRIOR), json.loads((folder / EVIDENCE).read_text())
        fix = make_correction(made.correction, prior, made.schedule) if made.correction else None
        return self.of(made.schedule, fix, made.sampler), evidence

    def loop(self, samples: int) -> ClosedLoop:
        """Samples with seeds after those that the bundle used; nothing has been run on them."""
        first = max(self.manifest.profiled_seeds) + 1
        return ClosedLoop(
            runner=Runner(pipe=self.pipe, steps=50, call=self.manifest.call),
            prior=self.prior,
            batches=self.batches(first, samples),
            references=self.references(50, first, samples),
        )

    def of(self, schedule: CacheSchedule, correction: Any = None, sampler: Any = None) -> Plan:
        return Plan(schedule=schedule, sampler=sampler or self.manifest.sampler, correction=correction)


def measure_ranking(lab: Lab) -> dict[str, Any]:
    found = analyze(lab.bundle, schedules=60, samples=RANKED, corrector="none")
    trials = json.loads((lab.bundle / EVIDENCE).read_text())["trials"]
    fitted_to = {tuple(trial["schedule"]["full_steps"]) for trial in trials}
    points = [tuple(point["full_steps"]) for each in found["points"].values() for point in each]
    known = sum(steps in fitted_to for steps in points)
    by_means = {
        name: rank_correlation([point["fitted, combined"] for point in each], [-point["psnr_db"] for point in each])
        for name, each in found["points"].items()
    }
    return {
        "schedules": 60,
        "fitted_to": known,
        "samples": RANKED,
        "spearman": found["spearman"],
        "by_means": by_means,
    }


def measure_cells(lab: Lab) -> list[dict[str, Any]]:
    rows = []
    full = CacheSchedule(num_steps=50, full_steps=range(50))
    rows.append({"budget": 50, "plan": "full compute", "psnr_db": lab.psnr(lab.of(full)).tolist()})
    for budget in BUDGETS:
        for name, settings in (("default, taylor1", PLAIN), ("default", {})):
            planned, evidence = lab.replanned(budget=budget, **settings)
            rows.append(
                {
                    "budget": budget,
                    "plan": name,
                    "psnr_db": lab.psnr(planned).tolist(),
                    "full_steps": planned.schedule.budget,
                    "correction": evidence["winner"]["correction"],
                    "generations": evidence["generations"]["total"],
                    "schedule": planned.schedule.to_dict(),
                }
            )
        ways = (("taylor1", "none"), ("taylor2", "none"), ("taylor1", "quadratic"))
        for solver, (predictor, corrector) in itertools.product(PUBLISHED, ways):
            settings = {"predictor": predictor, "corrector": corrector}
            try:
                schedule = plan_schedule(lab.prior, budget, solver=solver, **settings)
            except InfeasibleBudgetError:
                schedule = plan_schedule(lab.prior, budget, solver="cem-relaxed", **settings)
            name = f"{solver}, {predictor}" + (f", {corrector}" if corrector != "none" else "")
            rows.append({"budget": budget, "plan": name, "psnr_db": lab.psnr(lab.of(schedule)).tolist()})
    return rows


def measure_ceiling(lab: Lab, minutes: float) -> list[dict[str, Any]]:
    """Blind hill climbing: one full-compute step moved at a time, kept where 10 samples say so.

    From even spacing and from CEM's schedule, then, until the minutes are over, from the best so far with three steps
    moved at random. Minutes are those of one core (``OMP_NUM_THREADS=1``), so that other work on the machine takes
    nothing away.
    """
    rows, loop = [], lab.loop(10)
    generator = np.random.default_rng(0)

    def moves_of(schedule: CacheSchedule) -> list[CacheSchedule]:
        moves = list(neighbours(schedule))
        generator.shuffle(moves)
        return moves

    def climbed(start: CacheSchedule, ends: float) -> Trial:
        best = loop.run(start)
        moves = moves_of(start)
        while moves and time.process_time() < ends:
            trial = loop.run(moves.pop())
            if trial.psnr_db > best.psnr_db:
                best, moves = trial, moves_of(trial.schedule)
        return best

    for budget in BUDGETS[:3]:
        before, ends = len(loop.trials), time.process_time() + 60 * minutes
        published = [plan_schedule(lab.prior, budget, solver=name, predictor="taylor1") for name in PUBLISHED]
        tops = [climbed(start, ends) for start in published]
        while time.process_time() < ends:
            start = max(tops, key=lambda trial: trial.psnr_db).schedule
            for _ in range(3):
                start = moves_of(start)[0]
            tops.append(climbed(start, ends))
        best = max(tops, key=lambda trial: trial.psnr_db)
        rows.append(
            {
                "budget": budget,
                "minutes": minutes,
                "runs": len(loop.trials) - before,
                "climbs": len(tops),
                "psnr_db": lab.psnr(lab.of(best.schedule)).tolist(),
                "schedule": best.schedule.to_dict(),
            }
        )
    return rows


def measure_caches(lab: Lab) -> list[dict[str, Any]]:
    rows = []
    for budget, predictor, cache in itertools.product(BUDGETS, ("taylor1", "reuse"), CACHES):
        schedule = plan_schedule(lab.prior, budget, solver="uniform", predictor=predictor)
        planned = Plan(schedule=schedule, sampler=lab.manifest.sampler, cache=cache)
        rows.append({"budget": budget, "predictor": predictor, "cache": cache, "psnr_db": lab.psnr(planned).tolist()})
    return rows


def measure_ablation(lab: Lab) -> list[dict[str, Any]]:
    """Propagation is fitted anew for each view, to the same runs of the same budget."""
    rows = []
    for budget in BUDGETS[:3]:
        loop = lab.loop(16)
        for schedule in sample_schedules(50, 20, ("taylor1",), seed=1, budget=budget):
            loop.run(schedule)
        for view in VIEWS:
            schedule = plan_schedule(loop.fit(view).prior, budget, predictor="taylor1", view=view)
            rows.append(
                {
                    "view": view,
                    "budget": budget,
                    "psnr_db": lab.psnr(lab.of(schedule)).tolist(),
                    "full_steps": list(schedule.full_steps),
                }
            )
    return rows


def measure_auto(lab: Lab) -> dict[str, Any]:
    planned, evidence = lab.replanned(budget="auto")
    evaluated = ClosedLoop(
        runner=Runner(pipe=lab.pipe, steps=50, call=lab.manifest.call),
        prior=lab.prior,
        batches=lab.batches(EVALUATION_SEED_OFFSET),
        references=lab.references(50),
    )
    full = evaluated.run(full_compute(50))
    chosen = evaluated.run(planned.schedule, planned.correction)
    return {
        "budget": planned.schedule.budget,
        "tolerance": 0.15,
        "generations": evidence["generations"]["total"],
        "ratio": middle_mean(chosen.sample_relative_l2) / middle_mean(full.sample_relative_l2),
        "psnr_db": chosen.psnr_db,
        "full_psnr_db": full.psnr_db,
    }


def measure_steps(lab: Lab) -> list[dict[str, Any]]:
    """The plan of the bundle carried over, what the bundle was planned with for that step count, and what it would be
    if planned for that alone."""
    planned = {run.num_inference_steps: run for run in lab.manifest.other_runs}
    rows = []
    for steps in STEPS:
        carried = Plan(
            schedule=lab.manifest.schedule, sampler=lab.manifest.sampler, prior=lab.prior, view=lab.manifest.view
        )
        found = {"carried_over": lab.psnr(carried, steps)}
        if steps in planned:
            found["planned"] = lab.psnr(lab.of(planned[steps].schedule, sampler=planned[steps].sampler), steps)
        budget = round(steps / lab.manifest.schedule.compute_ratio)
        alone, _ = lab.replanned(steps=steps, budget=budget, rectify="none")
        found["alone"] = lab.psnr(alone, steps)
        rows.append({"steps": steps, "budget": budget} | {name: values.tolist() for name, values in found.items()})
    return rows


def measure_quanto(lab: Lab) -> list[float]:
    """PSNR of quanto's layers of the same scheme at 50 of 50, sample for sample those of the cells."""
    pipe = open_pipeline(locate(lab.manifest.model).folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    ((name, denoiser),) = denoisers(pipe)
    with record_calls(denoiser, every=5) as calls:
        lab.outcomes(pipe, 50, lab.batches(0, samples=16))
    quantize_pipeline(pipe, QuantizationSettings(scheme=lab.scheme, backend="quanto"), {name: calls})
    return lab.psnr_as_is(pipe).tolist()


def measure_solver() -> dict[str, float]:
    generator = np.random.default_rng(0)

    def synthetic(steps: int) -> ErrorPrior:
        v = generator.normal(size=(steps, 64)).cumsum(0)
        q = v + 0.1 * generator.normal(size=v.shape)
        return ErrorPrior(qq=q @ q.T, qv=q @ v.T, vv=v @ v.T, step_sizes=np.ones(steps), coherence=8.0)

    found = {}
    for steps, largest, gap in ((50, 50, 50), (1000, 200, 16)):
        prior = synthetic(steps)
        table = segment_costs(prior, ("taylor1",), gamma=2.0, max_gap=gap)
        solve, whole = [], []
        for _ in range(7):
            started = time.perf_counter()
            solve_segments(table.costs, largest)
            solve.append(time.perf_counter() - started)
            started = time.perf_counter()
            plan_all(prior, largest, predictor="taylor1", max_gap=gap)
            whole.append(time.perf_counter() - started)
        found[f"solve_{steps}_ms"] = 1e3 * statistics.median(solve)
        found[f"costs_and_solve_{steps}_ms"] = 1e3 * statistics.median(whole)
    for steps in (50, 100):
        prior = synthetic(steps)
        started = time.perf_counter()
        plan_predicted(prior, 3 * steps // 10)
        found[f"at_load_{steps}_ms"] = 1e3 * (time.perf_counter() - started)
    return found


MEASURES = {
    "ranking": measure_ranking,
    "cells": measure_cells,
    "caches": measure_caches,
    "ablation": measure_ablation,
    "auto": measure_auto,
    "steps": measure_steps,
    "quanto": measure_quanto,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "ceiling", "caches"), default=PARTS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--minutes", type=float, default=10.0, help="of processor time: ceiling search of each budget")
    parser.add_argument("--bundles", type=Path, help="keep the bundles here, and take those that are there")
    wanted = parser.parse_args()
    measures = MEASURES | {"ceiling": partial(measure_ceiling, minutes=wanted.minutes)}
    diffusers.utils.logging.disable_progress_bar()
    record = json.loads(HERE.with_suffix(".json").read_text()) if HERE.with_suffix(".json").is_file() else {}
    record["machine"] = describe_machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder = wanted.bundles or Path(scratch)
        for model in wanted.models:
            for scheme in wanted.schemes:
                name = f"{model}-{scheme}"
                if set(wanted.parts) == {"solver"}:
                    continue
                if not (folder / name).exists():
                    cemq.quantize_and_schedule(f"builtin:{model}", folder / name, scheme=scheme, budget=15)
                evidence = json.loads((folder / name / EVIDENCE).read_text())
                lab = Lab(model, scheme, folder / name)
                cell = record.setdefault(name, {})
                cell["generations"] = evidence["generations"]["total"]
                for part in wanted.parts:
                    if part in measures:
                        started = time.perf_counter()
                        cell[part] = measures[part](lab)
                        print(name, part, f"{time.perf_counter() - started:.0f} s", flush=True)
                        HERE.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    if "solver" in wanted.parts:
        record["solver"] = measure_solver()
    HERE.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    HERE.with_suffix(".md").write_text(page(record))


if __name__ == "__main__":
    main()
