"""Denoisers with random weights, the same ones however they are quantized; float weights exist one layer at a time."""

from __future__ import annotations

import zlib
from math import prod
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.utils import get_module_from_name
from torch import nn

from cemq.bench.architectures import Architecture
from cemq.errors import SchemeError
from cemq.families import BLOCK_LISTS, matches
from cemq.quantize import NO_SCHEME, CemqConfig, QuantizationSettings, check_scheme, quantize_calibrated
from cemq.quantize.allocate import layer_bytes
from cemq.quantize.calls import Call
from cemq.quantize.in_diffusers import mark_quantized, nothing_to_quantize, quantizable

_SMALL = 0.02  # standard deviation of biases and embeddings


def empty_model(architecture: Architecture) -> Any:
    """The model with its parameters on the meta device; its tables of positions are real."""
    with init_empty_weights(include_buffers=False):
        return getattr(diffusers, architecture.model_class)(**architecture.config).eval().requires_grad_(False)


def share_blocks(model: nn.Module) -> None:
    """Have blocks of one shape be one and the same block: a forward costs as much, and the model a few blocks."""
    for name, blocks in model.named_children():
        if isinstance(blocks, nn.ModuleList) and matches(name, BLOCK_LISTS):
            first: dict[tuple, nn.Module] = {}
            for index, block in enumerate(blocks):
                shapes = tuple((name, parameter.shape) for name, parameter in block.named_parameters())
                blocks[index] = first.setdefault((type(block), shapes), block)


def parse_scheme(text: str) -> tuple[str, str]:
    """``quanto:w8a8`` to ("quanto", "w8a8"); without a backend it is the native one.

    Raises:
        SchemeError: Unknown, not installed, or a pair that does not go together.
    """
    backend, _, scheme = text.rpartition(":")
    backend = backend or "native"
    if scheme == NO_SCHEME:
        raise SchemeError(f"scheme '{NO_SCHEME}' is full precision, which is timed unless it is left out: name others")
    check_scheme(scheme, backend)
    return backend, scheme


def quantization_config(model: nn.Module, backend: str, scheme: str) -> CemqConfig:
    """What a build takes for this model."""
    return QuantizationSettings(scheme=scheme, backend=backend).config(model)


def needs_float_model(model: nn.Module, config: CemqConfig) -> bool:
    """Whether the backend fixes activation scales from calls of the whole float model."""
    return any(config.layer_class(scheme).needs_largest for _, _, scheme in quantizable(model, config))


def planned_bytes(model: nn.Module, dtype: torch.dtype, config: CemqConfig | None = None) -> int:
    """Bytes of parameters and buffers that a (meta) model will have once it is built."""
    kinds = {name: _kept_dtype(model, name, dtype) for name, _ in model.named_parameters()}
    total = sum(parameter.numel() * kinds[name].itemsize for name, parameter in model.named_parameters())
    kept = model.state_dict()
    total += sum(buffer.numel() * buffer.element_size() for name, buffer in model.named_buffers() if name in kept)
    if config is None:
        return total
    for name, linear, scheme in quantizable(model, config):
        total += layer_bytes(config, linear, scheme)
        total -= linear.weight.numel() * kinds[f"{name}.weight"].itemsize
    return total


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of what would be stored: parameters and persistent buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


@torch.no_grad()
def random_model(
    architecture: Architecture,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    config: CemqConfig | None = None,
    weights_rounded_to: torch.dtype | None = None,
    batch: int = 1,
    shared_blocks: bool = False,
) -> Any:
    """A model whose weights depend on their names and the device alone, quantized by ``config`` (4 bits to nearest).

    Args:
        weights_rounded_to: Round the weights to this dtype before they are kept in ``dtype``.
        batch: Of the one call that backends with fixed activation scales are calibrated with.
        shared_blocks: See `share_blocks`.
    """
    model = empty_model(architecture)
    if shared_blocks:
        share_blocks(model)
    place, rounding = torch.device(device), weights_rounded_to or dtype

    def draw(module: nn.Module, prefix: str) -> None:
        for name, parameter in list(module.named_parameters(prefix)):
            if parameter.is_meta:
                owner, leaf = get_module_from_name(model, name)
                drawn = _draw(name, parameter.shape, isinstance(owner, nn.Embedding), place)
                for kind in (rounding, dtype):
                    drawn = drawn.to(_kept_dtype(model, name, kind))
                setattr(owner, leaf, nn.Parameter(drawn, requires_grad=False))

    if config is None or needs_float_model(model, config):
        draw(model, "")
        model.to(place)  # the buffers
        if config is not None:
            call = Call((), architecture.inputs(batch, dtype=dtype, device=place))
            quantize_calibrated(model, config, [call], gptq=False)
        return model
    replaced = 0
    for name, linear, scheme in quantizable(model, config):
        draw(linear, name)
        model.set_submodule(name, config.layer_class(scheme).from_linear(linear, scheme))
        replaced += 1
    if not replaced:
        raise nothing_to_quantize(model)
    draw(model, "")
    model.to(place)
    mark_quantized(model, config)
    return model


def _kept_dtype(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """Of one parameter: diffusers loads some modules of some classes (Wan) in float32 whatever it is asked for."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return torch.float32 if set(kept) & set(name.split(".")) else dtype


def _draw(name: str, shape: torch.Size, embedding: bool, device: torch.device) -> torch.Tensor:
    """Normal, scaled so that products keep the size of their inputs; the weights of norms are ones."""
    bias = name.endswith("bias")
    if len(shape) == 1 and not bias:
        return torch.ones(shape, dtype=torch.float32, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    scale = _SMALL if bias or embedding else prod(shape[1:]) ** -0.5
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=device).mul_(scale)
