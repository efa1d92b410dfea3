"""fp8: E4M3 numbers with a scale for each row, multiplied by `torch._scaled_mm` where that gives what it should."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

LARGEST = 448.0  # of E4M3, which has no infinity
_TINY = 1e-12
_MULTIPLE = 16  # tensor cores take inner and outer sizes in these
_CLOSE = 2**-7  # relative, of bfloat16 outputs and of sums that Hopper keeps in fewer bits


class E4M3:
    """Four bits of exponent, three of mantissa: numbers are off by a sixteenth of their size at most.

    Codes are stored as integers, because models cast what they hand to a layer to the dtype that it stores.
    """

    stored: str = "uint8"
    packed: int = 1

    def encode(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 (rows, columns) to codes of the same shape and scales (rows, 1): the largest number becomes 448."""
        scale = values.abs().amax(-1, keepdim=True).clamp_min(_TINY) / LARGEST
        return (values / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale

    def decode(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.float8_e4m3fn).float() * scale


def scaled_product(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """The product of codes (rows, in) and (out, in) with its scales and bias, or None where torch has none here.

    Exact but for the roundings of float32 sums and of ``dtype``; Hopper sums in fewer bits, as everybody lets it, which
    is little beside the three bits of the numbers.
    """
    if not has_scaled_product(tokens.device.type, tokens.device.index, dtype):
        return None
    return _scaled_product(tokens, token_scale, weight, weight_scale, bias, dtype)


def _scaled_product(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    columns = weight.shape[0]
    pad_inner, pad_columns = (-size % _MULTIPLE for size in (tokens.shape[1], columns))
    if pad_inner or pad_columns:  # codes of zero are zeros
        tokens, weight = F.pad(tokens, (0, pad_inner)), F.pad(weight, (0, pad_inner, 0, pad_columns))
        weight_scale = F.pad(weight_scale, (0, 0, 0, pad_columns))
        bias = bias if bias is None else F.pad(bias, (0, pad_columns))
    left, right = tokens.view(torch.float8_e4m3fn), weight.view(torch.float8_e4m3fn).t()
    if dtype == torch.bfloat16:
        output = torch._scaled_mm(
            left, right, token_scale, weight_scale.t(), bias=bias, out_dtype=dtype, use_fast_accum=True
        )
    else:  # scales of rows come with outputs in bfloat16 alone, but for some devices
        one = torch.ones((), dtype=torch.float32, device=tokens.device)
        output = torch._scaled_mm(left, right, one, one, out_dtype=torch.float32, use_fast_accum=True)
        output = output * (token_scale * weight_scale.t())
        output = (output if bias is None else output + bias.float()).to(dtype)
    return output[:, :columns] if pad_columns else output


@torch.compiler.assume_constant_result
def has_scaled_product(device: str, index: int | None, dtype: torch.dtype) -> bool:
    """Whether a device multiplies these codes, and right; NVIDIA's do from Ada on."""
    return _probe(device, index, dtype)


@functools.cache
def _probe(device: str, index: int | None, dtype: torch.dtype) -> bool:
    """Tries it once: builds and versions of torch differ in what they take."""
    place = torch.device(device, index) if index is not None else torch.device(device)
    generator = torch.Generator("cpu").manual_seed(0)
    values, weight = (
        torch.randn(rows, 40, generator=generator, dtype=torch.float32, device="cpu").to(place) for rows in (33, 24)
    )
    codec, bias = E4M3(), torch.ones(24, dtype=dtype, device=place)
    tokens, codes = codec.encode(values), codec.encode(weight)
    expected = codec.decode(*tokens).double() @ codec.decode(*codes).double().t() + 1
    try:
        found = _scaled_product(*tokens, *codes, bias, dtype).double()
    except (RuntimeError, NotImplementedError, ValueError, AttributeError):  # by version, device and build
        return False
    return float((found - expected).norm() / expected.norm()) < _CLOSE
