"""A FLUX of random W4A8 weights as a bundle: building it, loading it under a placement and drawing a picture."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from placement import counted
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import cemq
from cemq.bench.architectures import ARCHITECTURES, Architecture
from cemq.bench.random_models import empty_model, quantization_config, random_model
from cemq.builtin.training.models import tokenizer
from cemq.bundle.manifest import MANIFEST, read_bundle, seal
from cemq.memory.offload import place
from cemq.memory.placement import Estimate
from cemq.pipelines.batches import Batch, run
from cemq.runtime import schedule_hook
from gpu_parts import Setting

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

    @property
    def call(self) -> dict[str, int]:
        return {"height": self.pixels, "width": self.pixels, "max_sequence_length": self.text_tokens}


TINY = Sizes(
    transformer={
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 4,
        "joint_attention_dim": 64, "pooled_projection_dim": 64, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
    },
    clip={"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1},
    t5={"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4},
    channels=(4,), latent_channels=4, pixels=16, text_tokens=16,
)  # fmt: skip
DEV = Sizes(  # FLUX.1-dev
    transformer=dict(ARCHITECTURES["flux-dev"].config) | {"axes_dims_rope": (16, 56, 56)},
    clip={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12},
    t5={"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
    channels=(128, 256, 512, 512), latent_channels=16, pixels=1024, text_tokens=512,
)  # fmt: skip


def models(sizes: Sizes) -> dict[str, torch.nn.Module]:
    """All but the transformer, with random weights on the default device."""
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


def bundle(setting: Setting, sizes: Sizes) -> Path:
    """The folder of the bundle of a size, built unless it is there."""
    folder = setting.scratch / ("flux-tiny" if sizes is TINY else "flux")
    if not (folder / MANIFEST).exists():
        shutil.rmtree(folder, ignore_errors=True)
        _build(folder, sizes, setting)
    return folder


def _build(folder: Path, sizes: Sizes, setting: Setting) -> None:
    """A bundle of the tiny pipeline, and then the models of ``sizes`` in it."""
    torch.manual_seed(0)
    source = folder.with_name(folder.name + "-source")
    FluxPipeline(
        transformer=FluxTransformer2DModel(patch_size=1, **TINY.transformer), tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **models(TINY),
    ).save_pretrained(source)  # fmt: skip
    manifest = cemq.quantize_and_schedule(
        str(source), folder, scheme="w4a8", rounding="nearest", steps=STEPS, budget=BUDGET, samples=1, solver="uniform",
        planning_samples=1, effort="quick", dtype="bfloat16", device=str(setting.device), call=TINY.call,
    )  # fmt: skip
    shutil.rmtree(source)
    if sizes is TINY:
        return
    (folder / MANIFEST).unlink()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(setting.device):
        large = models(sizes)
    torch.set_default_dtype(default)
    large["transformer"] = _transformer(sizes, setting)
    for name in list(large):
        shutil.rmtree(folder / name)
        large.pop(name).save_pretrained(folder / name)
    seal(folder, replace(manifest, call=sizes.call))


def _transformer(sizes: Sizes, setting: Setting) -> torch.nn.Module:
    """One block of each kind is quantized, and then copied."""
    shape = Architecture(
        name="flux", model_class="FluxTransformer2DModel", config={"patch_size": 1} | sizes.transformer, batch=1
    )
    config = quantization_config(empty_model(shape), "native", "w4a8")
    model = random_model(shape, dtype=torch.bfloat16, device=setting.device, config=config, shared_blocks=True)
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for index in range(1, len(blocks)):
            blocks[index] = copy.deepcopy(blocks[0])
    return model


# --- one picture


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """What one run took.

    Args:
        seconds: Of each step from its predecessor's end to its own, the device waited for; the first is not known.
        host_seconds: The same without waiting for the device at the end, which was idle at the beginning.
        moved_on_skipped: Bytes of the denoiser's weights that skipped steps brought to the device.
    """

    picture: np.ndarray
    seconds: dict[int, float]
    host_seconds: dict[int, float]
    moved: int
    moved_on_skipped: int
    peak_bytes: int | None


def draw(pipe: Any, folder: Path, setting: Setting) -> Drawn:
    manifest, host_ends, ends = read_bundle(folder), [], []

    def step_ended() -> None:
        host_ends.append(time.perf_counter())
        setting.synchronize()
        ends.append(time.perf_counter())

    if setting.cuda:
        torch.cuda.reset_peak_memory_stats()
    with counted(pipe) as moves:
        picture = _run(pipe, manifest, on_step=step_ended)
    full = set(schedule_hook(pipe).schedule.full_steps)
    return Drawn(
        picture=picture,
        seconds={step: ends[step] - ends[step - 1] for step in range(1, len(ends))},
        host_seconds={step: host_ends[step] - ends[step - 1] for step in range(1, len(ends))},
        moved=sum(moves.moved.values()),
        moved_on_skipped=sum(size for step, size in moves.moved.items() if step is not None and step not in full),
        peak_bytes=torch.cuda.max_memory_allocated() if setting.cuda else None,
    )


def loop_seconds(pipe: Any, folder: Path, setting: Setting) -> float:
    """From the end of the first step to the end of the last, with nothing that waits between them."""
    manifest, ends, count = read_bundle(folder), [], 0

    def step_ended() -> None:
        nonlocal count
        count += 1
        if count in (1, manifest.num_inference_steps):
            setting.synchronize()
            ends.append(time.perf_counter())

    _run(pipe, manifest, on_step=step_ended)
    return ends[1] - ends[0]


def _run(pipe: Any, manifest: Any, on_step: Any) -> np.ndarray:
    batch = Batch(conditions=("a bold seven",), seeds=(3,))
    return run(pipe, batch, steps=manifest.num_inference_steps, call=manifest.call, on_step=on_step)


# --- placements


def load(folder: Path, device: torch.device | str, **options: Any) -> Any:
    pipe = cemq.from_pretrained(folder, device=str(device), verify="never", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def placements(folder: Path, setting: Setting) -> list[Estimate]:
    """What can be had on the device, the first of each placement."""
    found: dict[str, Estimate] = {}
    for estimate in cemq.plan_memory(folder, "1000GiB", device=str(setting.device)).estimates:
        if not estimate.obstacle and estimate.vae == "whole":
            found.setdefault(estimate.placement.name, estimate)
    return list(found.values())


def load_placed(folder: Path, estimate: Estimate, setting: Setting) -> Any:
    """A pipeline under a placement, however little memory it could do with."""
    plan = cemq.plan_memory(folder, "1000GiB", device=str(setting.device))
    pipe = load(folder, "cpu")
    weights = setting.scratch / f"{folder.name}-{estimate.placement.name.replace(' ', '-')}"
    place(pipe, dataclasses.replace(plan, chosen=estimate), device=setting.device, offload_folder=weights)
    return pipe
