"""Memory of quantizing and of loading a large model: ``python docs/benchmarks/memory.py`` (Linux).

Builds a DiT pipeline of about 700 MB in bfloat16 with random weights, then quantizes and loads it in processes of their
own and reads their peak resident memory from /proc. Writes memory.md and memory.json beside itself. About 5 minutes on
2 CPU cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

SCHEMES = ("w8a8", "w4a8")
MB = 1e6


def build(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=14, sample_size=16,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4)
    DiTPipeline(transformer.bfloat16(), vae.bfloat16(), DDIMScheduler()).save_pretrained(folder)


def quantize_while_loading(source: Path, target: Path, scheme: str) -> None:
    """diffusers' own loading, with a quantization config."""
    import torch
    from diffusers import DiTTransformer2DModel

    from cemq import CemqConfig

    config = CemqConfig(scheme, eight_bit=())
    model = DiTTransformer2DModel.from_pretrained(
        source / "transformer", quantization_config=config, torch_dtype=torch.bfloat16
    )
    model.save_pretrained(target)


def quantize_and_schedule(source: Path, target: Path, scheme: str) -> None:
    """The whole build: the full-precision model runs first, GPTQ is fitted to what it was fed."""
    import cemq

    settings = {"steps": 4, "budget": 2, "samples": 1, "planning_samples": 1, "solver": "uniform", "dtype": "bfloat16"}
    cemq.quantize_and_schedule(str(source), target, scheme=scheme, overwrite=True, **settings)


def load(source: Path, target: Path, scheme: str) -> None:
    import cemq

    kept.append(cemq.from_pretrained(target))


def load_and_run(source: Path, target: Path, scheme: str) -> None:
    import cemq

    pipe = cemq.from_pretrained(target)
    pipe.set_progress_bar_config(disable=True)
    pipe(class_labels=[1], num_inference_steps=4)


kept: list[object] = []
STAGES: dict[str, Callable[[Path, Path, str], None]] = {
    stage.__name__: stage for stage in (quantize_while_loading, quantize_and_schedule, load, load_and_run)
}


def resident() -> dict[str, int]:
    """Bytes in memory now and at most: all, and those that no file stands behind."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssAnon")}


def child(stage: str, source: Path, target: Path, scheme: str) -> None:
    """Run one stage and print how far memory rose above what the imports alone take."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    import cemq.build  # noqa: F401
    from cemq.quantize.kernels import cpu

    assert all((AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel))  # diffusers imports lazily
    cpu.kernels()
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    before, anonymous, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal anonymous
        while not done.is_set():
            anonymous = max(anonymous, resident()["RssAnon"])
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    STAGES[stage](source, target, scheme)
    done.set()
    watcher.join()
    peak = resident()["VmHWM"] - before["VmRSS"]
    print(json.dumps({"peak": peak, "peak_anonymous": anonymous - before["RssAnon"]}))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    from cemq.bench.machine import describe_machine, one_line

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "model"
        subprocess.run([sys.executable, __file__, "build", source], check=True)
        for scheme in SCHEMES:
            for stage in STAGES:
                target = Path(scratch) / f"{scheme}-{'model' if stage == 'quantize_while_loading' else 'bundle'}"
                command = [sys.executable, __file__, stage, source, target, scheme]
                found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1])
                row = {"scheme": scheme, "stage": stage, "source": size(source), "target": size(target)} | found
                rows.append(row)
                print(row, flush=True)
    machine = describe_machine()
    here = Path(__file__).with_suffix("")
    here.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    lines = [
        f"| {row['scheme']} | {row['stage']} | {row['target'] / MB:.0f} | {row['peak'] / MB:.0f} | "
        f"{row['peak'] / row['target']:.2f} | {row['peak_anonymous'] / MB:.0f} |"
        for row in rows
    ]
    table = "\n".join(lines)
    here.with_suffix(".md").write_text(
        f"""# Memory of quantizing and loading

{machine["date"][:10]}, {one_line(machine)}.
Command: `python docs/benchmarks/memory.py`. A DiT pipeline of {rows[0]["source"] / MB:.0f} MB (bfloat16, random
weights); every stage in a process of its own; peak resident memory above that of the imports, in MB. `anonymous` leaves
out what merely mirrors a file and can be dropped at any time.

| scheme | stage | written or loaded, MB | peak, MB | peak / written or loaded | peak anonymous, MB |
|---|---|---|---|---|---|
{table}

`quantize_while_loading` is `from_pretrained(..., quantization_config=CemqConfig(...))`: weights are rounded to nearest,
layer by layer. `quantize_and_schedule` must run the full-precision model first, to have something to compare with: its
peak is that model and, with GPTQ, the Hessians held at once (2 GiB at most).
"""
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["build"]:
        build(Path(sys.argv[2]))
    elif sys.argv[1:]:
        child(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        main()
