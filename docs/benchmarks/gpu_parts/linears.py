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

from cemq.quantize import SCHEMES, NativeLinear, integers, kernels
from cemq.quantize.fp8 import E4M3, has_scaled_product, scaled_product
from cemq.quantize.kernels import LinearWeights, integer_linear
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
        if setting.cuda or not kernel.startswith("triton")
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
    if kernel in ("cemq w8a8", "cemq w4a8"):
        row["chosen"] = kernels.choices().made()[-1].choice.kernel
    yield row | milliseconds(partial(layer, values), setting) | clocks(setting)
    yield {"graph_ms": graph_milliseconds(partial(layer, values), setting)}


def _bfloat16(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    return lambda values: F.linear(values, weight, bias)


def _cemq(bits: int, kernel: str, weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    """A native layer of so many bits; ``auto`` takes the fastest of those with cemq's arithmetic."""
    stored = _stored(bits, weight, bias)
    operands = stored.weight, stored.group_scale, *stored.scales
    return lambda values: integer_linear(values, *operands, by=kernel)


def _named(bits: int, kernel: str, weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    """One kernel of cemq's registry, by itself."""
    stored, found = _stored(bits, weight, bias), kernels.KERNELS[kernel]
    if why := found.obstacle_on(weight.device):
        raise RuntimeError(why)
    return lambda values: found.run(values, stored, None, False)


def _stored(bits: int, weight: torch.Tensor, bias: torch.Tensor) -> LinearWeights:
    tensors = NativeLinear.quantize(weight, SCHEMES[f"w{bits}a8"], None)
    scales = {name: tensors[name] for name in ("weight", "weight_scale", "weight_sum")}
    return LinearWeights(group_scale=tensors.get("group_scale"), bias=bias, columns=weight.shape[1], **scales)


def _cemq_quantize(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    """Only the tokens' part of cemq's layers."""
    if not weight.is_cuda:
        return lambda values: integers.quantize_tokens(values)[0]
    from cemq.quantize.kernels import triton_cuda

    return lambda values: triton_cuda.quantize_tokens(values)[0]


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


def _torchao_fp8(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    layer = _linear(weight, bias)
    quantize_(layer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False))
    return torch.compile(layer, dynamic=False)


def _gemlite_fp8(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    from gemlite.helper import A8W8_fp8_dynamic

    return A8W8_fp8_dynamic(device=str(weight.device), dtype=weight.dtype).from_weights(weight, bias=bias)


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
    "cemq w8a8": partial(_cemq, 8, "auto"),
    "cemq w4a8": partial(_cemq, 4, "auto"),
    "triton w8a8": partial(_named, 8, "triton"),
    "triton w4a8": partial(_named, 4, "triton"),
    "int-mm w8a8": partial(_named, 8, "int-mm"),
    "int-mm w4a8": partial(_named, 4, "int-mm"),
    "cemq tokens alone": _cemq_quantize,
    "cemq fp8, torch._scaled_mm, compiled": _fp8,
    "comfy-kitchen int8": partial(_named, 8, "comfy-kitchen"),
    "torchao int8, compiled": partial(_named, 8, "torchao"),
    "torchao fp8, compiled": _torchao_fp8,
    "gemlite int8": partial(_named, 8, "gemlite"),
    "gemlite fp8": _gemlite_fp8,
    "humming w8a8": partial(_humming, {"dtype": "int8"}, "int8"),
    "humming w4a8": partial(_humming, {"dtype": "int4", "group_size": 128}, "int8"),
    "humming w4a8 fp8": partial(_humming, {"dtype": "int4", "group_size": 128}, "float8e4m3"),
}
