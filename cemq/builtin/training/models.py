"""Untrained parts that several built-in pipelines have: real diffusers and transformers classes, small."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5TokenizerFast

from cemq.builtin.training.digits import STROKES, TILTS, WORDS

PROMPT_TOKENS = 16
TEXT_WIDTH = 64
SMALL_T5 = {
    "d_model": TEXT_WIDTH,
    "d_kv": 16,
    "d_ff": 2 * TEXT_WIDTH,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
OF_DIGITS = ("a", "tilted", *WORDS, *STROKES, *TILTS)


def vae(size: int = 32, blocks: tuple[int, ...] = (16, 32), channels: int = 4) -> AutoencoderKL:
    """RGB to latents; each block beyond the first halves height and width."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=size,
        shift_factor=0.0,  # StableDiffusion3Pipeline and FluxPipeline add it
        mid_block_add_attention=False,
    )


def parts_of(words: Iterable[str]) -> list[str]:
    """Words without their hyphens, which CLIP's tokenizer splits at."""
    return sorted({part for word in words for part in word.split("-")})


def merged(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte pair encoding: of all neighbours, those of the lowest rank are joined first."""
    while known := [pair for pair in itertools.pairwise(symbols) if pair in ranks]:
        left, right = min(known, key=ranks.__getitem__)
        place = list(itertools.pairwise(symbols)).index((left, right))
        symbols = [*symbols[:place], left + right, *symbols[place + 2 :]]
    return symbols


def tokenizer(words: Iterable[str] = OF_DIGITS) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges turn every word of the captions into one token; built from tables, so that it is
    the same in every process (training a tokenizer is not)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    ranks: dict[tuple[str, str], int] = {}
    for word in parts_of(words):
        left, *others = merged([*word[:-1], word[-1] + "</w>"], ranks)
        for right in others:  # what earlier merges make of the word is joined by later ones, which leave theirs alone
            ranks.setdefault((left, right), len(ranks))
            left += right
    tokens = [left + right for left, right in ranks]
    vocabulary: dict[str, int] = {}
    for token in [*_SPECIAL, *letters, *(letter + "</w>" for letter in letters), *tokens]:
        vocabulary.setdefault(token, len(vocabulary))
    built = CLIPTokenizer(vocab=vocabulary, merges=list(ranks))
    built.model_max_length = PROMPT_TOKENS
    return built


def t5_tokenizer(words: Iterable[str]) -> T5TokenizerFast:
    """A T5 tokenizer to which every word is one token, with or without a capital; other words are spelled."""
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -3.0)]
    known = dict.fromkeys(spelling for word in words for spelling in (word, word.capitalize()))
    scores += [("▁" + word, -1.0) for word in known]
    scores += [(chr(code), -5.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=scores, extra_ids=0, model_max_length=PROMPT_TOKENS)


def clip_config(vocabulary_size: int) -> CLIPTextConfig:
    # eos_token_id 2 would select transformers' legacy pooling; 1 is this tokenizer's end of text
    return CLIPTextConfig(
        vocab_size=vocabulary_size,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=TEXT_WIDTH,
        max_position_embeddings=PROMPT_TOKENS,
    )


def text_encoder(vocabulary_size: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(clip_config(vocabulary_size))


def pooling_text_encoder(vocabulary_size: int) -> CLIPTextModel:
    return CLIPTextModel(clip_config(vocabulary_size))
