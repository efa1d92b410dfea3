"""Writing a quantized model whose layers come one by one, and go to files before they add up to a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from cemq.files import link_or_copy
from cemq.quantize.in_diffusers import CemqConfig, mark_quantized
from cemq.reclaim import give_back

_STEM = SAFETENSORS_WEIGHTS_NAME.removesuffix(".safetensors")


class ShardWriter:
    """Writes a diffusers model as ``save_pretrained`` does one of several files.

    Args:
        folder: Where it waits for the rest; what lies there already is removed, but for what ``state`` names.
        shard_bytes: Of tensors that are gathered before they are written; a larger tensor is one file.
        state: Of another writer in this folder, to go on from.
    """

    def __init__(self, folder: Path, shard_bytes: int, state: Mapping[str, Any] | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._shard_bytes = folder, shard_bytes
        self._gathered: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._shards: list[list[str]] = [list(names) for names in state["shards"]] if state else []
        self._total = state["total"] if state else 0
        kept = {self._path(number) for number in range(len(self._shards))}
        for path in folder.iterdir():
            if path not in kept:
                path.unlink()

    def state(self) -> dict[str, Any]:
        """What is written by now, all that was added among it; plain values."""
        self._flush()
        return {"shards": [list(names) for names in self._shards], "total": self._total}

    def add(self, name: str, layer: nn.Module) -> None:
        """A quantized layer, whose module it takes the place of."""
        for leaf, tensor in layer.state_dict().items():
            self._gather(f"{name}.{leaf}", tensor)

    def finish(self, model: Any, config: CemqConfig, folder: Path) -> None:
        """Write the component to ``folder``: all that was added, all else that ``model`` holds, and what says where
        everything is, and how it is quantized.

        What another writer is to go on from stays where it is: the files are the same under another name. ``model`` is
        told that it is quantized, and must not be used any more.
        """
        written = {tensor.rpartition(".")[0] for names in (*self._shards, self._gathered) for tensor in names}
        for name, tensor in model.state_dict().items():
            if name.rpartition(".")[0] not in written:
                self._gather(name, tensor)
        self._flush()
        count = len(self._shards)
        names = [
            SAFETENSORS_WEIGHTS_NAME if count == 1 else f"{_STEM}-{number:05}-of-{count:05}.safetensors"
            for number in range(1, count + 1)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names):
            link_or_copy(self._path(number), folder / name)
        if count > 1:
            where = {tensor: name for name, tensors in zip(names, self._shards, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(where.items()))}
            path = folder / f"{SAFETENSORS_WEIGHTS_NAME}.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        mark_quantized(model, config)
        model.save_config(folder)

    def _gather(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._gathered and self._bytes + size > self._shard_bytes:
            self._flush()
        self._gathered[name] = tensor.detach().contiguous()
        self._bytes += size

    def _flush(self) -> None:
        if not self._gathered:
            return
        save_file(self._gathered, self._path(len(self._shards)), metadata={"format": "pt"})
        for tensor in self._gathered.values():
            give_back(tensor)
        self._shards.append(list(self._gathered))
        self._total += self._bytes
        self._gathered, self._bytes = {}, 0

    def _path(self, number: int) -> Path:
        return self._folder / f"{_STEM}.{number}.safetensors"
