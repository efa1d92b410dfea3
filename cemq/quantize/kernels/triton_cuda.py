"""Quantized linear layers on CUDA, in Triton: tokens to int8, then one integer product that also rescales its result.

Importing this module imports Triton. If Triton was imported with ``TRITON_INTERPRET=1``, the functions take CPU tensors
instead, slowly; the tests do that.
"""

# no `from __future__ import annotations`: torch derives the operators' schemas from the annotations
from typing import Any

import torch
import triton
import triton.language as tl

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # what `quantize_tokens` returns

_QUANTIZE_BLOCK = 2048
_ROW_BLOCKS = tl.constexpr(8)  # computed side by side, so that they find the weight in the L2 cache
_SIGN_BITS = tl.constexpr(-0x7F7F7F80)  # 0x80808080 as int32


@triton.jit
def _round(values):
    """To the nearest integer, half to even, below 2**22. libdevice has this too, but not for the interpreter."""
    return (values + 12582912.0) - 12582912.0


@triton.jit
def _quantize_kernel(values, tokens, scale, zero_point, k, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    values += row * k
    tokens += row * k
    columns = tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    poison = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, k, BLOCK):
        value = tl.load(values + start + columns, mask=start + columns < k, other=0).to(tl.float32)
        low = tl.minimum(low, value)
        high = tl.maximum(high, value)
        poison += value - value  # NaN, which minimum and maximum ignore, must not give a plausible row
    lowest = tl.min(low, 0)
    span = tl.max(high, 0) - lowest  # pyright: ignore[reportOperatorIssue]  # tuples only where indices are asked for
    step = tl.maximum(span * (1 / 255), 1e-12) + tl.sum(poison, 0)
    inverse = tl.div_rn(1.0, step)
    zero = _round(-128 - lowest * inverse)  # pyright: ignore[reportOperatorIssue]  # likewise
    tl.store(scale + row, step)
    tl.store(zero_point + row, zero.to(tl.int32))
    for start in range(0, k, BLOCK):
        value = tl.load(values + start + columns, mask=start + columns < k, other=0).to(tl.float32)
        token = tl.minimum(tl.maximum(_round(value * inverse) + zero, -128), 127)
        tl.store(tokens + start + columns, token.to(tl.int8), mask=start + columns < k)


@triton.jit
def _block(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows and columns of the output that this program computes."""
    blocks = tl.cdiv(n, BLOCK_N)
    first = tl.program_id(0) // (_ROW_BLOCKS * blocks) * _ROW_BLOCKS
    height = tl.minimum(tl.cdiv(m, BLOCK_M) - first, _ROW_BLOCKS)
    index = tl.program_id(0) % (_ROW_BLOCKS * blocks)
    rows = (first + index % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    return rows, index // height * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _store(product, rows, columns, scale, zero_point, weight_scale, weight_sum, bias, output, m, n):
    """Rescales an int32 product and stores it; an int32 output gets the product itself."""
    dtype: tl.constexpr = output.dtype.element_ty
    result = product
    if dtype != tl.int32:
        zero = tl.load(zero_point + rows, mask=rows < m, other=0)
        total = tl.load(weight_sum + columns, mask=columns < n, other=0)
        left = tl.load(scale + rows, mask=rows < m, other=0)
        right = tl.load(weight_scale + columns, mask=columns < n, other=0)
        result = (product - zero[:, None] * total[None, :]).to(tl.float32) * (left[:, None] * right[None, :])
        if bias is not None:
            result += tl.load(bias + columns, mask=columns < n, other=0).to(tl.float32)[None, :]
    pointers = output + rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(pointers, result.to(dtype), mask=(rows < m)[:, None] & (columns < n)[None, :])


_INTERPRETED = not isinstance(_store, triton.JITFunction)


# (rows, columns, depth, warps, stages); depth in steps of 64 columns of the weight, the usual group of int4
_BLOCKS = [
    (128, 256, 1, 8, 3), (128, 128, 2, 8, 3), (128, 128, 1, 4, 4),
    (128, 64, 2, 4, 3), (64, 128, 2, 4, 3), (64, 64, 2, 4, 4),
]  # fmt: skip


def _tuned(inner: str, step: int, largest: tuple[int, int, int, int, int]):
    """Autotuning over `_BLOCKS` and one of the kernel's own; a block too large for the GPU's memory drops out.

    ``step`` is what the kernel's ``inner`` calls 64 columns.
    """
    configs = [
        triton.Config({"BLOCK_M": rows, "BLOCK_N": columns, inner: depth * step}, num_warps=warps, num_stages=stages)
        for rows, columns, depth, warps, stages in ([(16, 32, 2, 1, 1)] if _INTERPRETED else [largest, *_BLOCKS])
    ]
    return triton.autotune(configs, key=["n", "k", "size"], do_bench=_bench)


def _bench(call, quantiles):
    """Triton's own takes 125 ms for each block shape, seconds for each layer shape that a model has."""
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


# In both kernels, rows and columns beyond the end wrap around, so that only the inner dimension and the store need a
# mask; and the weight block is loaded as it lies and then transposed: loaded as (k, n), the compiler fetches operands
# ahead byte by byte on Ampere and Ada, at thrice the instructions.


@_tuned("BLOCK_K", 64, largest=(128, 256, 2, 8, 3))
@triton.jit(do_not_specialize=["m", "size"])
def w8_kernel(
    tokens, scale, zero_point, weight, weight_scale, weight_sum, bias, output, m, n, k, size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, columns = _block(m, n, BLOCK_M, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    left = tokens + (rows % m).to(tl.int64)[:, None] * k + inner[None, :]
    right = weight + (columns % n).to(tl.int64)[:, None] * k + inner[None, :]
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, k, BLOCK_K):
        inside = (inner < k - start)[None, :]
        a = tl.load(left + start, mask=inside, other=0)
        b = tl.load(right + start, mask=inside, other=0)
        product = tl.dot(a, tl.trans(b), product, out_dtype=tl.int32)
    _store(product, rows, columns, scale, zero_point, weight_scale, weight_sum, bias, output, m, n)


@triton.jit
def _scaled(nibbles, factor):
    """Four weights in each int32: (nibble - 8) * factor in each byte, computed at once.

    With 128 more in each byte none is negative, so nothing is borrowed from the byte above; flipping the sign bits
    takes the 128 away again.
    """
    return ((nibbles & 0x0F0F0F0F) * factor + (_SIGN_BITS - 0x08080808 * factor)) ^ _SIGN_BITS


@_tuned("GROUPS", 1, largest=(256, 128, 1, 8, 3))
@triton.jit(do_not_specialize=["m", "size"])
def w4_kernel(
    tokens, scale, zero_point, words, group_scale, weight_scale, weight_sum, bias, output, m, n, k, size, groups,
    WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    rows, columns = _block(m, n, BLOCK_M, BLOCK_N)
    BLOCK_K: tl.constexpr = GROUPS * WORDS * 8
    inner, word, group = tl.arange(0, BLOCK_K), tl.arange(0, GROUPS * WORDS), tl.arange(0, GROUPS)
    wrapped = (columns % n).to(tl.int64)[:, None]
    left = tokens + (rows % m).to(tl.int64)[:, None] * k + inner[None, :]
    right = words + wrapped * (groups * WORDS) + word[None, :]
    factors = group_scale + wrapped * groups + group[None, :]
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    # single bytes cannot be fetched asynchronously, so the loop loads the factors of the next step
    upcoming = tl.load(factors, mask=(group < groups)[None, :], other=0)
    for first in range(0, groups, GROUPS):
        factor = tl.broadcast_to(upcoming.to(tl.int32)[:, :, None], (BLOCK_N, GROUPS, WORDS))
        factor = tl.reshape(factor, (BLOCK_N, GROUPS * WORDS))
        following = first + GROUPS
        upcoming = tl.load(factors + following, mask=(group < groups - following)[None, :], other=0)
        nibbles = tl.load(right + first * WORDS, mask=(word < (groups - first) * WORDS)[None, :], other=0)
        # a group's first half lies in the low half bytes; regrouping the bytes, each in its place, compiles to nothing
        halves = tl.join(_scaled(nibbles, factor), _scaled(nibbles >> 4, factor))
        halves = tl.permute(tl.reshape(halves, (BLOCK_N, GROUPS, WORDS, 2)), (0, 1, 3, 2))
        b = tl.reshape(halves, (BLOCK_N, GROUPS * 2 * WORDS))
        even = tl.join(b.to(tl.int8), (b >> 16).to(tl.int8))  # bytes 0 and 2
        odd = tl.join((b >> 8).to(tl.int8), (b >> 24).to(tl.int8))
        b = tl.reshape(tl.join(even, odd), (BLOCK_N, BLOCK_K))
        start = first * (WORDS * 8)
        a = tl.load(left + start, mask=(inner < k - start)[None, :], other=0)
        product = tl.dot(a, tl.trans(b), product, out_dtype=tl.int32)
    _store(product, rows, columns, scale, zero_point, weight_scale, weight_sum, bias, output, m, n)


def _quantize(values: torch.Tensor) -> Tokens:
    values = values.contiguous()
    rows, k = values.shape
    tokens = torch.empty_like(values, dtype=torch.int8)
    scale = values.new_empty((rows, 1), dtype=torch.float32)
    zero_point = values.new_empty((rows, 1), dtype=torch.int32)
    block = min(triton.next_power_of_2(k), _QUANTIZE_BLOCK)
    with torch.cuda.device_of(values):
        # a fused multiply-add would skip a rounding
        launch: Any = _quantize_kernel[(rows,)]
        launch(values, tokens, scale, zero_point, k, BLOCK=block, enable_fp_fusion=False)
    return tokens, scale, zero_point


def _multiply(kernel, quantized, operands, bias: torch.Tensor | None, dtype: torch.dtype, **sizes: int) -> torch.Tensor:
    """The output for what `_quantize` returns and a kernel's weight operands; int32 asks for the bare product."""
    (m, k), n = quantized[0].shape, operands[0].shape[0]
    output = operands[0].new_empty((m, n), dtype=dtype)
    size = triton.next_power_of_2(m)  # the autotuner chooses for sizes, not for each m

    def grid(chosen: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(m, chosen["BLOCK_M"]) * triton.cdiv(n, chosen["BLOCK_N"]),)

    with torch.cuda.device_of(output):
        kernel[grid](*quantized, *operands, bias, output, m, n, k, size, **sizes, enable_fp_fusion=False)
    return output


def multiply_w8(
    quantized: Tokens,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Quantized tokens times an int8 weight; as int32 the bare product, which is exact."""
    return _multiply(w8_kernel, quantized, (weight, weight_scale, weight_sum), bias, dtype)


def multiply_w4(
    quantized: Tokens,
    packed: torch.Tensor,
    group_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same for an int4 weight."""
    operands = packed.view(torch.int32), group_scale, weight_scale, weight_sum
    sizes = {"groups": group_scale.shape[1], "WORDS": group_size // 8}
    return _multiply(w4_kernel, quantized, operands, bias, dtype, **sizes)


@torch.library.custom_op("cemq::triton_quantize_tokens", mutates_args=())
def quantize_tokens(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`cemq.quantize.integers.quantize_tokens`: int8 tokens (m, k), float32 scales (m, 1), int32 zero points (m, 1)."""
    return _quantize(values)


@torch.library.custom_op("cemq::triton_linear_w8a8", mutates_args=())
def linear_w8a8(
    values: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Values (m, k) quantized per token, times an int8 weight (n, k): (m, n) in the dtype of the values."""
    return multiply_w8(_quantize(values), weight, weight_scale, weight_sum, bias, values.dtype)


@torch.library.custom_op("cemq::triton_linear_w4a8", mutates_args=())
def linear_w4a8(
    values: torch.Tensor,
    packed: torch.Tensor,
    group_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """The same for an int4 weight in groups of ``group_size`` columns, a power of two from 32 on.

    Each row of ``packed`` (n, groups * group_size / 2) holds, group by group, the first half of the group's columns in
    the low half bytes and the second in the high ones, each plus 8. ``group_scale`` (n, groups) lies in -15..18.
    """
    return multiply_w4(_quantize(values), packed, group_scale, weight_scale, weight_sum, bias, group_size, values.dtype)


@quantize_tokens.register_fake
def _(values):
    column = values.new_empty((values.shape[0], 1), dtype=torch.float32)
    return values.new_empty(values.shape, dtype=torch.int8), column, torch.empty_like(column, dtype=torch.int32)


@linear_w8a8.register_fake
@linear_w4a8.register_fake
def _(values, weight, *_args, **_options):
    return values.new_empty((values.shape[0], weight.shape[0]))
