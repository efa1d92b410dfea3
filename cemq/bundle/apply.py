"""A schedule on top of any pipeline, whoever quantized it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cemq.bundle.schedule_file import read_schedule
from cemq.runtime.attach import ScheduleHook, attach
from cemq.schedule import CacheSchedule


def apply_schedule(
    pipe: Any, schedule: str | Path | CacheSchedule, *, any_sampler: bool = False, cache: str | None = None
) -> ScheduleHook:
    """Have a diffusers pipeline follow a schedule, until `cemq.detach`.

    Only a hook on the denoiser is added, so it does not matter what computes the full steps: SDNQ, torchao, GGUF,
    nunchaku, or nothing that quantizes at all. The hook lies above offloading, whether that was applied before or is
    applied later. A run with another step count or sampler than the schedule was planned for computes in full.

    Args:
        pipe: Anything with a ``scheduler`` and a ``transformer`` or ``unet``.
        schedule: A file of ``cemq export --format json``, a bundle's folder, or a `CacheSchedule`.
        any_sampler: Follow it under every sampler with as many steps. A `CacheSchedule` names no sampler: it always is.
        cache: What skipped steps are predicted from, ``output``, the blocks' ``residual``, or the outputs of their
            attention and feed-forward ``modules``; None takes what the schedule was planned for, for a `CacheSchedule`
            the output.

    Returns:
        The hook, which counts full and skipped evaluations of the latest run.

    Raises:
        ModelError: The pipeline has no denoiser, or another cache is active on it, or it has no blocks whose residual
            or modules could be cached.
        InputError, BundleError: The schedule cannot be read, or there is no such cache.
    """
    found, sampler, planned_cache = read_schedule(schedule)
    return attach(pipe, found, None if any_sampler else sampler, cache=cache or planned_cache)
