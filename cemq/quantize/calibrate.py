"""Calibration from recorded calls of the denoiser: what each layer's inputs look like, over whole trajectories."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cemq.quantize.linear import InputStatistics
from cemq.quantize.quantizer import CemqConfig, mark_quantized, nothing_to_quantize, quantizable, refuse_adapters
from cemq.quantize.schemes import Scheme

HESSIAN_BYTES = 2 << 30  # of Hessians held at once; layers beyond it wait for another pass over the calls


@dataclass(frozen=True)
class Call:
    """Arguments of one call of the denoiser, on the CPU."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@contextmanager
def record_calls(denoiser: nn.Module, *, every: int, first: int = 0) -> Iterator[list[Call]]:
    """Keep the arguments of each ``every``-th call from the ``first`` on, both guidance branches alike."""
    calls: list[Call] = []
    seen, kept = 0, _Keeper()

    def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal seen
        if seen >= first and (seen - first) % every == 0:
            calls.append(Call(kept(arguments), kept(keywords)))
        seen += 1

    handle = denoiser.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


class _Keeper:
    """Copies tensors to the CPU, those that come again with every call (text embeddings) only once."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.is_inference():  # it counts no changes, so that an old copy might be taken for it
                return value.detach().to("cpu", copy=True)
            key = (id(value), value._version)
            if key not in self._copies:  # the original is kept too, or its id could be given to another
                self._copies[key] = (value, value.detach().to("cpu", copy=True))
            return self._copies[key][1]
        return _rebuild(value, self)


def _rebuild(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: change(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(change(item) for item in value)
    return value


@torch.no_grad()
def replay(denoiser: nn.Module, call: Call) -> Any:
    """Call the denoiser as it was called then, on its own device."""
    device = next(denoiser.parameters()).device

    def place(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else _rebuild(value, place)

    return denoiser(*place(call.arguments), **place(call.keywords))


@torch.no_grad()
def quantize_calibrated(
    denoiser: nn.Module,
    config: CemqConfig,
    calls: Sequence[Call],
    *,
    gptq: bool = True,
    progress: Callable[[float], None] | None = None,
    hessian_bytes: int = HESSIAN_BYTES,
) -> int:
    """Quantize in place from recorded calls: GPTQ for weights, smoothing, static activation scales.

    The calls are replayed as often as it takes for the Hessians of one pass to fit in ``hessian_bytes``; after each
    pass its layers are quantized, so that later ones are fitted to what they will be fed.

    Returns the number of layers replaced.

    Raises:
        SchemeError: The patterns leave nothing to quantize.
    """
    refuse_adapters(denoiser)
    layers = {name: scheme for name, _, scheme in quantizable(denoiser, config)}
    if not layers:
        raise nothing_to_quantize(denoiser)
    wanted = set(layers) if gptq and config.backend == "native" else set()
    owners = _shared_inputs(denoiser, layers, calls[0])
    passes = _passes(denoiser, layers, owners, wanted, hessian_bytes)
    for number, names in enumerate(passes):
        watched = {name: owners.get(name, name) for name in names}
        hessian_owners = {owner for name, owner in watched.items() if name in wanted}
        found = _Inputs(hessian_owners)
        handles = [
            denoiser.get_submodule(owner).register_forward_pre_hook(found.hook(owner))
            for owner in dict.fromkeys(watched.values())
        ]
        try:
            for done, call in enumerate(calls, start=1):
                replay(denoiser, call)
                if progress:
                    progress((number + done / len(calls)) / len(passes))
        finally:
            for handle in handles:
                handle.remove()
        for name, owner in watched.items():
            linear, scheme = denoiser.get_submodule(name), layers[name]
            layer = config.layer_class(scheme).from_linear(linear, scheme, found.statistics(owner))
            denoiser.set_submodule(name, layer)
    mark_quantized(denoiser, config)
    return len(layers)


class _Watched(nn.Linear):
    """A linear layer that notes whether its weight is read by anyone but itself."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.__dict__["busy"] = True
        try:
            return super().forward(input)
        finally:
            del self.__dict__["busy"]

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "busy" not in self.__dict__:
            self.__dict__["read"] = True
        return super().__getattr__(name)


def weights_read_elsewhere(denoiser: nn.Module, config: CemqConfig, call: Call) -> tuple[str, ...]:
    """Names of the layers whose weight the model reads past their forward, so that it cannot be replaced by integers.

    Torch's own multi-head attention is one such reader; a cast of inputs to ``layer.weight.dtype`` is another.
    """
    names = [name for name, _, _ in quantizable(denoiser, config)]
    layers = [denoiser.get_submodule(name) for name in names]
    for layer in layers:
        layer.__class__ = _Watched
    try:
        replay(denoiser, call)
    finally:
        read = tuple(name for name, layer in zip(names, layers, strict=True) if layer.__dict__.pop("read", False))
        for layer in layers:
            layer.__class__ = nn.Linear
    return read


class _Inputs:
    """What is summed up of the inputs of some layers while calls are replayed."""

    def __init__(self, with_hessian: set[str]):
        self._with_hessian = with_hessian
        self._hessians: dict[str, torch.Tensor] = {}
        self._channel_largest: dict[str, torch.Tensor] = {}
        self._largest: dict[str, list[torch.Tensor]] = {}

    def hook(self, name: str) -> Callable[..., None]:
        def before(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            flat = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).float()
            largest = flat.abs().amax(0)
            self._largest.setdefault(name, []).append(largest.amax())
            known = self._channel_largest.get(name)
            self._channel_largest[name] = largest if known is None else torch.maximum(known, largest)
            if name in self._with_hessian:
                if name not in self._hessians:
                    self._hessians[name] = flat.new_zeros(flat.shape[1], flat.shape[1])
                self._hessians[name].addmm_(flat.T, flat)

        return before

    def statistics(self, name: str) -> InputStatistics | None:
        if name not in self._largest:  # a layer that no call reached
            return None
        return InputStatistics(
            largest=tuple(torch.stack(self._largest[name]).tolist()),
            channel_largest=self._channel_largest[name],
            hessian=self._hessians.get(name),
        )


def _shared_inputs(denoiser: nn.Module, layers: Mapping[str, Scheme], call: Call) -> dict[str, str]:
    """Which layer's input each layer is fed too, itself included: q, k and v are fed by one tensor."""
    seen: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}  # ids are given again once a tensor is gone
    owners: dict[str, str] = {}

    def hook(name: str) -> Callable[..., None]:
        def before(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            values = arguments[0]
            known, owner = seen.get(id(values), (None, name))
            if known is None or known() is not values:
                owner, seen[id(values)] = name, (weakref.ref(values), name)
            owners.setdefault(name, owner)

        return before

    handles = [denoiser.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    try:
        replay(denoiser, call)
    finally:
        for handle in handles:
            handle.remove()
    return owners


def _passes(
    denoiser: nn.Module, layers: Mapping[str, Scheme], owners: Mapping[str, str], wanted: set[str], limit: int
) -> list[list[str]]:
    """Part the layers, in order, so that the Hessians of each part fit in ``limit`` bytes (one always does)."""
    passes: list[list[str]] = [[]]
    held: set[str] = set()
    used = 0
    for name in layers:
        owner = owners.get(name, name)
        if name in wanted and owner not in held:
            size = 4 * denoiser.get_submodule(name).in_features ** 2
            if held and used + size > limit:
                passes.append([])
                held, used = set(), 0
            held.add(owner)
            used += size
        passes[-1].append(name)
    return passes
