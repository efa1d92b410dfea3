"""What a native integer layer stores, for whoever multiplies with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cemq.quantize import integers
from cemq.quantize.kernels import cpu


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearWeights:
    """The stored tensors of a layer of ``columns`` inputs, all on the device of its values.

    Args:
        weight: int8 (out, in), or packed int4 (`integers.pack_int4`) where there is a ``group_scale``.
        group_scale: int8 (out, groups), or None.
        weight_scale: float32 (out, 1).
        weight_sum: int32 (out, 1), row sums of the integer weight, which the tokens' zero points are multiplied with.
        bias: (out,) in the dtype of the values, or None.
    """

    weight: torch.Tensor
    group_scale: torch.Tensor | None
    weight_scale: torch.Tensor
    weight_sum: torch.Tensor
    bias: torch.Tensor | None
    columns: int

    @property
    def bits(self) -> int:
        return 8 if self.group_scale is None else 4

    @property
    def scales(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What a product is turned into the layer's output by: ``weight_scale``, ``weight_sum`` and ``bias``."""
        return self.weight_scale, self.weight_sum, self.bias

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    def expanded(self) -> torch.Tensor:
        """The int8 weight (out, in)."""
        return integer_weight(self.weight, self.group_scale, self.columns)


def integer_weight(weight: torch.Tensor, group_scale: torch.Tensor | None, columns: int) -> torch.Tensor:
    """The int8 weight (out, columns) that takes part in the product."""
    if group_scale is None:
        return weight
    if has_memory(weight) and (compiled := cpu.kernels()):
        return compiled.expand_int4(weight, group_scale, columns)
    return integers.expand_int4(weight, group_scale, columns)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it holds numbers: no fake tensor or other subclass, and no trace being taken."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not torch.jit.is_tracing()


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether C may read it."""
    return is_plain(tensor) and tensor.device.type == "cpu"
