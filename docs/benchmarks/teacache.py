"""TeaCache beside planned schedules of no more compute, on the built-in models: ``python docs/benchmarks/teacache.py``.

TeaCache decides while a picture is drawn, with the polynomial of each model fitted as published; thresholds are swept.
Writes teacache.md and teacache.json beside itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cemq.bench.machine import describe_machine, one_line
from cemq.metrics import psnr_db
from cemq.pipelines.batches import (
    EVALUATION_SEED_OFFSET,
    check_conditions,
    make_batches,
    read_conditions,
    split_conditions,
)
from cemq.pipelines.opening import locate, open_pipeline
from cemq.quantize import CemqConfig, quantize_in_place
from cemq.recipe import find_calibration, load_recipe
from cemq.runtime import attached
from cemq.runtime.runner import Outcome, Runner
from cemq.runtime.teacache import TeaCache, fitted_coefficients
from cemq.schedule import CacheSchedule, uniform_steps
from cemq.schedule.plan import Plan
from cemq.search.choose import plan
from cemq.search.settings import PlanSettings
from cemq.search.trials import ClosedLoop

STEPS, MODELS = 50, ("dit-digits", "sd3-digits")
CASES = (("none", "residual"), ("w8a8", "residual"), ("none", "output"))  # scheme, and what TeaCache caches
THRESHOLDS = (0.05, 0.1, 0.2, 0.4)
PLANNING, EVALUATED = 8, 16  # samples


def measure(model: str, scheme: str, cache: str, steps: int) -> list[dict[str, Any]]:
    recipe = load_recipe(model)
    pipe = open_pipeline(locate(f"builtin:{model}").folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    conditions = check_conditions(pipe, read_conditions(find_calibration(recipe.calib)))
    profiled, held_out = split_conditions(conditions, profiled=8, seed=0)
    drawn = [(profiled, 8, 0), (held_out, PLANNING, 8), (held_out, EVALUATED, EVALUATION_SEED_OFFSET)]
    calibration, planning, evaluation = (
        make_batches(chosen, samples=samples, first_seed=seed, batch_size=8) for chosen, samples, seed in drawn
    )
    runner = Runner(pipe=pipe, steps=steps, call=recipe.call)
    trajectories, aims, references = runner.record(calibration), runner.run(planning), runner.run(evaluation)
    coefficients = fitted_coefficients(runner, calibration)
    if scheme != "none":  # rounded to nearest
        quantize_in_place(pipe.transformer, CemqConfig(scheme))
    prior = runner.profile(calibration, trajectories, scheme=scheme, dtype="float32")
    loop = ClosedLoop(runner=runner, prior=prior, batches=planning, references=aims)

    def quality() -> tuple[float, float]:
        """Mean PSNR of the evaluated samples, and how many steps were computed, with what is attached now."""
        return scores(references, runner.run(evaluation))

    rows = []
    for threshold in THRESHOLDS:
        with attached(pipe, TeaCache(threshold=threshold, coefficients=coefficients, cache=cache)):
            found, computed = quality()
        row = {"model": model, "scheme": scheme, "cache": cache, "threshold": threshold, "full_steps": computed}
        row["teacache"], budget = found, int(computed)
        if 2 <= budget < steps:
            searched = {"effort": "thorough", "allowed": 5.0}
            planned = plan(loop, PlanSettings(budget=budget, rectify="none", **searched)).schedule
            even = CacheSchedule(num_steps=steps, full_steps=uniform_steps(steps, budget), predictor="reuse")
            for name, schedule in (("planned", planned), ("uniform", even)):
                with attached(pipe, Plan(schedule=schedule, sampler=prior.metadata.sampler)):
                    row[name], _ = quality()
        rows.append(row)
        print(row, flush=True)
    return rows


def scores(references: list[Outcome], outcomes: list[Outcome]) -> tuple[float, float]:
    found = [psnr_db(one.images, other.images) for one, other in zip(references, outcomes, strict=True)]
    return float(np.concatenate(found).mean()), float(np.mean([outcome.full_steps for outcome in outcomes]))


def page(rows: list[dict[str, Any]], machine: dict[str, Any], minutes: float) -> str:
    lines = [
        "# TeaCache beside planned schedules",
        "",
        f"`python docs/benchmarks/teacache.py`, {minutes:.0f} minutes, {one_line(machine)}.",
        "",
        f"{STEPS} steps, PSNR in dB against full precision on {EVALUATED} samples that nothing was fitted to, drawn",
        "eight at once. TeaCache (arXiv:2411.19108) with the polynomial of each model, fitted to its full-precision",
        "runs as published; `residual` is what it was published with, `output` caches what skipped steps of a plan are",
        "predicted from. Beside it, at no more full-compute steps (the count rounded down): the plan of",
        f"five runs' worth on {PLANNING} planning samples, without `--rectify`, and evenly spaced steps that reuse the",
        "latest output. W8A8 is rounded to nearest.",
        "",
        "| model | scheme | cache | threshold | full steps | TeaCache | planned | uniform, reuse |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = [f"{row[name]:.1f}" if name in row else "" for name in ("teacache", "planned", "uniform")]
        lines.append(
            f"| {row['model']} | {row['scheme']} | {row['cache']} | {row['threshold']:g} | {row['full_steps']:.1f} | "
            + " | ".join(found)
            + " |"
        )
    gains = [row["planned"] - row["teacache"] for row in rows if "planned" in row]
    text = f"The plan is {np.mean(gains):.1f} dB above TeaCache on average, {min(gains):.1f} to {max(gains):.1f}."
    return "\n".join([*lines, "", text, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="Others keep the rows they have.")
    models = parser.parse_args().models
    torch.set_num_threads(1)
    started, path = time.time(), Path(__file__).with_suffix(".json")
    record = json.loads(path.read_text()) if path.is_file() else {"rows": [], "minutes": {}}
    record["rows"] = [row for row in record["rows"] if row["model"] not in models]
    for case, model in itertools.product(CASES, models):  # written after each: it may be stopped
        record["rows"] += measure(model, *case, STEPS)
        record["machine"] = describe_machine()
        record["minutes"] |= {model: (time.time() - started) / 60 / len(models) for model in models}
        path.write_text(json.dumps(record, indent=1) + "\n")
        rows = sorted(record["rows"], key=lambda row: (MODELS.index(row["model"]), row["scheme"], row["cache"]))
        path.with_suffix(".md").write_text(page(rows, record["machine"], sum(record["minutes"].values())))


if __name__ == "__main__":
    main()
