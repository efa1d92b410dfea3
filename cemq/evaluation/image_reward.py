"""ImageReward (Xu et al. 2023) on transformers' own BLIP, where the weights of its release are on this machine.

The release's package pins a timm of 2023, which little of today goes with: what is taken of it is the names of its
weights and what it does with a picture and a prompt (image-reward 1.5: ImageReward.py, models/BLIP).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cemq.errors import InputError, first_line
from cemq.evaluation.perceptual import read_weights
from cemq.files import absolute
from cemq.pipelines.outputs import as_bytes

FILE = "ImageReward.pt"
FOLDER = "~/.cache/ImageReward"  # where the release's package downloads it to
REPOSITORIES = ("THUDM/ImageReward", "zai-org/ImageReward")  # the Hub knows it by both
VOCABULARIES = ("bert-base-uncased", "google-bert/bert-base-uncased")  # likewise
_MEAN, _DEVIATION = 0.16717362830052426, 1.0333394966054072  # of rewards before they are told
_SHIFT, _SCALE = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of BLIP, for 0 to 1
_TOKENS = 35  # of a prompt, whatever its length
_HEAD = 64  # channels of an attention head, in ViT-L and in BERT
_AT_ONCE = 8  # pictures; a video has many
_RENAMED = (  # in the picture's encoder; the text's has the same names in both
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"^norm\.", "post_layernorm."),
)

Weights = Mapping[str, torch.Tensor]


def weights_file() -> Path | None:
    """Where its weights are; None where they are not."""
    path = absolute(FOLDER) / FILE
    return path if path.is_file() else _cached(REPOSITORIES, FILE)


def vocabulary_file() -> Path | None:
    """Where BERT's vocabulary is; None where it is not."""
    return _cached(VOCABULARIES, "vocab.txt")


def _cached(repositories: Sequence[str], name: str) -> Path | None:
    """A file of the first of these repositories whose copy in the Hub's cache has it."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, name) for repository in repositories)
    return next((Path(each) for each in found if isinstance(each, str)), None)


def has_image_reward() -> bool:
    return weights_file() is not None and vocabulary_file() is not None


class _ImageReward(nn.Module):
    """BLIP's encoder of a text that looks at a picture, and what its first token is worth; sizes are the weights'."""

    def __init__(self, weights: Weights) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        pictures = {_renamed(name): each for name, each in _within(weights, "blip.visual_encoder.").items()}
        texts = _within(weights, "blip.text_encoder.")
        texts.pop("embeddings.position_ids", None)  # numbers in their order
        layers = _within(weights, "mlp.layers.")
        width, _, self.patch, _ = pictures["embeddings.patch_embedding.weight"].shape
        self.side = self.patch * math.isqrt(pictures["embeddings.position_embedding"].shape[1] - 1)
        with torch.device("meta"):  # what is drawn at random is all replaced
            self.picture = BlipVisionModel(_vision_config(pictures, self.side, self.patch))
            self.text = BlipTextModel(_text_config(texts, width), add_pooling_layer=False)
        self.picture.load_state_dict(pictures, assign=True)
        self.text.load_state_dict(texts, assign=True)
        self.worth = [  # between them dropout, which is off, and no activation
            (layers[f"{place}.weight"], layers[f"{place}.bias"])
            for place in sorted({int(name.partition(".")[0]) for name in layers})
        ]

    def forward(self, pictures: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Of pictures (n, 3, side, side) and as many prompts (n, tokens); gives (n,)."""
        seen = self.picture(pictures).last_hidden_state
        places = torch.arange(tokens.shape[1], dtype=torch.int64, device="cpu")[None]
        read = self.text(tokens, attention_mask=mask, position_ids=places, encoder_hidden_states=seen)
        values = read.last_hidden_state[:, 0]
        for weight, bias in self.worth:
            values = nn.functional.linear(values, weight, bias)
        return (values[:, 0] - _MEAN) / _DEVIATION


def _within(weights: Weights, prefix: str) -> dict[str, torch.Tensor]:
    found = {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}
    return {name: each.float() if each.is_floating_point() else each for name, each in found.items()}


def _renamed(name: str) -> str:
    for before, after in _RENAMED:
        name = re.sub(before, after, name)
    return name


def _vision_config(weights: Weights, side: int, patch: int) -> Any:
    from transformers import BlipVisionConfig

    inner, width = weights["encoder.layers.0.mlp.fc1.weight"].shape
    return BlipVisionConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=_count(weights, "encoder.layers."),
        num_attention_heads=width // _HEAD, image_size=side, patch_size=patch, hidden_act="gelu", layer_norm_eps=1e-6,
    )  # fmt: skip


def _text_config(weights: Weights, picture_width: int) -> Any:
    from transformers import BlipTextConfig

    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary, hidden_size=width, encoder_hidden_size=picture_width,
        intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_count(weights, "encoder.layer."), num_attention_heads=width // _HEAD,
        max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
        hidden_act="gelu", layer_norm_eps=1e-12, bos_token_id=None, eos_token_id=None, sep_token_id=None,
        is_decoder=True,  # or no layer looks at the picture
    )  # fmt: skip


def _count(weights: Weights, prefix: str) -> int:
    """How many layers there are of that prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})


@functools.lru_cache(maxsize=1)
def _model_of(file: Path) -> _ImageReward:
    weights = read_weights(file, "image_reward")
    try:
        return _ImageReward(weights).eval().requires_grad_(False)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # of whatever else a file holds
        raise InputError(
            f"metric image_reward: '{file}' holds no weights of ImageReward ({first_line(error)}): remove it, or put "
            "it right"
        ) from None


@functools.lru_cache(maxsize=1)
def _tokenizer_of(vocabulary: Path) -> Any:
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab=str(vocabulary))
    # as BLIP has them; neither is put before a prompt: the first token stays BERT's [CLS], as in the release
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer


def image_reward(reference: np.ndarray, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """How people would like a picture as an answer to its prompt: more is better, and may be below 0.

    Shifted and scaled as in the release; computed on the CPU in float32.

    Raises:
        InputError: The weights cannot be read.

    Source: ImageReward, arXiv:2304.05977.
    """
    file, vocabulary = weights_file(), vocabulary_file()
    assert file is not None  # or it would not be asked
    assert vocabulary is not None
    model, tokenizer, found = _model_of(file), _tokenizer_of(vocabulary), []
    for start in range(0, len(images), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        given = tokenizer(
            list(prompts[some]), padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
        )
        pictures = torch.stack([_tensor(image, model.side) for image in as_bytes(images[some])])
        with torch.inference_mode():
            found.append(model(pictures, given.input_ids, given.attention_mask))
    return torch.cat(found).double().numpy()


def _tensor(image: np.ndarray, side: int) -> torch.Tensor:
    """The middle square of a picture (height, width, 3) of bytes, as BLIP takes it: (3, side, side)."""
    from PIL import Image

    height, width = image.shape[:2]
    shorter = min(height, width)
    # the sizes and the corner that torchvision's Resize and CenterCrop round to
    large = [int(side * each / shorter) for each in (width, height)]
    left, top = (round((each - side) / 2) for each in large)
    resized = Image.fromarray(image).resize((large[0], large[1]), Image.Resampling.BICUBIC)
    square = np.asarray(resized.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    scaled = (square - np.array(_SHIFT, dtype=np.float32)) / np.array(_SCALE, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(scaled)).to("cpu", torch.float32).movedim(-1, 0)
