"""Data about pipeline families; no code per family. Patterns are shell-style, matched against whole module names."""

from __future__ import annotations

# Sensitive and small: what turns latents and conditions into tokens, and tokens back into latents.
FULL_PRECISION = (
    "proj_out",
    "proj_out_2",
    "norm_out*",
    "pos_embed*",
    "patch_embed*",
    "x_embedder*",
    "context_embedder*",
    "caption_projection*",
    "proj_in*",
)

# What the same parts are called in denoisers that use other names, by class.
FAMILY_FULL_PRECISION = {
    "ChromaTransformer2DModel": ("distilled_guidance_layer.in_proj*", "distilled_guidance_layer.out_proj*"),
    "Lumina2Transformer2DModel": ("time_caption_embed.caption_embedder*",),
    "QwenImageTransformer2DModel": ("img_in*", "txt_in*"),
    "WanTransformer3DModel": ("condition_embedder.text_embedder*", "condition_embedder.image_embedder*"),
    "ZImageTransformer2DModel": ("all_x_embedder*", "all_final_layer*", "cap_embedder*"),
}

# Modulation and time embedding see a handful of rows, so 4 bits would cost quality and buy no time: 8 bits in W4A8.
EIGHT_BIT = ("*norm*.linear*", "*adaln*", "*modulation*", "*mod.*", "*time*embed*", "*time_proj*", "proj_out_1")

# Denoisers in the order they are looked for.
DENOISERS = ("transformer", "unet")


def full_precision_patterns(denoiser_class: str) -> tuple[str, ...]:
    """Patterns of the layers that stay in full precision by default, for a denoiser's class name."""
    return FULL_PRECISION + FAMILY_FULL_PRECISION.get(denoiser_class, ())
