"""Fidelity of both built-in models under every scheme and budget: ``python docs/benchmarks/fidelity.py``.

Builds each bundle once with `cemq.quantize_and_schedule` and compares it with `cemq.evaluate`, as the command line
does; writes fidelity.md and fidelity.json beside itself. About 15 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import tempfile
from pathlib import Path

import diffusers
import torch

import cemq

MODELS = ("builtin:dit-digits", "builtin:sd3-digits")
SCHEMES = ("none", "w8a8", "w4a8")
BUDGETS = (50, 25, 15, 10)
SOLVERS = ("segment", "cem", "uniform")


def machine() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "transformers")
    )
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads; {versions}"


def measure(samples: int) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in MODELS:
            for scheme in SCHEMES:
                for solver in SOLVERS:
                    bundle = Path(scratch) / f"{model.split(':')[1]}-{scheme}-{solver}"
                    cemq.quantize_and_schedule(model, bundle, scheme=scheme, solver=solver, budget=25)
                    for budget in BUDGETS if solver == "segment" else BUDGETS[1:]:
                        found = cemq.evaluate(bundle, samples=samples, budget=budget)
                        rows.append({"model": model, "scheme": scheme, "solver": solver} | found.to_dict())
                        print(
                            model, scheme, solver, budget, f"{found.psnr_db:.2f} dB {found.wall_ratio:.2f}", flush=True
                        )
    return rows


def table(rows: list[dict], value: str, form: str) -> str:
    lines = [
        "| model | scheme | schedule | " + " | ".join(f"{b} of 50" for b in BUDGETS) + " |",
        "|---" * (3 + len(BUDGETS)) + "|",
    ]
    for model in MODELS:
        for scheme in SCHEMES:
            for solver in SOLVERS:
                cells = {
                    row["full_steps"]: format(row[value], form)
                    for row in rows
                    if (row["model"], row["scheme"], row["solver"]) == (model, scheme, solver)
                }
                if cells:
                    shown = " | ".join(cells.get(budget, "") for budget in BUDGETS)
                    lines.append(f"| {model.split(':')[1]} | {scheme} | {solver} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16)
    samples = parser.parse_args().samples
    diffusers.utils.logging.disable_progress_bar()
    rows = measure(samples)
    sizes = sorted({(r["model"], r["scheme"], r["model_bytes"], r["reference_bytes"]) for r in rows})
    here = Path(__file__).with_suffix("")
    here.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    here.with_suffix(".md").write_text(
        f"""# Fidelity by scheme and budget

{datetime.date.today()}, {machine()}. Command: `make bench` ({samples} samples a cell, seeds from 1000000 on, none
of them profiled; 50 steps; predictor taylor1; combined prior of 16 samples). Reference: full precision, uncached, same seeds.

## PSNR in dB (100 stands for identical pictures)

{table(rows, "psnr_db", ".1f")}

## SSIM

{table(rows, "ssim", ".4f")}

## Reference seconds / bundle seconds, both measured in the cell's own run (fp32 reference)

{table(rows, "wall_ratio", ".2f")}

## Bytes of the denoiser

| model | scheme | bytes | full precision | share |
|---|---|---|---|---|
"""
        + "\n".join(f"| {m.split(':')[1]} | {s} | {b:,} | {r:,} | {b / r:.3f} |" for m, s, b, r in sizes)
        + """

The built-in models are too small for quantization to shrink them much: `dit-digits` keeps a table of 1001 class
embeddings in each of its blocks in full precision. `tests/test_quantize.py` holds the bound on a model whose linears
dominate.
"""
    )


if __name__ == "__main__":
    main()
