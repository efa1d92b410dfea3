"""Builds under ``--vram`` on a CPU: ``python docs/benchmarks/building.py`` (Linux, root for the control group).

Pipelines of FLUX's kind with random bfloat16 weights: a small one, and with ``--flux`` one of FLUX.1-dev's shapes, its
12 B transformer and T5-XXL, 33 GB on disk. Each is built to a bundle (effort instant: one reference, one forced run)
and draws a picture, in processes of their own; the kernel grants each of them, from the moment it begins, no more than
what it was told to stay within, in a memory control group. The small one is then built without ``--vram`` in the same
group, to see it killed. Writes building.md and building.json beside itself, row by row. A few minutes; with ``--flux``
about an hour and 55 GB of disk, on 2 CPU cores. (tests/test_within.py runs ``make`` and ``build``.)

    python docs/benchmarks/building.py [--flux] [--folder SCRATCH] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from placement import drop, memory_group

HERE = Path(__file__).parent
GIB = 1 << 30
STEPS, SIZE = 4, 256
FLUX = {  # FLUX.1-dev
    "transformer": {
        "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
        "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "in_channels": 64,
        "axes_dims_rope": [16, 56, 56],
    },
    "text_encoder": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "text_encoder_2": {
        "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
    # not FLUX's: its convolutions take half an hour a picture in bfloat16 on a CPU that has no units for that
    "vae": {"block_out_channels": [32, 64, 64, 64], "layers_per_block": 1, "norm_num_groups": 8},
}  # fmt: skip
SMALL = {
    "transformer": FLUX["transformer"] | {
        "num_layers": 3, "num_single_layers": 6, "attention_head_dim": 64, "num_attention_heads": 16,
        "joint_attention_dim": 1024, "axes_dims_rope": [16, 24, 24],
    },
    "text_encoder": FLUX["text_encoder"] | {"num_hidden_layers": 2},
    "text_encoder_2": FLUX["text_encoder_2"] | {
        "d_model": 1024, "d_ff": 2816, "num_heads": 16, "num_layers": 8, "vocab_size": 1024,
    },
    "vae": FLUX["vae"],
}  # fmt: skip
PIPELINES = {"small": SMALL, "flux": FLUX}
SHARD_BYTES = 2 * GIB


# --- stages, each in a process of its own


def make(folder: Path, name: str) -> dict[str, Any]:
    """A pipeline of random weights, of which no more than a file's is in memory."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from cemq.pipelines.opening import locate

    sizes, digits = PIPELINES[name], locate("builtin:sd3-digits").folder
    vae = {
        "in_channels": 3, "out_channels": 3, "latent_channels": 16, "use_quant_conv": False,
        "use_post_quant_conv": False,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "shift_factor": 0.0,
    }  # fmt: skip
    tokens = json.loads((digits / "text_encoder" / "config.json").read_text())
    text = {key: tokens[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.device("meta"):
        parts = {
            "transformer": FluxTransformer2DModel(**sizes["transformer"]),
            "vae": AutoencoderKL(**vae | sizes["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text | sizes["text_encoder"])),
            "text_encoder_2": T5EncoderModel(T5Config(**sizes["text_encoder_2"])),
        }
    for part, model in parts.items():
        fill(folder / part, model)
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(digits / "tokenizer", folder / part)
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    kinds = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    tokenizer = json.loads((digits / "model_index.json").read_text())["tokenizer"]
    kinds |= {"tokenizer": tokenizer, "tokenizer_2": tokenizer}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"} | kinds, indent=2))
    return {"bytes": size(folder)}


def fill(folder: Path, model: Any) -> None:
    """The files of a model that lies on the meta device, with weights drawn here."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model.config.save_pretrained(folder) if hasattr(model, "all_tied_weights_keys") else model.save_config(folder)
    stem = "model" if hasattr(model, "all_tied_weights_keys") else "diffusion_pytorch_model"
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    generator, shards, gathered = torch.Generator().manual_seed(0), [], {}

    def flush() -> None:
        path = folder / f"{stem}-{len(shards) + 1:05}.safetensors"
        save_file(gathered, path, metadata={"format": "pt"})
        shards.append((path, list(gathered)))
        gathered.clear()

    for key, tensor in model.state_dict().items():
        if key in tied or "position_ids" in key:
            continue
        values = torch.empty(tensor.shape, dtype=torch.bfloat16)
        if tensor.dim() < 2:  # of norms, and biases
            values.fill_(float("norm" in key and key.endswith("weight")))
        else:
            values.normal_(0.0, 0.7 * tensor[0].numel() ** -0.5, generator=generator)
        if gathered and sum(each.nbytes for each in gathered.values()) + values.nbytes > SHARD_BYTES:
            flush()
        gathered[key] = values
    flush()
    where = {}
    for number, (path, keys) in enumerate(shards, start=1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        where |= dict.fromkeys(keys, path.rename(folder / name).name)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))


def build(folder: Path, bundle: Path, vram: int, group: Path | None) -> dict[str, Any]:
    """Build it; 0 for no limit."""
    import cemq

    with granted(folder, group):
        started = time.perf_counter()
        manifest = cemq.quantize_and_schedule(
            str(folder), bundle, scheme="w4a8", effort="instant", rounding="nearest", steps=STEPS, budget=2,
            dtype="bfloat16", device="cpu", vram=vram or None, progress=said(),
            call={"height": SIZE, "width": SIZE, "max_sequence_length": 64},
        )  # fmt: skip
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": size(bundle), "generations": manifest.generations["total"]} | peaks()


def draw(bundle: Path, vram: int, offload: Path, group: Path | None) -> dict[str, Any]:
    import cemq

    with granted(bundle, group):
        started = time.perf_counter()
        pipe = cemq.from_pretrained(bundle, device="cpu", vram=vram or None, offload_folder=offload, verify="never")
        loaded = time.perf_counter() - started
        (image,) = pipe("a seven", height=SIZE, width=SIZE, num_inference_steps=STEPS, max_sequence_length=64).images
        seconds = time.perf_counter() - started - loaded
    assert image.size == (SIZE, SIZE)
    plan = getattr(pipe, "cemq_memory_plan", None)
    return {"load_seconds": loaded, "seconds": seconds, "placement": plan.chosen.name if plan else ""} | peaks()


class granted:
    """From here on only what the control group grants; what is read of the files counts, wherever it was before."""

    def __init__(self, folder: Path, group: Path | None):
        self.folder, self.group = folder, group

    def __enter__(self) -> None:
        warm_up()
        for file in filter(Path.is_file, self.folder.rglob("*")):
            drop(file)
        if self.group:
            (self.group / "cgroup.procs").write_text(str(os.getpid()))

    def __exit__(self, *_: object) -> None:
        pass


def warm_up() -> None:
    """What is imported and compiled lazily: memory of before the group is not the group's."""
    import diffusers
    import transformers

    import cemq.build
    from cemq.bundle import load
    from cemq.quantize.kernels import cpu

    for loaded in (diffusers.FluxPipeline, transformers.T5EncoderModel, cemq.build, load):
        assert loaded
    cpu.kernels()


def said() -> Any:
    """Progress for whoever waits for an hour."""
    last = [0.0]

    def report(stage: str, share: float) -> None:
        if time.monotonic() - last[0] > 30:
            last[0] = time.monotonic()
            print(f"{time.strftime('%H:%M:%S')} {stage} {share:.0%}", file=sys.stderr, flush=True)

    return report


def peaks() -> dict[str, int]:
    """Bytes: the most that this process had in memory, and what of it belongs to no file, now."""
    status = Path("/proc/self/status").read_text()
    found = {name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) << 10 for name in ("VmHWM", "RssAnon")}
    return {"peak_bytes": found["VmHWM"], "anonymous_bytes": found["RssAnon"]}


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


# --- all of it


def call(stage: str, *arguments: object, quiet: bool = True) -> dict[str, Any] | None:
    """What a stage prints last; None where the kernel killed it."""
    command = [sys.executable, __file__, stage, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE if quiet else None, text=True)
    if done.returncode == -signal.SIGKILL:
        return None
    if done.returncode:
        raise SystemExit(f"{stage} {arguments}: {done.stderr or ''}")
    return json.loads(done.stdout.splitlines()[-1])


def rows(name: str, scratch: Path, vram: int) -> Iterator[dict[str, Any]]:
    folder, bundle = scratch / name, scratch / f"{name}-bundle"
    made = call("make", folder, name)
    named = {"pipeline": name, "vram": vram, "original_bytes": made["bytes"]}

    def inside(stage: str, *arguments: object, **options: bool) -> dict[str, Any]:
        with memory_group(vram) as group:
            found = call(stage, *arguments, group or "", **options)
            return {"enforced": group is not None, "ended": "killed" if found is None else "finished"} | (found or {})

    yield named | {"stage": "build"} | inside("build", folder, bundle, vram, quiet=False)
    if name == "small":
        yield named | {"stage": "build, no --vram"} | inside("build", folder, scratch / "whole", 0)
    shutil.rmtree(folder)  # there may be no room for what weights rest in beside it
    yield named | {"stage": "draw"} | inside("draw", bundle, vram, scratch / "offload", quiet=False)
    shutil.rmtree(bundle)


def main() -> None:
    stages = {"make": make, "build": build, "draw": draw}
    if len(sys.argv) > 1 and sys.argv[1] in stages:
        stage, *arguments = sys.argv[1:]
        read = [Path(each) if "/" in each else int(each) if each.isdecimal() else each or None for each in arguments]
        print(json.dumps(stages[stage](*read)))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--flux", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="write nothing")
    asked = parser.parse_args()
    from cemq.bench.machine import describe_machine

    path = HERE / "building.json"
    names = ["flux"] if asked.flux else ["small"]
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    content = {"machine": describe_machine(), "rows": [row for row in kept if row["pipeline"] not in names]}
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        for name in names:
            for row in rows(name, Path(scratch), {"small": 400 << 20, "flux": 12 * GIB}[name]):
                content["rows"].append(row)
                print(row, flush=True)
                if not asked.quick:
                    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
                    (HERE / "building.md").write_text(page(content), encoding="utf-8")


def page(content: dict[str, Any]) -> str:
    from cemq.bench.machine import one_line

    machine = content["machine"]
    columns = (("load_seconds", 1, 0), ("seconds", 1, 0), ("peak_bytes", GIB, 2), ("bytes", GIB, 2))
    lines = []
    for row in content["rows"]:
        ended = row["ended"] if row["enforced"] else "no control group"
        figures = [f"{row[key] / unit:.{digits}f}" if row.get(key) else "" for key, unit, digits in columns]
        sizes = f"{row['original_bytes'] / GIB:.2f} | {row['vram'] / GIB:.2f}"
        cells = [row["pipeline"], sizes, row["stage"], ended, *figures, row.get("placement", "")]
        lines.append(f"| {' | '.join(cells)} |")
    return f"""# Builds within a limit

{machine["date"][:10]}, {one_line(machine)}; seconds are of a shared machine.

Pipelines of FLUX's kind with random bfloat16 weights, W4A8 to nearest, effort `instant`, {STEPS} steps at {SIZE} x
{SIZE}; `flux` has FLUX.1-dev's transformer and text encoders. Each stage is a process of its own, in a memory
control group of exactly the bytes given as `--vram`, which it joins when its libraries are loaded; files count when
they are read. The peak is of the process, and its libraries are in it. GiB.

| pipeline | weights | limit | stage | ended | loading, s | then, s | peak | written | placement |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}

`python docs/benchmarks/building.py [--flux]`
"""


if __name__ == "__main__":
    main()
