"""Building within a limit of device memory: the weights are never all there at once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cemq.build.settings import BuildSettings, Limit
from cemq.bundle.manifest import complete_index
from cemq.bundle.plan_memory import RESERVE, placements_from_files, refuse_conversion
from cemq.families import DENOISERS
from cemq.memory.footprint import (
    ANY_FLOAT,
    Headers,
    quantized_activation_bytes,
    read_footprint,
    read_headers,
)
from cemq.memory.offload import free_host_memory, open_placed
from cemq.memory.placement import ComponentMemory, MemoryPlan, plan_placement
from cemq.pipelines.batches import BUILD_LOG, Progress
from cemq.pipelines.opening import denoisers, open_pipeline
from cemq.quantize import CemqConfig, Observer, QuantizationSettings, ShardWriter, quantize_pipeline, quantized_layers
from cemq.quantize.in_diffusers import quantizable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_GPTQ_COPIES = 4  # of a Hessian, while a layer is fitted: damped, in order, its factor, and its inverse's
_FLOAT_COPIES = 3  # of a weight in float32, while it is quantized
_LOOKED_BACK = 3  # full-compute steps, by taylor2


def plan_build(settings: BuildSettings, quantized: Path | None = None) -> MemoryPlan:
    """Where the weights of a pipeline lie while a build runs it: of the full-precision one, which is quantized beside
    running, or of what was ``quantized``, in this folder.

    Raises:
        PlacementError: Nothing fits, or weights would be converted on their way from disk.
    """
    recipe, limit, dtype = settings.recipe, settings.limit, settings.dtype
    assert limit is not None
    folder, variant = (quantized, None) if quantized else (settings.source.folder, recipe.variant)
    headers = read_headers(folder, call=settings.call, samples=recipe.batch_size, variant=variant)
    components = read_footprint(
        headers,
        dtype=dtype,
        stored_dtype=dtype if quantized else ANY_FLOAT,
        full_steps=settings.steps,
        cache=settings.cache,
        kept_steps=_LOOKED_BACK,  # full precision keeps none, but what it becomes shall fit as well
    )
    if not quantized:
        components = _as_quantized(headers, components, settings)
    kind = torch.device(settings.device).type
    reserve = RESERVE.get(kind, 0)
    if not quantized:
        reserve += _quantization_bytes(headers, limit, settings.quantization, kind)
    plan = plan_placement(
        components,
        limit.vram,
        device=kind,
        reserve_bytes=reserve,
        host_limit=free_host_memory() if limit.host_memory is None else limit.host_memory,
        samples=recipe.batch_size,
        placements=placements_from_files(kind),
        reserved_for="the device's libraries" if quantized else "the device's libraries and for quantizing",
    )
    refuse_conversion(headers, plan, dtype)
    return plan


def _as_quantized(
    headers: Headers, components: Sequence[ComponentMemory], settings: BuildSettings
) -> list[ComponentMemory]:
    """Denoisers with the activations that they will have, where these are more: what is made shall fit as well."""
    options = {"scheme": settings.recipe.scheme, "dtype": settings.dtype}
    return [
        replace(
            each, activation_bytes=max(each.activation_bytes, quantized_activation_bytes(headers, each.name, **options))
        )
        if each.role == "denoiser" and settings.quantization.quantizes(each.name)
        else each
        for each in components
    ]


def _quantization_bytes(headers: Headers, limit: Limit, quantization: QuantizationSettings, kind: str) -> int:
    """What quantizing takes on the device beside what runs there: on a CPU, where all is one memory, shards too."""
    linears = [
        tensor
        for name in DENOISERS
        if quantization.quantizes(name)
        for tensor in headers.tensors.get(name, ())
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


def open_within(settings: BuildSettings, offload_folder: Path, quantized: Path | None = None) -> DiffusionPipeline:
    """The pipeline of `plan_build`, with its weights where that says.

    Args:
        offload_folder: For weights that rest on disk; it belongs to this pipeline alone.

    Raises:
        ModelError: It cannot be loaded.
        PlacementError: As of `plan_build`, or it has parts that the placement's offloading cannot follow.
    """
    plan = plan_build(settings, quantized)
    logging.getLogger(BUILD_LOG).info("%s pipeline: %s", "quantized" if quantized else "full-precision", plan.summary())
    where = {"dtype": settings.dtype, "device": torch.device(settings.device), "offload_folder": offload_folder}
    if quantized:
        return open_placed(quantized, plan, **where)
    return open_placed(settings.source.folder, plan, **where, variant=settings.recipe.variant)


class PieceByPiece:
    """The quantized pipeline, written from the full-precision files and from layers that come one by one.

    Args:
        folder: Where layers wait for the rest.
    """

    def __init__(self, settings: BuildSettings, folder: Path):
        assert settings.limit is not None
        self._settings, self._limit, self._folder = settings, settings.limit, folder
        source = settings.source.folder
        self._pipe = open_pipeline(  # mapped, not read
            source, dtype=settings.dtype, device="cpu", aligned=False, variant=settings.recipe.variant
        )
        self._states: dict[str, Any] = {}
        self._writers: dict[str, ShardWriter] = {}

    def observed(self, name: str) -> dict[str, Any]:
        """How a denoiser's `Observer` gets at float weights, gets rid of quantized ones, and what it may hold."""
        return {
            "weights": getattr(self._pipe, name),
            "put": lambda layer, quantized: self._writer(name).add(layer, quantized),
            "limit_bytes": self._limit.hessian_bytes,
        }

    def state(self) -> dict[str, Any]:
        """What is written by now, for `restore`; plain values."""
        return self._states | {name: writer.state() for name, writer in self._writers.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what another had written in this folder."""
        self._states = dict(state)

    def finish(
        self,
        folder: Path,
        quantization: QuantizationSettings,
        observers: Mapping[str, Observer],
        progress: Progress | None = None,
    ) -> None:
        """The whole pipeline in a folder.

        Raises:
            SchemeError: There is nothing to quantize in a component.
        """
        streamed = [name for name, _ in denoisers(self._pipe) if quantization.quantizes(name)]
        for name in streamed:
            model = getattr(self._pipe, name)
            if name in observers:
                config = observers[name].finish(partial(progress, "quantization") if progress else None)
            else:
                config = self._round(name, model, quantization.config(model), progress)
            self._writer(name).finish(model, config, folder / name)
            self._pipe.register_modules(**{name: None})
        if others := [name for name in quantization.components if name not in DENOISERS]:
            quantize_pipeline(self._pipe, replace(quantization, components=others), {}, progress)
        sharded = {"max_shard_size": self._limit.shard_bytes, "safe_serialization": True}
        for name, part in self._pipe.components.items():
            if part is not None:
                part.save_pretrained(folder / name, **sharded if isinstance(part, nn.Module) else {})
        self._pipe.save_config(folder)
        complete_index(folder, self._settings.source.folder, absent=streamed)

    def _round(self, name: str, model: nn.Module, config: CemqConfig, progress: Progress | None) -> CemqConfig:
        total = sum(1 for _ in quantizable(model, config))
        layers = quantized_layers(model, config, device=torch.device(self._settings.device))
        for done, (layer, quantized) in enumerate(layers, start=1):
            self._writer(name).add(layer, quantized)
            if progress:
                progress("quantization", done / total)
        return config

    def _writer(self, name: str) -> ShardWriter:
        if name not in self._writers:
            folder, state = self._folder / name, self._states.get(name)
            self._writers[name] = ShardWriter(folder, self._limit.shard_bytes, state)
        return self._writers[name]
