"""Layers for number formats that come with a codec: stored in it, multiplied as floats unless the format has a product
of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cemq.quantize.kernels import FEW_ROWS
from cemq.quantize.layers import InputStatistics, Layout, QuantizedLinear
from cemq.quantize.schemes import Codec, Format, Scheme


class CodedLinear(QuantizedLinear):
    """``weight`` holds the codes of `Codec.encode` (out, codes a row), ``weight_scale`` its scales, float32 (out, 1).

    With few rows (time embedding, adaLN) activations stay as they are, as in the native layer.
    """

    weight_scale: torch.Tensor

    @classmethod
    def layout(cls, in_features: int, out_features: int, scheme: Scheme) -> Layout:
        codec = _codec(scheme.weight)
        stored = getattr(torch, codec.stored)
        return {
            "weight": ((out_features, -(-in_features // codec.packed)), stored),
            "weight_scale": ((out_features, 1), torch.float32),
        }

    @classmethod
    def quantize(
        cls, weight: torch.Tensor, scheme: Scheme, statistics: InputStatistics | None
    ) -> dict[str, torch.Tensor]:
        codes, scale = _codec(scheme.weight).encode(weight.float())
        return {"weight": codes, "weight_scale": scale}

    def multiply(self, values: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(values.dtype)
        if self.scheme.activation is not None and values.shape[0] >= FEW_ROWS:
            codec, product = _codec(self.scheme.activation), self.scheme.activation.product
            tokens = codec.encode(values.float())
            if product is not None and self.scheme.activation == self.scheme.weight:
                output = product(*tokens, self.integers, self.weight_scale, bias, values.dtype)
                if output is not None:
                    return output
            values = codec.decode(*tokens)[:, : self.in_features].to(values.dtype)
        weight = _codec(self.scheme.weight).decode(self.integers, self.weight_scale)[:, : self.in_features]
        return F.linear(values, weight.to(values.dtype), bias)


def _codec(format: Format) -> Codec:
    assert format.codec is not None, f"{format.name} is multiplied by kernels of its own"
    return format.codec
