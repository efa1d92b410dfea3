"""What can be quantized here, which layers of a model were, and models on disk whose tensors were changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cemq.quantize import BACKENDS, QuantizedLinear, Scheme, installed

# every backend with every scheme of it
PAIRS = [
    pytest.param(backend, scheme, marks=pytest.mark.skipif(not installed(backend), reason=f"{backend} is missing"))
    for backend in BACKENDS
    for scheme in BACKENDS[backend].layers
]


def schemes_of(model: nn.Module) -> dict[str, Scheme]:
    return {name: module.scheme for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def eight_bits(model: nn.Module) -> set[str]:
    return {name for name, scheme in schemes_of(model).items() if scheme.weight_bits == 8}


def saved_and_edited(model: Any, folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The folder of a model on disk whose tensors went through ``edit``."""
    model.save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder
