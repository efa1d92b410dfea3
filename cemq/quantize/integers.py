"""Float tensors to integers and back; the integer product. Nothing here knows of modules or models."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

INT8_MAX = 127
INT4_MAX = 7
# int4 times its group scale must fit in int8, so that the product with int8 activations stays integer
GROUP_SCALE_MAX = INT8_MAX // INT4_MAX
_TINY = 1e-12
_CLIP_TRIALS = 4  # how far below the smallest unclipped group scale to look for a smaller squared error


def quantize_channels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 per output channel, ``weight ~ quantized * scale``: int8 (out, in) and float32 (out, 1)."""
    weight = weight.float()
    scale = weight.abs().amax(-1, keepdim=True).clamp_min(_TINY) / INT8_MAX
    return (weight / scale).round_().to(torch.int8), scale


def quantize_tokens(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric int8 per token: ``values ~ (quantized - zero_point) * scale``, and zero stays exactly zero.

    What leaves an activation function lies mostly on one side of zero, where symmetric scales waste a bit: on the
    built-in DiT this lowers the error of a W8A8 forward by a quarter.

    Returns:
        int8 (tokens, channels), float32 scales (tokens, 1), int32 zero points (tokens, 1) in -128..127.
    """
    values = values.float()
    low, high = values.amin(-1, keepdim=True).clamp_max_(0), values.amax(-1, keepdim=True).clamp_min_(0)
    scale = ((high - low) / 255).clamp_min_(_TINY)
    zero_point = (-128 - low / scale).round_()
    quantized = (values / scale).round_().add_(zero_point).clamp_(-128, 127)
    return quantized.to(torch.int8), scale, zero_point.to(torch.int32)


def quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Progressive int4: ``weight ~ int4 * group_scale * scale`` with integer group scales (as in QServe, 2405.04532).

    ``int4`` lies in -7..7 and ``group_scale`` in 1..18, so their product is an int8 weight. Each group scale is the one
    of the four largest useful candidates with the least squared error.

    Returns:
        packed (out, padded_in / 2) uint8, group scales (out, groups) int8, scales (out, 1) float32.
    """
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    grouped = F.pad(weight.float(), (0, groups * group_size - columns)).view(rows, groups, group_size)
    scale = grouped.abs().amax((1, 2)).clamp_min(_TINY).view(rows, 1, 1) / (INT4_MAX * GROUP_SCALE_MAX)
    unclipped = (grouped.abs().amax(-1, keepdim=True) / (INT4_MAX * scale)).ceil().clamp(1, GROUP_SCALE_MAX)
    best_error = best = best_scale = None
    for trial in range(_CLIP_TRIALS):
        group_scale = (unclipped - trial).clamp_min(1)
        step = group_scale * scale
        quantized = (grouped / step).round().clamp(-INT4_MAX, INT4_MAX)
        error = (quantized * step - grouped).square().sum(-1, keepdim=True)
        if best is None:
            best_error, best, best_scale = error, quantized, group_scale
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, quantized, best)
        best_scale = torch.where(better, group_scale, best_scale)
    return pack_int4(best.to(torch.int8).flatten(1)), best_scale.squeeze(-1).to(torch.int8), scale.view(rows, 1)


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """int8 in -8..7, shape (rows, even), to uint8 (rows, even / 2); the even column sits in the low half byte."""
    shifted = (values + 8).to(torch.uint8)
    return shifted[:, ::2] | (shifted[:, 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_int4`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1).to(torch.int8) - 8


def expand_int4(packed: torch.Tensor, group_scale: torch.Tensor, columns: int) -> torch.Tensor:
    """The int8 weight (rows, columns) that packed int4 and its integer group scales stand for."""
    values = unpack_int4(packed).view(*group_scale.shape, -1)
    return (values * group_scale.unsqueeze(-1)).flatten(1)[:, :columns]


def integer_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Exact int8 x int8 product in int32: left (m, k), right (n, k), result (m, n)."""
    if left.is_cuda:  # cuBLAS wants more than 16 rows, and k and n in multiples of 8
        return _padded_matmul(left, right, min_rows=17, multiple=8)
    if not _cpu_product_is_exact():
        return (left.double() @ right.double().t()).to(torch.int32)
    if left.shape[1] == 1:  # torch leaves the result of a one-column product uninitialised
        return _padded_matmul(left, right, min_rows=1, multiple=2)
    return torch._int_mm(left.contiguous(), right.t())


@functools.cache
def _cpu_product_is_exact() -> bool:
    """False on CPUs without VNNI, where oneDNN sums pairs of products in 16 bits and saturates."""
    extreme = torch.full((32, 64), INT8_MAX, dtype=torch.int8)
    return bool((torch._int_mm(extreme, extreme.t()) == 64 * INT8_MAX**2).all())


def _padded_matmul(left: torch.Tensor, right: torch.Tensor, *, min_rows: int, multiple: int) -> torch.Tensor:
    (rows, inner), columns = left.shape, right.shape[0]
    pad_inner, pad_columns = -inner % multiple, -columns % multiple
    left = F.pad(left, (0, pad_inner, 0, max(min_rows - rows, 0)))
    right = F.pad(right, (0, pad_inner, 0, pad_columns))
    return torch._int_mm(left, right.t())[:rows, :columns]
