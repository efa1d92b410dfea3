"""LoRAs beside quantized layers, loaded by PEFT: in floats, as they are in the file, and added to what a layer gives.

PEFT wraps layers whose classes it knows, and those of cemq it does not. To one that is wrapped already it adds another
adapter, whoever wrapped it: so all quantized layers of a model are wrapped before a file is loaded, and those that it
had nothing for are unwrapped again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from cemq.errors import ModelError
from cemq.pipelines.lora import adapted_layers
from cemq.quantize.layers import QuantizedLinear, Rounding
from cemq.quantize.overrides import guard_saving

ROUNDS = (
    "cemq: fuse_lora() rounds the weights of quantized layers anew: unfuse_lora() takes it back, and beside the layers "
    "nothing is rounded"
)


class QuantizedLoraLinear(nn.Module, LoraLayer):
    """A quantized layer and the LoRAs beside it, whose weights are in the dtype that the layer computes in.

    It is fused on request (`QuantizedLinear.add_to_weight`), and unfused from a copy of what was there, bit for bit.
    """

    base_layer: QuantizedLinear
    warns: bool = True  # of what fusing does; not where somebody says it for all layers

    def __init__(self, base_layer: QuantizedLinear):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.cost: Rounding = Rounding()
        self._before: dict[str, torch.Tensor] = {}
        self.train(base_layer.training)

    def _get_in_out_features(self, module: QuantizedLinear) -> tuple[int, int]:
        return module.in_features, module.out_features  # PEFT warns of a class that it does not know

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        """Add an adapter. Raises ModelError for one that is made of the layer's float weight."""
        initial = config.init_lora_weights
        if config.use_dora or (isinstance(initial, str) and initial != "gaussian"):
            what = "a DoRA" if config.use_dora else f"init_lora_weights={initial!r}"
            raise ModelError(f"{what} needs the float weight of a layer that is quantized: fuse it before quantizing")
        if not self.r:
            self._active_adapter = adapter_name  # as of a layer that is wrapped for it
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(input)
        beside = None
        for name in self.active_adapters:
            if name not in self.lora_A or _is_zero(self.scaling[name]):
                continue
            values = self.lora_dropout[name](self._cast_input_dtype(input, self._factor(self.lora_A, name).dtype))
            added = self.lora_B[name](self.lora_A[name](values)) * self.scaling[name]
            beside = added if beside is None else beside + added
        return self.base_layer(input, beside)

    def change_of(self, name: str) -> torch.Tensor:
        """What an adapter adds to the weight, float32 (out, in)."""
        up, down = self._factor(self.lora_B, name), self._factor(self.lora_A, name)
        return self.scaling[name] * (up.float() @ down.float())

    @staticmethod
    def _factor(factors: nn.ModuleDict, name: str) -> torch.Tensor:
        return cast(torch.Tensor, factors[name].weight)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fuse adapters into the integers.

        Raises:
            ModelError: The layer cannot take them.
            ValueError: They hold NaN or infinity, which no integer does.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        self.check_merging(names)
        change = torch.stack([self.change_of(name) for name in names]).sum(0)
        if not torch.isfinite(change).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapters {', '.join(names)} seem to be broken")
        layer = self.base_layer
        if not self.merged:
            self._before = {name: tensor.clone() for name, tensor in layer.stored().items()}
        self.cost += layer.add_to_weight(change)
        self.merged_adapters.extend(names)
        if self.warns:
            warnings.warn(ROUNDS, stacklevel=2)

    def check_merging(self, names: Iterable[str]) -> None:
        """Raises ModelError where `merge` would."""
        layer, kind = self.base_layer, type(self.base_layer).__name__
        if not layer.rounds_anew:
            raise ModelError(f"fuse_lora() cannot round the weights of {kind} anew: leave the LoRA beside the layers")
        if layer.weight.is_meta:
            raise ModelError("fuse_lora() needs the weights in memory, and these are offloaded: fuse before offloading")
        if any(self.lora_bias.get(name) for name in names):
            raise ModelError("fuse_lora() changes no biases, and this LoRA has some: leave it beside the layers")

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back what was there."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer.restore(self._before)
        self.cost, self._before = Rounding(), {}
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


def _is_zero(scaling: Any) -> bool:
    """Whether an adapter is off. PEFT's hotswapping makes scales tensors, so that they can change without compiling."""
    return not torch.is_tensor(scaling) and scaling == 0


@contextmanager
def adaptable(model: nn.Module) -> Iterator[nn.Module]:
    """Have PEFT put LoRAs beside the quantized layers of a model, for the length of a ``with`` block.

    diffusers' and transformers' own methods of a quantized model do this themselves. It is for models that have none (a
    ``DiTTransformer2DModel``), which `peft.inject_adapter_in_model` serves. Layers without an adapter are left as they
    were.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear) and not name.endswith(".base_layer"):
            model.set_submodule(name, QuantizedLoraLinear(module))
    try:
        yield model
    finally:
        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer) and not getattr(module, "r", True):
                model.set_submodule(name, module.get_base_layer())
        if adapted_layers(model):
            guard_saving(model)


def fuse_together(layers: Sequence[QuantizedLoraLinear], fuse: Callable[[], Any]) -> tuple[Any, Rounding]:
    """Call ``fuse``, which merges layers of a model, and say what that cost them all; nobody else says anything.

    Raises:
        ModelError: One of them cannot be merged; then none is.
    """
    for layer in layers:
        layer.check_merging(layer.active_adapters)
    try:
        for layer in layers:
            layer.warns = False
        result = fuse()
    finally:
        for layer in layers:
            del layer.warns
    return result, sum((layer.cost for layer in layers), Rounding())
