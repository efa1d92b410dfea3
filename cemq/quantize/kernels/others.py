"""Kernels of other libraries, each imported when it is used. They take stored 8-bit weights as they are, and round
tokens symmetrically."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from cemq.quantize.kernels.own import compiled
from cemq.quantize.kernels.weights import LinearWeights


def one_column(values: torch.Tensor, weights: LinearWeights) -> str:
    """torch leaves an integer product over one column uninitialised."""
    return "takes two input features or more" if weights.columns == 1 else ""


def cuda_alone(device: torch.device) -> str:
    return "" if device.type == "cuda" else "for CUDA devices alone"


def by_comfy_kitchen(values: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
    """https://github.com/Comfy-Org/comfy-kitchen (Apache-2.0): CUTLASS or cuBLAS on CUDA, torch ops elsewhere."""
    from comfy_kitchen import int8_linear  # pyright: ignore[reportMissingImports]  # optional

    return int8_linear(values, weights.weight, weights.weight_scale, weights.bias, out_dtype=values.dtype)


def not_in_blocks_of_32(values: torch.Tensor, weights: LinearWeights) -> str:
    return "takes multiples of 32 input features" if weights.columns % 32 else ""


def by_gemlite(values: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
    """https://github.com/mobiusml/gemlite (Apache-2.0): Triton. Its layer keeps weights transposed, not copied."""
    from gemlite import forward_functional  # pyright: ignore[reportMissingImports]  # optional

    stored = weights.weight.t(), weights.weight_scale.view(1, -1), _none(values.device)
    return forward_functional(values, weights.bias, list(stored), _gemlite_settings(weights.columns, values.dtype))


@functools.cache
def _gemlite_settings(columns: int, dtype: torch.dtype) -> list[int]:
    """What its own layer of so many input features hands to its kernels, number of outputs apart."""
    from gemlite.helper import A8W8_int8_dynamic  # pyright: ignore[reportMissingImports]  # optional

    weight = torch.zeros(1, columns, dtype=torch.int8, device="cpu")
    scale = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    layer = A8W8_int8_dynamic(device="cpu", dtype=dtype).from_weights(weight, scales=scale)
    return layer.get_meta_args()


@functools.cache
def _none(device: torch.device) -> torch.Tensor:
    """How gemlite is told that weights have no zero points."""
    return torch.empty(1, 0, dtype=torch.int32, device=device)


def by_torchao(values: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
    """https://github.com/pytorch/ao (BSD): its tensor of int8, compiled on CUDA, where its passes are slow if they are
    not."""
    multiply = compiled(_torchao) if values.is_cuda else _torchao
    return multiply(values, weights.weight, weights.weight_scale, weights.bias)


def _torchao(
    values: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from torchao.quantization import Int8Tensor

    dtype = values.dtype
    if dtype == torch.float16:  # torchao rounds to it before it multiplies with the weight scale, and overflows
        values = values.float()
    block = [1, weight.shape[1]]
    stored = Int8Tensor(weight, weight_scale, block, values.dtype, act_quant_kwargs=_torchao_activations())
    return F.linear(values, stored, bias).to(dtype)


@functools.cache
def _torchao_activations() -> Any:
    """How torchao quantizes activations where it quantizes them while a model runs: symmetrically, row by row."""
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    return QuantizeTensorToInt8Kwargs(granularity=PerRow())
