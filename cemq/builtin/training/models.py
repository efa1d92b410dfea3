"""The untrained parts of the two built-in pipelines: real diffusers and transformers classes, small."""

from __future__ import annotations

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from cemq.builtin.training.digits import STROKES, TILTS, WORDS

PROMPT_TOKENS = 16
_TEXT_WIDTH = 64
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def vae() -> AutoencoderKL:
    """32 x 32 RGB to 16 x 16 latents of 4 channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        shift_factor=0.0,  # StableDiffusion3Pipeline adds it
        mid_block_add_attention=False,
    )


def dit() -> DiTTransformer2DModel:
    """2.8 M parameters. 1000 classes because DiTPipeline's null class is hard-coded as 1000."""
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=16,
        patch_size=2,
    )


def dit_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )


def sd3() -> SD3Transformer2DModel:
    """3.0 M parameters."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * _TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * _TEXT_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def sd3_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=2.0)


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges turn every word of the captions into one token; built from tables, so that it is
    the same in every process (training a tokenizer is not)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges, tokens = [], []
    for word in sorted({"a", "tilted", *WORDS, *STROKES, *TILTS}):
        symbols = [*word[:-1], word[-1] + "</w>"]
        left = symbols[0]
        for right in symbols[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            if left not in tokens:
                tokens.append(left)
    vocabulary = {}
    for token in [*_SPECIAL, *letters, *(letter + "</w>" for letter in letters), *tokens]:
        vocabulary.setdefault(token, len(vocabulary))
    built = CLIPTokenizer(vocab=vocabulary, merges=merges)
    built.model_max_length = PROMPT_TOKENS
    return built


def text_encoder(vocabulary_size: int) -> CLIPTextModelWithProjection:
    # eos_token_id 2 would select transformers' legacy pooling; 1 is this tokenizer's end of text
    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_size=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=_TEXT_WIDTH,
        max_position_embeddings=PROMPT_TOKENS,
    )
    return CLIPTextModelWithProjection(config)
