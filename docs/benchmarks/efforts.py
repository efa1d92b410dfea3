"""What a build gives for what it takes, at each effort: ``python docs/benchmarks/efforts.py``.

Both built-in models, both schemes, 25, 15 and 10 of 50 steps, three seeds; PSNR to full precision at 50 of 50 steps on
64 samples with seeds from 1000000 on that no build has seen. Generations are counted by a hook on the denoiser: rows
it was called with, in those of one full generation of one sample. Beside them what the builds gave that took some 800,
sample for sample as they stand in planning.json, and evenly spaced steps.

Writes efforts.md and efforts.json beside itself. ``--models``, ``--schemes`` and ``--seeds`` measure some of it anew
and keep the rest. About an hour for each model on a core of one's own (``OMP_NUM_THREADS=1``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cemq.bench.machine import describe_machine
from cemq.build import references, stages
from cemq.build.settings import BuildSettings, resolve
from cemq.build.work import Work
from cemq.metrics import psnr_db
from cemq.pipelines.batches import (
    EVALUATION_SEED_OFFSET,
    check_conditions,
    make_batches,
    read_conditions,
    split_conditions,
)
from cemq.pipelines.opening import denoisers, locate, open_pipeline
from cemq.recipe import find_calibration, load_recipe
from cemq.runtime import attached
from cemq.runtime.runner import Outcome, Runner
from cemq.schedule import plan_schedule

MODELS, SCHEMES, BUDGETS, SEEDS = ("dit-digits", "sd3-digits"), ("w8a8", "w4a8"), (25, 15, 10), (0, 1000, 2000)
EFFORTS = ("instant", "quick", "normal")
STEPS, SAMPLES = 50, 64
HERE = Path(__file__).with_suffix("")
# Full generations of one sample that others calibrate a schedule with, as they say themselves
OTHERS = {"MagCache": 1, "DPCache": 10, "BudCache": 200}


class Evaluation:
    """The samples that planning.json is about, as full precision draws them."""

    def __init__(self, model: str):
        recipe = load_recipe(model)
        self.model, pipe = model, open_pipeline(locate(recipe.model).folder, dtype="float32", device="cpu")
        pipe.set_progress_bar_config(disable=True)
        lines = check_conditions(pipe, read_conditions(find_calibration(recipe.calib)))
        _, held_out = split_conditions(lines, profiled=16, seed=0)
        self.batches = make_batches(held_out, samples=SAMPLES, first_seed=EVALUATION_SEED_OFFSET, batch_size=8)
        self.call = recipe.call
        self.references = self.run(pipe)

    def run(self, pipe: Any) -> list[Outcome]:
        return Runner(pipe=pipe, steps=STEPS, call=self.call).run(self.batches)

    def psnr(self, pipe: Any) -> list[float]:
        pairs = zip(self.references, self.run(pipe), strict=True)
        return np.concatenate([psnr_db(reference.images, found.images) for reference, found in pairs]).tolist()


@contextmanager
def counted(pipe: Any) -> Iterator[list[int]]:
    """Rows of every call that reaches the denoiser's first block; on skipped steps none does."""
    rows: list[int] = []
    (_, denoiser), *_ = denoisers(pipe)

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(len(args[0] if args else kwargs["hidden_states"]))

    handle = denoiser.transformer_blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def measure(evaluation: Evaluation, scheme: str, effort: str, seed: int) -> Iterator[dict[str, Any]]:
    """A build for every budget, told in its stages; what comes before planning is the same for all, and run once."""
    asked = {"scheme": scheme, "effort": effort, "seed": seed, "dtype": "float32", "also_steps": []}
    settings = resolve(f"builtin:{evaluation.model}", None, "cpu", asked)
    with tempfile.TemporaryDirectory() as scratch:
        full = references.FullPrecision(settings, None, Work(Path(scratch), keeps=False))
        with counted(full.runner.pipe) as rows:
            samples = references.draw_samples(full.runner, settings)
            originals, fitted = references.run_originals(full, full.describe(), samples)
            quantized = stages.quantize(full.runner, settings.quantization, fitted.calls)
    with counted(quantized.pipe) as forced:
        prior = stages.profile(quantized, samples, originals, settings)
    before, each = sum(rows) + sum(forced), 2 * STEPS  # both branches of guidance in one call
    for budget in BUDGETS:
        own: BuildSettings = replace(settings, recipe=settings.recipe.model_copy(update={"budget": budget}))
        with counted(quantized.pipe) as rows:
            plans = stages.choose_plans(quantized, prior, samples, originals, own)
            stages.check(quantized, plans, samples, originals, own)
        with attached(quantized.pipe, plans.own):
            found = evaluation.psnr(quantized.pipe)
        row = {"scheme": scheme, "effort": effort, "seed": seed, "budget": budget}
        generations = (before + sum(rows)) / each
        yield row | {"generations": generations, "psnr_db": found, "schedule": plans.own.schedule.to_dict()}
        if effort == "instant" and seed == SEEDS[0]:
            even = plan_schedule(prior, budget, solver="uniform", predictor="taylor1")
            with attached(quantized.pipe, replace(plans.own, schedule=even)):
                yield row | {"effort": "uniform", "generations": 0, "psnr_db": evaluation.psnr(quantized.pipe)}


def default_before(model: str, scheme: str, budget: int) -> list[float]:
    """What the builds of some 800 generations gave, sample for sample."""
    cells = json.loads(HERE.with_name("planning.json").read_text())[f"{model}-{scheme}"]["cells"]
    return next(row["psnr_db"] for row in cells if (row["budget"], row["plan"]) == (budget, "search, auto"))


def page(record: dict[str, Any]) -> str:
    def mean(rows: list[dict[str, Any]]) -> float:
        return float(np.mean([row["psnr_db"] for row in rows]))

    lines, differences = [], {effort: [] for effort in EFFORTS}
    for model, scheme, budget in itertools.product(MODELS, SCHEMES, BUDGETS):
        rows = [row for row in record.get(model, ()) if (row["scheme"], row["budget"]) == (scheme, budget)]
        if {row["effort"] for row in rows} < {"uniform", *EFFORTS}:
            continue  # not measured yet
        before, even = float(np.mean(default_before(model, scheme, budget))), mean(of(rows, "uniform"))
        cells = []
        for effort in EFFORTS:
            found = [mean([row]) for row in of(rows, effort)]
            differences[effort] += [each - before for each in found]
            cells.append(f"{np.mean(found):.1f} ({min(found):.1f} to {max(found):.1f})")
        lines.append(f"| {model} | {scheme} | {budget} | {even:.1f} | {' | '.join(cells)} | {before:.1f} |")
    spent = {
        effort: [row["generations"] for rows in record.values() if isinstance(rows, list) for row in of(rows, effort)]
        for effort in EFFORTS
    }
    machine = record["machine"]
    known = sorted({row["seed"] for rows in record.values() if isinstance(rows, list) for row in rows})
    seeds = ", ".join(map(str, known))
    summary = "\n".join(
        f"| `{effort}` | {min(spent[effort]):.1f} to {max(spent[effort]):.1f} | {np.mean(differences[effort]):+.2f} | "
        f"{min(differences[effort]):+.1f} |"
        for effort in EFFORTS
    )
    others = ", ".join(f"{name} with {count}" for name, count in OTHERS.items())
    return f"""# What a build takes, and what it gives

{machine["date"][:10]}, {machine["cpu"]}, {machine["threads"]} thread; torch {machine["libraries"]["torch"]}, diffusers
{machine["libraries"]["diffusers"]}. Command: `python docs/benchmarks/efforts.py`. PSNR in dB to full precision at 50 of
50 steps, mean of {SAMPLES} samples that no build has seen; of builds with the first seeds {seeds} the mean, the least
and the greatest. `before` is the default build of the version before, which took some 800 generations, on the same
samples (planning.json). A generation is a full one of one sample, counted by a hook on the denoiser, the calls that
GPTQ replays with it; plans for a second step count are left out here. {record.get("remark", "")}

| effort | generations | on average to `before`, dB | at worst, dB |
|---|---|---|---|
{summary}

Others say of themselves that they calibrate a schedule {others} generations.

| model | scheme | of 50 | uniform, taylor1 | instant | quick | normal | before |
|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}
"""


def of(rows: list[dict[str, Any]], effort: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["effort"] == effort]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--output", type=Path, default=HERE.with_suffix(".json"))
    asked = parser.parse_args()
    file = asked.output
    for model in asked.models:
        evaluation = Evaluation(model)
        for seed, scheme, effort in itertools.product(asked.seeds, asked.schemes, EFFORTS):
            found = list(measure(evaluation, scheme, effort, seed))
            record = json.loads(file.read_text()) if file.exists() else {}
            kept = [
                row
                for row in record.get(model, ())
                if (row["scheme"], row["seed"]) != (scheme, seed) or row["effort"] not in {r["effort"] for r in found}
            ]
            record |= {"machine": describe_machine(), model: kept + found}
            file.write_text(json.dumps(record, indent=1) + "\n")
            for row in found:
                print(model, *(row[key] for key in ("scheme", "effort", "seed", "budget")), row["generations"],
                      round(float(np.mean(row["psnr_db"])), 2), flush=True)  # fmt: skip
    file.with_suffix(".md").write_text(page(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
