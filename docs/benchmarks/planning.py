"""What the plans are worth, on both built-in models: ``python docs/benchmarks/planning.py``.

Every part is measured on evaluation seeds that no plan has seen, against full precision at 50 of 50 steps:

* ranking: Spearman of every predicted cost with the error found in closed loop (`cemq analyze`)
* cells: the default plan against `uniform` and `cem`, for each scheme and budget
* ceiling: what a closed-loop local search of ``--minutes`` for each budget finds (half an hour a bundle more; not
  measured by default)
* caches: even spacing served from the output, from the blocks' residual and from their modules (not by default)
* ablation: the schedule planned on each view of the prior, run on the quantized model
* auto: the budget that `--budget auto` finds, and its error on evaluation seeds
* steps: a prior of 50 steps carried over to 20, 28 and 100, against one measured there
* quanto: the default plans against quanto's layers of the same scheme with every step computed
* solver: milliseconds of the dynamic program

Writes planning.md and planning.json beside itself; ``--parts``, ``--models`` and ``--schemes`` measure some of it anew
and keep the rest.
About six hours on a CPU core of one's own (``OMP_NUM_THREADS=1``), two more with the ceiling; models and schemes can be
measured side by side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np

import cemq
from cemq.analysis import analyze, rank_correlation
from cemq.bench.machine import describe_machine, one_line
from cemq.bundle import EVIDENCE, PRIOR, Manifest, read_bundle
from cemq.closed_loop import FULL, ClosedLoop, Trial
from cemq.closed_search import PUBLISHED
from cemq.errors import InfeasibleBudgetError
from cemq.evaluation import run_batch
from cemq.evaluation.metrics import psnr_db
from cemq.models import denoisers, locate, open_pipeline
from cemq.planning import plan
from cemq.prior import VIEWS, ErrorPrior
from cemq.profiling import profile, record_references
from cemq.propagation import sample_schedules
from cemq.quantize import QuantizationPlan, quantize_pipeline, record_calls
from cemq.runtime import Plan, attached, detach
from cemq.sampling import EVALUATION_SEED_OFFSET, make_batches
from cemq.schedule import (
    CacheSchedule,
    neighbours,
    plan_all,
    plan_predicted,
    plan_schedule,
    segment_costs,
    solve_segments,
)

MODELS = ("dit-digits", "sd3-digits")
SCHEMES = ("w8a8", "w4a8")
CACHES = ("output", "residual", "modules")
BUDGETS = (25, 15, 10, 7)
STEPS = (20, 28, 100)
NATIVE_EFFORTS = ("quick", "normal")  # of the searches that plans carried over are compared with
PARTS = ("ranking", "cells", "ablation", "auto", "steps", "quanto", "solver")
SAMPLES = 64  # on 16, chance alone moves the mean by 1 dB
RANKED = 48  # on fewer, two halves of them do not agree on the ranking themselves
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
        return [run_batch(pipe, batch, steps=steps, call=self.manifest.call) for batch in batches]

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

    def loop(self, steps: int = 50, prior: ErrorPrior | None = None, samples: int = 64) -> ClosedLoop:
        """The planning samples, with seeds after those that the bundle used; nothing has been run on them."""
        first = max(self.manifest.profiled_seeds) + 1
        return ClosedLoop(
            pipe=self.pipe,
            prior=prior or self.prior,
            batches=self.batches(first, samples),
            references=self.references(steps, first, samples),
            steps=steps,
            call=self.manifest.call,
        )

    def of(self, schedule: CacheSchedule, correction: Any = None, sampler: Any = None) -> Plan:
        return Plan(schedule=schedule, sampler=sampler or self.manifest.sampler, correction=correction)


def measure_ranking(lab: Lab) -> dict[str, Any]:
    found = analyze(lab.bundle, schedules=60, samples=RANKED)
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
        "corrector": found["corrector"],
        "spearman": found["spearman"],
        "by_means": by_means,
    }


def measure_cells(lab: Lab) -> list[dict[str, Any]]:
    rows = []
    full = CacheSchedule(num_steps=50, full_steps=range(50))
    rows.append({"budget": 50, "plan": "full compute", "psnr_db": lab.psnr(lab.of(full)).tolist()})
    for budget in BUDGETS:
        for predictor, corrector, correction in (("taylor1", "none", "none"), ("auto", "auto", "auto")):
            planned = plan(lab.loop(), budget, predictor=predictor, corrector=corrector, correction=correction)
            corrected = planned.evidence["winner"]["correction"]
            rows.append(
                {
                    "budget": budget,
                    "plan": f"search, {predictor}",
                    "psnr_db": lab.psnr(lab.of(planned.schedule, planned.correction)).tolist(),
                    "full_steps": planned.schedule.budget,
                    "correction": corrected,
                    "full_run_equivalents": planned.evidence["full_run_equivalents"],
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
    rows, loop = [], lab.loop(samples=10)
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
        loop = lab.loop(samples=16)
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
    loop = lab.loop()
    planned = plan(loop, "auto")
    evaluated = ClosedLoop(
        pipe=lab.pipe,
        prior=lab.prior,
        batches=lab.batches(EVALUATION_SEED_OFFSET),
        references=lab.references(50),
        steps=50,
        call=lab.manifest.call,
    )
    full = evaluated.run(CacheSchedule(num_steps=50, full_steps=range(50), solver=FULL))
    chosen = evaluated.run(planned.schedule, planned.correction)
    return {
        "budget": planned.schedule.budget,
        "tolerance": 0.15,
        "full_run_equivalents": planned.evidence["full_run_equivalents"],
        "planning_ratio": planned.evidence["winner"]["relative_l2"] / planned.evidence["full_compute"]["relative_l2"],
        "evaluation_ratio": chosen.relative_l2 / full.relative_l2,
        "psnr_db": chosen.psnr_db,
        "full_psnr_db": full.psnr_db,
    }


def measure_steps(lab: Lab) -> list[dict[str, Any]]:
    """The plan of the bundle carried over, what the bundle was planned with for that step count, and what is searched
    for from a prior profiled there; no corrections."""
    planned = {run.num_inference_steps: run for run in lab.manifest.other_runs}
    rows = []
    for steps in STEPS:
        carried = Plan(
            schedule=lab.manifest.schedule, sampler=lab.manifest.sampler, prior=lab.prior, view=lab.manifest.view
        )
        found = {"carried_over": lab.psnr(carried, steps)}
        if steps in planned:
            found["planned"] = lab.psnr(lab.of(planned[steps].schedule, sampler=planned[steps].sampler), steps)
        profiled = lab.batches(0)
        references = record_references(lab.original, profiled, steps=steps, call=lab.manifest.call)
        prior = profile(
            lab.pipe, profiled, references, steps=steps, call=lab.manifest.call, scheme=lab.scheme, dtype="float32"
        )
        budget = round(steps / lab.manifest.schedule.compute_ratio)
        for effort in NATIVE_EFFORTS:
            native = plan(lab.loop(steps, prior), budget, correction="none", effort=effort)
            found[effort] = lab.psnr(lab.of(native.schedule, sampler=prior.metadata.sampler), steps)
        rows.append({"steps": steps, "budget": budget} | {name: values.tolist() for name, values in found.items()})
    return rows


def measure_quanto(lab: Lab) -> list[float]:
    """PSNR of quanto's layers of the same scheme at 50 of 50, sample for sample those of the cells."""
    pipe = open_pipeline(locate(lab.manifest.model).folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    ((name, denoiser),) = denoisers(pipe)
    with record_calls(denoiser, every=5) as calls:
        lab.outcomes(pipe, 50, lab.batches(0, samples=16))
    quantize_pipeline(pipe, QuantizationPlan(scheme=lab.scheme, backend="quanto"), {name: calls})
    return lab.psnr_as_is(pipe).tolist()


def planning_cost(manifest: Manifest, evidence: dict[str, Any]) -> dict[str, float]:
    """Of the bundle and of its other step counts, in runs of the planning samples at full compute."""
    steps = manifest.schedule.num_steps
    found = zip(manifest.other_runs, evidence["other_runs"], strict=True)
    others = [tried["full_run_equivalents"] * run.schedule.num_steps / steps for run, tried in found]
    return {"own": evidence["full_run_equivalents"], "others": sum(others)}


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
    if set(wanted.parts) >= set(PARTS) and wanted.models == MODELS and wanted.schemes == SCHEMES:
        record.pop("remark", None)  # on parts that were taken apart from the others
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
                cell["fit"], cell["cost"] = evidence["fit"], planning_cost(lab.manifest, evidence)
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


def mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}"


def interval(values: list[float]) -> str:
    """Mean and the half width of its 95 % confidence interval over seeds (normal approximation)."""
    return f"{statistics.mean(values):.1f} ± {1.96 * statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def difference(ours: list[float], theirs: list[float]) -> str:
    """Mean and the half width of its 95 % confidence interval over seeds, of the same samples."""
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.mean(gains):+.1f} ± {1.96 * statistics.stdev(gains) / math.sqrt(len(gains)):.1f}"


def rows_of(record: dict[str, Any], part: str) -> list[tuple[str, str, Any]]:
    return [
        (model, scheme, record[f"{model}-{scheme}"][part])
        for model in MODELS
        for scheme in SCHEMES
        if part in record.get(f"{model}-{scheme}", {})
    ]


def table(head: list[str], rows: list[list[Any]]) -> str:
    if not rows:
        return "Not measured with these plans yet."
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(value) for value in row) + " |" for row in rows])


def page(record: dict[str, Any]) -> str:
    costs = [f"{kind}, {view}" for kind in ("fitted", "unweighted", "cem") for view in VIEWS]
    ranking = [
        [model, scheme, predictor, found.get("corrector", "none")]
        + [f"{values[costs[0]]:.3f}", f"{found['by_means'][predictor]:.3f}" if "by_means" in found else "-"]
        + [f"{values[cost]:.2f}" for cost in costs[1:]]
        for model, scheme, found in rows_of(record, "ranking")
        for predictor, values in found["spearman"].items()
    ]
    cells = []
    for model, scheme, found in rows_of(record, "cells"):
        full = next(row["psnr_db"] for row in found if row["plan"] == "full compute")
        for budget in BUDGETS:
            row = {each["plan"]: each for each in found if each["budget"] == budget}
            best, best_of_both = (
                max((row[f"{s}, {name}"]["psnr_db"] for s in PUBLISHED for name in names), key=statistics.mean)
                for names in (["taylor1"], ["taylor1", "taylor2"])
            )
            own = row["search, auto"]
            later = [row.get(f"{solver}, taylor1, quadratic") for solver in PUBLISHED]  # not in records of before
            cells.append(
                [model, scheme, mean(full), budget]
                + [mean(row[f"{solver}, {name}"]["psnr_db"]) for name in ("taylor1", "taylor2") for solver in PUBLISHED]
                + [mean(each["psnr_db"]) if each else "-" for each in later]
                + [mean(row["search, taylor1"]["psnr_db"])]
                + [interval(own["psnr_db"]), own["correction"] or "none", own["full_steps"]]
                + [difference(row["search, taylor1"]["psnr_db"], best)]
                + [difference(own["psnr_db"], published) for published in (best, best_of_both)]
            )
    ablation = [
        [model, scheme, budget]
        + [
            interval(next(r["psnr_db"] for r in found if r["view"] == view and r["budget"] == budget))
            for view in ("cache", "self", "combined")
        ]
        for model, scheme, found in rows_of(record, "ablation")
        for budget in BUDGETS[:3]
    ]
    auto = [
        [
            model,
            scheme,
            found["budget"],
            f"{found['planning_ratio']:.3f}",
            f"{found['evaluation_ratio']:.3f}",
            f"{found['psnr_db']:.1f}",
            f"{found['full_psnr_db']:.1f}",
            found["full_run_equivalents"],
        ]
        for model, scheme, found in rows_of(record, "auto")
    ]
    steps = [
        [
            model,
            scheme,
            row["steps"],
            row["budget"],
            mean(row["carried_over"]),
            mean(row["planned"]) if "planned" in row else "-",
            *(mean(row[effort]) for effort in NATIVE_EFFORTS),
            *(difference(row.get("planned", row["carried_over"]), row[effort]) for effort in NATIVE_EFFORTS),
        ]
        for model, scheme, found in rows_of(record, "steps")
        for row in found
    ]
    quanto = []
    for model, scheme, found in rows_of(record, "quanto"):
        own = {row["budget"]: row for row in record[f"{model}-{scheme}"]["cells"] if row["plan"] == "search, auto"}
        margins = [difference(own[budget]["psnr_db"], found) for budget in BUDGETS]
        quanto.append([model, scheme, interval(found), mean(own[10]["psnr_db"]), *margins])
    costs_of_planning = [
        [model, scheme, *(f"{cost:.2f}" for cost in (found["own"], found["others"], sum(found.values())))]
        for model, scheme, found in rows_of(record, "cost")
    ]
    caches = [
        [model, scheme, budget]
        + [
            " / ".join(
                mean(row["psnr_db"])
                for cache in CACHES
                for row in found
                if (row["budget"], row["predictor"], row["cache"]) == (budget, predictor, cache)
            )
            for predictor in ("taylor1", "reuse")
        ]
        for model, scheme, found in rows_of(record, "caches")
        for budget in BUDGETS
    ]
    ceiling = [
        [
            *(model, scheme, row["budget"], f"{row['minutes']:.1f}", row["climbs"], row["runs"]),
            *(mean(row["psnr_db"]), mean(own["psnr_db"])),
            difference(own["psnr_db"], row["psnr_db"]),
        ]
        for model, scheme, found in rows_of(record, "ceiling")
        for row in found
        for own in record[f"{model}-{scheme}"]["cells"]
        if own["budget"] == row["budget"] and own["plan"] == "search, taylor1"
    ]
    inner = ""
    if caches:
        inner = f"""## Output, residual or modules

Uniform schedules, PSNR in dB served from the [output / the blocks' residual / their modules](../caching.md).

{table(["model", "scheme", "budget", "taylor1", "reuse"], caches)}

"""
    fitted_to = sum(found["fitted_to"] for _, _, found in rows_of(record, "ranking"))
    solver = record.get("solver", {})
    return f"""# What plans are worth

{record["machine"]["date"][:10]}, {one_line(record["machine"])}.
Command: `python docs/benchmarks/planning.py`. Both built-in models, 50 steps, {
        SAMPLES
    } samples with seeds from 1000000 on that no
plan has seen; PSNR in dB to full precision at 50 of 50 with the same seeds. {record.get("remark", "")}

## Which cost ranks schedules

Spearman's correlation of predicted cost and error found in closed loop over 60 schedules with 15 full-compute steps,
half of them random, half near uniform, {fitted_to or "none"} of them fitted to, on {
        RANKED
    } evaluation samples. `fitted` is what plans are
made with; `unweighted` is the same with step sizes as the only weights; `cem` is CEM's published cost. Schedules have
the corrector that the bundle was planned with. What sets a schedule apart is averaged over the middle two thirds of the
samples, as where plans are compared; `by plain means` is the first column without that.

{table(["model", "scheme", "predictor", "corrector", costs[0], "by plain means", *costs[1:]], ranking)}

## Default plan against uniform and CEM

`search, taylor1` is the search with that one predictor, no corrector and no correction, as `uniform` and `cem` have it;
`corrected later` are those two with the corrector `quadratic`; `default` has it where skipping costs enough, and
chooses the predictor of each segment and a correction besides. CEM's rule has no schedule of 7: its relaxed variant
stands in. Margins are over the better of uniform and CEM: of `search, taylor1` with that predictor, of `default` with
that predictor, and with the better of both. Every cell is planned on samples that nothing has been run on. "full steps"
is what the default plan spends: it may leave part of the budget.

{
        table(
            [
                "model",
                "scheme",
                "50 of 50",
                "budget",
                *(f"{solver}, {name}" for name in ("taylor1", "taylor2") for solver in PUBLISHED),
                *(f"{solver}, taylor1, corrected later" for solver in PUBLISHED),
                "search, taylor1",
                "default",
                "correction",
                "full steps",
                "search over taylor1",
                "default over taylor1",
                "default over both",
            ],
            cells,
        )
    }

## How far from the ceiling

A blind local search in closed loop, one full-compute step moved at a time and kept where 10 samples say so, from even
spacing, from CEM's schedule, then again and again from the best so far with three steps moved at random, until the
minutes of one core are over; `search, taylor1` is what the default search finds in 8 runs' worth.

{
        table(
            ["model", "scheme", "budget", "minutes", "climbs", "runs", "ceiling", "search, taylor1", "difference"],
            ceiling,
        )
    }

{inner}## Planned on which prior

Schedules of the dynamic program (taylor1, no search, no correction), planned on the full-precision prior (`cache`), the
quantized model's own (`self`) and the combined one; all run on the quantized model. Mean and 95 % confidence interval
over {SAMPLES} seeds.

{table(["model", "scheme", "budget", "cache", "self", "combined"], ablation)}

## `--budget auto`

Tolerance 0.15: error (relative L2 of the final latent) over that of the same quantized model at full compute.

{
        table(
            ["model", "scheme", "budget found", "ratio, planning", "ratio, evaluation", "dB", "dB at 50 of 50", "runs"],
            auto,
        )
    }

## Other step counts

A bundle made at 50 steps with 15 of them full, run at another step count. `carried over`: its prior and schedule are,
and are planned on without running anything. `planned`: where the bundle was planned for that step count besides
(`--also-steps`, by default 20 for 50), which is what it follows there; its prior is carried over all the same. `quick`
and `normal` are what searches of that effort find at that step count, in closed loop, from a prior profiled there; the
last two columns compare what the bundle follows with them.

{
        table(
            ["model", "scheme", "steps", "budget", "carried over", "planned", *NATIVE_EFFORTS]
            + [f"to {effort}" for effort in NATIVE_EFFORTS],
            steps,
        )
    }

## Against quanto at full compute

quanto's layers of the same scheme (`--backend quanto`) with 50 of 50 steps computed, beside the default plans above:
PSNR to full precision on the same samples, and what the default plan of each budget has over quanto.

{
        table(
            ["model", "scheme", "quanto, 50 of 50", "default, 10 of 50", *(f"{budget} of 50" for budget in BUDGETS)],
            quanto,
        )
    }

## What planning costs

Runs of all planning samples at full compute that planning of the bundles took (15 of 50 steps, effort `normal`).

{
        table(
            ["model", "scheme", "the bundle's step count", "other step counts", "both"],
            costs_of_planning,
        )
    }

## Solver

{
        table(
            ["", "dynamic program, ms", "with its cost table, ms"],
            [
                [
                    "every budget of 50 steps",
                    *(f"{solver.get(k, math.nan):.1f}" for k in ("solve_50_ms", "costs_and_solve_50_ms")),
                ],
                [
                    "every budget to 200 of 1000 steps",
                    *(f"{solver.get(k, math.nan):.0f}" for k in ("solve_1000_ms", "costs_and_solve_1000_ms")),
                ],
            ],
        )
    }

Another budget or step count at load, local search from every start and all (synthetic prior, 3 of 10 steps in full):
{solver.get("at_load_50_ms", math.nan):.0f} ms for 50 steps, {solver.get("at_load_100_ms", math.nan):.0f} ms for 100.
"""


if __name__ == "__main__":
    main()
