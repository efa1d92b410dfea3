"""What a build was said to take, and what it took: ``python docs/benchmarks/estimate.py``.

Three models of different size are built at W8A8 and W4A8, each in a process of its own: both built-in ones, and a DiT
of some 130 M parameters with random weights. Minutes are estimated from headers before anything is run, then by
`cemq.build.remaining` once a step of full precision was timed, and once a step of the quantized model was. All seconds
are of the process's own CPU time (``OMP_NUM_THREADS=1``), so that what else the machine does counts neither in
estimates nor in what happened. Bytes are compared with the bundle's and with the process's peak.

Writes estimate.md and estimate.json beside itself. ``--models`` measures some of them anew and keeps the rest. Half an
hour on a core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cemq.bench.architectures import ARCHITECTURES, Architecture
from cemq.bench.machine import describe_machine, one_line
from cemq.bench.random_models import random_model
from cemq.build import quantize_and_schedule
from cemq.build.estimate import estimate
from cemq.build.remaining import Remaining
from cemq.build.settings import resolve
from cemq.memory.placement import format_bytes

HERE = Path(__file__).with_suffix("")
SCHEMES = ("w8a8", "w4a8")
LARGE = "dit-130m"
MODELS = {
    "dit-digits": {"effort": "normal"},
    "sd3-digits": {"effort": "normal"},
    LARGE: {"effort": "quick", "steps": 12},
}


def large_pipeline(folder: Path) -> str:
    """A DiT pipeline of 256 x 256 pixels with random weights, written to a folder."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    small = ARCHITECTURES["dit-small"]
    architecture = Architecture(
        name=LARGE, model_class=small.model_class, config=small.config | {"num_layers": 12}, batch=small.batch
    )
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(16, 16, 32, 32), norm_num_groups=8, sample_size=256, **blocks
    )
    transformer = random_model(architecture, dtype=torch.float32, device="cpu")
    DiTPipeline(transformer=transformer, vae=vae.eval(), scheduler=DDIMScheduler()).save_pretrained(folder)
    return str(folder)


def measure(name: str, scheme: str) -> dict[str, Any]:
    """One build, in this process."""
    clock: Callable[[], float] = time.process_time
    with tempfile.TemporaryDirectory() as place:
        model = large_pipeline(Path(place) / "model") if name == LARGE else f"builtin:{name}"
        asked = MODELS[name] | {"scheme": scheme}
        told = estimate(resolve(model, None, "cpu", asked), clock=clock)
        said, spans = [], {}

        def note(stage: str, share: float) -> None:
            spans.setdefault(stage, [clock() - started, 0.0])[1] = clock() - started

        def say(seconds: float) -> None:
            at = clock() - started
            said.append({"stage": list(spans)[-1], "after_seconds": at, "left_seconds": seconds})

        started = clock()
        bundle = Path(place) / "bundle"
        progress = Remaining(told, note, say=say, clock=clock)
        manifest = quantize_and_schedule(model, bundle, device="cpu", progress=progress, **asked)
        seconds = clock() - started
        disk = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    return {
        "model": name, "scheme": scheme, **MODELS[name], "reference_bytes": manifest.reference_bytes,
        "estimate": told.to_dict(), "generations": manifest.generations, "seconds": seconds, "said": said,
        "stages": {stage: until - since for stage, (since, until) in spans.items()}, "disk_bytes": disk,
        "host_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }  # fmt: skip


def first_said(row: dict[str, Any], *stages: str) -> float | None:
    """Seconds in all, as they were said once a step of one of these stages had been timed."""
    for before, now in itertools.pairwise([None, *row["said"]]):
        if now["stage"] in stages and (before is None or before["stage"] == now["stage"]):
            return now["after_seconds"] + now["left_seconds"]
    return None


def page(record: dict[str, Any]) -> str:
    lines, worst = [], {"headers": [], "full": [], "quantized": []}
    for row in record["rows"]:
        took, told = row["seconds"], row["estimate"]
        found = {
            "headers": 60 * told["minutes"],
            "full": first_said(row, "reference runs"),
            "quantized": first_said(row, "forced runs"),
        }
        for kind, seconds in found.items():
            worst[kind].append(seconds / took)
        cells = [f"{seconds / 60:.2f} ({seconds / took:.2f})" for seconds in found.values()]
        counts = told["generations"], row["generations"]
        generations = " of ".join(f"{each['full_precision']:g} + {each['quantized']:g}" for each in counts[::-1])
        sizes = [
            f"{format_bytes(row[kind])} ({told[kind] / row[kind]:.3f})" for kind in ("disk_bytes", "host_memory_bytes")
        ]
        lines.append(
            f"| {row['model']}, {row['reference_bytes'] / 4e6:.1f} M | {row['scheme']} | {row['effort']} | "
            f"{generations} | {took / 60:.2f} | {' | '.join(cells)} | {' | '.join(sizes)} |"
        )
    machine = record["machine"]
    ranges = {kind: f"{min(each):.2f} to {max(each):.2f}" for kind, each in worst.items()}
    return f"""# What a build is said to take, and what it takes

{machine["date"][:10]}, {one_line(machine)}. Command: `python docs/benchmarks/estimate.py`.

Minutes are of the process's own CPU time, since others used the machine as well; in brackets what was said over what
it came to. `headers` is what `--dry-run` says: the arithmetic of the weights' shapes, over what one block of a
transformer of about that width takes here. The next two columns are what a build says itself once it has timed a step
of full precision (or as many as take a second), and then of the quantized model. Generations are those run of those
estimated, full precision and quantized; where schedules are tried, the estimate is the most that may be. The DiT of
130 M has random weights, 12 steps and 256 x 256 pixels.

| model, parameters | scheme | effort | generations | minutes | headers | a step | a quantized one | disk | host peak |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}

Said over what it came to: {ranges["headers"]} from headers, {ranges["full"]} with a step of full precision timed,
{ranges["quantized"]} with a quantized one. {record.get("remark", "")}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--cell", nargs=2, metavar=("MODEL", "SCHEME"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=HERE.with_suffix(".json"))
    asked = parser.parse_args()
    if asked.cell:
        asked.output.write_text(json.dumps(measure(*asked.cell)))
        return
    file = asked.output
    for model, scheme in itertools.product(asked.models, SCHEMES):
        with tempfile.NamedTemporaryFile(suffix=".json") as found:
            command = [sys.executable, __file__, "--cell", model, scheme, "--output", found.name]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            row = json.loads(Path(found.name).read_text())
        record = json.loads(file.read_text()) if file.exists() else {"rows": []}
        kept = [each for each in record["rows"] if (each["model"], each["scheme"]) != (model, scheme)]
        rows = sorted([*kept, row], key=lambda each: list(MODELS).index(each["model"]))
        record |= {"machine": describe_machine(), "rows": rows}
        file.write_text(json.dumps(record, indent=1) + "\n")
        print(model, scheme, 60 * row["estimate"]["minutes"], row["seconds"], flush=True)
    record = json.loads(file.read_text())
    file.with_suffix(".md").write_text(page(record))


if __name__ == "__main__":
    main()
