"""Data about pipeline families; no code per family. Patterns are shell-style, matched against whole module names."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

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
    "condition_embedder.time_embedder*",  # Wan and its kin cast the timestep to the dtype of its first parameter
)

# What the same parts are called in denoisers that use other names, by class.
FAMILY_FULL_PRECISION = {
    "ChromaTransformer2DModel": ("distilled_guidance_layer.in_proj*", "distilled_guidance_layer.out_proj*"),
    "HiDreamImageTransformer2DModel": ("final_layer*",),
    "HunyuanDiT2DModel": ("time_extra_emb.pooler*",),  # multi-head attention of torch, which reads the weights itself
    "Lumina2Transformer2DModel": ("time_caption_embed.caption_embedder*",),
    "MochiTransformer3DModel": ("time_embed.caption_proj",),
    "QwenImageTransformer2DModel": ("img_in*", "txt_in*"),
    "StableAudioDiTModel": ("cross_attention_proj*", "global_proj*"),
    "WanTransformer3DModel": ("condition_embedder.text_embedder*", "condition_embedder.image_embedder*"),
    "ZImageTransformer2DModel": ("all_x_embedder*", "all_final_layer*", "cap_embedder*"),
}

# Modulation and time embedding see a handful of rows, so 4 bits buy no time; rounded to nearest, they cost quality.
EIGHT_BIT = ("*norm*.linear*", "*adaln*", "*modulation*", "*mod.*", "*time*embed*", "*time_proj*", "proj_out_1")

# Layers that see the tokens of the text alone, where those of the picture have layers of their own.
OF_TEXT = ("*context*", "*.add_[qkv]_proj", "*.to_add_out", "*txt_*")
# Those of cross-attention, which is the second of a block, that do too.
OF_CONDITIONS = ("*.attn2.to_[kv]",)

QUERIES_AND_KEYS = ("*.to_[qk]", "*.to_query", "*.to_key")

# Denoisers in the order they are looked for.
DENOISERS = ("transformer", "transformer_2", "unet")

# What denoisers call the timestep among the arguments of their forward.
TIMESTEP_ARGUMENTS = ("timestep", "timesteps", "t")

# Lists of blocks among a denoiser's own children: what may be cached in place of its output. Token refiners and
# projections are lists too, and run on every step.
BLOCK_LISTS = ("*blocks", "layers")

# Modules of a block whose outputs may be cached each by itself, as its class names them.
ATTENTION = ("attn", "attn[0-9]", "attention", "*_attn", "*_attn[0-9]", "*_attention")
FEED_FORWARD = ("ff", "ffn", "ff_*", "*_ff", "feed_forward", "mlp", "img_mlp", "txt_mlp")
# Blocks with both of these compute the two side by side and join them in the latter (FLUX's single ones): its output is
# cached, and what feeds it alone need not run.
JOINT = ("proj_mlp", "proj_out")
JOINT_INPUTS = ("attn", "proj_mlp", "act_mlp")

# Pipeline arguments that take a picture: a call names its file, so that it can be written down.
PICTURE_ARGUMENTS = ("image", "control_image", "mask_image", "ip_adapter_image", "last_image")

# Pipelines that draw 128 x 128 latents when no size is given, whatever size their autoencoder says it was trained for
# (FLUX.1's says the same: 1024 pixels, 8 to a latent).
SIZED_BY_CLASS = ("FluxPipeline",)

# Frames a second that video models were trained for, by pipeline class, from their pipelines' own examples.
FRAME_RATES = {
    "CogVideoXPipeline": 8,
    "HunyuanVideoPipeline": 15,
    "LTXPipeline": 24,
    "LattePipeline": 8,
    "MochiPipeline": 30,
    "WanPipeline": 16,
}
DEFAULT_FRAME_RATE = 16


def full_precision_patterns(denoiser_class: str) -> tuple[str, ...]:
    """Patterns of the layers that stay in full precision by default, for a denoiser's class name."""
    return FULL_PRECISION + FAMILY_FULL_PRECISION.get(denoiser_class, ())


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module's whole name is like one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def cached_modules(children: Iterable[str]) -> tuple[str, ...]:
    """Which of a block's children, by name, are attention or feed-forward modules whose output may be cached."""
    names = tuple(children)
    if set(JOINT) <= set(names):
        return JOINT[1:]
    return tuple(name for name in names if matches(name, (*ATTENTION, *FEED_FORWARD)))
