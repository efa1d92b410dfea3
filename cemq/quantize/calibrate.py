"""Calibration from recorded calls of the denoiser: what each layer's inputs look like, over whole trajectories."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cemq.errors import ReplayError, first_line
from cemq.pipelines.batches import BUILD_LOG
from cemq.pipelines.outputs import first_tensor
from cemq.quantize.in_diffusers import CemqConfig, mark_quantized, nothing_to_quantize, quantizable, refuse_adapters
from cemq.quantize.layers import InputStatistics
from cemq.quantize.schemes import Scheme

HESSIAN_BYTES = 2 << 30  # of Hessians held at once; layers beyond it wait for another pass over the calls
RECORDED_BYTES = 8 << 30  # of recorded calls; some pipelines hand their denoiser gigabytes of a ControlNet or a cache
_THINNING = 3  # odd, so that what is kept of two calls a step (guidance) is of both


@dataclass(frozen=True)
class Call:
    """Arguments of one call of the denoiser, copied as they were then, tensors to the CPU."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@contextmanager
def record_calls(
    denoiser: nn.Module, *, every: int, first: int = 0, limit_bytes: int = RECORDED_BYTES
) -> Iterator[list[Call]]:
    """Keep the arguments of each ``every``-th call from the ``first`` on, both guidance branches alike.

    Where they take more than ``limit_bytes``, every third of those kept is kept on. In the end the last call that was
    recorded is replayed, for not all can be: a denoiser may depend on more than its arguments.

    Raises:
        ReplayError: At the end of the block: an argument cannot be copied, or the replayed call gave something else.
    """
    recorder = _Recorder(denoiser, every, first, limit_bytes)
    handles = (
        denoiser.register_forward_pre_hook(recorder.before, with_kwargs=True),
        denoiser.register_forward_hook(recorder.after),
    )
    try:
        yield recorder.calls
    finally:
        for handle in handles:
            handle.remove()
    recorder.check()
    if recorder.every > every:
        logging.getLogger(BUILD_LOG).info(
            "recorded calls of %s take much memory: one in %d is kept, instead of one in %d",
            type(denoiser).__name__, recorder.every, every,
        )  # fmt: skip


class _Recorder:
    """What `record_calls` keeps while a pipeline runs."""

    def __init__(self, denoiser: nn.Module, every: int, first: int, limit_bytes: int):
        self.calls: list[Call] = []
        self.every = every
        self._denoiser, self._first, self._limit_bytes = denoiser, first, limit_bytes
        self._seen, self._kept = 0, _Keeper()
        self._tensors: list[dict[int, torch.Tensor]] = []  # of each call, by id
        self._last: Call | None = None
        self._records, self._output = False, None
        self._problem: Exception | None = None

    def before(self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        number, self._seen = self._seen - self._first, self._seen + 1
        self._records = number >= 0 and number % self.every == 0 and self._problem is None
        if not self._records:
            return
        tensors: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept = self._kept(tensor)
            tensors[id(kept)] = kept
            return kept

        try:
            self._last = Call(*_copied(self._denoiser, (arguments, keywords), keep))
        except Exception as error:  # whatever objects of a pipeline's own raise; the run itself goes on
            self._problem, self._records = error, False
            return
        self.calls.append(self._last)
        self._tensors.append(tensors)
        while len(self.calls) > 1 and self._bytes() > self._limit_bytes:
            self.every *= _THINNING
            self.calls[:], self._tensors[:] = self.calls[::_THINNING], self._tensors[::_THINNING]

    def after(self, _: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if self._records:
            self._output = first_tensor(output).detach().to("cpu", copy=True)

    def _bytes(self) -> int:
        unique = {key: tensor for tensors in self._tensors for key, tensor in tensors.items()}
        return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())

    def check(self) -> None:
        """Raises ReplayError if the calls say too little to be repeated."""
        name = type(self._denoiser).__name__
        if self._problem is not None:
            raise ReplayError(f"a call of {name} cannot be copied: {first_line(self._problem)}") from self._problem
        if self._output is None:
            return
        device = next(self._denoiser.parameters()).device
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                found = first_tensor(replay(self._denoiser, self._last)).cpu()
        except Exception as error:  # whatever a model raises that misses something
            raise ReplayError(f"a call of {name} cannot be replayed: {first_line(error)}") from error
        # kernels may depend on how memory is aligned, and on a GPU on chance; another call is further away than this
        tolerance = torch.finfo(found.dtype).eps ** 0.5
        if found.shape != self._output.shape or not _distance(found, self._output) <= tolerance:
            raise ReplayError(f"a call of {name} gives something else when it is replayed")


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error; infinities and what is no number count as numbers, for they can be repeated too."""
    found, expected = (torch.nan_to_num(tensor.float()).double() for tensor in (found, expected))
    return ((found - expected).norm() / expected.norm().clamp_min(1e-20)).item()


class _Keeper:
    """Copies tensors to the CPU, those that come again with every call (text embeddings) only once."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor]]] = {}

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        if value.is_inference():  # it counts no changes, so that an old copy might be taken for it
            return value.detach().to("cpu", copy=True)
        key = (id(value), value._version)
        original, copy = (reference() for reference in self._copies.get(key, (lambda: None, lambda: None)))
        if original is not value or copy is None:  # its id may have been another's, and copies may have been dropped
            copy = value.detach().to("cpu", copy=True)
            self._copies[key] = weakref.ref(value), weakref.ref(copy)
        return copy


class _TensorsCopied(TorchFunctionMode):
    """Where deep copies copy their tensors in a way of their own."""

    def __init__(self, copy: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self._copy = copy

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.__deepcopy__:
            return self._copy(args[0])
        return function(*args, **(kwargs or {}))


def _copied(denoiser: nn.Module, value: Any, copy: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A deep copy, of caches and other objects too, with tensors as ``copy`` gives them; the denoiser stays itself."""
    with _TensorsCopied(copy):
        return deepcopy(value, {id(module): module for module in denoiser.modules()})


@torch.no_grad()
def replay(denoiser: nn.Module, call: Call) -> Any:
    """Call the denoiser as it was called then, on its own device, with copies that it may change."""
    device = next(denoiser.parameters()).device
    arguments, keywords = _copied(
        denoiser, (call.arguments, call.keywords), lambda tensor: tensor.to(device, copy=True)
    )
    return denoiser(*arguments, **keywords)


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
    done, total = 0, sum(len(calls) + len(names) for names in passes)

    def advance() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done / total)

    for names in passes:
        watched = {name: owners.get(name, name) for name in names}
        hessian_owners = {owner for name, owner in watched.items() if name in wanted}
        found = _Inputs(hessian_owners)
        handles = [
            denoiser.get_submodule(owner).register_forward_pre_hook(found.hook(owner))
            for owner in dict.fromkeys(watched.values())
        ]
        try:
            for call in calls:
                replay(denoiser, call)
                advance()
        finally:
            for handle in handles:
                handle.remove()
        for name, owner in watched.items():
            linear, scheme = denoiser.get_submodule(name), layers[name]
            layer = config.layer_class(scheme).from_linear(linear, scheme, found.statistics(owner))
            denoiser.set_submodule(name, layer)
            advance()
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
