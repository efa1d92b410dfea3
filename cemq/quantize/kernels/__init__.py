"""The arithmetic of a quantized layer on the machine at hand: C on the CPU, Triton on CUDA, torch ops everywhere else.

All of them compute what `integers` spells out. To ``torch.compile`` the CPU's layers are single ops: its own code for
the torch ops is slower than the C kernels.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from cemq.quantize import integers
from cemq.quantize.kernels import cpu

__all__ = ["integer_linear", "integer_weight", "weight_only_linear"]


def integer_linear(
    values: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    bias: torch.Tensor | None,
    smooth: torch.Tensor | None = None,
    gelu: bool = False,
) -> torch.Tensor:
    """Quantize each token, multiply integers, scale back; with ``gelu``, apply its tanh form to the result.

    Args:
        values: (tokens, in) in any float dtype.
        weight: int8 (out, in), or packed int4 where there is a ``group_scale`` (out, groups).
        weight_scale: float32 (out, 1).
        weight_sum: int32 (out, 1), row sums of the integer weight, which the tokens' zero points are multiplied with.
        bias: (out,) or None.
        smooth: float32 (in,) that the values are multiplied with before they are quantized, or None.

    Returns:
        (tokens, out) in the dtype of ``values``.
    """
    if torch.compiler.is_compiling() and values.device.type == "cpu":
        return _integer_linear_op(values, weight, group_scale, weight_scale, weight_sum, bias, smooth, gelu)
    values, bias = values.contiguous(), _as(bias, values.dtype)
    if values.is_cuda and _has_triton():
        from cemq.quantize.kernels import triton_cuda as fused

        if smooth is not None:
            values = (values * smooth).to(values.dtype)
        if group_scale is None:
            output = fused.linear_w8a8(values, weight, weight_scale, weight_sum, bias)
        else:
            group_size = 2 * weight.shape[1] // group_scale.shape[1]
            output = fused.linear_w4a8(values, weight, group_scale, weight_scale, weight_sum, bias, group_size)
        return F.gelu(output, approximate="tanh") if gelu else output
    compiled = _cpu_kernels(values)
    quantized, scale, zero_point = (compiled or integers).quantize_tokens(values, smooth)
    product = integers.integer_matmul(quantized, integer_weight(weight, group_scale, values.shape[1]))
    scales = scale, zero_point, weight_scale, weight_sum
    return (compiled or integers).rescale(product, *scales, bias, values.dtype, gelu)


def weight_only_linear(
    values: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    smooth: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product with the weight that the integers stand for; activations are not quantized. Shapes as above."""
    if torch.compiler.is_compiling() and values.device.type == "cpu":
        return _weight_only_linear_op(values, weight, group_scale, weight_scale, bias, smooth)
    bias = _as(bias, values.dtype)
    if smooth is not None:
        values = (values * smooth).to(values.dtype)
    if values.shape[0] < FEW_ROWS and (compiled := _cpu_kernels(values)):
        return compiled.few_rows(values.contiguous(), weight, group_scale, weight_scale, bias)
    expanded = integer_weight(weight, group_scale, values.shape[1])
    return F.linear(values, (expanded * weight_scale).to(values.dtype), bias)


FEW_ROWS = 32  # below it the time goes into reading the weight, which is best read as integers


def integer_weight(weight: torch.Tensor, group_scale: torch.Tensor | None, columns: int) -> torch.Tensor:
    """The int8 weight (out, columns) that takes part in the product."""
    if group_scale is None:
        return weight
    if _has_memory(weight) and (compiled := cpu.kernels()):
        return compiled.expand_int4(weight, group_scale, columns)
    return integers.expand_int4(weight, group_scale, columns)


def _as(bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Some models feed float32 to layers of a bfloat16 model (Wan's time embedding)."""
    return bias if bias is None or bias.dtype == dtype else bias.to(dtype)


def _cpu_kernels(values: torch.Tensor) -> cpu.Kernels | None:
    return cpu.kernels() if _has_memory(values) and values.dtype in cpu.DTYPES else None


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether C may read it: no fake tensor or other subclass, and no trace being taken that C would not show up in."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return plain and tensor.device.type == "cpu" and not torch.jit.is_tracing()


def _rows_by_outputs(values: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return values.new_empty(values.shape[0], weight.shape[0])


_integer_linear_op = torch.library.custom_op(
    "cemq::integer_linear",
    integer_linear,
    mutates_args=(),
    schema="(Tensor values, Tensor weight, Tensor? group_scale, Tensor weight_scale, Tensor weight_sum, Tensor? bias, "
    "Tensor? smooth, bool gelu=False) -> Tensor",
)
_weight_only_linear_op = torch.library.custom_op(
    "cemq::weight_only_linear",
    weight_only_linear,
    mutates_args=(),
    schema="(Tensor values, Tensor weight, Tensor? group_scale, Tensor weight_scale, Tensor? bias, Tensor? smooth) "
    "-> Tensor",
)
for _op in (_integer_linear_op, _weight_only_linear_op):
    _op.register_fake(_rows_by_outputs)


@torch.compiler.assume_constant_result  # a trace cannot follow it
def _has_triton() -> bool:
    """Whether the Triton kernels run: on NVIDIA devices from Ampere on, older ones have no int8 product they reach."""
    return _probe_triton()


@functools.cache
def _probe_triton() -> bool:
    if find_spec("triton") is None or torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        return False
    from cemq.quantize.kernels import triton_cuda  # noqa: F401  registers its operators before any trace

    return True
