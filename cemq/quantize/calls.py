"""Calls of a denoiser, recorded while a pipeline runs and replayed later."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
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
        if self._output is None or self._last is None:
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
