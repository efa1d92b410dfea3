"""torchao's dynamic int8: https://github.com/pytorch/ao."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor, quantize_

from cemq.quantize.backends import refuse_one_feature
from cemq.quantize.layers import InputStatistics, Layout, QuantizedLinear
from cemq.quantize.schemes import Scheme


class TorchaoLinear(QuantizedLinear):
    """Symmetric int8 per output channel, and per token while the model runs.

    ``weight`` is int8 (out, in), ``weight_scale`` float32 (out, 1): what torchao's `Int8Tensor` holds, made by
    `Int8DynamicActivationInt8WeightConfig` and put together again for each product.
    """

    weight_scale: torch.Tensor

    @classmethod
    def layout(cls, in_features: int, out_features: int, scheme: Scheme) -> Layout:
        return {
            "weight": ((out_features, in_features), torch.int8),
            "weight_scale": ((out_features, 1), torch.float32),
        }

    @classmethod
    def quantize(
        cls, weight: torch.Tensor, scheme: Scheme, statistics: InputStatistics | None
    ) -> dict[str, torch.Tensor]:
        refuse_one_feature(weight, "w8a8 of torchao")
        quantized = _int8_tensor(weight)
        return {"weight": quantized.qdata, "weight_scale": quantized.scale}

    def multiply(self, values: torch.Tensor) -> torch.Tensor:
        dtype = values.dtype
        if dtype == torch.float16:  # torchao rounds to it before it multiplies with the weight scale, and overflows
            values = values.float()
        block = [1, self.in_features]
        weight = Int8Tensor(self.integers, self.weight_scale, block, values.dtype, act_quant_kwargs=_ACTIVATIONS)
        return F.linear(values.contiguous(), weight, self.bias).to(dtype)


def _int8_tensor(weight: torch.Tensor) -> Int8Tensor:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.float(), requires_grad=False)
    # the inductor config is the process's own affair
    quantize_(linear, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    assert isinstance(linear.weight, Int8Tensor)
    return linear.weight


# how torchao quantizes activations under that config
_ACTIVATIONS = _int8_tensor(torch.ones(1, 1, dtype=torch.float32, device="cpu")).act_quant_kwargs
