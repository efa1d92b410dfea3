"""Building within a limit of device memory: the weights are never all there at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cemq.build.settings import Limit
from cemq.bundle.manifest import write_pipeline
from cemq.bundle.plan_memory import RESERVE
from cemq.errors import PlacementError
from cemq.families import DENOISERS
from cemq.memory.footprint import ANY_FLOAT, DTYPES, read_footprint, tensors_of
from cemq.memory.offload import free_host_memory, place
from cemq.memory.placement import MAPPED, PLACEMENTS, MemoryPlan, plan_placement
from cemq.pipelines.batches import Progress
from cemq.pipelines.opening import denoisers, open_pipeline
from cemq.quantize import Observer, QuantizationSettings, ShardWriter, quantize_pipeline, quantized_layers
from cemq.reclaim import map_large_allocations

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_GPTQ_COPIES = 4  # of a Hessian, while a layer is fitted: damped, in order, its factor, and its inverse's
_FLOAT_COPIES = 3  # of a weight in float32, while it is quantized
_LOOKED_BACK = 3  # full-compute steps, by taylor2


def plan_build(
    folder: Path,
    limit: Limit,
    *,
    device: str,
    dtype: str,
    original: bool,
    quantization: QuantizationSettings,
    **run: Any,
) -> MemoryPlan:
    """Where the weights of a pipeline folder lie while a build runs it.

    Args:
        original: Whether it is the full-precision pipeline, which is quantized beside running, or what became of it.
        run: Of `read_footprint`: call, full_steps, samples, cache.

    Raises:
        PlacementError: Nothing fits, or weights would be converted on their way from disk.
    """
    components = read_footprint(
        folder, dtype=dtype, stored_dtype=ANY_FLOAT if original else dtype,
        kept_steps=0 if original else _LOOKED_BACK, **run,
    )  # fmt: skip
    kind = torch.device(device).type
    reserve = RESERVE.get(kind, 0)
    if original:
        reserve += _quantization_bytes(folder, limit, quantization, kind)
    plan = plan_placement(
        components,
        limit.vram,
        device=kind,
        reserve_bytes=reserve,
        host_limit=free_host_memory() if limit.host_memory is None else limit.host_memory,
        samples=run.get("samples", 1),
        placements=(PLACEMENTS[0], MAPPED) if kind == "cpu" else PLACEMENTS,
    )
    found = _other_floats(folder, dtype) if plan.chosen.placement.disk else None
    if found:
        raise PlacementError(
            f"vram: weights would stay on disk, where they are {found}, and dtype={dtype} converts all of them in "
            f"memory first: give --dtype {found}, or allow more memory"
        )
    return plan


def _quantization_bytes(folder: Path, limit: Limit, quantization: QuantizationSettings, kind: str) -> int:
    """What quantizing takes on the device beside what runs there: on a CPU, where all is one memory, shards too."""
    linears = [
        tensor
        for name in DENOISERS
        if quantization.quantizes(name)
        for tensor in tensors_of(folder / name)
        if len(tensor.shape) == 2
    ]
    work = max((4 * _FLOAT_COPIES * prod(tensor.shape) for tensor in linears), default=0)
    if quantization.gptq:
        hessians = [4 * tensor.shape[1] ** 2 for tensor in linears]
        fitted = [size for size in hessians if size <= limit.hessian_bytes]
        work += min(limit.hessian_bytes, sum(hessians)) + _GPTQ_COPIES * max(fitted, default=0)
    if kind == "cpu":
        work += min(limit.shard_bytes, sum(tensor.bytes for tensor in linears))
    return work


def _other_floats(folder: Path, dtype: str) -> str | None:
    """The dtype of the weights on disk, if it is another."""
    names = {code: name for name, code in DTYPES.items()}
    bytes_of: dict[str, int] = {}
    for component in folder.iterdir():
        for tensor in tensors_of(component):
            if tensor.dtype in names:
                bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + tensor.bytes
    most = names[max(bytes_of, key=bytes_of.__getitem__)]
    return most if most != dtype else None


def open_within(
    folder: Path, plan: MemoryPlan, *, dtype: str, device: str, offload_folder: Path, variant: str | None = None
) -> DiffusionPipeline:
    """The pipeline with its weights where the plan wants them.

    Args:
        offload_folder: Empty or not there, for weights that rest on disk; it belongs to this pipeline alone.

    Raises:
        ModelError: It cannot be loaded.
        PlacementError: It has parts that the placement's offloading cannot follow.
    """
    stays = plan.chosen.placement.unit == "nothing"
    if plan.chosen.placement.disk and torch.device(device).type == "cpu":
        map_large_allocations()  # before diffusers takes memory for every weight of the models that it is to fill
    pipe = open_pipeline(folder, dtype=dtype, device=device if stays else "cpu", aligned=stays, variant=variant)
    place(pipe, plan, device=torch.device(device), offload_folder=offload_folder)
    return pipe


class PieceByPiece:
    """The quantized pipeline, written from the full-precision files and from layers that come one by one.

    Args:
        source: The full-precision pipeline's folder.
        folder: To write to; it must not hold the denoiser yet.
    """

    def __init__(
        self, source: Path, folder: Path, limit: Limit, *, dtype: str, device: str, variant: str | None = None
    ):
        self._from, self._to, self._limit = source, folder, limit
        self._device = torch.device(device)
        self._pipe = open_pipeline(
            source, dtype=dtype, device="cpu", aligned=False, variant=variant
        )  # mapped, not read
        self._writers: dict[str, ShardWriter] = {}

    def observed(self, name: str) -> dict[str, Any]:
        """How a denoiser's `Observer` gets at float weights, gets rid of quantized ones, and what it may hold."""
        return {
            "weights": getattr(self._pipe, name),
            "put": self._writer(name).add,
            "limit_bytes": self._limit.hessian_bytes,
        }

    def finish(
        self, quantization: QuantizationSettings, observers: Mapping[str, Observer], progress: Progress | None = None
    ) -> None:
        """All that is not written yet.

        Raises:
            SchemeError: There is nothing to quantize in a component.
        """
        streamed = [name for name, _ in denoisers(self._pipe) if quantization.quantizes(name)]
        for name in streamed:
            model, writer = getattr(self._pipe, name), self._writer(name)
            if name in observers:
                config = observers[name].finish(partial(progress, "quantization") if progress else None)
            else:
                config = quantization.config(model)
                for layer, quantized in quantized_layers(model, config, device=self._device):
                    writer.add(layer, quantized)
            writer.finish(model, config)
            self._pipe.register_modules(**{name: None})
        if others := [name for name in quantization.components if name not in DENOISERS]:
            quantize_pipeline(self._pipe, replace(quantization, components=others), {}, progress)
        write_pipeline(self._pipe, self._to, self._from, but_for=streamed, max_shard_size=self._limit.shard_bytes)

    def _writer(self, name: str) -> ShardWriter:
        if name not in self._writers:
            self._writers[name] = ShardWriter(self._to / name, self._limit.shard_bytes)
        return self._writers[name]
