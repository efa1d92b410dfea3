"""Metrics by networks that others trained: used where their weights are on this machine, and never downloaded.

LPIPS reads the AlexNet that torchvision, lpips and torchmetrics keep in torch's hub folder; its heads come with
torchmetrics. CLIP scores are told where the environment names a CLIP model.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import nn

from cemq.errors import InputError, first_line
from cemq.pipelines.outputs import as_bytes

ALEXNET = "alexnet-owt-7be5be79.pth"  # as torchvision calls it
CLIP = "CEMQ_CLIP_MODEL"  # in the environment: a folder, or the name of a model in the cache of the Hub
_SMALLEST = 64  # pixels; AlexNet's strides leave nothing of much less
_CONVOLUTIONS = (  # of AlexNet: its number in torchvision's, channels, kernel, stride, padding, a pooling before it
    (0, (3, 64), 11, 4, 2, False),
    (3, (64, 192), 5, 1, 2, True),
    (6, (192, 384), 3, 1, 1, True),
    (8, (384, 256), 3, 1, 1, False),
    (10, (256, 256), 3, 1, 1, False),
)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of LPIPS, for pictures from -1 to 1


def alexnet_file() -> Path | None:
    """Where its weights are; None where they are not."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    return path if path.is_file() else None


def has_lpips() -> bool:
    return alexnet_file() is not None


def has_clip() -> bool:
    return bool(os.environ.get(CLIP))


class _Lpips(nn.Module):
    """AlexNet's five convolutions, and what each channel's change weighs."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        weights = read_weights(file, "lpips")
        own = Path(str(torchmetrics.__file__)).parent / "functional" / "image" / "lpips_models" / "alex.pth"
        heads = read_weights(own, "lpips")
        self.layers, self.weights = nn.ModuleList(), []
        for number, (place, channels, kernel, stride, padding, pooled) in enumerate(_CONVOLUTIONS):
            layer = nn.Conv2d(*channels, kernel, stride, padding, device="cpu", dtype=torch.float32)
            names = ("weight", "bias")
            layer.load_state_dict({name: weights[f"features.{place}.{name}"] for name in names})
            before = [nn.MaxPool2d(3, 2)] if pooled else []
            self.layers.append(nn.Sequential(*before, layer, nn.ReLU()))
            self.weights.append(heads[f"lin{number}.model.1.weight"].float())

    def forward(self, reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Of pictures (n, 3, height, width) from -1 to 1; gives (n,)."""
        shift, scale = (
            torch.tensor(each, dtype=torch.float32, device="cpu")[:, None, None] for each in (_SHIFT, _SCALE)
        )
        left, right = (reference - shift) / scale, (other - shift) / scale
        total = torch.zeros(len(left), dtype=torch.float32, device="cpu")
        for layer, weight in zip(self.layers, self.weights, strict=True):
            left, right = layer(left), layer(right)
            changes = (_unit(left) - _unit(right)).square()
            total += (changes * weight).sum(1).mean((1, 2))
        return total


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Of length 1 at every place, over channels."""
    return features / (features.square().sum(1, keepdim=True) + 1e-16).sqrt()


def read_weights(file: Path, metric: str) -> Any:
    """What a file of torch's holds, for a metric. Raises InputError where it cannot be read."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever reading a damaged file raises
        raise InputError(
            f"metric {metric}: '{file}' cannot be read ({first_line(error)}): remove it, or put it right"
        ) from None


@functools.lru_cache(maxsize=1)
def _lpips_of(file: Path) -> _Lpips:
    return _Lpips(file).eval().requires_grad_(False)


def lpips(reference: np.ndarray, images: np.ndarray) -> np.ndarray:
    """LPIPS (Zhang et al. 2018) with AlexNet, 0 for what looks the same. Pictures under 64 pixels are enlarged.

    Raises:
        InputError: The weights cannot be read.
    """
    file = alexnet_file()
    assert file is not None  # or it would not be asked
    left, right = (_tensor(each) for each in (reference, images))
    with torch.inference_mode():
        return _lpips_of(file)(left, right).double().numpy()


def _tensor(images: np.ndarray) -> torch.Tensor:
    """(n, height, width, 3) from 0 to 1 as (n, 3, height, width) from -1 to 1, large enough."""
    zoom = -(-_SMALLEST // min(images.shape[1:3]))
    large = images.repeat(zoom, 1).repeat(zoom, 2)
    return torch.from_numpy(np.ascontiguousarray(large)).to("cpu", torch.float32).movedim(-1, 1) * 2 - 1


@functools.lru_cache(maxsize=1)
def _clip_of(name: str) -> tuple[Any, Any]:
    """A model and what prepares its input. Raises InputError where its files are not here."""
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(name, local_files_only=True)
        return model.float().eval(), CLIPProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{CLIP}={name}: no CLIP model of that name is on this machine, and none is downloaded: hf download "
            f"{name}, or give its folder ({first_line(error)})"
        ) from None


def check_clip() -> None:
    """Raises InputError where the environment names a CLIP model that is not on this machine."""
    if has_clip():
        _clip_of(os.environ[CLIP])


def clip_score(reference: np.ndarray, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """CLIPScore (Hessel et al. 2021), 100 for a picture that says what its prompt does; never below 0.

    Raises:
        InputError: The model that the environment names is not on this machine.
    """
    from PIL import Image

    model, prepare = _clip_of(os.environ[CLIP])
    pictures = [Image.fromarray(image) for image in as_bytes(images)]
    given = prepare(text=list(prompts), images=pictures, return_tensors="pt", padding=True, truncation=True)
    with torch.inference_mode():
        answer = model(**given)
    return (100 * (answer.image_embeds * answer.text_embeds).sum(-1)).clamp_min(0).double().numpy()


def clip_change(reference: np.ndarray, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """By how much `clip_score` is above that of full precision. Raises InputError as that does."""
    return clip_score(images, images, prompts) - clip_score(reference, reference, prompts)
