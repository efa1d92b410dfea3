"""A plan at sizes that it was not made for, on builtin:emoji: ``python docs/benchmarks/sizes.py``.

A bundle is built at 64 x 64, at 96 x 96 and at 128 x 128 by the default effort. At each size the bundle of 64 x 64 is
called as a user would, with another height and width, beside the one that was built there, evenly spaced steps and
every step computed, on the same samples that nothing was fitted to. The model was trained at 64 x 64 alone: larger, its
pictures are worse at full precision too, and what is measured is the distance to those. Writes sizes.md and sizes.json
beside itself; about 25 minutes of a CPU core (``OMP_NUM_THREADS=1``).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cemq
from cemq.bench.machine import describe_machine, one_line
from cemq.bundle.manifest import Manifest, read_bundle
from cemq.metrics import psnr_db
from cemq.pipelines.batches import EVALUATION_SEED_OFFSET, Batch, make_batches
from cemq.pipelines.opening import locate, open_pipeline
from cemq.recipe import load_recipe
from cemq.runtime import attached, detach
from cemq.runtime.runner import Outcome, Runner
from cemq.schedule import CacheSchedule, uniform_steps

MODEL, SIZES, SAMPLES, STEPS = "emoji", (64, 96, 128), 16, 50
CELLS = (("w8a8", 15), ("w4a8", 15))
PLANS = ("every step", "uniform, taylor1", "made at 64 x 64", "made here")
HERE = Path(__file__).with_suffix("")


def call_at(size: int) -> dict[str, Any]:
    return load_recipe(MODEL).call | {"height": size, "width": size}


def draw(pipe: Any, size: int, batches: list[Batch]) -> list[Outcome]:
    pipe.set_progress_bar_config(disable=True)
    return Runner(pipe=pipe, steps=STEPS, call=call_at(size)).run(batches)


def figures(references: list[Outcome], pipe: Any, size: int, batches: list[Batch]) -> dict[str, float]:
    pairs = zip(references, draw(pipe, size, batches), strict=True)
    found = np.concatenate([psnr_db(reference.images, own.images) for reference, own in pairs])
    return {
        "psnr_db": float(found.mean()),
        "p5_db": float(np.percentile(found, 5)),
        "worst_db": float(found.min()),
        "standard_error_db": float(found.std(ddof=1) / np.sqrt(len(found))),
    }


def judge(bundles: dict[int, Path], size: int, manifest: Manifest) -> dict[str, dict[str, float]]:
    """Of each of `PLANS`, what it gives at one size."""
    batches = make_batches(
        manifest.held_out_conditions, samples=SAMPLES, first_seed=EVALUATION_SEED_OFFSET, batch_size=4
    )
    original = open_pipeline(locate(manifest.model).folder, dtype="float32", device="cpu")
    references = draw(original, size, batches)
    rows = {}
    for name, made_at in (("made at 64 x 64", SIZES[0]), ("made here", size)):
        pipe = cemq.from_pretrained(bundles[made_at], device="cpu")
        rows[name] = figures(references, pipe, size, batches)
    detach(pipe)
    rows["every step"] = figures(references, pipe, size, batches)
    evenly = uniform_steps(STEPS, manifest.schedule.budget)
    even = CacheSchedule(num_steps=STEPS, full_steps=evenly, predictor="taylor1")
    with attached(pipe, even):
        rows["uniform, taylor1"] = figures(references, pipe, size, batches)
    return rows


def measure(scheme: str, budget: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        bundles = {size: Path(scratch) / str(size) for size in SIZES}
        for size, folder in bundles.items():
            asked = {"scheme": scheme, "budget": budget, "dtype": "float32", "also_steps": [], "call": call_at(size)}
            cemq.quantize_and_schedule(f"builtin:{MODEL}", folder, device="cpu", **asked)
        rows = []
        for size in SIZES:
            found = judge(bundles, size, read_bundle(bundles[size]))
            rows += [{"scheme": scheme, "budget": budget, "size": size, "plan": name} | found[name] for name in PLANS]
            print(*rows[-len(PLANS) :], sep="\n", flush=True)
    return rows


def page(record: dict[str, Any]) -> str:
    rows, machine = record["rows"], record["machine"]
    lines = [
        "# Plans at other sizes",
        "",
        f"{machine['date'][:10]}, {one_line(machine)}. Command: `python docs/benchmarks/sizes.py`.",
        "",
        f"builtin:{MODEL}, {STEPS} steps, {SAMPLES} samples with seeds from {EVALUATION_SEED_OFFSET} on that nothing",
        "was fitted to; PSNR in dB to full precision at 50 of 50 steps and the same size: mean, fifth percentile and",
        "worst. Bundles are of the default effort. `made at 64 x 64` is the bundle of that size",
        "called with another height and width; `made here` was profiled, quantized and planned at the size of its row.",
        "The model was trained at 64 x 64 alone. A row that is not there was not measured.",
        "",
        f"| scheme | of {STEPS} | size | {' | '.join(PLANS)} | made here over made at 64 x 64 |",
        f"|---|---|---|{'---|' * len(PLANS)}---|",
    ]
    for scheme, budget in dict.fromkeys((row["scheme"], row["budget"]) for row in rows):
        for size in SIZES:
            own = {
                row["plan"]: row
                for row in rows
                if (row["scheme"], row["budget"], row["size"]) == (scheme, budget, size)
            }
            if not own:  # not measured
                continue
            told = [f"{own[n]['psnr_db']:.1f} ({own[n]['p5_db']:.1f}, {own[n]['worst_db']:.1f})" for n in PLANS]
            gain = own["made here"]["psnr_db"] - own["made at 64 x 64"]["psnr_db"]
            lines.append(f"| {scheme} | {budget} | {size} x {size} | {' | '.join(told)} | {gain:+.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    record: dict[str, Any] = {"machine": describe_machine(), "rows": []}
    for scheme, budget in CELLS:
        record["rows"] += measure(scheme, budget)
    HERE.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    HERE.with_suffix(".md").write_text(page(record))


if __name__ == "__main__":
    main()
