"""Adapters and quantized models: which methods of diffusers' and transformers' models they have in another form."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from torch import nn

from cemq.errors import ModelError, refuse_method
from cemq.pipelines.lora import adapted_layers
from cemq.quantize.overrides import override

# Methods that take float weights apart or are of training, and what to do instead. Left to themselves they would find
# out at the first quantized layer, half-way.
_OF_FLOAT_MODELS = {
    "add_adapter": "a LoRA that is trained already is loaded with load_lora_weights()",
    "load_attn_procs": "a LoRA is loaded with load_lora_weights()",
    "fuse_qkv_projections": "leave the projections as they are, or fuse them before quantizing it",
}
# parts of tensors' names that say what the file is, and why a quantized layer cannot do with it
_NOT_BESIDE = {
    ".lokr_": "a LoKr, which is no product of two matrices to compute beside a layer",
    "lora_magnitude_vector": "a DoRA, which scales the rows of float weights",
    "dora_scale": "a DoRA, which scales the rows of float weights",
}


def refuse_adapters(model: nn.Module) -> None:
    """Raises ModelError for LoRA layers that are not fused: they would be quantized apart from what they adapt."""
    if adapted_layers(model):
        raise ModelError(
            f"{type(model).__name__} holds LoRA layers: call fuse_lora() and unload_lora_weights() before quantizing it"
        )


def guard_methods(model: nn.Module) -> None:
    """Have a quantized model load LoRAs beside its layers, and refuse, in one line, what would break it half-way."""
    for name, advice in _OF_FLOAT_MODELS.items():
        refuse_method(
            model, name, f"{name}() works on float weights, and this {type(model).__name__} is quantized: {advice}"
        )
    for name, function in _IN_ANOTHER_FORM.items():
        override(model, name, function)


def _load_adapter(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """diffusers' ``load_lora_adapter`` and transformers' ``load_adapter``.

    Raises:
        ModelError: peft is not installed, the file is no plain LoRA, or the weights are not in memory.
    """
    kind = type(model).__name__
    if find_spec("peft") is None:
        raise ModelError("LoRAs are loaded with peft, which is not installed: pip install 'cemq[lora]'")
    for tensor in _tensor_names(*args, *kwargs.values()):
        for part, reason in _NOT_BESIDE.items():
            if part in tensor:
                raise ModelError(f"this file is {reason}, and {kind} is quantized: fuse it before, or leave it out")
    # a pipeline that is handed on has its offloading taken off while it loads
    if kwargs.get("_pipeline") is None and any(tensor.is_meta for tensor in model.parameters()):
        raise ModelError(
            f"weights of {kind} are offloaded: load the LoRA before, or with the pipeline's load_lora_weights()"
        )
    from cemq.quantize.lora import adaptable  # loads peft

    with adaptable(model):
        return original(*args, **kwargs)


def _tensor_names(*arguments: Any) -> Iterator[str]:
    for each in arguments:
        if isinstance(each, Mapping):
            yield from (name for name in each if isinstance(name, str))


def _fuse_lora(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """diffusers' ``fuse_lora``, which says what the rounding costs.

    Raises:
        ModelError: A quantized layer cannot take it in; then none has.
    """
    from cemq.quantize.lora import QuantizedLoraLinear, fuse_together

    layers = [each for each in adapted_layers(model) if isinstance(each, QuantizedLoraLinear)]
    result, cost = fuse_together(layers, lambda: original(*args, **kwargs))
    if cost.change:
        what = f"{len(layers)} layers of {type(model).__name__}"
        warnings.warn(
            f"cemq: fuse_lora() rounded the weights of {what} to integers anew, which moves them by {cost.share:.0%} "
            "of what the LoRA does: unfuse_lora() takes it back, a LoRA that is not fused is not rounded, and one that "
            "a build fuses (--lora) is fused before quantization",
            stacklevel=3,
        )
    return result


_IN_ANOTHER_FORM: dict[str, Callable[..., Any]] = {
    "load_lora_adapter": _load_adapter,
    "load_adapter": _load_adapter,
    "fuse_lora": _fuse_lora,
}
