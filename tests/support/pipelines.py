"""The tiny pipelines that most tests run, with random weights and built without any file; and how they run them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from cemq.builtin.training import models as built
from cemq.pipelines.batches import Batch, run

STEPS = 6
BATCH, CALL = Batch(conditions=(1, 2), seeds=(5, 6)), {"guidance_scale": 2.0}  # of `make_dit`
ONE = Batch(conditions=("a bold seven",), seeds=(3,))  # of `make_flux`
FLUX_CALL = {
    "height": 16, "width": 16, "max_sequence_length": 16, "negative_prompt": "thin", "true_cfg_scale": 2.0,
}  # fmt: skip


def make_denoiser(heads: int = 2) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip


@torch.no_grad()
def predict(model: nn.Module, seed: int = 1) -> torch.Tensor:
    """Three images of sixteen tokens, so that the blocks run in integers and the embeddings weight-only."""
    torch.manual_seed(seed)
    sample = torch.randn(3, 4, 8, 8).to(model.pos_embed.proj.weight.dtype)
    return model(sample, timestep=torch.tensor([5, 50, 500]), class_labels=torch.tensor([1, 2, 3])).sample


def tiny_vae(latent_channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=latent_channels,
        block_out_channels=(4,),
        norm_num_groups=2,
        sample_size=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        mid_block_add_attention=False,
    ).eval()


def make_dit(scheduler=None, head_dim=16, layers=2) -> DiTPipeline:
    """Class-conditional, guidance batched, learned sigma (the second half of the channels is thrown away)."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=head_dim, in_channels=4, out_channels=8, num_layers=layers,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipe = DiTPipeline(transformer=transformer.eval(), vae=tiny_vae(4), scheduler=scheduler or DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_dit(root: Path, labels: int, head_dim: int = 16, layers: int = 2) -> Path:
    """`make_dit` as ``pipeline`` in a folder, and beside it ``labels.txt`` to calibrate with; returns the folder."""
    make_dit(head_dim=head_dim, layers=layers).save_pretrained(root / "pipeline")
    (root / "labels.txt").write_text("".join(f"{label}\n" for label in range(labels)))
    return root


def run_dit(pipe: DiTPipeline, steps: int = STEPS, **options) -> np.ndarray:
    return run(pipe, BATCH, steps=steps, call=CALL, **options)


def make_flux() -> FluxPipeline:
    """Text to image; with true guidance it calls the denoiser twice a step, in the contexts cond and uncond."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=False,
    )  # fmt: skip
    tokenizer = built.tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    pipe = FluxPipeline(
        transformer=transformer.eval(), vae=tiny_vae(1), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=CLIPTextModel(clip).eval(), tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(), tokenizer_2=built.tokenizer(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_flux(pipe: FluxPipeline, **options) -> np.ndarray:
    return run(pipe, ONE, steps=STEPS, call=FLUX_CALL, **options)
