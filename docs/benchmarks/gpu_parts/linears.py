"""Linear layers by themselves: cemq's kernels beside every other that loads, at the shapes that cost most time.

A candidate takes a bfloat16 weight (out, in) and a bias and gives back a function of bfloat16 values (rows, in). Its
error is against the float32 product of the unquantized weight; int8 activations alone give about 0.01.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cemq.quantize import integers
from cemq.quantize.fp8 import E4M3, has_scaled_product, scaled_product
from cemq.quantize.integers import GROUP_SIZE
from cemq.quantize.kernels import integer_linear
from gpu_parts import Case, Rows, Setting
from gpu_parts.timing import clocks, elapsed, graph_milliseconds, milliseconds

Layer = Callable[[torch.Tensor], torch.Tensor]
SHAPES = {  # rows, in, out
    "FLUX projection": (4608, 3072, 3072),
    "FLUX feed-forward": (4608, 3072, 12288),
    "FLUX joint output": (4608, 15360, 3072),
    "Wan 14B feed-forward": (7800, 5120, 13824),
    "Wan 1.3B projection": (7800, 1536, 1536),
}


def cases(setting: Setting) -> list[Case]:
    shapes = {"tiny": (64, 128, 96)} if setting.tiny else SHAPES
    return [
        Case(
            labels={"layer": layer, "rows": rows, "in": columns, "out": outputs, "kernel": kernel},
            measure=partial(_layer, setting, kernel, rows, columns, outputs),
        )
        for kernel in KERNELS
        for layer, (rows, columns, outputs) in shapes.items()
    ]


def _layer(setting: Setting, kernel: str, rows: int, columns: int, outputs: int) -> Rows:
    generator = torch.Generator(setting.device).manual_seed(rows + columns + outputs)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=setting.device)

    weight, bias = (draw(outputs, columns) / columns**0.5).bfloat16(), draw(outputs).bfloat16()
    values = draw(rows, columns).bfloat16()
    exact = F.linear(values.float(), weight.float(), bias.float())
    layer = KERNELS[kernel](weight, bias)
    found: list[torch.Tensor] = []
    first = elapsed(lambda: found.append(layer(values)), setting)
    whole = found[0].shape == exact.shape  # not so where only a part of a layer is timed
    error = float((found[0].float() - exact).norm() / exact.norm()) if whole else None
    row = {"relative_l2": error, "first_seconds": first}
    yield row | milliseconds(partial(layer, values), setting) | clocks(setting)
    yield {"graph_ms": graph_milliseconds(partial(layer, values), setting)}


def _bfloat16(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    return lambda values: F.linear(values, weight, bias)


def _cemq(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    quantized, scale = integers.quantize_channels(weight)
    total = quantized.sum(1, keepdim=True, dtype=torch.int32)
    return lambda values: integer_linear(values, quantized, None, scale, total, bias)


def _cemq_int4(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    packed, group_scale, scale = integers.quantize_int4(weight, GROUP_SIZE)
    whole = integers.expand_int4(packed, group_scale, weight.shape[1])
    total = whole.sum(1, keepdim=True, dtype=torch.int32)
    return lambda values: integer_linear(values, packed, group_scale, scale, total, bias)


def _cemq_quantize(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    """Only the tokens' part of cemq's layers."""
    if not weight.is_cuda:
        return lambda values: integers.quantize_tokens(values)[0]
    from cemq.quantize.kernels import triton_cuda

    return lambda values: triton_cuda.quantize_tokens(values)[0]


def _int_mm(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    """torch's own integer product, with the quantization before it and the scales after it compiled."""
    quantized, scale = integers.quantize_channels(weight)
    total = quantized.sum(1, keepdim=True, dtype=torch.int32)

    def layer(values: torch.Tensor) -> torch.Tensor:
        tokens, token_scale, zero = integers.quantize_tokens(values)
        product = torch._int_mm(tokens, quantized.t())
        return integers.rescale(product, token_scale, zero, scale, total, bias, values.dtype)

    return torch.compile(layer, dynamic=False)


def _fp8(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    """cemq's: E4M3 for tokens and output channels, multiplied by torch's scaled product, which must be there."""
    codec = E4M3()
    codes, scale = codec.encode(weight.float())
    if not has_scaled_product(weight.device.type, weight.device.index, weight.dtype):
        raise RuntimeError("torch has no scaled product of E4M3 here, or gives another result")

    def layer(values: torch.Tensor) -> torch.Tensor:
        tokens, token_scale = codec.encode(values.float())
        return scaled_product(tokens, token_scale, codes, scale, bias, values.dtype)

    return torch.compile(layer, dynamic=False)


def _torchao(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = _linear(weight, bias)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return torch.compile(layer, dynamic=False)


def _torchao_fp8(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    layer = _linear(weight, bias)
    quantize_(layer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False))
    return torch.compile(layer, dynamic=False)


def _gemlite(fp8: bool, weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    from gemlite.helper import A8W8_fp8_dynamic, A8W8_int8_dynamic

    make = A8W8_fp8_dynamic if fp8 else A8W8_int8_dynamic
    return make(device=str(weight.device), dtype=weight.dtype).from_weights(weight, bias=bias)


def _humming(weights: dict[str, Any], activations: str, weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    from humming.layer import HummingLayer

    layer = HummingLayer(
        shape_n=weight.shape[0], shape_k=weight.shape[1], weight_config=dict(weights), torch_dtype=weight.dtype,
        input_config={"dtype": activations},
    ).to(weight.device)  # fmt: skip
    layer.load_from_unquantized(weight)
    layer.transform()
    return lambda values: layer(values) + bias


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = (nn.Parameter(part, requires_grad=False) for part in (weight, bias))
    return layer


KERNELS: dict[str, Callable[[torch.Tensor, torch.Tensor], Layer]] = {
    "bfloat16": _bfloat16,
    "cemq w8a8": _cemq,
    "cemq w4a8": _cemq_int4,
    "cemq tokens alone": _cemq_quantize,
    "torch._int_mm, compiled": _int_mm,
    "cemq fp8, torch._scaled_mm, compiled": _fp8,
    "torchao int8, compiled": _torchao,
    "torchao fp8, compiled": _torchao_fp8,
    "gemlite int8": partial(_gemlite, False),
    "gemlite fp8": partial(_gemlite, True),
    "humming w8a8": partial(_humming, {"dtype": "int8"}, "int8"),
    "humming w4a8": partial(_humming, {"dtype": "int4", "group_size": 128}, "int8"),
    "humming w4a8 fp8": partial(_humming, {"dtype": "int4", "group_size": 128}, "float8e4m3"),
}
