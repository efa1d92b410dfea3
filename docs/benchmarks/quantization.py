"""What quantization alone costs, and what each part of cemq's buys: ``python docs/benchmarks/quantization.py``.

The built-in models, 50 of 50 steps, every backend and scheme that is installed, and the native ones with their parts
taken away or added; recipes of four-bit weights fitted to three sets of samples. Writes quantization.md and
quantization.json beside itself. ``--only w4a8`` measures the rows of that name anew and keeps the rest. About 20
minutes on a core of one's own (``OMP_NUM_THREADS=1``).
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import nn

from cemq.bench.machine import describe_machine, one_line
from cemq.errors import InputError
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
from cemq.quantize import BACKENDS, Call, QuantizationSettings, installed, quantize_pipeline, record_calls, stored_bits
from cemq.quantize.in_diffusers import quantizable
from cemq.recipe import find_calibration, load_recipe
from cemq.runtime.runner import Outcome, Runner

MODELS, SEEDS = ("dit-digits", "sd3-digits", "emoji", "moving-digits"), (0, 1000, 2000)
PROFILED, STEPS = 16, 50
ROTATED = 64  # columns that are rotated together
HERE = Path(__file__).with_suffix("")


@dataclass(frozen=True)
class Row:
    """One line of the table: how it is called, and the plan that `cemq quantize-and-schedule` would follow."""

    what: str
    options: str
    plan: QuantizationSettings
    rotated: bool = False
    everywhere: bool = False  # 4 bits in all layers, which is the least budget


def native(scheme: str, options: str, what: str, **settings: Any) -> Row:
    return Row(f"native {scheme}, {what}", options, QuantizationSettings(scheme=scheme, **settings))


ROWS = (
    native("w8a8", "", "default"),
    native("w8a8", "--rounding nearest", "rounded to nearest", gptq=False),
    native("w8a8", "smoothed: true", "smoothed", smoothed=True),
    native("w8a8-fp8", "", "rounded to nearest"),
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


RECIPES = (
    *(row for row in ROWS if row.what.startswith("native w4a8") and "smoothed" not in row.what),
    Row("native w4a8, 4 bits everywhere", "", QuantizationSettings(scheme="w4a8"), everywhere=True),
    Row("native w4a8, rotated", "", QuantizationSettings(scheme="w4a8"), rotated=True),
)
BEFORE = "native w4a8, default before"  # 4 bits, fifteen levels, group scales weighted by the Hessian's diagonal


class Rotated(nn.Module):
    """A layer behind a random sign and a Hadamard transform of every `ROTATED` channels, which its weight undoes."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        size = min(ROTATED, linear.in_features & -linear.in_features)
        rotation = torch.ones(1, 1, dtype=torch.float32, device="cpu")
        while len(rotation) < size:
            rotation = torch.kron(rotation, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float32, device="cpu"))
        signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(0), device="cpu") * 2 - 1
        self.rotation = signs * rotation / size**0.5
        self.linear = linear
        linear.weight = nn.Parameter(self._turned(linear.weight.detach()), requires_grad=False)

    def _turned(self, values: torch.Tensor) -> torch.Tensor:
        return (values.unflatten(-1, (-1, len(self.rotation))) @ self.rotation).flatten(-2)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.linear(self._turned(values))


class Bench:
    """A model, samples that no calibration sees, and what full precision makes of them."""

    def __init__(self, model: str, samples: int):
        self.model, self.recipe = model, load_recipe(model)
        self.pipe = open_pipeline(locate(f"builtin:{model}").folder, dtype="float32", device="cpu")
        self.pipe.set_progress_bar_config(disable=True)
        conditions = check_conditions(self.pipe, read_conditions(find_calibration(self.recipe.calib)))
        self.profiled, held_out = split_conditions(conditions, profiled=PROFILED, seed=0)
        self.batches = make_batches(held_out, samples=samples, first_seed=EVALUATION_SEED_OFFSET, batch_size=8)
        ((self.name, self.original),) = denoisers(self.pipe)
        self.references, self.bytes = self.outcomes(), weight_bytes(self.pipe)

    def outcomes(self) -> list[Outcome]:
        return Runner(pipe=self.pipe, steps=STEPS, call=self.recipe.call).run(self.batches)

    def calls(self, seed: int) -> list[Call]:
        """A fifth of what the denoiser is called with for other samples, of conditions that are not evaluated."""
        setattr(self.pipe, self.name, self.original)
        with record_calls(self.original, every=5) as calls:
            for batch in make_batches(self.profiled, samples=PROFILED, first_seed=seed, batch_size=4):
                run(self.pipe, batch, steps=STEPS, call=self.recipe.call)
        return calls

    def measure(self, row: Row, seed: int, calls: list[Call]) -> dict[str, Any]:
        denoiser = copy.deepcopy(self.original)
        if row.rotated:
            for name, linear, _ in list(quantizable(denoiser, row.plan.config(denoiser))):
                denoiser.set_submodule(name, Rotated(linear))
        setattr(self.pipe, self.name, denoiser)
        plan = row.plan
        if row.everywhere:
            least = stored_bits(denoiser, plan.config(denoiser).with_eight_bit(()))
            plan = replace(plan, bits_budget=least)
        quantize_pipeline(self.pipe, plan, {self.name: calls})
        fidelity = measure_fidelity(self.references, self.outcomes())
        return {
            "model": self.model,
            "seed": seed,
            "what": row.what,
            "options": row.options,
            "scheme": row.plan.scheme,
            "backend": row.plan.backend,
            "psnr_db": fidelity.psnr_db,
            "ssim": fidelity.ssim,
            "relative_l2": fidelity.relative_l2,
            "bytes_share": weight_bytes(self.pipe) / self.bytes,
        }


def find(rows: list[dict[str, Any]], model: str, what: str, seed: int = 0) -> dict[str, Any] | None:
    return next((row for row in rows if (row["model"], row["what"], row.get("seed", 0)) == (model, what, seed)), None)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | options | " + " | ".join(f"{model}: PSNR | SSIM | bytes" for model in MODELS) + " |",
        "|---" * (2 + 3 * len(MODELS)) + "|",
    ]
    for row in ROWS:
        cells = []
        for model in MODELS:
            if (cell := find(rows, model, row.what)) is None:
                cells.append("| |")
                continue
            mark = "" if "seed" in cell else " \\*"
            cells.append(f"{cell['psnr_db']:.1f}{mark} | {cell['ssim']:.4f} | {cell['bytes_share']:.3f}")
        options = f"`{row.options}`" if row.options else ""
        lines.append(f"| {row.what} | {options} | {' | '.join(cells)} |")
    return "\n".join(lines)


def recipes_table(rows: list[dict[str, Any]]) -> str:
    rows = [row for row in rows if "seed" in row]  # others are of the version before
    lines = [
        "| | " + " | ".join(f"{model}: bytes | PSNR | to the default" for model in MODELS) + " |",
        "|---" * (1 + 3 * len(MODELS)) + "|",
    ]
    for what in (BEFORE, *(row.what for row in RECIPES)):
        cells = []
        for model in MODELS:
            both = [
                (found, default)
                for seed in SEEDS
                if (found := find(rows, model, what, seed))
                and (default := find(rows, model, "native w4a8, default", seed))
            ]
            if not both:
                cells.append("| |")
                continue
            found, default = (np.array([cell["psnr_db"] for cell in cells]) for cells in zip(*both, strict=True))
            apart = ", ".join(f"{each:+.1f}" for each in found - default)
            share = both[0][0]["bytes_share"]
            cells.append(f"{share:.3f} | {found.mean():.1f} | {(found - default).mean():+.1f} ({apart})")
        lines.append(f"| {what.removeprefix('native w4a8, ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(record: dict[str, Any], samples: int) -> str:
    machine = record["machine"]
    notes = "\n".join(f"* {name}: {backend.note}." for name, backend in BACKENDS.items() if backend.note)
    old = any("seed" not in row for row in record["rows"])
    remeasured = "\n* \\*: measured on 2026-11-21, by the version of then." if old else ""
    return f"""# Fidelity of quantization alone

{machine["date"][:10]}, {one_line(machine)}.
Command: `python docs/benchmarks/quantization.py` ({samples} samples a cell). {STEPS} steps, all of them computed; PSNR
in dB and SSIM against the full-precision float32 run of the same seeds; conditions and seeds were not used for
calibration, which saw a fifth of the denoiser calls of {PROFILED} other samples. Bytes: of the denoiser, share of
float32 (small models: `dit-digits` keeps a table of 1001 class embeddings in each block).

{table(record["rows"])}

{notes}{remeasured}

Differences below about half a dB are noise: recording other calls moves the figures by that much and more.

## Recipes of four-bit weights

The same samples, each recipe fitted to samples from the seeds {", ".join(map(str, SEEDS))} on: mean PSNR in dB, and
what it is above the default that was fitted to the same, on average and for each. The default has a fifth of its
weights at 8 bits, those of the last blocks; a bits budget has more or fewer. `default before` is that of an earlier
version, all at 4 bits: fifteen levels in place of sixteen, scales chosen by the size of the inputs. `rotated` has a
Hadamard transform of every {ROTATED} channels in front of each layer, and the default after it; cemq does not ship it.

{recipes_table(record["rows"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--only", default="", help="measure the rows whose name has this in it, keep the others")
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    asked = parser.parse_args()
    diffusers.utils.logging.disable_progress_bar()
    stored = HERE.with_suffix(".json")
    record = json.loads(stored.read_text()) if asked.only and stored.exists() else {"rows": []}
    for model in asked.models:
        bench = Bench(model, asked.samples)
        for seed in asked.seeds:
            calls = bench.calls(seed)
            for row in dict.fromkeys((*(ROWS if seed == 0 else ()), *RECIPES)):
                if asked.only not in row.what:
                    continue
                try:
                    found = bench.measure(row, seed, calls)
                except InputError as refused:  # narrow layers need more bits for their scales
                    print(model, seed, row.what, refused, flush=True)
                    continue
                print(model, seed, row.what, f"{found['psnr_db']:.2f} dB", flush=True)
                old = find(record["rows"], model, row.what, seed)
                record["rows"] = [each for each in record["rows"] if each is not old] + [found]
                record["machine"] = describe_machine()
                stored.write_text(json.dumps(record, indent=1) + "\n")
    HERE.with_suffix(".md").write_text(page(record, asked.samples))


if __name__ == "__main__":
    main()
