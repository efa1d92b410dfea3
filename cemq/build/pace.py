"""How fast a device computes, by one block of a transformer that is run on it for less than a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from cemq.build.arithmetic import Arithmetic, RunArithmetic
from cemq.quantize.in_diffusers import CemqConfig, quantizable
from cemq.quantize.schemes import SCHEMES

_HEAD = 64  # features of an attention head
_MOST_OPERATIONS = {"cuda": 2e12}  # of the block that is timed
_MOST_ELSEWHERE = 4e9  # some 0.1 s of one core
_LEAST_ROWS = 64  # tokens: from 32 on quantized layers multiply integers
_WIDEST = {"cpu": 1536}  # of that block; a CPU's speed does not depend on it from there on
_SMALL = 64  # width of a block that takes hardly more than what it takes to call its layers
_SECONDS = 0.1  # that the block is run for, over and over


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds that it takes to call a linear layer and what goes with it, and what the device multiplies meanwhile."""

    layer_seconds: float
    operations_per_second: float

    def seconds(self, work: Arithmetic) -> float:
        return work.layers * self.layer_seconds + work.operations / self.operations_per_second


class _Block(nn.Module):
    """What most denoisers repeat: modulation, attention and two layers with a GELU between them."""

    def __init__(self, width: int, widest: int):
        super().__init__()
        self.heads: int = max(1, width // _HEAD)
        self.modulation: nn.Module = nn.Linear(width, 6 * width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.expand, self.contract = nn.Linear(width, widest), nn.Linear(widest, width)

    def forward(self, tokens: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Tokens (inputs, tokens, width) and a condition (inputs, width) to tokens."""
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
        normalized = F.layer_norm(tokens, tokens.shape[-1:]) * (1 + scale) + shift
        split = (layer(normalized).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in split))
        tokens = tokens + gate * self.out(attended.transpose(1, 2).flatten(2))
        normalized = F.layer_norm(tokens, tokens.shape[-1:]) * (1 + scale_2) + shift_2
        return tokens + gate_2 * self.contract(F.gelu(self.expand(normalized), approximate="tanh"))

    def arithmetic(self, inputs: int, tokens: int) -> Arithmetic:
        width, widest = self.contract.out_features, self.contract.in_features
        linear = 2 * inputs * (tokens * (4 * width**2 + 2 * width * widest) + 6 * width**2)
        return Arithmetic(operations=linear + 4 * inputs * tokens**2 * width, layers=7)


@torch.inference_mode()
def measure_pace(
    run: RunArithmetic,
    config: CemqConfig | None,
    *,
    device: str,
    dtype: str,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Pace, Pace]:
    """In full precision, and with layers quantized by ``config``: the same where there is none, or where the backend
    fixes scales by calibration.

    A block of about the model's widths is timed, and one so small that calling its layers is all it takes.
    """
    kind = torch.device(device).type
    width = min(max(_HEAD, run.width // _HEAD * _HEAD), _WIDEST.get(kind, run.width or _HEAD))
    sizes = [(width, min(max(run.widest, width), 4 * width)), (_SMALL, _SMALL)]
    paces = []
    for each in (None, config) if config and _can_be_timed(config) else (None,):
        found = []
        for wide, widest in sizes:
            block = _Block(wide, widest).eval().to(device=device, dtype=getattr(torch, dtype))
            if each is not None:
                for name, linear, scheme in list(quantizable(block, each)):
                    block.set_submodule(name, each.layer_class(scheme).from_linear(linear, scheme))
            inputs, tokens = (
                _rows(block, run, _MOST_OPERATIONS.get(kind, _MOST_ELSEWHERE)) if wide != _SMALL else (1, _LEAST_ROWS)
            )
            found.append((block.arithmetic(inputs, tokens), _time(block, inputs, tokens, wide, clock)))
        paces.append(pace_of(*found))
    return paces[0], paces[-1]


def _can_be_timed(config: CemqConfig) -> bool:
    return not config.layer_class(SCHEMES[config.scheme]).needs_largest


def _rows(block: _Block, run: RunArithmetic, most: float) -> tuple[int, int]:
    """As many inputs and tokens as the model's, or as few as stay below so many operations."""
    inputs, tokens = run.inputs, max(run.tokens, _LEAST_ROWS)
    while inputs > 1 and block.arithmetic(inputs, tokens).operations > most:
        inputs -= 1
    while tokens > _LEAST_ROWS and block.arithmetic(inputs, tokens).operations > most:
        tokens = max(_LEAST_ROWS, tokens // 2)
    return inputs, tokens


def _time(block: _Block, inputs: int, tokens: int, width: int, clock: Callable[[], float]) -> float:
    """Seconds of one call, the least of some."""
    parameter = block.query.bias
    values = torch.randn(inputs, tokens, width, dtype=torch.float32, device="cpu").to(parameter)
    condition = values[:, 0]

    def wait() -> None:
        if values.is_cuda:
            torch.cuda.synchronize(values.device)

    def timed(times: int) -> float:
        wait()
        started = clock()
        for _ in range(times):
            block(values, condition)
        wait()
        return (clock() - started) / times

    timed(1)
    once = timed(1)
    times = max(1, int(_SECONDS / 4 / max(once, 1e-6)))
    return min(once, *(timed(times) for _ in range(3)))


def pace_of(large: tuple[Arithmetic, float], small: tuple[Arithmetic, float]) -> Pace:
    """The pace at which both take as long as they took."""
    (work, seconds), (little, few) = large, small
    shared = little.layers / work.layers
    more = seconds * shared - few
    operations = work.operations * shared - little.operations
    if more <= 0 or operations <= 0:  # too small a model for its arithmetic to show
        return Pace(layer_seconds=seconds / work.layers, operations_per_second=float("inf"))
    rate = operations / more
    return Pace(layer_seconds=max(0.0, few - little.operations / rate) / little.layers, operations_per_second=rate)
