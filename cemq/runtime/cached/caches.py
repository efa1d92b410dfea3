"""What may be cached of a denoiser, by name, and finding out beforehand whether it can be and how much it takes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map

from cemq.pipelines.opening import denoisers
from cemq.runtime.cached.inner import Forward
from cemq.runtime.cached.inside import InsideCache
from cemq.runtime.cached.modules import ModuleCache
from cemq.runtime.cached.residual import ResidualCache, Routes
from cemq.runtime.history import copied, summed, tensor_bytes
from cemq.runtime.registration import OutermostHook, install, uninstall
from cemq.schedule.plan import INSIDE

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Cache(Protocol):
    """What `ScheduleHook` asks of it, for one denoiser."""

    contents: str  # what of the denoiser is kept, in words

    def compute(self, forward: Forward, *, wanted: bool, shapes: Any) -> tuple[Any, Any]:
        """The denoiser's output and, if it is wanted, what is kept of this call; its arguments have these shapes."""
        ...

    def serve(self, forward: Forward, prediction: Any, /) -> Any:
        """The output made from a prediction of what is kept, whose leaves may be `Weighted`; None if it cannot be."""

    def install(self) -> None: ...

    def remove(self) -> None: ...


class OutputCache:
    """Keeps the denoiser's output: a skipped step runs nothing of the denoiser."""

    contents: str = "the output"

    @torch.compiler.disable(recursive=False)
    def compute(self, forward: Forward, *, wanted: bool, shapes: Any) -> tuple[Any, Any]:
        output = forward()
        return output, self._copy(output) if wanted else None

    @torch.compiler.disable()
    def serve(self, forward: Forward, prediction: Any) -> Any:
        return summed(prediction)

    @torch.compiler.disable()
    def _copy(self, output: Any) -> Any:
        return tree_map(copied, output)

    def install(self) -> None: ...

    def remove(self) -> None: ...


def make_caches(kind: str, models: Sequence[nn.Module]) -> list[Cache]:
    """A cache of this kind (see `Plan`) for each denoiser of a pipeline.

    Raises:
        ModelError: A denoiser has nothing of the kind to cache.
    """
    if kind == "residual":
        routes: Routes = {}
        return [ResidualCache(model, routes) for model in models]
    kinds = {"output": lambda _: OutputCache(), "modules": ModuleCache, INSIDE: InsideCache}
    return [kinds[kind](model) for model in models]


@dataclass
class CacheMemory:
    """What a cache takes: ``step_bytes`` for every full-compute step that it keeps, of all calls of the denoisers."""

    contents: str
    step_bytes: int = 0


class _Probe(OutermostHook):
    """Keeps nothing, but checks every call and adds up what would be kept of it."""

    def __init__(self, cache: Cache, memory: CacheMemory):
        super().__init__()
        self.cache, self.memory = cache, memory

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = functools.partial(self.fn_ref.original_forward, *args, **kwargs)
        output, value = self.cache.compute(forward, wanted=True, shapes=None)
        self.memory.step_bytes += tensor_bytes(value)
        return output


@contextmanager
def cache_checked(pipe: DiffusionPipeline, kind: str) -> Iterator[CacheMemory]:
    """Find out in one step, run without a schedule, whether denoisers can be cached in this way and what that takes.

    Outputs are unchanged. Each denoiser is checked at its first call.

    Raises:
        ModelError: They cannot, at once or at a denoiser's first call; says why.
    """
    models = [denoiser for _, denoiser in denoisers(pipe)]
    caches = make_caches(kind, models)
    memory = CacheMemory(contents=caches[0].contents)
    with ExitStack() as undo:
        for denoiser, cache in zip(models, caches, strict=True):
            install(denoiser, _Probe(cache, memory))
            undo.callback(uninstall, denoiser)
            undo.callback(cache.remove)
            cache.install()
        yield memory
