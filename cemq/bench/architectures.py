"""Denoisers of real size as data: the published config, and what one picture or clip at native resolution feeds them.

Nothing is downloaded: shapes decide what a forward costs, and weights are drawn at random (`random_models`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, Any]
Draw = Callable[..., torch.Tensor]  # a shape to a normal tensor of the benchmark's dtype and device


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A denoiser's class and config, and the size of its inputs.

    Args:
        model_class: Name of the class in diffusers.
        config: Its arguments that differ from the class's defaults, as in the checkpoint's config.json.
        batch: Inputs of one forward: 2 where guidance batches both branches, 1 where it does not.
        sizes: What the config does not say of the inputs: text tokens, latent frames, height and width.
    """

    name: str
    model_class: str
    config: Mapping[str, Any]
    batch: int
    sizes: Mapping[str, int] = field(default_factory=dict)

    def inputs(self, batch: int, *, dtype: torch.dtype, device: torch.device | str) -> Inputs:
        """Keyword arguments of the forward, the same ones each time for the same device."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(dtype)

        return INPUTS[self.model_class](self, batch, draw)


def _square(architecture: Architecture, batch: int, draw: Draw) -> Inputs:
    """What DiT, PixArt and SD3 have in common."""
    config = architecture.config
    sample = draw(batch, config["in_channels"], config["sample_size"], config["sample_size"])
    return {"hidden_states": sample, "timestep": torch.full((batch,), 500, dtype=torch.int64, device=sample.device)}


def _dit(architecture: Architecture, batch: int, draw: Draw) -> Inputs:
    inputs = _square(architecture, batch, draw)
    classes = torch.arange(batch, dtype=torch.int64, device=inputs["timestep"].device)
    return inputs | {"class_labels": classes % architecture.config["num_embeds_ada_norm"]}


def _pixart(architecture: Architecture, batch: int, draw: Draw) -> Inputs:
    config = architecture.config
    return _square(architecture, batch, draw) | {
        "encoder_hidden_states": draw(batch, architecture.sizes["text_tokens"], config["caption_channels"]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sd3(architecture: Architecture, batch: int, draw: Draw) -> Inputs:
    config = architecture.config
    return _square(architecture, batch, draw) | {
        "encoder_hidden_states": draw(batch, architecture.sizes["text_tokens"], config["joint_attention_dim"]),
        "pooled_projections": draw(batch, config["pooled_projection_dim"]),
    }


def _flux(architecture: Architecture, batch: int, draw: Draw) -> Inputs:
    config, sizes = architecture.config, architecture.sizes
    sample = draw(batch, sizes["height"] * sizes["width"], config["in_channels"])
    places = (torch.arange(sizes[side], dtype=torch.int64, device=sample.device) for side in ("height", "width"))
    rows, columns = torch.meshgrid(*places, indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    return {
        "hidden_states": sample,
        "encoder_hidden_states": draw(batch, sizes["text_tokens"], config["joint_attention_dim"]),
        "pooled_projections": draw(batch, config["pooled_projection_dim"]),
        "timestep": torch.full((batch,), 0.5, device=sample.device, dtype=sample.dtype),
        "img_ids": positions.to(sample),
        "txt_ids": torch.zeros(sizes["text_tokens"], 3, device=sample.device, dtype=sample.dtype),
        "guidance": torch.full((batch,), 3.5, dtype=torch.float32, device=sample.device),
    }


def _wan(architecture: Architecture, batch: int, draw: Draw) -> Inputs:
    config, sizes = architecture.config, architecture.sizes
    sample = draw(batch, config["in_channels"], sizes["frames"], sizes["height"], sizes["width"])
    return {
        "hidden_states": sample,
        "timestep": torch.full((batch,), 500, dtype=torch.int64, device=sample.device),
        "encoder_hidden_states": draw(batch, sizes["text_tokens"], config["text_dim"]),
    }


def _qwen_image(architecture: Architecture, batch: int, draw: Draw) -> Inputs:
    config, sizes = architecture.config, architecture.sizes
    sample = draw(batch, sizes["height"] * sizes["width"], config["in_channels"])
    return {
        "hidden_states": sample,
        "encoder_hidden_states": draw(batch, sizes["text_tokens"], config["joint_attention_dim"]),
        "encoder_hidden_states_mask": torch.ones(batch, sizes["text_tokens"], dtype=torch.bool, device=sample.device),
        "timestep": torch.full((batch,), 0.5, device=sample.device, dtype=sample.dtype),
        "img_shapes": [[(1, sizes["height"], sizes["width"])]] * batch,
    }


INPUTS: dict[str, Callable[[Architecture, int, Draw], Inputs]] = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "WanTransformer3DModel": _wan,
    "QwenImageTransformer2DModel": _qwen_image,
}

_DIT = {"in_channels": 4, "out_channels": 8, "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000}

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            name="dit-small",
            model_class="DiTTransformer2DModel",
            config=_DIT | {"num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 6},
            batch=2,
        ),
        Architecture(  # facebook/DiT-XL-2-256
            name="dit-xl-2",
            model_class="DiTTransformer2DModel",
            config=_DIT | {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28},
            batch=2,
        ),
        Architecture(  # PixArt-alpha/PixArt-Sigma-XL-2-1024-MS
            name="pixart-sigma",
            model_class="PixArtTransformer2DModel",
            config={
                "num_attention_heads": 16,
                "attention_head_dim": 72,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 28,
                "sample_size": 128,
                "patch_size": 2,
                "cross_attention_dim": 1152,
                "caption_channels": 4096,
                "interpolation_scale": 2,
                "use_additional_conditions": False,
            },
            batch=2,
            sizes={"text_tokens": 300},
        ),
        Architecture(  # stabilityai/stable-diffusion-3-medium-diffusers: 77 tokens of CLIP and 256 of T5
            name="sd3-medium",
            model_class="SD3Transformer2DModel",
            config={
                "sample_size": 128,
                "patch_size": 2,
                "in_channels": 16,
                "num_layers": 24,
                "attention_head_dim": 64,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "caption_projection_dim": 1536,
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 192,
            },
            batch=2,
            sizes={"text_tokens": 333},
        ),
        Architecture(  # stabilityai/stable-diffusion-3.5-medium: half of its blocks attend to the picture alone besides
            name="sd3.5-medium",
            model_class="SD3Transformer2DModel",
            config={
                "sample_size": 128,
                "patch_size": 2,
                "in_channels": 16,
                "num_layers": 24,
                "attention_head_dim": 64,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "caption_projection_dim": 1536,
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)),
                "qk_norm": "rms_norm",
            },
            batch=2,
            sizes={"text_tokens": 333},
        ),
        Architecture(  # black-forest-labs/FLUX.1-dev at 1024 x 1024; guidance is an input, not a second branch
            name="flux-dev",
            model_class="FluxTransformer2DModel",
            config={
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "guidance_embeds": True,
            },
            batch=1,
            sizes={"height": 64, "width": 64, "text_tokens": 512},
        ),
        Architecture(  # Wan-AI/Wan2.1-T2V-1.3B-Diffusers, 17 frames of 832 x 480; both branches one after the other
            name="wan-1.3b",
            model_class="WanTransformer3DModel",
            config={
                "num_attention_heads": 12,
                "attention_head_dim": 128,
                "in_channels": 16,
                "out_channels": 16,
                "text_dim": 4096,
                "ffn_dim": 8960,
                "num_layers": 30,
            },
            batch=1,
            sizes={"frames": 5, "height": 60, "width": 104, "text_tokens": 512},
        ),
        Architecture(  # Wan-AI/Wan2.1-T2V-14B-Diffusers, the same clip
            name="wan-14b",
            model_class="WanTransformer3DModel",
            config={
                "num_attention_heads": 40,
                "attention_head_dim": 128,
                "in_channels": 16,
                "out_channels": 16,
                "text_dim": 4096,
                "ffn_dim": 13824,
                "num_layers": 40,
            },
            batch=1,
            sizes={"frames": 5, "height": 60, "width": 104, "text_tokens": 512},
        ),
        Architecture(  # Qwen/Qwen-Image at 1024 x 1024; both branches one after the other
            name="qwen-image",
            model_class="QwenImageTransformer2DModel",
            config={
                "in_channels": 64,
                "out_channels": 16,
                "num_layers": 60,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 3584,
            },
            batch=1,
            sizes={"height": 64, "width": 64, "text_tokens": 256},
        ),
    )
}
