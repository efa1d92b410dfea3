"""bitsandbytes' LLM.int8() and 4-bit floats: https://github.com/bitsandbytes-foundation/bitsandbytes."""

from __future__ import annotations

import functools
from typing import Any

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from bitsandbytes import matmul_4bit
from torch.overrides import TorchFunctionMode

from cemq.quantize.backends import refuse_one_feature
from cemq.quantize.layers import InputStatistics, Layout, QuantizedLinear
from cemq.quantize.schemes import Scheme

OUTLIER = 6.0  # inputs from here on are multiplied in floats, the paper's threshold
BLOCK = 64  # weights that share a scale in 4 bits
_FOUR_BIT_TYPES = {"w4a16": "nf4", "w4a16-fp4": "fp4"}


class Int8Linear(QuantizedLinear):
    """LLM.int8() (Dettmers et al., 2208.07339): int8 per token and per output channel, columns of outliers in floats.

    ``weight`` is int8 (out, in), ``weight_absmax`` float32 (out,). Like `bitsandbytes.nn.Linear8bitLt`, but nothing is
    kept outside the stored tensors. bitsandbytes rounds the inputs to float16 before it quantizes them, and on CUDA the
    product as well.
    """

    weight_absmax: torch.Tensor

    @classmethod
    def layout(cls, in_features: int, out_features: int, scheme: Scheme) -> Layout:
        return {
            "weight": ((out_features, in_features), torch.int8),
            "weight_absmax": ((out_features,), torch.float32),
        }

    @classmethod
    def quantize(
        cls, weight: torch.Tensor, scheme: Scheme, statistics: InputStatistics | None
    ) -> dict[str, torch.Tensor]:
        refuse_one_feature(weight, "w8a8 of bitsandbytes")
        quantized, absmax, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return {"weight": quantized, "weight_absmax": absmax}

    def multiply(self, values: torch.Tensor) -> torch.Tensor:
        # What bitsandbytes.matmul does, without its log message at every call. Of the copy: bitsandbytes blanks the
        # outliers of its argument and then restores them.
        values = values.contiguous()
        tokens = values.to(torch.float16, copy=True)
        quantized, absmax, outliers = bnb.int8_vectorwise_quant(tokens, threshold=OUTLIER)
        bias = None if self.bias is None else self.bias.to(values.dtype)
        multiply = torch.ops.bitsandbytes.int8_mixed_scaled_mm
        return multiply(values, quantized, self.integers, absmax, self.weight_absmax, outliers, bias)[0]


class FourBitLinear(QuantizedLinear):
    """4-bit floats in blocks of 64: nf4 (QLoRA, Dettmers et al., 2305.14314) or fp4; the inputs stay as they are.

    ``weight`` is uint8 (out, padded_in / 2), ``weight_absmax`` float32 (out, blocks). Rows are padded to whole blocks:
    bitsandbytes has no fast kernel for others. `bitsandbytes.nn.Linear4bit` is left out of it, because on some CPUs its
    first forward repacks the weight and rounds the scales to bfloat16.
    """

    weight_absmax: torch.Tensor

    @classmethod
    def layout(cls, in_features: int, out_features: int, scheme: Scheme) -> Layout:
        blocks = -(-in_features // BLOCK)
        return {
            "weight": ((out_features, blocks * BLOCK // 2), torch.uint8),
            "weight_absmax": ((out_features, blocks), torch.float32),
        }

    @classmethod
    def quantize(
        cls, weight: torch.Tensor, scheme: Scheme, statistics: InputStatistics | None
    ) -> dict[str, torch.Tensor]:
        padded = F.pad(weight.float(), (0, -weight.shape[1] % BLOCK)).contiguous()
        packed, state = bnb.quantize_4bit(padded, blocksize=BLOCK, quant_type=_FOUR_BIT_TYPES[scheme.name])
        rows = weight.shape[0]
        return {"weight": packed.reshape(rows, -1), "weight_absmax": state.absmax.reshape(rows, -1)}

    def multiply(self, values: torch.Tensor) -> torch.Tensor:
        kind, padded_in = _FOUR_BIT_TYPES[self.scheme.name], 2 * self.integers.shape[1]
        state = bnb.QuantState(
            absmax=self.weight_absmax.flatten(),
            shape=torch.Size((self.out_features, padded_in)),
            code=code_of(kind, values.device),
            blocksize=BLOCK,
            quant_type=kind,
            dtype=values.dtype,
        )
        values = F.pad(values, (0, padded_in - self.in_features)).contiguous()
        bias = None if self.bias is None else self.bias.to(values.dtype)
        return matmul_4bit(values, self.integers.view(1, -1), quant_state=state, bias=bias)


@functools.cache
def code_of(kind: str, device: torch.device) -> torch.Tensor:
    """The 16 values of ``nf4`` or ``fp4``, in float32; made once for each device."""
    with torch.inference_mode(False), _Float32():  # it will be used outside too
        return bnb.get_4bit_type(kind, device=device)


class _Float32(TorchFunctionMode):
    """Has bitsandbytes make its table in float32, as its kernels read it, and not in torch's default dtype."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return function(*args, **({"dtype": torch.float32} | kwargs if function is torch.tensor else kwargs))
