"""A FLUX of random W4A8 weights in 8, 12 and 16 GiB: ``python docs/benchmarks/flux_vram.py`` (needs CUDA; not run yet).

Builds a bundle of FLUX.1-dev's shapes (transformer W4A8, T5-XXL, CLIP and VAE in bfloat16; 18 GB of disk, 40 GB of
host memory, nothing is downloaded), then draws one picture of 1024 x 1024 under each limit in a process of its own,
which may allocate no more than that (``torch.cuda.set_per_process_memory_fraction``) and loads with ``vram=``. Prints
and writes flux_vram.json: placement, planned and measured peak, seconds of full-compute and of skipped steps.
``--tiny`` does the same with a tiny model on any device, without the limit where there is no CUDA, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

GIB = 1 << 30
LIMITS = (8, 12, 16)  # GiB
STEPS, BUDGET = 28, 10


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one pipeline: configs that replace those of the tiny one."""

    transformer: dict[str, Any]
    clip: dict[str, Any]
    t5: dict[str, Any]
    channels: tuple[int, ...]
    latent_channels: int
    pixels: int
    text_tokens: int


TINY = Sizes(
    transformer={
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 4,
        "joint_attention_dim": 64, "pooled_projection_dim": 64, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
    },
    clip={"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1},
    t5={"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4},
    channels=(4,), latent_channels=4, pixels=16, text_tokens=16,
)  # fmt: skip


def flux_sizes() -> Sizes:
    from cemq.bench.architectures import ARCHITECTURES

    return Sizes(
        transformer=dict(ARCHITECTURES["flux-dev"].config) | {"axes_dims_rope": (16, 56, 56)},
        clip={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12},
        t5={"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
        channels=(128, 256, 512, 512), latent_channels=16, pixels=1024, text_tokens=512,
    )  # fmt: skip


def models(sizes: Sizes) -> dict[str, torch.nn.Module]:
    """All but the transformer, with random weights on the default device."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    levels = len(sizes.channels)
    clip = {"max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return {
        "text_encoder": CLIPTextModel(CLIPTextConfig(**clip | sizes.clip)).eval(),
        "text_encoder_2": T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes.t5)).eval(),
        "vae": AutoencoderKL(
            latent_channels=sizes.latent_channels, block_out_channels=sizes.channels, layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
            norm_num_groups=min(32, sizes.channels[0]), sample_size=sizes.pixels, use_quant_conv=False,
            use_post_quant_conv=False, shift_factor=0.0, mid_block_add_attention=levels > 1,
        ),
    }  # fmt: skip


def build(folder: Path, sizes: Sizes, device: str) -> None:
    """A bundle of the tiny pipeline, and then the models of ``sizes`` in it."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    import cemq
    from cemq.bench.architectures import Architecture
    from cemq.bench.random_models import empty_model, quantization_config, random_model
    from cemq.builtin.training.models import tokenizer
    from cemq.bundle.manifest import MANIFEST, seal

    torch.manual_seed(0)
    tiny, source = models(TINY), folder.with_name(folder.name + "-tiny")
    FluxPipeline(
        transformer=FluxTransformer2DModel(patch_size=1, **TINY.transformer), tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **tiny,
    ).save_pretrained(source)  # fmt: skip
    manifest = cemq.quantize_and_schedule(
        str(source), folder, scheme="w4a8", rounding="nearest", steps=STEPS, budget=BUDGET, samples=1, solver="uniform",
        planning_samples=1, effort="quick", dtype="bfloat16", device=device,
        call={"height": TINY.pixels, "width": TINY.pixels, "max_sequence_length": TINY.text_tokens},
    )  # fmt: skip
    shutil.rmtree(source)
    call = {"height": sizes.pixels, "width": sizes.pixels, "max_sequence_length": sizes.text_tokens}
    if sizes != TINY:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            large = models(sizes)
        torch.set_default_dtype(default)
    else:
        large = {name: model.bfloat16() for name, model in models(sizes).items()}
    shape = Architecture(
        name="flux", model_class="FluxTransformer2DModel", config={"patch_size": 1} | sizes.transformer, batch=1
    )
    config = quantization_config(empty_model(shape), "native", "w4a8")
    large["transformer"] = random_model(shape, dtype=torch.bfloat16, device=device, config=config)
    for name in list(large):
        shutil.rmtree(folder / name)
        large.pop(name).save_pretrained(folder / name)
    (folder / MANIFEST).unlink()
    seal(folder, replace(manifest, call=call))


def measure(folder: Path, limit: int, device: str, offload: Path) -> dict[str, Any]:
    """One picture within ``limit`` bytes: seconds of each kind of step after the first, and memory."""
    import cemq
    from cemq.bundle.manifest import read_bundle
    from cemq.pipelines.batches import Batch, run
    from cemq.runtime import schedule_hook

    cuda = device.startswith("cuda")
    if cuda:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    manifest, ends = read_bundle(folder), []
    pipe = cemq.from_pretrained(folder, device=device, vram=limit, offload_folder=offload, verify=False)
    pipe.set_progress_bar_config(disable=True)

    def step_ended() -> None:
        if cuda:
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())

    run(
        pipe, Batch(conditions=("a bold seven",), seeds=(3,)), steps=manifest.num_inference_steps, call=manifest.call,
        on_step=step_ended,
    )  # fmt: skip
    full, plan, hook = set(manifest.schedule.full_steps), pipe.cemq_memory_plan, schedule_hook(pipe)
    seconds = {step: ends[step] - ends[step - 1] for step in range(1, len(ends))}
    return {
        "limit": limit,
        "placement": plan.chosen.name,
        "planned": plan.chosen.device_bytes,
        "peak_allocated": torch.cuda.max_memory_allocated(device) if cuda else None,
        "peak_reserved": torch.cuda.max_memory_reserved(device) if cuda else None,
        "full_step_seconds": statistics.median(taken for step, taken in seconds.items() if step in full),
        "skipped_step_seconds": statistics.median(taken for step, taken in seconds.items() if step not in full),
        "full_evaluations": hook.full_evaluations,
        "skipped_evaluations": hook.skipped_evaluations,
    }


def limits_of(folder: Path, device: str, tiny: bool) -> list[int]:
    """Those that are asked for; of a tiny model, just what its first and its least placement need."""
    import cemq

    if not tiny:
        return [size * GIB for size in LIMITS]
    plan = cemq.plan_memory(folder, "1000GiB", device=device)
    needs = [e.device_bytes + plan.reserve_bytes for e in plan.estimates if not e.obstacle]
    return [needs[0], min(needs)]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "LIMIT", "OFFLOAD"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("flux_vram.py: no CUDA device here, and a FLUX is measured on one; --tiny tries the steps")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.measure:
        folder, limit, offload = options.measure
        print(json.dumps(measure(Path(folder), int(limit), device, Path(offload))))
        return
    import diffusers
    import transformers

    from cemq.bench.machine import describe_machine

    diffusers.logging.set_verbosity_error()  # the tiny text encoders say of every prompt that it is too long
    transformers.logging.set_verbosity_error()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "bundle")
        build(folder, TINY if options.tiny else flux_sizes(), device)
        for limit in limits_of(folder, device, options.tiny):
            command = [sys.executable, __file__, *arguments, "--measure", folder, limit, Path(scratch, "offload")]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
            # a placement that does not fit after all (torch.cuda.OutOfMemoryError) is a result, too
            row = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"limit": limit}
            rows.append(row if done.returncode == 0 else row | {"failed": done.stderr.strip().splitlines()[-1]})
            print(rows[-1], flush=True)
    if not options.tiny:
        content = {"machine": describe_machine(), "rows": rows}
        Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
