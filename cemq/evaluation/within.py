"""Full precision and what was made of it, run one after the other within a limit of device memory."""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cemq.bundle.original import Original
from cemq.bundle.plan_memory import plan_memory, plan_original
from cemq.errors import InputError, PlacementError
from cemq.files import cache_folder
from cemq.memory.footprint import Headers, cached_bytes, read_headers
from cemq.memory.offload import free_host_memory
from cemq.memory.placement import MemoryPlan, format_bytes
from cemq.pipelines.opening import check_device

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def at_once(batch_size: int | None, vram: str | int | None, usual: int) -> int:
    """Samples run together; one within a limit, as placements allow for.

    Args:
        usual: Where neither says.

    Raises:
        InputError: None are asked for, or more than one within a limit.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size={batch_size}: at least one sample is drawn at a time")
    if vram is None:
        return usual if batch_size is None else batch_size
    if batch_size not in (None, 1):
        raise InputError(f"batch_size={batch_size}: with vram={vram} samples are drawn one at a time: leave one out")
    return 1


def plan_bundle(bundle: str | Path, vram: str | int | None, device: str, **asked: Any) -> MemoryPlan | None:
    """Where the weights of a bundle will lie that is opened once full precision has drawn: what does not fit is refused
    before. None without a limit.

    Args:
        asked: Budget and call, as of `cemq.from_pretrained`.

    Raises:
        PlacementError: Nothing fits into ``vram``.
        InputError: The limit is no size, or there is no such device.
    """
    if vram is None:
        return None
    return plan_memory(bundle, vram, device=check_device(device).type, host_memory=free_host_memory(), **asked)


@contextmanager
def opening_original(
    original: Original, vram: str | int | None, *, dtype: str, device: str, call: Mapping[str, Any], steps: int
) -> Iterator[Callable[[], DiffusionPipeline]]:
    """What opens full precision; its weights may rest on disk for as long as the block lasts.

    Args:
        vram: None: all of it on the device.
        call: Arguments of the pipeline, as it wants them.

    Raises:
        PlacementError: It fits nowhere, said before anything is loaded.
    """
    opening = partial(original.open, dtype=dtype, device=device)
    if vram is None:
        yield opening
        return
    plan = plan_original(original, vram, dtype=dtype, device=check_device(device).type, call=call, steps=steps)
    logging.getLogger("cemq").info("%s: %s", original.source.name, plan.summary())
    root = cache_folder() / "offload"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="original-", dir=root) as folder:
        yield partial(opening, plan=plan, offload_folder=Path(folder) / "weights")


def free_device_memory() -> None:
    """Have the memory of pipelines back that nobody holds any more; they refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a pipeline that was placed leaves of its limit to a cache.

    Args:
        folder: Of its files.
        dtype: That it runs in.
        call: Arguments of the pipeline, as it wants them.
    """

    plan: MemoryPlan
    folder: Path
    dtype: str
    call: Mapping[str, Any]

    @cached_property
    def _headers(self) -> Headers:
        return read_headers(self.folder, call=self.call)

    def check(self, cache: str, kept_steps: int) -> None:
        """Raises PlacementError where what is cached of so many steps does not fit beside the weights."""
        headers, plan = self._headers, self.plan
        kept = cached_bytes(headers, dtype=self.dtype, cache=cache, kept_steps=kept_steps)
        needed = plan.with_cached(headers.first_denoiser, kept)
        if not plan.fits(needed):
            raise PlacementError(
                f"vram={format_bytes(plan.limit_bytes)}: the cache may hold {format_bytes(kept)}, and with that "
                f"{needed.name} takes {format_bytes(needed.device_bytes + plan.reserve_bytes)}: allow that much"
            )


def room_of(pipe: DiffusionPipeline, folder: Path, *, dtype: str, call: Mapping[str, Any]) -> Room | None:
    """None of a pipeline that was opened without a limit; the other arguments are those of `Room`."""
    plan = getattr(pipe, "cemq_memory_plan", None)
    return None if plan is None else Room(plan=plan, folder=folder, dtype=dtype, call=call)
