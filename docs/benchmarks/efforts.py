"""What a build gives for what it takes, at each effort: ``python docs/benchmarks/efforts.py``.

Both built-in models, both schemes, 25, 15 and 10 of 50 steps, three seeds; PSNR to full precision at 50 of 50 steps on
64 samples with seeds from 1000000 on that no build has seen. Generations are counted by a hook on the denoiser: rows
it was called with, in those of one full generation of one sample. Beside them evenly spaced steps, and what the default
build of the version before gave, which took some 800 (kept in efforts.json).

Writes efforts.md, efforts.png and efforts.json beside itself. ``--models``, ``--schemes``, ``--seeds``, ``--budgets``
and ``--efforts`` measure some of it anew and keep the rest. About an hour for each model on a core of one's own
(``OMP_NUM_THREADS=1``); ``thorough``, which is measured when asked for, takes two for each seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cemq.bench.machine import describe_machine, one_line
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
CELLS = tuple(itertools.product(MODELS, SCHEMES, BUDGETS))
EFFORTS = ("instant", "quick", "normal", "thorough")
STEPS, SAMPLES = 50, 64
HERE = Path(__file__).with_suffix("")
# Full generations of one sample that others calibrate a schedule with, as they say themselves
OTHERS = {"MagCache": 1, "DPCache": 10, "CEM": 100, "BudCache": 200}
BEFORE = 800  # that the default took before
FOUR_BITS = 4.55  # a weight, scales included: all layers at 4 bits, as they were in that


class Evaluation:
    """The samples that plans are judged on, as full precision draws them."""

    def __init__(self, model: str, samples: int = SAMPLES):
        recipe = load_recipe(model)
        self.model, pipe = model, open_pipeline(locate(recipe.model).folder, dtype="float32", device="cpu")
        pipe.set_progress_bar_config(disable=True)
        lines = check_conditions(pipe, read_conditions(find_calibration(recipe.calib)))
        _, held_out = split_conditions(lines, profiled=16, seed=0)
        self.batches = make_batches(held_out, samples=samples, first_seed=EVALUATION_SEED_OFFSET, batch_size=8)
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


def measure(
    evaluation: Evaluation, scheme: str, effort: str, seed: int, budgets: Sequence[int] = BUDGETS
) -> Iterator[dict[str, Any]]:
    """A build for every budget, told in its stages; what comes before planning is the same for all, and run once."""
    asked = {"scheme": scheme, "effort": effort, "seed": seed, "dtype": "float32", "also_steps": []}
    if scheme == "w4a8":
        asked["bits_budget"] = FOUR_BITS
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
    for budget in budgets:
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


def before(record: dict[str, Any], model: str, scheme: str, budget: int) -> float:
    """What the build of some 800 generations gave on the same samples: nothing makes such builds any more."""
    return mean(cell(record["before"], model, scheme, budget))


def page(record: dict[str, Any]) -> str:
    lines, differences, spent = [], {effort: [] for effort in EFFORTS}, {effort: [] for effort in EFFORTS}
    for model, scheme, budget in CELLS:
        rows = cell(record, model, scheme, budget)
        if not of(rows, "uniform"):
            continue  # not measured yet
        default, even = before(record, model, scheme, budget), mean(of(rows, "uniform"))
        told = []
        for effort in EFFORTS:
            builds = of(rows, effort)
            found = [mean([row]) for row in builds]
            spent[effort] += [row["generations"] for row in builds]
            differences[effort] += [each - default for each in found]
            spread = f" ({min(found):.1f} to {max(found):.1f})" if len(found) > 1 else ""
            told.append(f"{np.mean(found):.1f}{spread}" if found else "")
        lines.append(f"| {model} | {scheme} | {budget} | {even:.1f} | {' | '.join(told)} | {default:.1f} |")
    machine = record["machine"]
    summary = "\n".join(
        f"| `{effort}` | {min(spent[effort]):.1f} to {max(spent[effort]):.1f} | {len(spent[effort])} | "
        f"{np.mean(differences[effort]):+.2f} | {min(differences[effort]):+.1f} |"
        for effort in EFFORTS
        if spent[effort]
    )
    others = ", ".join(f"{name} {count}" for name, count in OTHERS.items())
    return f"""# What a build takes, and what it gives

{machine["date"][:10]}, {one_line(machine)}. Command: `python docs/benchmarks/efforts.py`.

PSNR in dB to full precision at 50 of 50 steps, mean of {SAMPLES} samples that no build has seen; of builds with
several first seeds ({known(record)}) the mean, the least and the greatest. `before` is the default build of the
version before, which took some {BEFORE} generations, on the same samples. A generation is a full one
of one sample, counted by a hook on the denoiser; plans for a second step count are left out here. In W4A8 all layers
have 4 bits, as in `before` (`--bits-budget {FOUR_BITS}`); with the default, 5.3, both are 3 to 5 dB nearer.

| effort | generations | builds | on average to `before`, dB | at worst, dB |
|---|---|---|---|---|
{summary}

![PSNR against generations](efforts.png)

The dotted line is evenly spaced steps with `taylor1`. Grey lines are what others calibrate a schedule with, as they say
themselves, in generations: {others} (BudCache's are shortened ones).

| model | scheme | of 50 | uniform, taylor1 | {" | ".join(EFFORTS)} | before |
|---|---|---|---|{"---|" * len(EFFORTS)}---|
{chr(10).join(lines)}
"""


def draw(record: dict[str, Any], path: Path) -> None:
    """A PNG: PSNR of every rung against its generations, a panel for each model and scheme."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.supxlabel("full generations of one sample")
    figure.supylabel("PSNR to full precision, dB")
    panels = figure.subplots(len(MODELS), len(SCHEMES), sharex=True).flat
    for axes, (model, scheme) in zip(panels, itertools.product(MODELS, SCHEMES), strict=True):
        for number, budget in enumerate(BUDGETS):
            rows = cell(record, model, scheme, budget)
            if not of(rows, "uniform"):
                continue  # not measured yet
            curve = [
                (float(np.mean([row["generations"] for row in builds])), mean(builds))
                for effort in EFFORTS
                if (builds := of(rows, effort))
            ]
            curve.append((BEFORE, before(record, model, scheme, budget)))
            axes.plot(*zip(*curve, strict=True), "o-", color=f"C{number}", label=f"{budget} of {STEPS}")
            axes.axhline(mean(of(rows, "uniform")), color=f"C{number}", linestyle=":", linewidth=1)
        for name, count in OTHERS.items():
            axes.axvline(count, color="0.8", zorder=0)
            axes.annotate(
                name, (count, 0.02), xycoords=("data", "axes fraction"), rotation=90, ha="right", color="0.5",
                fontsize="small",
            )  # fmt: skip
        axes.set(xscale="log", title=f"{model}, {scheme}")
    axes.legend()
    figure.savefig(path, dpi=100)


def cell(record: dict[str, Any], model: str, scheme: str, budget: int) -> list[dict[str, Any]]:
    return [row for row in record.get(model, ()) if (row["scheme"], row["budget"]) == (scheme, budget)]


def mean(rows: list[dict[str, Any]]) -> float:
    return float(np.mean([row["psnr_db"] for row in rows]))


def known(record: dict[str, Any]) -> str:
    """The first seeds of the builds."""
    return ", ".join(str(seed) for seed in sorted({row["seed"] for model in MODELS for row in record.get(model, ())}))


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("scheme", "effort", "seed", "budget"))


def of(rows: list[dict[str, Any]], effort: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["effort"] == effort]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS, choices=BUDGETS)
    parser.add_argument("--efforts", nargs="+", default=("instant", "quick", "normal"), choices=EFFORTS)
    parser.add_argument("--output", type=Path, default=HERE.with_suffix(".json"))
    asked = parser.parse_args()
    file = asked.output
    for model in asked.models:
        evaluation = Evaluation(model)
        for seed, scheme, effort in itertools.product(asked.seeds, asked.schemes, asked.efforts):
            found = list(measure(evaluation, scheme, effort, seed, asked.budgets))
            record = json.loads(file.read_text()) if file.exists() else {}
            anew = {key(row) for row in found}
            kept = [row for row in record.get(model, ()) if key(row) not in anew]
            record |= {"machine": describe_machine(), model: kept + found}
            file.write_text(json.dumps(record, indent=1) + "\n")
            for row in found:
                print(model, *key(row), row["generations"], round(mean([row]), 2), flush=True)
    record = json.loads(file.read_text())
    file.with_suffix(".md").write_text(page(record))
    draw(record, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
