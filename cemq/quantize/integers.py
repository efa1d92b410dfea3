"""Float tensors to integers and back; the integer product. Nothing here knows of modules or models."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

INT8_MAX = 127
INT4_MIN, INT4_MAX = -8, 7
GROUP_SIZE = 64  # int4 weights that share a group scale
# int4 times its group scale must fit in int8, so that the product with int8 activations stays integer
GROUP_SCALE_MAX = INT8_MAX // -INT4_MIN
_TINY = 1e-12
_EXACT_COLUMNS = 1 << 10
_ROWS_AT_ONCE = 1 << 8
_VALUES_AT_ONCE = 1 << 20
_CLIP_TRIALS = 3  # how many group scales, from the smallest unclipped one down, to try; of either sign


def quantize_channels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 per output channel, ``weight ~ quantized * scale``: int8 (out, in) and float32 (out, 1)."""
    scale = channel_scales(weight)
    return (weight.float() / scale).round_().to(torch.int8), scale


def channel_scales(weight: torch.Tensor) -> torch.Tensor:
    """The symmetric int8 scale of each output channel, float32 (out, 1)."""
    return weight.float().abs().amax(-1, keepdim=True).clamp_min(_TINY) / INT8_MAX


def quantize_tokens(
    values: torch.Tensor, smooth: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric int8 per token: ``values ~ (quantized - zero_point) * scale``, and zero stays exactly zero.

    What leaves an activation function lies mostly on one side of zero, where symmetric scales waste a bit: on the
    built-in DiT this lowers the error of a W8A8 forward by a quarter. The kernels do the same float32 operations in the
    same order.

    Args:
        values: (tokens, channels).
        smooth: float32 (channels,) that the values are multiplied with first, or None.

    Returns:
        int8 (tokens, channels), float32 scales (tokens, 1), int32 zero points (tokens, 1) in -128..127.
    """
    values = values.float() if smooth is None else values.float() * smooth
    low, high = values.amin(-1, keepdim=True).clamp_max(0), values.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) * (1 / 255)).clamp_min(_TINY)
    inverse = scale.reciprocal()
    zero_point = (-128 - low * inverse).round()
    quantized = ((values * inverse).round() + zero_point).clamp(-128, 127)
    return quantized.to(torch.int8), scale, zero_point.to(torch.int32)


def quantize_symmetric(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Symmetric int8 per token, as other libraries' kernels have it: the same three, zero points being zero.

    Args:
        values: (tokens, channels).
    """
    values = values.float()
    scale = (values.abs().amax(-1, keepdim=True) / INT8_MAX).clamp_min(_TINY)
    return (values / scale).round().to(torch.int8), scale, torch.zeros_like(scale, dtype=torch.int32)


def group_scales(
    weight: torch.Tensor, group_size: int, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Progressive scales for int4: ``weight ~ int4 * group_scale * scale``, group scales whole (QServe, 2405.04532).

    ``int4`` lies in -8..7 and ``group_scale`` in -15..-1 or 1..15, so their product is an int8 weight. The sign turns
    the further reach of int4 to the side of the group that needs it: sixteen levels, where symmetric ones are fifteen.
    Each group scale is the one of some candidates with the least squared error.

    Args:
        weight: (out, groups * group_size).
        group_size: Columns that share a group scale.
        importance: (groups * group_size,), how much each column's squared error counts; None: all alike.

    Returns:
        group scales (out, groups) float32 of whole numbers, scales (out, 1) float32.
    """
    grouped = weight.float().unflatten(1, (-1, group_size))
    scale = grouped.abs().amax((1, 2)).clamp_min(_TINY).view(-1, 1, 1) / (-INT4_MIN * GROUP_SCALE_MAX)
    unclipped = (grouped.abs().amax(-1, keepdim=True) / (-INT4_MIN * scale)).ceil().clamp(1, GROUP_SCALE_MAX)
    weighting = 1.0 if importance is None else importance.float().view(1, -1, group_size)
    candidates, errors = [], []
    for trial, sign in itertools.product(range(_CLIP_TRIALS), (1, -1)):
        group_scale = (unclipped - trial).clamp_min(1) * sign
        step = group_scale * scale
        error = (grouped / step).round_().clamp_(INT4_MIN, INT4_MAX).mul_(step).sub_(grouped).square_()
        candidates.append(group_scale.squeeze(-1))
        errors.append((error * weighting).sum(-1))
    best = torch.stack(errors).argmin(0, keepdim=True)
    return torch.stack(candidates).gather(0, best).squeeze(0), scale.view(-1, 1)


def quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round to nearest under the scales of `group_scales`, some rows at a time to need little memory.

    Returns:
        packed (out, padded_in / 2) uint8, group scales (out, groups) int8, scales (out, 1) float32.
    """
    parts = [_round_int4(rows, group_size) for rows in weight.split(max(1, _VALUES_AT_ONCE // weight.shape[1]))]
    packed, group_scale, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return packed, group_scale, scale


def _round_int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = F.pad(weight.float(), (0, -weight.shape[1] % group_size))
    group_scale, scale = group_scales(weight, group_size)
    step = (group_scale * scale).repeat_interleave(group_size, 1)
    values = (weight / step).round_().clamp_(INT4_MIN, INT4_MAX)
    return pack_int4(values.to(torch.int8), group_size), group_scale.to(torch.int8), scale


def round_to_scales(weight: torch.Tensor, scale: torch.Tensor, group_scale: torch.Tensor | None) -> torch.Tensor:
    """Integers for a weight (out, in) under scales that are there already, packed where there are group scales.

    Args:
        scale: float32 (out, 1).
        group_scale: int8 (out, groups) of int4, or None.
    """
    if group_scale is None:
        return (weight / scale).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    weight = F.pad(weight, (0, -weight.shape[1] % GROUP_SIZE))
    step = (group_scale * scale).repeat_interleave(GROUP_SIZE, 1)
    return pack_int4((weight / step).round_().clamp_(INT4_MIN, INT4_MAX).to(torch.int8), GROUP_SIZE)


def pack_int4(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """int8 in -8..7, shape (rows, groups * group_size), to uint8 (rows, groups * group_size / 2).

    A byte holds a column of the first half of a group in its low half, and its like of the second half in its high
    half: both halves of a group unpack to runs of neighbours, which vector units and tensor cores can take as they are.
    """
    low, high = (values + 8).to(torch.uint8).unflatten(1, (-1, 2, group_size // 2)).unbind(2)
    return (low | (high << 4)).flatten(1)


def unpack_int4(packed: torch.Tensor, group_size: int) -> torch.Tensor:
    """The inverse of `pack_int4`."""
    halves = packed.unflatten(1, (-1, 1, group_size // 2))
    return torch.cat((halves & 15, halves >> 4), 2).flatten(1).to(torch.int8) - 8


def expand_int4(packed: torch.Tensor, group_scale: torch.Tensor, columns: int) -> torch.Tensor:
    """The int8 weight (rows, columns) that packed int4 and its integer group scales stand for."""
    group_size = 2 * packed.shape[1] // group_scale.shape[1]
    values = unpack_int4(packed, group_size).unflatten(1, (-1, group_size))
    return (values * group_scale.unsqueeze(-1)).flatten(1)[:, :columns]


def rescale(
    product: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    gelu: bool = False,
) -> torch.Tensor:
    """From the int32 product (tokens, out) of quantized tokens and an integer weight to what the float layer gives.

    With ``gelu`` its tanh form is applied before the result is rounded to ``dtype``.
    """
    output = (product - zero_point * weight_sum.t()).float() * (scale * weight_scale.t())
    if bias is not None:
        output = output + bias.float()
    if gelu:
        output = F.gelu(output, approximate="tanh")
    return output.to(dtype)


def integer_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Exact int8 x int8 product in int32: left (m, k), right (n, k), result (m, n)."""
    if left.is_cuda:  # cuBLAS wants more than 16 rows, and k and n in multiples of 8
        return padded_matmul(left, right, min_rows=17, multiple=8)
    if not has_int8_units():
        return float_matmul(left, right)
    if left.shape[1] == 1:  # torch leaves the result of a one-column product uninitialised
        return padded_matmul(left, right, min_rows=1, multiple=2)
    return torch._int_mm(left.contiguous(), right.t())


def float_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The same by float32: sums of `_EXACT_COLUMNS` products of int8 are whole numbers up to 2**24, all of which it
    has, in whichever order they are summed. Some rows of ``right`` at a time, to need little memory."""
    product = torch.zeros(len(left), len(right), dtype=torch.int32, device=left.device)
    for values, weight in zip(left.split(_EXACT_COLUMNS, 1), right.split(_EXACT_COLUMNS, 1), strict=True):
        values = values.float()
        for rows, part in zip(product.split(_ROWS_AT_ONCE, 1), weight.split(_ROWS_AT_ONCE), strict=True):
            rows += (values @ part.float().t()).to(torch.int32)
    return product


@torch.compiler.assume_constant_result
def has_int8_units() -> bool:
    """Whether this CPU multiplies int8 faster than float32, and right; what it has not is multiplied by the latter."""
    return probe_int8_units()


@functools.cache
def probe_int8_units() -> bool:
    """Tries both. Without VNNI torch multiplies one number at a time, some twenty times slower than float32, or adds
    pairs of products in 16 bits and saturates, which the CPU's name does not tell."""
    extreme = torch.full((64, 256), INT8_MAX, dtype=torch.int8, device="cpu")
    if not (torch._int_mm(extreme, extreme.t()) == 256 * INT8_MAX**2).all():
        return False
    units = functools.partial(torch._int_mm, extreme, extreme.t())
    return is_faster(units, functools.partial(float_matmul, extreme, extreme))


def is_faster(call: Callable[[], object], other: Callable[[], object]) -> bool:
    """Whether a call takes less time than another: the least of three turns of each."""
    seconds = {call: math.inf, other: math.inf}
    for each in (call, other) * 3:
        started = time.perf_counter()
        each()
        seconds[each] = min(seconds[each], time.perf_counter() - started)
    return seconds[call] < seconds[other]


def padded_matmul(left: torch.Tensor, right: torch.Tensor, *, min_rows: int, multiple: int) -> torch.Tensor:
    """The product of matrices that are filled up with zeros to sizes which the device multiplies."""
    (rows, inner), columns = left.shape, right.shape[0]
    pad_inner, pad_columns = -inner % multiple, -columns % multiple
    left = F.pad(left, (0, pad_inner, 0, max(min_rows - rows, 0)))
    right = F.pad(right, (0, pad_inner, 0, pad_columns))
    return torch._int_mm(left, right.t())[:rows, :columns].contiguous()
