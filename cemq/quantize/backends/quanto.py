"""optimum-quanto's integers and products: https://github.com/huggingface/optimum-quanto."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from optimum.quanto import (
    AbsmaxOptimizer,
    MaxOptimizer,
    WeightQBitsTensor,
    WeightQBytesTensor,
    group,
    qint4,
    qint8,
    quantize_activation,
    quantize_weight,
)
from optimum.quanto.tensor.packed import PackedTensor

from cemq.errors import SchemeError
from cemq.quantize.backends import refuse_one_feature
from cemq.quantize.layers import InputStatistics, Layout, QuantizedLinear
from cemq.quantize.schemes import Scheme

MOMENTUM = 0.9  # of the input scale, quanto's default
_TINY = 1e-12


class QuantoLinear(QuantizedLinear):
    """Symmetric int8 per output channel, or int4 with a minimum per group; int8 activations with one fixed scale.

    ``weight`` is int8 (out, in) with ``weight_scale`` (out, 1); or uint8 (half the groups, group size), whose low half
    bytes are the first half of the groups, with ``weight_scale`` and ``weight_shift`` (groups, 1), the groups in row
    order. With int8 activations there is ``input_scale`` (1,), fixed by calibration. Scales are float32.

    Outputs are not quantized, and w4a8 is simulated: quanto has no kernel for it and multiplies what it dequantizes.
    """

    needs_largest: ClassVar[bool] = True
    weight_scale: torch.Tensor
    weight_shift: torch.Tensor
    input_scale: torch.Tensor

    @classmethod
    def layout(cls, in_features: int, out_features: int, scheme: Scheme) -> Layout:
        if scheme.weight_bits == 8:
            tensors: Layout = {
                "weight": ((out_features, in_features), torch.int8),
                "weight_scale": ((out_features, 1), torch.float32),
            }
        else:
            size = group_size(in_features)
            groups = out_features * in_features // size
            tensors = {
                "weight": ((-(-groups // 2), size), torch.uint8),
                "weight_scale": ((groups, 1), torch.float32),
                "weight_shift": ((groups, 1), torch.float32),
            }
        if scheme.activation_bits == 8:
            tensors["input_scale"] = ((1,), torch.float32)
        return tensors

    @classmethod
    def quantize(
        cls, weight: torch.Tensor, scheme: Scheme, statistics: InputStatistics | None
    ) -> dict[str, torch.Tensor]:
        tensors = {}
        if scheme.activation_bits == 8:
            if statistics is None or not statistics.largest:
                raise SchemeError(
                    f"{scheme.name} of quanto multiplies with fixed activation scales, and no inputs were recorded for "
                    f"this layer: calibrate first, or take w{scheme.weight_bits}a16 or another backend"
                )
            refuse_one_feature(weight, f"{scheme.name} of quanto")
            largest = [input_scale(statistics.largest)]
            tensors["input_scale"] = torch.tensor(largest, dtype=torch.float32, device=weight.device)
        weight = weight.float()
        if scheme.weight_bits == 8:
            scale = AbsmaxOptimizer()(weight, qint8, axis=0).clamp_min(_TINY)  # quanto divides a row of zeros by zero
            bytes_of = quantize_weight(weight, qint8, axis=0, scale=scale, optimized=False)
            assert isinstance(bytes_of, WeightQBytesTensor)
            return tensors | {"weight": bytes_of._data, "weight_scale": scale.reshape(-1, 1)}
        size = group_size(weight.shape[1])
        # not called but optimize: of a single group, a call takes the minimum per column
        scale, shift = MaxOptimizer().optimize(group(weight, axis=0, group_size=size), qint4, axis=0)
        scale = scale.clamp_min(_TINY)
        bits_of = quantize_weight(weight, qint4, axis=0, scale=scale, shift=shift, group_size=size, optimized=False)
        assert isinstance(bits_of, WeightQBitsTensor)
        return tensors | {"weight": bits_of._data._data, "weight_scale": scale, "weight_shift": shift}

    def multiply(self, values: torch.Tensor) -> torch.Tensor:
        rows, dtype = values.shape[0], values.dtype
        values = values.contiguous()
        if self.scheme.activation_bits == 16:
            weight = self._quanto_weight(dtype)
            if dtype == torch.bfloat16 and isinstance(weight, WeightQBytesTensor) and not values.is_cuda:
                values, weight = self._for_int8pack(values, weight)
            return F.linear(values, weight, self.bias)
        scale = self.input_scale.squeeze()
        if self.scheme.weight_bits == 4:
            values = quantize_activation(values.float(), qint8, scale).dequantize().to(dtype)
            return F.linear(values, self._quanto_weight(dtype), self.bias)
        if values.is_cuda:  # quanto multiplies integers there from 17 rows on, in multiples of 8, and else floats
            values = F.pad(values, (0, 0, 0, max(24 - rows, -rows % 8)))
        # float32 all through: a bfloat16 quotient is rounded once before it is rounded to an integer
        values = quantize_activation(values.float(), qint8, scale)
        return F.linear(values, self._quanto_weight(torch.float32), self.bias)[:rows].to(dtype)

    def _quanto_weight(self, dtype: torch.dtype) -> WeightQBytesTensor | WeightQBitsTensor:
        """quanto's tensor around the stored ones; quanto wants scales in the dtype of the product."""
        shape, stride = (self.out_features, self.in_features), (self.in_features, 1)
        scale = self.weight_scale.to(dtype)
        if self.scheme.weight_bits == 8:
            activations = qint8 if self.scheme.activation_bits == 8 else None
            return WeightQBytesTensor(qint8, 0, shape, stride, self.integers, scale, activations)
        size = self.integers.shape[1]
        packed = PackedHalves(self.integers, 4, (scale.shape[0], size), (size, 1))
        return WeightQBitsTensor(qint4, 0, size, shape, stride, packed, scale, self.weight_shift.to(dtype))

    def _for_int8pack(
        self, values: torch.Tensor, weight: WeightQBytesTensor
    ) -> tuple[torch.Tensor, WeightQBytesTensor | torch.Tensor]:
        """What `torch._weight_int8pack_mm`, which quanto calls for bfloat16 on CPUs, multiplies without harm.

        It reads whole vectors: it crashes on operands that are not aligned (those of a mapped file often are not), and
        with a number of columns that does not divide into vectors it crashes or returns nonsense.
        """
        if self.in_features % 16:
            return values, weight.dequantize()
        weight._data = _aligned(weight._data)
        return _aligned(values), weight


class PackedHalves(PackedTensor):
    """Unpacks without quanto's extension, which wants a compiler at the first call; the low half bytes come first."""

    def unpack(self) -> torch.Tensor:
        return torch.cat((self._data & 15, self._data >> 4))[: self.shape[0]]

    @staticmethod
    def __tensor_unflatten__(
        inner_tensors: dict[str, Any], meta: dict[str, Any], outer_size: object, outer_stride: object
    ) -> PackedHalves:
        # torch.compile takes tensors apart and puts them together again, as the parent class if left to it
        plain = PackedTensor.__tensor_unflatten__(inner_tensors, meta, outer_size, outer_stride)
        return PackedHalves(plain._data, plain._bits, plain.size(), plain.stride())


def group_size(in_features: int) -> int:
    """Input features that share a scale in int4, as quanto's `QModuleMixin` chooses them; the whole row if none fit."""
    return next((size for size in (128, 96, 64, 32) if in_features > 128 and in_features % size == 0), in_features)


def input_scale(largest: tuple[float, ...]) -> float:
    """The moving average of quanto's `Calibration` over the largest ``|x|`` of each call."""
    scale = largest[0] / qint8.qmax
    for value in largest[1:]:
        scale = MOMENTUM * scale + (1 - MOMENTUM) * value / qint8.qmax
    return max(scale, _TINY)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.data_ptr() % 32 == 0 else tensor.clone()
