"""The arithmetic of a quantized layer on the machine at hand: C on the CPU, Triton or torch's own product on CUDA,
other libraries where they are asked for, torch ops everywhere else.

All of them compute what `integers` spells out (`registry` says which do not to the last bit). To ``torch.compile``
layers are single ops, which choose their kernel while they run: its own code for the torch ops is slower than C.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from cemq.quantize.kernels.choice import Choices, Made, choices
from cemq.quantize.kernels.own import by_torch_ops, cpu_kernels, smoothed
from cemq.quantize.kernels.registry import AUTO, KERNELS, check_kernel, register_kernel
from cemq.quantize.kernels.weights import LinearWeights, integer_weight

__all__ = [
    "AUTO",
    "KERNELS",
    "Choices",
    "LinearWeights",
    "Made",
    "check_kernel",
    "choices",
    "integer_linear",
    "integer_weight",
    "register_kernel",
    "weight_only_linear",
]


def integer_linear(
    values: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    bias: torch.Tensor | None,
    smooth: torch.Tensor | None = None,
    gelu: bool = False,
    by: str = AUTO,
) -> torch.Tensor:
    """Quantize each token, multiply integers, scale back; with ``gelu``, apply its tanh form to the result.

    Args:
        values: (tokens, in) in any float dtype.
        weight: int8 (out, in), or packed int4 where there is a ``group_scale`` (out, groups).
        weight_scale: float32 (out, 1).
        weight_sum: int32 (out, 1), row sums of the integer weight, which the tokens' zero points are multiplied with.
        bias: (out,) or None.
        smooth: float32 (in,) that the values are multiplied with before they are quantized, or None.
        by: The name of one in `KERNELS`, ``fastest`` of all, or ``auto``: the fastest of those with this very
            arithmetic.

    Returns:
        (tokens, out) in the dtype of ``values``.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and values.device.type in ("cpu", "cuda"):
        arguments = values, weight, group_scale, weight_scale, weight_sum, bias, smooth, gelu, by
        return _integer_linear_op(*arguments)
    values, bias = values.contiguous(), _as(bias, values.dtype)
    weights = LinearWeights(
        weight=weight,
        group_scale=group_scale,
        weight_scale=weight_scale,
        weight_sum=weight_sum,
        bias=bias,
        columns=values.shape[1],
    )
    run = by_torch_ops if compiling else choices().kernel(by, values, weights).run
    return run(values, weights, smooth, gelu)


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
    values = smoothed(values, smooth)
    if values.shape[0] < FEW_ROWS and (compiled := cpu_kernels(values)):
        return compiled.few_rows(values.contiguous(), weight, group_scale, weight_scale, bias)
    expanded = integer_weight(weight, group_scale, values.shape[1])
    return F.linear(values, (expanded * weight_scale).to(values.dtype), bias)


FEW_ROWS = 32  # below it the time goes into reading the weight, which is best read as integers


def _as(bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Some models feed float32 to layers of a bfloat16 model (Wan's time embedding)."""
    return bias if bias is None or bias.dtype == dtype else bias.to(dtype)


def _rows_by_outputs(values: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return values.new_empty(values.shape[0], weight.shape[0])


_integer_linear_op = torch.library.custom_op(
    "cemq::integer_linear",
    integer_linear,
    mutates_args=(),
    schema="(Tensor values, Tensor weight, Tensor? group_scale, Tensor weight_scale, Tensor weight_sum, Tensor? bias, "
    "Tensor? smooth, bool gelu=False, str by='auto') -> Tensor",
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
