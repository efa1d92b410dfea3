"""What quantization alone costs, and what each part of cemq's buys: ``python docs/benchmarks/quantization.py``.

Both built-in models, 50 of 50 steps, every backend and scheme that is installed, and the native ones with their parts
taken away or added. Writes quantization.md and quantization.json beside itself. About 6 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from cemq.bench.machine import describe_machine, one_line
from cemq.evaluation.compare import measure_fidelity
from cemq.pipelines.batches import (
    EVALUATION_SEED_OFFSET,
    check_conditions,
    make_batches,
    read_conditions,
    run,
    split_conditions,
)
from cemq.pipelines.opening import denoisers, locate, open_pipeline, weight_bytes
from cemq.quantize import BACKENDS, QuantizationSettings, installed, quantize_pipeline, record_calls
from cemq.recipe import find_calibration, load_recipe
from cemq.runtime.runner import Outcome, Runner

MODELS = ("dit-digits", "sd3-digits")


@dataclass(frozen=True)
class Row:
    """One line of the table: how it is called, and the plan that `cemq quantize-and-schedule` would follow."""

    what: str
    options: str
    plan: QuantizationSettings


def native(scheme: str, options: str, what: str, **settings: Any) -> Row:
    return Row(f"native {scheme}, {what}", options, QuantizationSettings(scheme=scheme, **settings))


ROWS = (
    native("w8a8", "", "default"),
    native("w8a8", "--rounding nearest", "rounded to nearest", gptq=False),
    native("w8a8", "smoothed: true", "smoothed", smoothed=True),
    native("w4a8", "", "default"),
    native("w4a8", "--rounding nearest", "rounded to nearest", gptq=False),
    native("w4a8", "smoothed: true", "smoothed", smoothed=True),
    native("w4a8", "--low-rank 16", "rank 16", low_rank=16),
    native("w4a8", "--low-rank 32", "rank 32", low_rank=32),
    native("w4a8", "--bits-budget 4.8", "4.8 bits on average", bits_budget=4.8),
    native("w4a8", "--bits-budget 5.5", "5.5 bits on average", bits_budget=5.5),
    native("w8a16", "", "default"),
    native("w4a16", "", "default"),
    *(
        Row(f"{backend} {scheme}", f"--backend {backend}", QuantizationSettings(scheme=scheme, backend=backend))
        for backend in BACKENDS
        if backend != "native" and installed(backend)
        for scheme in BACKENDS[backend].layers
    ),
)


def measure(model: str, samples: int) -> list[dict[str, Any]]:
    recipe = load_recipe(model)
    pipe = open_pipeline(locate(f"builtin:{model}").folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    conditions = check_conditions(pipe, read_conditions(find_calibration(recipe.calib)))
    profiled, held_out = split_conditions(conditions, profiled=recipe.samples, seed=0)
    calibration = make_batches(profiled, samples=recipe.samples, first_seed=0, batch_size=4)
    evaluation = make_batches(held_out, samples=samples, first_seed=EVALUATION_SEED_OFFSET, batch_size=8)
    ((name, original),) = denoisers(pipe)

    def outcomes() -> list[Outcome]:
        return Runner(pipe=pipe, steps=50, call=recipe.call).run(evaluation)

    with record_calls(original, every=5) as calls:
        for batch in calibration:
            run(pipe, batch, steps=50, call=recipe.call)
    references, reference_bytes, rows = outcomes(), weight_bytes(pipe), []
    for row in ROWS:
        setattr(pipe, name, copy.deepcopy(original))
        quantize_pipeline(pipe, row.plan, {name: calls})
        fidelity = measure_fidelity(references, outcomes())
        rows.append(
            {
                "model": model,
                "what": row.what,
                "options": row.options,
                "scheme": row.plan.scheme,
                "backend": row.plan.backend,
                "psnr_db": fidelity.psnr_db,
                "ssim": fidelity.ssim,
                "relative_l2": fidelity.relative_l2,
                "bytes_share": weight_bytes(pipe) / reference_bytes,
            }
        )
        print(model, row.what, f"{fidelity.psnr_db:.2f} dB", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | options | " + " | ".join(f"{model}: PSNR | SSIM | bytes" for model in MODELS) + " |",
        "|---" * (2 + 3 * len(MODELS)) + "|",
    ]
    for row in ROWS:
        cells = []
        for model in MODELS:
            cell = next(r for r in rows if (r["model"], r["what"]) == (model, row.what))
            cells.append(f"{cell['psnr_db']:.1f} | {cell['ssim']:.4f} | {cell['bytes_share']:.3f}")
        options = f"`{row.options}`" if row.options else ""
        lines.append(f"| {row.what} | {options} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16)
    samples = parser.parse_args().samples
    diffusers.utils.logging.disable_progress_bar()
    machine = describe_machine()
    rows = [row for model in MODELS for row in measure(model, samples)]
    here = Path(__file__).with_suffix("")
    here.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    notes = "\n".join(f"* {name}: {backend.note}." for name, backend in BACKENDS.items() if backend.note)
    here.with_suffix(".md").write_text(
        f"""# Fidelity of quantization alone

{machine["date"][:10]}, {one_line(machine)}.
Command: `python docs/benchmarks/quantization.py` ({samples} samples a cell). 50 steps, all of them computed; PSNR in dB
and SSIM against the full-precision float32 run of the same seeds; conditions and seeds were not used for calibration,
which saw a fifth of the denoiser calls of 16 other samples. Bytes: of the denoiser, share of float32 (small models:
`dit-digits` keeps a table of 1001 class embeddings in each block).

{table(rows)}

{notes}

Differences below about half a dB are noise: recording other calls moves the figures by that much.
"""
    )


if __name__ == "__main__":
    main()
