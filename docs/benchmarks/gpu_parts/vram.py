"""The FLUX-size pipeline within 8, 12, 16 and 24 GiB, each in a process that may allocate no more than that."""

from __future__ import annotations

import statistics
import zlib
from functools import partial

import numpy as np
import torch

import cemq
from cemq.bundle.manifest import read_bundle
from cemq.memory.placement import GIB
from gpu_parts import Case, Rows, Setting, flux
from gpu_parts.timing import elapsed

LIMITS = (12, 8, 24, 16)  # GiB, the most telling first


def cases(setting: Setting) -> list[Case]:
    """Of a toy: just what its first and its least placement need."""
    if not setting.tiny:
        return [Case(labels={"limit": size * GIB}, measure=partial(_picture, setting, size * GIB)) for size in LIMITS]
    plan = cemq.plan_memory(flux.bundle(setting, flux.TINY), "1000GiB", device=str(setting.device))
    needs = [e.device_bytes + plan.reserve_bytes for e in plan.estimates if not e.obstacle]
    return [Case(labels={"limit": size}, measure=partial(_picture, setting, size)) for size in (needs[0], min(needs))]


def _picture(setting: Setting, limit: int) -> Rows:
    folder = flux.bundle(setting, flux.TINY if setting.tiny else flux.DEV)
    if setting.cuda:
        torch.cuda.empty_cache()  # where it was built just now
        total = torch.cuda.get_device_properties(setting.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), setting.device)
    loaded: list = []
    loading = elapsed(
        lambda: loaded.append(
            flux.load(folder, setting.device, vram=limit, offload_folder=setting.scratch / "offload")
        ),
        setting,
    )
    (pipe,) = loaded
    chosen = pipe.cemq_memory_plan.chosen
    yield {
        "placement": chosen.name, "planned_bytes": chosen.device_bytes,
        "reserve_bytes": pipe.cemq_memory_plan.reserve_bytes, "loading_seconds": loading,
    }  # fmt: skip
    drawn, full = flux.draw(pipe, folder, setting), set(read_bundle(folder).schedule.full_steps)
    row = {
        "full_step_seconds": statistics.median(drawn.seconds[step] for step in drawn.seconds if step in full),
        "skipped_step_seconds": statistics.median(drawn.seconds[step] for step in drawn.seconds if step not in full),
        "moved_bytes": drawn.moved,
        "moved_on_skipped_bytes": drawn.moved_on_skipped,
        "peak_bytes": drawn.peak_bytes,
        "finite": bool(np.isfinite(drawn.picture).all()),
        "picture": f"{zlib.crc32(drawn.picture.tobytes()):08x}",  # the same under every limit, but for a tiled VAE
    }
    if setting.cuda:
        free, total = torch.cuda.mem_get_info()
        row |= {"peak_reserved_bytes": torch.cuda.max_memory_reserved(), "used_on_device_bytes": total - free}
    yield row
