"""Quantized text encoders as a transformers quantizer: ``quant_method: "cemq"`` in a model's config.json.

Saving and loading are transformers' own. After ``import cemq``, ``T5EncoderModel.from_pretrained(folder)`` reloads a
quantized folder bit for bit, and ``from_pretrained(..., quantization_config=TextEncoderConfig())`` quantizes one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto  # and not transformers itself, which may be in the midst of importing this
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cemq.errors import BundleError
from cemq.quantize.adapters import guard_methods
from cemq.quantize.in_diffusers import METHOD, CemqConfig, linear_of, nothing_to_quantize
from cemq.quantize.layers import QuantizedLinear
from cemq.quantize.schemes import Scheme

# Heads see one row per prompt or none at all; vision towers only run in pipelines that edit pictures.
FULL_PRECISION = ("*lm_head*", "*text_projection*", "*visual*", "*vision_*", "*multi_modal_projector*")

# T5's outliers pass through here. T5 casts its input to the dtype that the weight answers with, unless that is int8:
# under sequential offloading, where it lies on meta, uint8 would be the answer for one of four bits.
EIGHT_BIT = ("*.wo",)


class TextEncoderConfig(CemqConfig, QuantizationConfigMixin):
    """A `CemqConfig` with the defaults of text encoders: they run once per picture, so only weights are quantized."""

    def __init__(
        self,
        scheme: str = "w8a16",
        full_precision: Sequence[str] = FULL_PRECISION,
        eight_bit: Sequence[str] = EIGHT_BIT,
        **others: Any,
    ):
        super().__init__(scheme, full_precision=full_precision, eight_bit=eight_bit, **others)


@torch.no_grad()
def quantize_text_encoder(model: Any, config: TextEncoderConfig) -> int:
    """Replace the linear layers of a transformers model one by one, so that each float weight is freed in turn.

    Returns the number of layers replaced; the model then saves and reloads as a quantized transformers model.

    Raises:
        SchemeError: The patterns leave nothing to quantize.
    """
    replaced = 0
    for name, linear, layer, scheme in quantizable_layers(model, config):
        _put(model, name, layer.from_linear(linear, scheme))
        replaced += 1
    if not replaced:
        raise nothing_to_quantize(model)
    quantizer = TextEncoderQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method, model.hf_quantizer = True, config.quant_method, quantizer
    model.config.quantization_config = config
    guard_methods(model)
    return replaced


def quantizable_layers(
    model: Any, config: CemqConfig
) -> Iterator[tuple[str, nn.Linear, type[QuantizedLinear], Scheme]]:
    """Name, layer, class to be and scheme of every linear layer that the config quantizes."""
    tied = {name.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for name in pair}
    for name in [name for name, module in model.named_modules() if type(module) is nn.Linear]:
        scheme = None if name in tied else config.scheme_for(name)
        if scheme is None:
            continue
        linear, layer = linear_of(model, name), config.layer_class(scheme)
        weight_dtype = layer.layout(linear.in_features, linear.out_features, scheme)["weight"][1]
        if not _kept_in_float32(model, name) or weight_dtype == torch.int8:  # see EIGHT_BIT
            yield name, linear, layer, scheme


def _kept_in_float32(model: Any, name: str) -> bool:
    """Whether transformers computes this layer in float32 when the model is float16, where it would overflow."""
    return any(re.search(pattern, name) for pattern in model._keep_in_fp32_modules or ())


def _put(model: nn.Module, name: str, layer: QuantizedLinear) -> None:
    model.set_submodule(name, layer)
    if _kept_in_float32(model, name):
        layer.register_forward_pre_hook(_out_of_float16)


def _out_of_float16(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    return (inputs[0].float(),) if inputs[0].dtype == torch.float16 else None


def _layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear))


class TextEncoderQuantizer(HfQuantizer):
    """The glue transformers calls while it loads or saves a model."""

    quantization_config: TextEncoderConfig
    is_trainable: bool = False
    is_compileable: bool = True

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Stores each quantized weight with one more dimension.

        transformers without cemq ignores the quantization config and would take int8 weights for float ones: a shape
        that does not fit makes it stop.
        """
        tensors = model.state_dict()
        for name, _ in _layers(model):
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].unsqueeze(-1)
        return tensors, {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        for name, linear, layer, scheme in quantizable_layers(model, self.quantization_config):
            sizes, bias, dtype = (linear.in_features, linear.out_features), linear.bias is not None, linear.weight.dtype
            if dtype == torch.float16 and _kept_in_float32(model, name):
                dtype = torch.float32
            _put(model, name, layer(*sizes, scheme=scheme, bias=bias, dtype=dtype, device="meta"))
            parent = model.get_submodule(name.rpartition(".")[0])
            if not parent._buffers:  # or transformers draws normal numbers for a missing weight, and fails: it is int8
                vars(parent)["_is_hf_initialized"] = True
        self.shapes: dict[str, torch.Size] = {name: tensor.shape for name, tensor in model.named_parameters()}
        self.exact: dict[str, torch.dtype] = {  # the dtypes of what must be loaded as it is stored
            f"{name}.{leaf}": tensor.dtype
            for name, layer in _layers(model)
            for leaf, tensor in layer.named_parameters()
            if leaf != "bias"
        }

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        if converter.target_patterns[0] in self.exact:
            return None  # no cast, which would hide that it was stored as something else
        return super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return self.pre_quantized  # none does, but where this is true transformers leaves comparing shapes to us

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            quantize_text_encoder(model, self.quantization_config)
            return model
        loaded = dict(model.named_parameters())
        if any(tensor.is_meta for tensor in loaded.values()):
            raise BundleError(
                f"{type(model).__name__} is quantized and cannot be offloaded by a device_map: load it without, and "
                "offload with the pipeline's enable_model_cpu_offload()"
            )
        missing = [name for name, tensor in loaded.items() if not getattr(tensor, "_is_hf_initialized", False)]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise BundleError(f"{type(model).__name__} lacks {len(missing)} tensors ({shown}): write the bundle again")
        for name, tensor in loaded.items():
            shape, dtype = self.shapes[name], self.exact.get(name, tensor.data.dtype)
            if name in self.exact and tensor.shape == (*shape, 1):
                tensor.data = tensor.data.squeeze(-1)
            if tensor.shape != shape or tensor.data.dtype != dtype:
                raise BundleError(
                    f"{type(model).__name__}: tensor '{name}' is {tuple(tensor.shape)} {tensor.data.dtype}, expected "
                    f"{tuple(shape)} {dtype}: the file was not written under this config.json"
                )
            if name not in self.exact and tensor.device.type == "cpu" and tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()  # a float product over unaligned memory differs in the last bits
        for _, layer in _layers(model):
            layer.requires_grad_(False)
            layer.answer_in_compute_dtype()
        guard_methods(model)
        return model


auto.AUTO_QUANTIZER_MAPPING[METHOD] = TextEncoderQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = TextEncoderConfig
