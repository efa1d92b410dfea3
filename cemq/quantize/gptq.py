"""Making a weight easier to quantize, and rounding it well, given the inputs it will be multiplied with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cemq.errors import SchemeError
from cemq.quantize.integers import INT4_MAX, INT4_MIN, INT8_MAX, channel_scales, group_scales, pack_int4

DAMPING = 0.01  # share of the mean diagonal that is added to the Hessian's, as in the paper
SMOOTHING = 0.3  # SmoothQuant's alpha: 0 evens out the weight's columns, 1 the input's; docs/benchmarks/quantization.md
_LARGEST_SMOOTHING = 100.0  # a channel that was silent in calibration must not explode later


@torch.no_grad()
def gptq_int4(
    weight: torch.Tensor, hessian: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`integers.quantize_int4`, fitted: values from GPTQ, scales for what it makes of the weight.

    A rounding error that later columns can make up for does little harm. What is left of a column's once they have is
    its square over that of the diagonal of the inverse Hessian's Cholesky factor (2210.17323), and so much it counts
    in the choice of group scales. The scales of channels are fitted once more in the end, to the integers.

    Args:
        weight: (out, in).
        hessian: (in, in) float32, the sum of ``x x^T`` over the layer's inputs ``x``.
        group_size: Columns that share a group scale.

    Returns:
        packed (out, padded_in / 2) uint8, group scales (out, groups) int8, scales (out, 1) float32.

    Raises:
        SchemeError: The Hessian holds NaN or infinity.
    """
    columns, padding = weight.shape[1], -weight.shape[1] % group_size
    inputs = _Inputs.of(hessian)
    importance = torch.empty_like(inputs.hessian[0])
    importance[inputs.order] = inputs.factor.diagonal() ** -2
    group_scale, scale = group_scales(
        F.pad(weight.float(), (0, padding)), group_size, importance=F.pad(importance, (0, padding))
    )
    wide = group_scale.repeat_interleave(group_size, 1)[:, :columns]
    values = _round_in_order(weight, inputs, wide * scale, INT4_MIN, INT4_MAX)
    scale = refitted_scale(weight, values * wide, inputs.hessian, scale)
    return pack_int4(F.pad(values, (0, padding)), group_size), group_scale.to(torch.int8), scale


@torch.no_grad()
def gptq_int8(weight: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`integers.quantize_channels`, fitted: int8 (out, in) from GPTQ, and float32 scales (out, 1)."""
    scale = channel_scales(weight)
    return _round_in_order(weight, _Inputs.of(hessian), scale, -INT8_MAX, INT8_MAX), scale


def refitted_scale(
    weight: torch.Tensor, integers: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The scales with which integers are nearest to the weight in the norm of the layer's output, ``tr(E H E^T)``.

    Least squares, channel by channel: never worse than before.

    Args:
        weight: (out, in).
        integers: (out, in), whole numbers.
        hessian: (in, in) float32.
        scale: (out, 1), what is kept where integers have nothing in common with the weight.
    """
    output = integers.float() @ hessian
    shared = (output * weight.float()).sum(1, keepdim=True)
    own = (output * integers).sum(1, keepdim=True)
    return torch.where((shared > 0) & (own > 0), shared / own, scale)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Inputs:
    """What GPTQ knows of a layer's inputs.

    Args:
        hessian: (in, in) float32, damped.
        order: (in,) columns in the order of falling Hessian diagonals, so that those that matter most are rounded while
            most others can still make up.
        factor: (in, in) upper Cholesky factor of the inverse of the Hessian, in that order.
    """

    hessian: torch.Tensor
    order: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor) -> _Inputs:
        hessian = hessian.float().clone()
        diagonal = hessian.diagonal()
        diagonal += DAMPING * diagonal.mean().clamp_min(1e-12)
        order = diagonal.argsort(descending=True)
        return cls(hessian=hessian, order=order, factor=_inverse_factor(hessian[order][:, order]))


def _round_in_order(
    weight: torch.Tensor, inputs: _Inputs, step: torch.Tensor, least: int, greatest: int
) -> torch.Tensor:
    """Whole multiples of ``step`` whose product with the recorded inputs stays close to the weight's (2210.17323).

    The weight is rounded column by column, and later columns make up for each rounding error.

    Args:
        weight: (out, in).
        step: What one unit is worth, (out, in) or (out, 1), of either sign.
        least: The smallest multiple.
        greatest: The largest.

    Returns:
        int8 (out, in).
    """
    order, factor = inputs.order, inputs.factor
    # transposed, so that what is a column above is a run of neighbours here
    remaining = weight.float().T[order].contiguous()
    step = step.T.expand(weight.shape[1], -1)[order]
    values = torch.empty_like(remaining, dtype=torch.int8)
    for start in range(0, len(order), _BLOCK):
        block = remaining[start : start + _BLOCK]
        end = start + len(block)
        errors = torch.empty_like(block)
        for row, (current, width) in enumerate(zip(block, step[start:end], strict=True)):
            reach = factor[start + row, start + row : end]
            rounded = (current / width).round_().clamp_(least, greatest)
            values[start + row] = rounded
            torch.div(current - rounded * width, reach[0], out=errors[row])
            block[row:].addr_(reach, errors[row], alpha=-1)
        remaining[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    ordered = torch.empty_like(values)
    ordered[order] = values
    return ordered.T.contiguous()


_BLOCK = 128  # columns updated at once: the paper's lazy batches


def smoothing(weight: torch.Tensor, channel_largest: torch.Tensor | None) -> torch.Tensor:
    """What to multiply the input's channels with, and divide the weight's columns by (SmoothQuant, 2211.10438, eq. 4).

    Args:
        weight: (out, in).
        channel_largest: (in,) the largest input of each channel; None: no smoothing, ones.

    Returns:
        float32 (in,), of geometric mean 1.
    """
    if channel_largest is None:
        return torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
    largest_input = channel_largest.to(weight.device).float().clamp_min(1e-5)
    largest_weight = weight.float().abs().amax(0).clamp_min(1e-5)
    smooth = largest_weight ** (1 - SMOOTHING) / largest_input**SMOOTHING
    return (smooth / smooth.log().mean().exp()).clamp(1 / _LARGEST_SMOOTHING, _LARGEST_SMOOTHING)


def low_rank(weight: torch.Tensor, hessian: torch.Tensor | None, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a weight that is best kept out of quantization: ``up @ down``, bfloat16 (out, rank) and (rank, in).

    The best approximation of that rank in the norm of the layer's output, ``tr(E H E^T)``; without a Hessian in that of
    the weight. Taken off before the rest is quantized, as in SVDQuant (2411.05007).
    """
    weight = weight.float()
    if hessian is None:
        up, sizes, down = torch.linalg.svd(weight, full_matrices=False)
        return (up[:, :rank] * sizes[:rank]).bfloat16(), down[:rank].bfloat16()
    damped = hessian.float().clone()
    damped.diagonal().add_(DAMPING * hessian.diagonal().mean().clamp_min(1e-12))
    root = torch.linalg.cholesky(damped)
    up, sizes, down = torch.linalg.svd(weight @ root, full_matrices=False)
    down = torch.linalg.solve_triangular(root, down[:rank], upper=False, left=False)
    return (up[:, :rank] * sizes[:rank]).bfloat16(), down.bfloat16()


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse; more damping where rounding has made the Hessian indefinite."""
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return inverse
        hessian.diagonal().add_(hessian.diagonal().mean() * DAMPING)
    raise SchemeError(
        "a layer's recorded inputs hold NaN or infinity: check dtype and calibration, or round to nearest"
    )
