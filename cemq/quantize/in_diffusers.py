"""Quantization as a diffusers quantizer: ``quant_method: "cemq"`` in a model's config.json, whatever the backend.

Saving and loading are diffusers' own. After ``import cemq``, ``SomeModel.from_pretrained(folder)`` reloads a quantized
folder bit for bit, and ``from_pretrained(..., quantization_config=CemqConfig(scheme="w8a8"))`` quantizes while loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from enum import Enum
from importlib import import_module
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils import get_module_from_name
from torch import nn

from cemq.errors import BundleError, SchemeError
from cemq.families import EIGHT_BIT, FULL_PRECISION, matches
from cemq.quantize.adapters import guard_methods, refuse_adapters
from cemq.quantize.layers import InputStatistics, QuantizedLinear, fuse_gelu
from cemq.quantize.schemes import BACKENDS, SCHEMES, Scheme, check_scheme

METHOD = "cemq"


class Method(str, Enum):
    """An enum of one, because diffusers reads ``quant_method.value``."""

    CEMQ = METHOD


class CemqConfig(QuantizationConfigMixin):
    """Which layers are quantized, and how.

    Args:
        scheme: One of `SCHEMES`.
        backend: What computes the quantized layers, one of `BACKENDS`.
        full_precision: Shell-style patterns of module names that stay as they are.
        eight_bit: Patterns of those that take 8-bit weights in a 4-bit scheme, where the backend has such a scheme.
        low_rank: Rank of a bfloat16 correction beside every 4-bit weight; native backend only.
        smoothed: Whether inputs are scaled per channel before they are quantized; native backend only.

    Raises:
        SchemeError: Unknown scheme or backend, or a pair that does not go together here.
    """

    def __init__(
        self,
        scheme: str = "w8a8",
        backend: str = "native",
        full_precision: Sequence[str] = FULL_PRECISION,
        eight_bit: Sequence[str] = EIGHT_BIT,
        low_rank: int = 0,
        smoothed: bool = False,
        **unknown: Any,
    ):
        unknown.pop("quant_method", None)
        if unknown:
            raise SchemeError(f"quantization config has unknown keys: {', '.join(sorted(unknown))}")
        check_scheme(scheme, backend)
        if scheme not in SCHEMES:
            raise SchemeError(f"scheme {scheme!r} quantizes nothing: leave the quantization config out instead")
        self.quant_method: Method = Method.CEMQ
        self.scheme: str = scheme
        self.backend: str = backend
        self.full_precision: list[str] = list(full_precision)
        self.eight_bit: list[str] = list(eight_bit)
        if (low_rank or smoothed) and backend != "native":
            raise SchemeError(f"backend '{backend}' has no low-rank correction and no smoothing: take --backend native")
        self.low_rank: int = low_rank
        self.smoothed: bool = smoothed

    def scheme_for(self, name: str) -> Scheme | None:
        """The scheme of one module, None where it stays in full precision."""
        if matches(name, self.full_precision):
            return None
        scheme = SCHEMES[self.scheme]
        if scheme.is_coded:
            return scheme
        wider = f"w8a{scheme.activation_bits}"
        if scheme.weight_bits < 8 and wider in BACKENDS[self.backend].layers and matches(name, self.eight_bit):
            scheme = SCHEMES[wider]
        rank = self.low_rank if scheme.weight_bits == 4 else 0
        return replace(scheme, low_rank=rank, smoothed=self.smoothed and scheme.activation_bits == 8)

    def with_eight_bit(self, eight_bit: Sequence[str]) -> CemqConfig:
        """The same, with other layers at 8 bits."""
        return CemqConfig(**{**self.to_dict(), "eight_bit": eight_bit})

    def with_full_precision(self, names: Sequence[str]) -> CemqConfig:
        """The same, with more layers left as they are."""
        return CemqConfig(**{**self.to_dict(), "full_precision": [*self.full_precision, *names]})

    def layer_class(self, scheme: Scheme) -> type[QuantizedLinear]:
        """The class of the layers that this backend makes for a scheme."""
        module, _, name = BACKENDS[self.backend].layers[scheme.name].partition(":")
        return getattr(import_module(module), name)

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "scheme": self.scheme,
            "backend": self.backend,
            "full_precision": self.full_precision,
            "eight_bit": self.eight_bit,
            "low_rank": self.low_rank,
            "smoothed": self.smoothed,
        }

    to_diff_dict = to_dict


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of this name."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def quantizable(model: nn.Module, config: CemqConfig) -> Iterator[tuple[str, nn.Linear, Scheme]]:
    """Name, layer and scheme of every linear layer that the config quantizes, in the order of definition."""
    # names first, and each layer looked up in its turn: a list of modules would keep replaced ones alive
    for name in [name for name, module in model.named_modules() if type(module) is nn.Linear]:
        if (scheme := config.scheme_for(name)) is not None:
            yield name, linear_of(model, name), scheme


@torch.no_grad()
def quantize_in_place(
    model: nn.Module, config: CemqConfig, statistics: Mapping[str, InputStatistics] | None = None
) -> int:
    """Replace the linear layers of a diffusers model one by one, so that each float weight is freed in turn.

    Returns the number of layers replaced; the model then saves and reloads as a quantized diffusers model.

    Args:
        statistics: What calibration knows of each layer's inputs, by name; layers without are rounded to nearest.

    Raises:
        SchemeError: The patterns leave nothing to quantize.
    """
    replaced = 0
    for name, layer in quantized_layers(model, config, statistics):
        model.set_submodule(name, layer)
        replaced += 1
    mark_quantized(model, config)
    return replaced


@torch.no_grad()
def quantized_layers(
    model: nn.Module,
    config: CemqConfig,
    statistics: Mapping[str, InputStatistics] | None = None,
    *,
    device: torch.device | None = None,
) -> Iterator[tuple[str, QuantizedLinear]]:
    """What is to take the place of each linear layer, one by one; the model itself stays as it is.

    Args:
        statistics: As of `quantize_in_place`.
        device: Where each layer is quantized; None: where it lies.

    Raises:
        SchemeError: The patterns leave nothing to quantize.
    """
    refuse_adapters(model)
    layers = [(name, scheme) for name, _, scheme in quantizable(model, config)]
    if not layers:
        raise nothing_to_quantize(model)
    for name, scheme in layers:
        known = statistics.get(name) if statistics else None
        yield name, quantized_there(linear_of(model, name), config.layer_class(scheme), scheme, known, device)


def quantized_there(
    linear: nn.Linear,
    kind: type[QuantizedLinear],
    scheme: Scheme,
    known: InputStatistics | None = None,
    device: torch.device | None = None,
) -> QuantizedLinear:
    """A layer quantized on another device, and back where the linear one lies."""
    home = linear.weight.device
    if device in (None, home):
        return kind.from_linear(linear, scheme, known)
    return kind.from_linear(deepcopy(linear).to(device), scheme, known).to(home)


def nothing_to_quantize(model: nn.Module) -> SchemeError:
    return SchemeError(
        f"{type(model).__name__} has no linear layer outside the full-precision patterns: nothing to quantize"
    )


def mark_quantized(model: Any, config: CemqConfig) -> None:
    """Tell diffusers that the model is quantized, and how, so that it saves it as such."""
    fuse_gelu(model)
    quantizer = CemqQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method, model.hf_quantizer = True, config.quant_method, quantizer
    model.register_to_config(quantization_config=config)
    guard_methods(model)


class CemqQuantizer(DiffusersQuantizer):
    """The glue diffusers calls while it loads a model."""

    quantization_config: CemqConfig
    use_keep_in_fp32_modules = True  # what a model keeps in float32 is so when it is measured, and when it is loaded
    is_serializable: bool = True
    is_trainable: bool = False
    is_compileable: bool = True

    def _process_model_before_weight_loading(
        self, model: Any, keep_in_fp32_modules: Sequence[str] = (), **kwargs: Any
    ) -> None:
        config = self.quantization_config
        for name, module, scheme in quantizable(model, config):
            kept = not set(keep_in_fp32_modules or ()).isdisjoint(name.split("."))
            empty = config.layer_class(scheme)(
                module.in_features,
                module.out_features,
                scheme=scheme,
                bias=module.bias is not None,
                dtype=torch.float32 if kept else module.weight.dtype,
                device="meta",
            )
            if not self.pre_quantized:  # the float weight is about to be loaded under this name
                empty.register_parameter("weight", nn.Parameter(module.weight, requires_grad=False))
            model.set_submodule(name, empty)
        fuse_gelu(model)
        model.config.quantization_config = config

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        module, leaf = get_module_from_name(model, param_name)
        return isinstance(module, QuantizedLinear) and leaf != "bias"

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        module, leaf = get_module_from_name(model, param_name)
        stored = state_dict[param_name]  # not param_value: diffusers has rounded that to the model's dtype already
        if leaf == "weight" and not self.pre_quantized:
            module.set_weight(stored.to(target_device))
            return
        expected = getattr(module, leaf)
        if stored.shape != expected.shape or stored.dtype != expected.dtype:
            raise BundleError(
                f"tensor '{param_name}' is {tuple(stored.shape)} {stored.dtype}, expected "
                f"{tuple(expected.shape)} {expected.dtype}: the file was not written under this config.json"
            )
        setattr(module, leaf, nn.Parameter(stored.to(target_device), requires_grad=False))

    def check_quantized_param_shape(self, *args: Any, **kwargs: Any) -> bool:
        return True  # create_quantized_param compares shapes itself, and dtypes too

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        if self.pre_quantized:
            return missing_keys
        made_here = {
            f"{name}.{tensor}"
            for name, module in model.named_modules()
            if isinstance(module, QuantizedLinear)
            for tensor in module._parameters
            if tensor not in ("weight", "bias")
        }
        return [key for key in missing_keys if key not in made_here]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        missing = [name for name, tensor in model.named_parameters() if tensor.is_meta]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise BundleError(f"{type(model).__name__} lacks {len(missing)} tensors ({shown}): write the bundle again")
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.answer_in_compute_dtype()  # biases may have come after weights
        guard_methods(model)
        return model


auto.AUTO_QUANTIZER_MAPPING[METHOD] = CemqQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = CemqConfig
