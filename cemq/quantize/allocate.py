"""Which layers deserve 8 bits, when an average number of bits is all there is to spend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import nn

from cemq.errors import InputError
from cemq.pipelines.outputs import first_tensor
from cemq.quantize.calls import Call, replay
from cemq.quantize.in_diffusers import CemqConfig, nothing_to_quantize, quantizable
from cemq.quantize.schemes import SCHEMES, Scheme

MEASURED_CALLS = 4  # calls, spread over the recorded ones, on which each layer's harm is measured


def stored_bits(denoiser: nn.Module, config: CemqConfig) -> float:
    """Average bits that a quantized weight takes on disk and in memory, scales included."""
    layers = list(quantizable(denoiser, config))
    if not layers:
        raise nothing_to_quantize(denoiser)
    size = sum(layer_bytes(config, linear, scheme) for _, linear, scheme in layers)
    return 8 * size / sum(linear.weight.numel() for _, linear, _ in layers)


@torch.no_grad()
def choose_eight_bit(
    denoiser: nn.Module,
    config: CemqConfig,
    calls: Sequence[Call],
    bits_budget: float,
    *,
    progress: Callable[[float], None] | None = None,
) -> list[str]:
    """Names of the layers to keep at 8 bits in a 4-bit scheme, so that the average stays within a budget.

    Each layer is rounded to 4 bits alone in the full-precision model, and what that does to the model's output on a few
    recorded calls is its harm; layers are raised to 8 bits in the order of harm undone per byte.

    Args:
        bits_budget: Average stored bits per quantized weight, scales included.

    Raises:
        InputError: Not even 4 bits everywhere fit the budget.
    """
    least, free = least_bits(denoiser, config, within=bits_budget)
    lowest = config.with_eight_bit(free)
    layers = [entry for entry in quantizable(denoiser, lowest) if entry[2].weight_bits == 4]
    harms = _harms(denoiser, lowest, calls[:: max(1, len(calls) // MEASURED_CALLS)][:MEASURED_CALLS], progress)
    extra = {name: _extra_bytes(lowest, linear, scheme) for name, linear, scheme in layers}
    room = (bits_budget - least) / 8 * sum(linear.weight.numel() for _, linear, _ in quantizable(denoiser, lowest))
    raised = list(free)
    for name in sorted(extra, key=lambda name: harms[name] / extra[name], reverse=True):
        if extra[name] <= room:
            room -= extra[name]
            raised.append(name)
    return raised


def least_bits(denoiser: nn.Module, config: CemqConfig, *, within: float) -> tuple[float, list[str]]:
    """The smallest average there is, and the names of layers so narrow that 8 bits take no more room than 4.

    Raises:
        InputError: Not even 4 bits everywhere stay ``within`` the budget.
    """
    lowest = config.with_eight_bit(())
    free = [name for name, linear, scheme in quantizable(denoiser, lowest) if _extra_bytes(lowest, linear, scheme) <= 0]
    least = stored_bits(denoiser, config.with_eight_bit(free))
    if within < least:
        raise InputError(f"bits budget {within}: {config.scheme} needs {least:.2f} bits a weight at least")
    return least, free


def _extra_bytes(config: CemqConfig, linear: nn.Linear, scheme: Scheme) -> int:
    """What a layer of 4-bit weights would take more with 8-bit ones."""
    wider = replace(SCHEMES[f"w8a{scheme.activation_bits}"], smoothed=scheme.smoothed)
    return layer_bytes(config, linear, wider) - layer_bytes(config, linear, scheme)


def _harms(
    denoiser: nn.Module, config: CemqConfig, calls: Sequence[Call], progress: Callable[[float], None] | None
) -> dict[str, float]:
    """Squared error of the model's output, relative to its square, with each layer alone at 4 bits."""
    wanted = [replayed_output(denoiser, call).float() for call in calls]
    layers, harms = [entry for entry in quantizable(denoiser, config) if entry[2].weight_bits == 4], {}
    for done, (name, linear, scheme) in enumerate(layers, start=1):
        alone = SCHEMES[f"w{scheme.weight_bits}a16"]
        denoiser.set_submodule(name, config.layer_class(alone).from_linear(linear, alone))
        try:
            found = [replayed_output(denoiser, call).float() for call in calls]
        finally:
            denoiser.set_submodule(name, linear)
        harms[name] = sum(
            ((a - b).square().sum() / b.square().sum().clamp_min(1e-12)).item()
            for a, b in zip(found, wanted, strict=True)
        )
        if progress:
            progress(done / len(layers))
    return harms


def replayed_output(denoiser: nn.Module, call: Call) -> torch.Tensor:
    """The first tensor in what the denoiser answers to a call."""
    return first_tensor(replay(denoiser, call))


def layer_bytes(config: CemqConfig, linear: nn.Linear, scheme: Scheme) -> int:
    """Bytes of a quantized layer but for its bias."""
    layout = config.layer_class(scheme).layout(linear.in_features, linear.out_features, scheme)
    return sum(prod(shape) * kind.itemsize for shape, kind in layout.values())
