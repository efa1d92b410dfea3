"""Fidelity of both built-in models under every scheme and budget: ``python docs/benchmarks/fidelity.py``.

Builds each bundle once with `cemq.quantize_and_schedule` and compares it with `cemq.evaluate`, as the command line
does; writes fidelity.md and fidelity.json beside itself. About 6 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import diffusers

import cemq
from cemq.bench.machine import describe_machine, one_line
from cemq.bundle.manifest import PRIOR, read_bundle
from cemq.evaluation.compare import measure_fidelity
from cemq.pipelines.batches import EVALUATION_SEED_OFFSET, make_batches, run
from cemq.pipelines.opening import locate, open_pipeline
from cemq.prior.error_prior import ErrorPrior
from cemq.runtime import attached, detach, schedule_hook
from cemq.runtime.runner import Runner
from cemq.schedule import plan_schedule

MODELS = ("builtin:dit-digits", "builtin:sd3-digits")
SCHEMES = ("none", "w8a8", "w4a8")
BUDGETS = (50, 25, 15, 10)
SOLVERS = ("bundle", "cem", "uniform")


def budget_wall_share(bundle: Path, rounds: int = 7) -> float:
    """Seconds of a run with 10 of 50 steps over one with 50 of 50, same bundle, four samples, interleaved; median."""
    manifest = read_bundle(bundle)
    (batch,) = make_batches(manifest.held_out_conditions, samples=4, first_seed=EVALUATION_SEED_OFFSET, batch_size=4)
    pipes = [cemq.from_pretrained(bundle, budget=budget, device="cpu") for budget in (10, 50)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    shares = []
    for _ in range(rounds):
        seconds = []
        for pipe in pipes:
            started = time.perf_counter()
            run(pipe, batch, steps=50, call=manifest.call)
            seconds.append(time.perf_counter() - started)
            assert schedule_hook(pipe).full_evaluations == schedule_hook(pipe).schedule.budget
        shares.append(seconds[0] / seconds[1])
    return statistics.median(shares)


def compare_solvers(bundle: Path, samples: int) -> list[dict]:
    """PSNR of the schedules that other solvers find on the bundle's own prior, on the samples `cemq.evaluate` takes."""
    manifest, prior = read_bundle(bundle), ErrorPrior.load(bundle / PRIOR)
    batches = make_batches(
        manifest.held_out_conditions, samples=samples, first_seed=EVALUATION_SEED_OFFSET, batch_size=4
    )
    original = open_pipeline(locate(manifest.model).folder, dtype=manifest.dtype, device="cpu")
    scheduled = cemq.from_pretrained(bundle, device="cpu")
    detach(scheduled)

    def outcomes(pipe):
        pipe.set_progress_bar_config(disable=True)
        return Runner(pipe=pipe, steps=50, call=manifest.call).run(batches)

    references, rows = outcomes(original), []
    for solver in ("cem", "uniform"):
        for budget in BUDGETS[1:]:
            with attached(scheduled, plan_schedule(prior, budget, solver=solver), manifest.sampler):
                fidelity = measure_fidelity(references, outcomes(scheduled))
            rows.append({"solver": solver, "full_steps": budget, "psnr_db": fidelity.psnr_db, "ssim": fidelity.ssim})
    return rows


def nothing() -> None:
    pass


def measure(samples: int) -> tuple[list[dict], dict[str, float]]:
    rows, shares = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for model in MODELS:
            for scheme in SCHEMES:
                name = f"{model.split(':')[1]}-{scheme}"
                bundle = Path(scratch) / name
                cemq.quantize_and_schedule(model, bundle, scheme=scheme, budget=25, also_steps=[])
                cells = [
                    {"solver": "bundle"} | cemq.evaluate(bundle, samples=samples, budget=budget).to_dict()
                    for budget in BUDGETS
                ]
                shares[name] = budget_wall_share(bundle)
                cells += compare_solvers(bundle, samples)
                for cell in cells:
                    print(name, cell["solver"], cell["full_steps"], f"{cell['psnr_db']:.2f} dB", flush=True)
                rows += [{"model": model, "scheme": scheme} | cell for cell in cells]
    return rows, shares


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
                    if value in row and (row["model"], row["scheme"], row["solver"]) == (model, scheme, solver)
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
    machine = describe_machine()
    rows, shares = measure(samples)
    sizes = sorted({(r["model"], r["scheme"], r["model_bytes"], r["reference_bytes"]) for r in rows if "seeds" in r})
    here = Path(__file__).with_suffix("")
    record = {"machine": machine, "rows": rows, "wall_share_10_of_50": shares}
    here.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    here.with_suffix(".md").write_text(
        f"""# Fidelity by scheme and budget

{machine["date"][:10]}, {one_line(machine)}.
Command: `make bench` ({samples} samples a cell, seeds from 1000000 on, none of them profiled; 50 steps; combined
prior of 16 samples). Reference: full precision, uncached, same seeds. `bundle` is built once, with 25 full-compute
steps, and loaded with the other budgets, planned from its prior in milliseconds: what planning each budget in closed
loop gives is in [planning](planning.md). `cem` and `uniform` have the predictor taylor1. The denoiser ran exactly as
often as the schedule says in every timed run (asserted).

## PSNR in dB (100 stands for identical pictures)

{table(rows, "psnr_db", ".1f")}

## SSIM

{table(rows, "ssim", ".4f")}

## Reference seconds / bundle seconds, both measured in the cell's own run (fp32 reference)

{table(rows, "wall_ratio", ".2f")}

## Seconds of a run with 10 of 50 steps over one with 50 of 50, same bundle, 4 samples, interleaved, median of 7

{", ".join(f"{name} {share:.3f}" for name, share in shares.items())}

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
