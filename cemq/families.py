"""Data about pipeline families; no code per family. Patterns are shell-style, matched against whole module names."""

from __future__ import annotations

# Sensitive and small: what turns latents and conditions into tokens, and tokens back into latents.
FULL_PRECISION = (
    "proj_out*",
    "norm_out*",
    "pos_embed*",
    "patch_embed*",
    "x_embedder*",
    "context_embedder*",
    "caption_projection*",
    "condition_embedder.text_embedder*",
    "txt_in*",
    "img_in*",
    "proj_in*",
)

# Modulation and time embedding see a handful of rows, so 4 bits would cost quality and buy no time: 8 bits in W4A8.
EIGHT_BIT = ("*norm*.linear*", "*adaln*", "*modulation*", "*mod.*", "*time*embed*", "*time_proj*")

# Denoisers in the order they are looked for.
DENOISERS = ("transformer", "unet")
