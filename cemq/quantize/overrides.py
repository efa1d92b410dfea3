"""A method of one model, in the place of its class's."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from cemq.errors import ModelError
from cemq.pipelines.lora import adapted_layers


def override(model: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Have a method, if the model has it, call ``function(model, original, *args, **kwargs)``."""
    if hasattr(type(model), name):
        setattr(model, name, _Method(model, name, function))


def guard_saving(model: nn.Module) -> None:
    """Have a model that has been given LoRA layers refuse to be saved for as long as it holds them.

    Not one that never had any: ``Model.from_pretrained(...).save_pretrained(...)`` keeps no model for `_Method`.
    """
    override(model, "save_pretrained", _save_pretrained)


def _save_pretrained(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Raises ModelError while there are LoRA layers: the names of what was written would be those of no model."""
    if adapted_layers(model):
        raise ModelError(
            f"{type(model).__name__} holds LoRA layers, and a quantized model is saved without: call "
            "unload_lora_weights() first, and keep the LoRA's own file"
        )
    return original(*args, **kwargs)


class _Method:
    """It does not keep the model, or a quantized one would only be freed when Python looks for circles; and it finds
    the right one in a copy.
    """

    def __init__(self, model: nn.Module, name: str, function: Callable[..., Any]):
        self._model = weakref.ref(model)
        self._name, self._function = name, function
        # diffusers' pipelines ask for it before they call save_pretrained
        self.__signature__: inspect.Signature = inspect.signature(self._original(model))

    def _original(self, model: nn.Module) -> Callable[..., Any]:
        return getattr(type(model), self._name).__get__(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        assert model is not None, "the model of this method is gone"
        return self._function(model, self._original(model), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Method:
        model = self._model()
        return _Method(memo.get(id(model), model), self._name, self._function)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Method, (self._model(), self._name, self._function)
