"""Which layers take 8 bits in a 4-bit scheme."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod

from torch import nn

from cemq.errors import InputError
from cemq.families import EIGHT_BIT, OF_CONDITIONS, OF_TEXT, QUERIES_AND_KEYS, matches
from cemq.quantize.in_diffusers import CemqConfig, nothing_to_quantize, quantizable
from cemq.quantize.schemes import SCHEMES, Scheme

EIGHT_BIT_SHARE = 0.2  # of the weights, where no budget is given; see docs/notebook/weights.md

_BLOCK = re.compile(r"(.*?\.\d+)\.")


def stored_bits(denoiser: nn.Module, config: CemqConfig) -> float:
    """Average bits that a quantized weight takes on disk and in memory, scales included."""
    layers = list(quantizable(denoiser, config))
    if not layers:
        raise nothing_to_quantize(denoiser)
    size = sum(layer_bytes(config, linear, scheme) for _, linear, scheme in layers)
    return 8 * size / sum(linear.weight.numel() for _, linear, _ in layers)


def choose_eight_bit(
    denoiser: nn.Module, config: CemqConfig, bits_budget: float | None = None, *, first: Sequence[str] = ()
) -> list[str]:
    """Names of the layers to keep at 8 bits in a 4-bit scheme: those of the last blocks, where 4 bits harm most.

    What reaches the output from layers that are quantized alone grows with their depth. Of a block, first come what
    attention adds and the feed-forward network; then, after those of all blocks, queries and keys; last modulation
    and what sees the conditions alone, which hardly show.

    Args:
        bits_budget: Average stored bits per quantized weight, scales included; None: `EIGHT_BIT_SHARE` of the weights.
        first: Patterns of layers that come before all others.

    Raises:
        InputError: Not even 4 bits everywhere fit the budget.
    """
    if bits_budget is None:
        raised, lowest = [], config.with_eight_bit(())
        costs = {name: linear.weight.numel() for name, linear, _ in quantizable(denoiser, lowest)}
        room = EIGHT_BIT_SHARE * sum(costs.values())
    else:
        least, raised = _least_bits(denoiser, config, within=bits_budget)
        lowest = config.with_eight_bit(raised)
        weights = sum(linear.weight.numel() for _, linear, _ in quantizable(denoiser, lowest))
        costs = _extra_bytes(denoiser, lowest)
        room = (bits_budget - least) / 8 * weights
    for name in _most_harmed_first(costs, first):
        if costs[name] <= room:
            room -= costs[name]
            raised.append(name)
    return raised


def _most_harmed_first(names: Iterable[str], first: Sequence[str]) -> list[str]:
    """Layers, given in the order of definition, in the order in which they are raised."""
    names = list(names)
    blocks = {name: found[1] for name in names if (found := _BLOCK.match(name))}
    depths = {block: depth for depth, block in enumerate(dict.fromkeys(blocks.values()))}

    def rank(name: str) -> tuple[int, int]:
        if matches(name, first):
            kind = 3
        elif name not in blocks or matches(name, (*EIGHT_BIT, *OF_TEXT, *OF_CONDITIONS)):
            kind = 0
        else:
            kind = 1 if matches(name, QUERIES_AND_KEYS) else 2
        return kind, depths.get(blocks.get(name), -1)

    return sorted(names, key=rank, reverse=True)


def _least_bits(denoiser: nn.Module, config: CemqConfig, *, within: float) -> tuple[float, list[str]]:
    """The smallest average there is, and the names of layers so narrow that 8 bits take no more room than 4.

    Raises:
        InputError: Not even 4 bits everywhere stay ``within`` the budget.
    """
    free = [name for name, extra in _extra_bytes(denoiser, config.with_eight_bit(())).items() if extra <= 0]
    least = stored_bits(denoiser, config.with_eight_bit(free))
    if within < least:
        raise InputError(f"bits budget {within}: {config.scheme} needs {least:.2f} bits a weight at least")
    return least, free


def _extra_bytes(denoiser: nn.Module, config: CemqConfig) -> dict[str, int]:
    """What every layer of 4-bit weights would take more with 8-bit ones."""

    def wider(scheme: Scheme) -> Scheme:
        return replace(SCHEMES[f"w8a{scheme.activation_bits}"], smoothed=scheme.smoothed)

    return {
        name: layer_bytes(config, linear, wider(scheme)) - layer_bytes(config, linear, scheme)
        for name, linear, scheme in quantizable(denoiser, config)
        if scheme.weight_bits == 4
    }


def layer_bytes(config: CemqConfig, linear: nn.Linear, scheme: Scheme) -> int:
    """Bytes of a quantized layer but for its bias."""
    layout = config.layer_class(scheme).layout(linear.in_features, linear.out_features, scheme)
    return sum(prod(shape) * kind.itemsize for shape, kind in layout.values())
