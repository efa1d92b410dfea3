"""The full-precision model that a bundle was made from, as it was then."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cemq.bundle.manifest import MANIFEST, Manifest
from cemq.errors import ModelError
from cemq.memory.offload import open_placed
from cemq.memory.placement import MemoryPlan
from cemq.pipelines.lora import Lora, fuse_loras, locate_again
from cemq.pipelines.opening import ModelSource, class_of_folder, locate, open_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class Original:
    """Where it lies, and the LoRAs that are fused into it."""

    source: ModelSource
    loras: tuple[Lora, ...]
    variant: str | None

    def open(
        self, *, dtype: str, device: str, plan: MemoryPlan | None = None, offload_folder: Path | None = None
    ) -> DiffusionPipeline:
        """Load it, its LoRAs fused.

        Args:
            plan: Where its weights go, by `cemq.bundle.plan_memory.plan_original`; None: all of them on the device.
            offload_folder: For weights that the plan keeps on disk.

        Raises:
            ModelError: It cannot be loaded.
            PlacementError: It has parts that the placement's offloading cannot follow.
        """
        folder = self.source.folder
        if plan is not None:
            where = torch.device(device)
            return open_placed(
                folder, plan, dtype=dtype, device=where, offload_folder=offload_folder, variant=self.variant
            )
        pipe = open_pipeline(folder, dtype=dtype, device=device, variant=self.variant)
        fuse_loras(pipe, self.loras)
        return pipe


def find_original(manifest: Manifest, model: str | None = None) -> Original:
    """Find what a bundle was made from; nothing is loaded.

    Args:
        model: Where the model lies by now, its LoRAs not fused; None takes where it lay.

    Raises:
        ModelError: It is not there, or another by now; or a LoRA is, or there is no peft to fuse it with.
    """
    source = find_model(manifest, model)
    loras = tuple(locate_again(each) for each in manifest.lora)
    return Original(source=source, loras=loras, variant=None if model else manifest.variant)


def find_model(manifest: Manifest, model: str | None = None) -> ModelSource:
    """As `find_original`, without LoRAs."""
    where = {} if model else {"variant": manifest.variant, "revision": manifest.revision}
    source = locate(model or manifest.model, **where)
    if (source.folder / MANIFEST).is_file():
        raise ModelError(f"'{source.name}' is a cemq bundle: give the full-precision model")
    if source.revision and manifest.revision and source.revision != manifest.revision:
        raise ModelError(
            f"'{source.name}' is at revision {source.revision}, the bundle was made from {manifest.revision}: give a "
            "folder with that one"
        )
    found = class_of_folder(source.folder).__name__
    if found != manifest.pipeline_class:
        raise ModelError(
            f"'{source.name}' is a {found}, the bundle was made from a {manifest.pipeline_class}: give the model that "
            "it was made from"
        )
    return source
