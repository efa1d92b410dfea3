"""The quantized linear layer: plain integer tensors and one integer product."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from cemq.quantize.integers import expand_int4, integer_matmul, quantize_channels, quantize_int4, quantize_tokens
from cemq.quantize.schemes import Scheme

# With fewer rows (time embedding, adaLN) there is nothing to gain from an integer product, and the input is precious.
WEIGHT_ONLY_BELOW_ROWS = 32


class QuantizedLinear(nn.Module):
    """A linear layer with integer weights and, from 32 rows on, int8 activations quantized per token.

    ``weight`` is int8 (out, in), or uint8 (out, padded_in / 2) with ``group_scale`` int8 (out, groups);
    ``weight_scale`` is float32 (out, 1) and stays so whatever dtype the model is cast to. ``weight_sum`` is int32
    (out, 1), the row sums of the integer weight, which the activations' zero points are multiplied with.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scheme: Scheme,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme

        def frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        if scheme.weight_bits == 4:
            groups = -(-in_features // scheme.group_size)
            self.weight = frozen(out_features, groups * scheme.group_size // 2, dtype=torch.uint8)
            self.group_scale = frozen(out_features, groups, dtype=torch.int8)
        else:
            self.weight = frozen(out_features, in_features, dtype=torch.int8)
        self.weight_scale = frozen(out_features, 1, dtype=torch.float32)
        self.weight_sum = frozen(out_features, 1, dtype=torch.int32)
        self.bias = frozen(out_features, dtype=dtype) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme) -> QuantizedLinear:
        """Round the weights of ``linear`` to nearest under ``scheme``; the bias is kept."""
        quantized = cls(
            linear.in_features,
            linear.out_features,
            scheme=scheme,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device="meta",
        )
        quantized.set_weight(linear.weight)
        if linear.bias is not None:
            quantized.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return quantized

    @torch.no_grad()
    def set_weight(self, weight: torch.Tensor) -> None:
        """Quantize a float weight (out, in)."""
        if self.scheme.weight_bits == 4:
            packed, group_scale, scale = quantize_int4(weight, self.scheme.group_size)
            self.group_scale = nn.Parameter(group_scale, requires_grad=False)
        else:
            packed, scale = quantize_channels(weight)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        row_sums = self.integer_weight().sum(1, keepdim=True, dtype=torch.int32)
        self.weight_sum = nn.Parameter(row_sums, requires_grad=False)

    def integer_weight(self) -> torch.Tensor:
        """The int8 weight (out, in) that takes part in the product."""
        if self.scheme.weight_bits == 4:
            return expand_int4(self.weight, self.group_scale, self.in_features)
        return self.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.numel() // self.in_features
        weight = self.integer_weight()
        if rows < WEIGHT_ONLY_BELOW_ROWS:
            return F.linear(input, (weight * self.weight_scale).to(input.dtype), self.bias)
        tokens, token_scale, zero_point = quantize_tokens(input.reshape(rows, self.in_features))
        product = integer_matmul(tokens, weight) - zero_point * self.weight_sum.t()
        output = (product * token_scale * self.weight_scale.t()).to(input.dtype)
        if self.bias is not None:
            output = output + self.bias
        return output.reshape(*input.shape[:-1], self.out_features)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        scale = self.weight_scale.detach()  # the parameter itself is cast in place
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:  # a cast of the model: move the scale, do not round it
            self.weight_scale = nn.Parameter(scale.to(self.weight_scale.device), requires_grad=False)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, scheme={self.scheme.name}, bias={self.bias is not None}"
