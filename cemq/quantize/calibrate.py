"""Calibration: what each layer is fed while the denoiser runs, and quantizing to it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cemq.errors import SchemeError
from cemq.pipelines.batches import BUILD_LOG
from cemq.quantize.adapters import refuse_adapters
from cemq.quantize.calls import Call, replay
from cemq.quantize.in_diffusers import (
    CemqConfig,
    linear_of,
    mark_quantized,
    nothing_to_quantize,
    quantizable,
    quantized_there,
)
from cemq.quantize.layers import InputStatistics
from cemq.quantize.schemes import Scheme

HESSIAN_BYTES = 2 << 30  # of Hessians held at once

Progress = Callable[[float], None]


class Observer:
    """Sums up what the layers of a denoiser are fed in some runs of its pipeline, and quantizes them to that.

    Hessians of all layers may be more than memory holds. Layers are then parted, in order, and each part is watched in
    a share of the runs and quantized after it; where that does not suffice either, those with the largest Hessians are
    rounded to nearest. The denoiser stays as it is until `install`.

    Args:
        config: Which layers, and how; after the first call without those whose weights others read.
        runs: How many there will be.
        every: Of how many calls in a run one is watched.
        limit_bytes: Of Hessians held at once.
        weights: The same denoiser, to take float weights from while they are moved about in the one that runs.
        put: What is done with each quantized layer, by name; None keeps them for `install`.

    Raises:
        SchemeError: The patterns leave nothing to quantize.
        ModelError: The denoiser holds adapters.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        config: CemqConfig,
        *,
        gptq: bool = True,
        runs: int = 1,
        every: int = 1,
        limit_bytes: int = HESSIAN_BYTES,
        weights: nn.Module | None = None,
        put: Callable[[str, nn.Module], None] | None = None,
    ):
        refuse_adapters(denoiser)
        self.config: CemqConfig = config
        self._denoiser, self._weights = denoiser, weights or denoiser
        self._runs, self._every, self._limit = runs, every, limit_bytes
        self._layers = _layers(denoiser, config)
        self._gptq = gptq and config.backend == "native"
        self._owners: dict[str, str] = {}  # none before the first call that is watched
        self._parts, self._part = [list(self._layers)], 0
        self._watched: set[str] = set(self._layers)  # the owners of this part
        self._fitted: set[str] = set()  # the owners of all parts that have a Hessian, of those that are known
        self._sums, self._quantized = _InputSums(), dict[str, nn.Module]()
        self._put = put or self._quantized.__setitem__

    @contextmanager
    def watch(self, run: int, *, first: int = 0) -> Iterator[None]:
        """Watch a run, number ``run`` of all, from its ``first`` call on."""
        if (part := run * len(self._parts) // self._runs) != self._part:
            self._quantize_part()
            self._begin(part)
        seen, on, learning = 0, False, None

        def before(*_: Any) -> None:
            nonlocal seen, on, learning
            on, seen = seen >= first and (seen - first) % self._every == 0, seen + 1
            if on and not self._owners:
                learning = FirstCall(self._denoiser, self._layers)

        def after(*_: Any) -> None:
            nonlocal on, learning
            on = False
            if learning is not None:
                learning.close()
                self._learn(learning)
                learning = None

        def sums(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
                owners = self._owners if learning is None else learning.owners
                if on and name in self._watched and owners.get(name, name) == name:
                    fits = self._sums.hessian_bytes + _hessian_bytes(arguments[0].shape[-1]) <= self._limit
                    fitted = name in self._fitted if name in self._owners else fits
                    self._sums.add(name, arguments[0], with_hessian=self._gptq and fitted)

            return hook

        handles = [self._denoiser.register_forward_pre_hook(before), self._denoiser.register_forward_hook(after)]
        handles += [self._denoiser.get_submodule(name).register_forward_pre_hook(sums(name)) for name in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if learning is not None:
                learning.close()

    def finish(self, progress: Progress | None = None) -> CemqConfig:
        """Quantize what is left, after all runs; returns what was quantized and how.

        Raises:
            SchemeError: No call was watched.
        """
        if not self._owners:
            raise SchemeError(
                f"{type(self._denoiser).__name__} was not called in any reference run, and {self.config.backend} "
                f"{self.config.scheme} is fitted to what it is fed: give --rounding nearest, or a call that uses it"
            )
        self._quantize_part(progress)
        return self.config

    def install(self, denoiser: nn.Module, progress: Progress | None = None) -> None:
        """Put quantized layers in the place of the denoiser's, or of another object's with the same layers.

        Raises:
            SchemeError: No call was watched.
        """
        config = self.finish(progress)
        for name in list(self._quantized):
            denoiser.set_submodule(name, self._quantized.pop(name))
        mark_quantized(denoiser, config)

    def state(self) -> dict[str, Any]:
        """What was learned up to now, of plain values and tensors, for `restore`."""
        return {
            "owners": dict(self._owners),
            "full_precision": list(self.config.full_precision),
            "parts": [list(part) for part in self._parts],
            "part": self._part,
            "fitted": sorted(self._fitted),
            "sums": self._sums.state(),
            "quantized": {name: dict(layer.state_dict()) for name, layer in self._quantized.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what another observer of the same denoiser and runs had learned."""
        known = self.config.full_precision
        self.config = self.config.with_full_precision([name for name in state["full_precision"] if name not in known])
        self._layers = _layers(self._denoiser, self.config)
        self._owners, self._parts = dict(state["owners"]), [list(part) for part in state["parts"]]
        self._fitted = set(state["fitted"])
        self._begin(state["part"])
        self._sums.restore(state["sums"], next(self._denoiser.parameters()).device)
        for name, tensors in state["quantized"].items():
            linear, scheme = linear_of(self._weights, name), self._layers[name]
            self._quantized[name] = self.config.layer_class(scheme).from_stored(linear, scheme, tensors)

    def _learn(self, call: FirstCall) -> None:
        """Part the layers, now that it is known which of them share a Hessian, and which have to stay."""
        self._owners = call.owners
        for name in call.read:
            del self._layers[name]
        self.config = self.config.with_full_precision(call.read)
        if not self._layers:
            raise nothing_to_quantize(self._denoiser)
        owners = {name: self._owners.get(name, name) for name in self._layers}
        reached = {owner for owner in owners.values() if owner in self._owners}
        sizes = {owner: _hessian_bytes(linear_of(self._denoiser, owner).in_features) for owner in reached}
        self._fitted = {owner for owner in reached if sizes[owner] <= self._limit} if self._gptq else set()
        while len(parts := _passes(owners, {owner: sizes[owner] for owner in self._fitted}, self._limit)) > self._runs:
            self._fitted.remove(max(sorted(self._fitted), key=sizes.__getitem__))
        self._parts = parts
        rounded = sum(owner not in self._fitted for owner in owners.values() if owner in sizes)
        if rounded and self._gptq:
            logging.getLogger(BUILD_LOG).warning(
                f"{rounded} of {len(owners)} layers of {type(self._denoiser).__name__} are rounded to nearest: GPTQ of "
                f"theirs would take more than {self._runs} runs with {self._limit / 2**30:.3g} GiB each; more samples, "
                "or a larger effort, leave fewer"
            )
        kept = self._sums
        self._begin(0)
        self._sums = kept.of(self._watched, {*self._fitted, *(self._layers.keys() - self._owners.keys())})

    def _begin(self, part: int) -> None:
        self._part, self._sums = part, _InputSums()
        self._watched = {self._owners.get(name, name) for name in self._parts[part]}

    @torch.no_grad()
    def _quantize_part(self, progress: Progress | None = None) -> None:
        names = self._parts[self._part]
        for done, name in enumerate(names, start=1):
            linear, scheme = linear_of(self._weights, name), self._layers[name]
            known = self._sums.statistics(self._owners.get(name, name))
            kind = self.config.layer_class(scheme)
            self._put(name, quantized_there(linear, kind, scheme, known, self._sums.device))
            if progress:
                progress(done / len(names))
        self._sums = _InputSums()


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
    layers = _layers(denoiser, config)
    first = _first_call(denoiser, layers, calls[0])
    owners = {name: first.owners.get(name, name) for name in layers}
    fitted = set(owners.values()) if gptq and config.backend == "native" else set()
    sizes = {owner: _hessian_bytes(linear_of(denoiser, owner).in_features) for owner in fitted}
    passes = _passes(owners, sizes, hessian_bytes)
    done, total = 0, sum(len(calls) + len(names) for names in passes)

    def advance() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done / total)

    for names in passes:
        sums = _InputSums()

        def hook(name: str, sums: _InputSums = sums) -> Callable[..., None]:
            return lambda _, arguments: sums.add(name, arguments[0], with_hessian=name in fitted)

        watched = dict.fromkeys(owners[name] for name in names)
        handles = [denoiser.get_submodule(owner).register_forward_pre_hook(hook(owner)) for owner in watched]
        try:
            for call in calls:
                replay(denoiser, call)
                advance()
        finally:
            for handle in handles:
                handle.remove()
        for name in names:
            linear, scheme = linear_of(denoiser, name), layers[name]
            layer = config.layer_class(scheme).from_linear(linear, scheme, sums.statistics(owners[name]))
            denoiser.set_submodule(name, layer)
            advance()
    mark_quantized(denoiser, config)
    return len(layers)


def weights_read_elsewhere(denoiser: nn.Module, config: CemqConfig, call: Call) -> tuple[str, ...]:
    """`FirstCall.read` of a recorded call."""
    return _first_call(denoiser, [name for name, _, _ in quantizable(denoiser, config)], call).read


def _first_call(denoiser: nn.Module, names: Iterable[str], call: Call) -> FirstCall:
    found = FirstCall(denoiser, names)
    try:
        replay(denoiser, call)
    finally:
        found.close()
    return found


def _layers(denoiser: nn.Module, config: CemqConfig) -> dict[str, Scheme]:
    """Raises SchemeError for none."""
    layers = {name: scheme for name, _, scheme in quantizable(denoiser, config)}
    if not layers:
        raise nothing_to_quantize(denoiser)
    return layers


class FirstCall:
    """Finds out, in one call of a denoiser, which layers are fed one tensor, and which are read by others.

    Args:
        names: The linear layers to look at.
    """

    def __init__(self, denoiser: nn.Module, names: Iterable[str]):
        self.owners: dict[str, str] = {}  # whose input each layer is fed too, itself included: q, k and v are fed alike
        self._layers = {name: denoiser.get_submodule(name) for name in names}
        self._seen: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}  # ids are given again once a tensor is gone
        self._handles = []
        for name, layer in self._layers.items():
            layer.__class__ = _ReadWatched
            self._handles += [
                layer.register_forward_pre_hook(self._before(name), prepend=True),
                layer.register_forward_hook(self._after, always_call=True),
            ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for layer in self._layers.values():
            layer.__class__ = nn.Linear

    @property
    def read(self) -> tuple[str, ...]:
        """Names of the layers whose weight the model reads past their forward, so that no integers can replace it.

        Torch's own multi-head attention is one such reader; a cast of inputs to ``layer.weight.dtype`` is another.
        """
        return tuple(name for name, layer in self._layers.items() if layer.__dict__.get("read"))

    def _before(self, name: str) -> Callable[..., None]:
        def before(layer: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            layer.__dict__["busy"] = True
            values = arguments[0]
            known, owner = self._seen.get(id(values), (None, name))
            if known is None or known() is not values:
                owner, self._seen[id(values)] = name, (weakref.ref(values), name)
            self.owners.setdefault(name, owner)

        return before

    def _after(self, layer: nn.Module, *_: Any) -> None:
        layer.__dict__.pop("busy", None)


class _ReadWatched(nn.Linear):
    """A linear layer that notes whether its weight is read while it does not run itself."""

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "busy" not in self.__dict__:
            self.__dict__["read"] = True
        return super().__getattr__(name)


class _InputSums:
    """What is summed up of the inputs of some layers."""

    def __init__(self) -> None:
        self._hessians: dict[str, torch.Tensor] = {}
        self._channel_largest: dict[str, torch.Tensor] = {}
        self._largest: dict[str, list[torch.Tensor]] = {}
        self.hessian_bytes = 0
        self.device: torch.device | None = None

    def add(self, name: str, values: torch.Tensor, *, with_hessian: bool) -> None:
        flat = values.detach().reshape(-1, values.shape[-1]).float()
        largest = flat.abs().amax(0)
        self._largest.setdefault(name, []).append(largest.amax())
        known = self._channel_largest.get(name)
        self._channel_largest[name] = largest if known is None else torch.maximum(known, largest)
        self.device = flat.device
        if with_hessian or name in self._hessians:
            if name not in self._hessians:
                self._hessians[name] = flat.new_zeros(flat.shape[1], flat.shape[1])
                self.hessian_bytes += _hessian_bytes(flat.shape[1])
            self._hessians[name].addmm_(flat.T, flat)

    def of(self, names: Set[str], with_hessian: Set[str]) -> _InputSums:
        """Those of some layers only."""
        kept = _InputSums()
        kept.device = self.device
        kept._largest = {name: found for name, found in self._largest.items() if name in names}
        kept._channel_largest = {name: found for name, found in self._channel_largest.items() if name in names}
        kept._hessians = {name: found for name, found in self._hessians.items() if name in names & with_hessian}
        kept.hessian_bytes = sum(_hessian_bytes(len(found)) for found in kept._hessians.values())
        return kept

    def state(self) -> dict[str, Any]:
        return {
            "hessians": dict(self._hessians),
            "channel_largest": dict(self._channel_largest),
            "largest": {name: torch.stack(found) for name, found in self._largest.items()},
        }

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._hessians = {name: found.to(device) for name, found in state["hessians"].items()}
        self._channel_largest = {name: found.to(device) for name, found in state["channel_largest"].items()}
        self._largest = {name: list(found.to(device)) for name, found in state["largest"].items()}
        self.hessian_bytes = sum(_hessian_bytes(len(found)) for found in self._hessians.values())
        self.device = device if self._largest else None

    def statistics(self, name: str) -> InputStatistics | None:
        if name not in self._largest:  # a layer that no call reached
            return None
        return InputStatistics(
            largest=tuple(torch.stack(self._largest[name]).tolist()),
            channel_largest=self._channel_largest[name],
            hessian=self._hessians.get(name),
        )


def _hessian_bytes(features: int) -> int:
    return 4 * features**2


def _passes(owners: Mapping[str, str], sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Part the layers, in order, so that the Hessians of each part fit in ``limit`` bytes (one always does).

    Args:
        owners: By layer, whose Hessian is its own.
        sizes: Bytes, of the owners that have one.
    """
    passes: list[list[str]] = [[]]
    held: set[str] = set()
    used = 0
    for name, owner in owners.items():
        if owner in sizes and owner not in held:
            if held and used + sizes[owner] > limit:
                passes.append([])
                held, used = set(), 0
            held.add(owner)
            used += sizes[owner]
        passes[-1].append(name)
    return passes
