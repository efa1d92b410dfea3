"""cemq's own ways to multiply, all with the arithmetic that `integers` spells out, and what they need."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from cemq.quantize import integers
from cemq.quantize.kernels import cpu
from cemq.quantize.kernels.weights import LinearWeights, has_memory

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # as `integers.quantize_tokens` gives them


def smoothed(values: torch.Tensor, smooth: torch.Tensor | None) -> torch.Tensor:
    """The values as a smoothed layer quantizes them, for kernels that do not smooth themselves."""
    return values if smooth is None else (values * smooth).to(values.dtype)


def by_torch_ops(values: torch.Tensor, weights: LinearWeights, smooth: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    """On any device; the reference that others are compared with."""
    return _multiplied(integers.quantize_tokens(values, smooth), weights, values.dtype, gelu)


def by_symmetric_tokens(
    values: torch.Tensor, weights: LinearWeights, smooth: torch.Tensor | None, gelu: bool
) -> torch.Tensor:
    """The same with tokens that have no zero point; the reference of symmetric kernels."""
    return _multiplied(integers.quantize_symmetric(smoothed(values, smooth)), weights, values.dtype, gelu)


def on_the_cpu(values: torch.Tensor, weights: LinearWeights, smooth: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    """C where there is a compiler, with its own product or around torch's; torch ops where there is none."""
    if (compiled := cpu_kernels(values)) and weights.weight.is_contiguous() and multiplies_faster(compiled):
        return compiled.linear(values, smooth, weights.weight, weights.group_scale, *weights.scales, gelu)
    return _by_passes(compiled or integers, values, weights, smooth, gelu)


def _by_passes(
    passes: Any, values: torch.Tensor, weights: LinearWeights, smooth: torch.Tensor | None, gelu: bool
) -> torch.Tensor:
    """torch's product between the passes of C, or of `integers`."""
    return _multiplied(passes.quantize_tokens(values, smooth), weights, values.dtype, gelu, rescale=passes.rescale)


@functools.cache
def multiplies_faster(compiled: cpu.Kernels) -> bool:
    """Whether C's own product is faster than torch's between C's passes; results are alike to the bit.

    Both are tried once, on a layer of ordinary size: it depends on what the CPU, the compiler and torch know.
    """
    rows, columns, outputs = _TRIED
    values = torch.ones(rows, columns, dtype=torch.float32, device="cpu")
    weights = LinearWeights(
        weight=torch.ones(outputs, columns, dtype=torch.int8, device="cpu"),
        group_scale=None,
        weight_scale=torch.ones(outputs, 1, dtype=torch.float32, device="cpu"),
        weight_sum=torch.full((outputs, 1), columns, dtype=torch.int32, device="cpu"),
        bias=None,
        columns=columns,
    )
    whole = functools.partial(compiled.linear, values, None, weights.weight, None, *weights.scales)
    return integers.is_faster(whole, functools.partial(_by_passes, compiled, values, weights, None, False))


_TRIED = 256, 768, 768  # rows, columns and outputs of the layer that is timed


def product_on_the_cpu() -> str:
    """What multiplies integers on this CPU, in words."""
    if (compiled := cpu.kernels()) and multiplies_faster(compiled):
        return "by C, in one pass with what surrounds it"
    return "by torch" if integers.has_int8_units() else "by float32, as exactly: this CPU has no int8 units"


def _multiplied(
    tokens: Tokens,
    weights: LinearWeights,
    dtype: torch.dtype,
    gelu: bool,
    *,
    expanded: torch.Tensor | None = None,
    rescale: Callable[..., torch.Tensor] = integers.rescale,
) -> torch.Tensor:
    """The output for tokens that are quantized, with their scales and zero points."""
    quantized, scale, zero_point = tokens
    product = integers.integer_matmul(quantized, weights.expanded() if expanded is None else expanded)
    return rescale(product, scale, zero_point, *weights.scales, dtype, gelu)


def cpu_kernels(values: torch.Tensor) -> cpu.Kernels | None:
    return cpu.kernels() if has_memory(values) and values.dtype in cpu.DTYPES else None


def cpu_obstacle(device: torch.device) -> str:
    return "" if device.type == "cpu" else "for the CPU alone"


def by_triton(values: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
    """Tokens quantized, integers multiplied and the result scaled in two kernels of `triton_cuda`."""
    from cemq.quantize.kernels import triton_cuda as fused

    if weights.group_scale is None:
        return fused.linear_w8a8(values, weights.weight, *weights.scales)
    group_size = 2 * weights.weight.shape[1] // weights.group_scale.shape[1]
    return fused.linear_w4a8(values, weights.weight, weights.group_scale, *weights.scales, group_size)


@functools.cache
def triton_obstacle(device: torch.device) -> str:
    """NVIDIA devices have it from Ampere on; older ones have no int8 product that Triton reaches."""
    if device.type != "cuda":
        return "for CUDA devices alone"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip:
        return "for NVIDIA devices alone"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "for Ampere and newer"
    from cemq.quantize.kernels import triton_cuda  # noqa: F401  registers its operators before any trace

    return ""


def by_int_mm(values: torch.Tensor, weights: LinearWeights, smooth: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    """torch's own product, with the passes before and after it compiled by torch."""
    weight = weights.weight
    if weights.group_scale is not None:
        weight = compiled(integers.expand_int4)(weight, weights.group_scale, weights.columns)
    tokens, rescale = _tokens(values, smooth), compiled(integers.rescale)
    return _multiplied(tokens, weights, values.dtype, gelu, expanded=weight, rescale=rescale)


def _tokens(values: torch.Tensor, smooth: torch.Tensor | None) -> Tokens:
    """By cemq's own kernel where there is one: torch compiles division for CUDA to an approximation."""
    if triton_obstacle(values.device):
        return compiled(integers.quantize_tokens)(values, smooth)
    from cemq.quantize.kernels import triton_cuda as fused

    return fused.quantize_tokens(smoothed(values, smooth))


def int_mm_obstacle(device: torch.device) -> str:
    if device.type not in ("cpu", "cuda"):
        return "for CPUs and CUDA devices"
    return compile_obstacle(device.type)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once for all sizes: a model has more shapes than torch would compile a function for."""
    return torch.compile(function, dynamic=True)


def compile_obstacle(device: str) -> str:
    """Why torch.compile cannot work on a device type; empty where it can."""
    wanted = os.environ.get("CXX") or "g++"
    if not any(shutil.which(name) for name in (wanted, "clang++", "c++")):
        return f"no C++ compiler: {wanted} is not on the PATH"
    if device.startswith("cuda") and find_spec("triton") is None:
        return "Triton is not installed"
    return ""
