"""What a run made of a batch of samples, and how many of its steps were computed in full."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cemq.pipelines.batches import Batch, run
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.pipelines.outputs import as_array
from cemq.pipelines.trajectory import run_end
from cemq.runtime.attach import find_hook
from cemq.schedule import CacheSchedule


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """Images, videos or audio (`outputs` knows the shapes) and latents of one batch, the seconds it took, and the
    timesteps; and how many steps it made, and of these in full."""

    images: np.ndarray
    latents: torch.Tensor
    seconds: float
    sampler: SamplerFingerprint | None = None
    num_steps: int = 0
    full_steps: float = 0.0


def run_batch(
    pipe: Any, batch: Batch, *, steps: int, call: Mapping[str, Any], on_step: Callable[[], None] | None = None
) -> Outcome:
    """Run one batch to images, frames or audio, and keep its final latents."""
    with run_end(pipe) as end:
        started = time.perf_counter()
        images = run(pipe, batch, steps=steps, call=call, on_step=on_step)
        if end.sample.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    values, hook = as_array(images), find_hook(pipe)
    num_steps, full_steps = (end.num_steps, end.num_steps) if hook is None else hook.steps_run
    # DiT denoises its samples twice over, for guidance, and decodes the first half
    return Outcome(
        images=values, latents=end.sample[: len(values)], seconds=seconds, sampler=end.sampler, num_steps=num_steps,
        full_steps=full_steps,
    )  # fmt: skip


def said_of_steps(planned: CacheSchedule, num_steps: float, full_steps: float) -> str | None:
    """What to say where other steps were computed than a schedule has; None where there is nothing to say, nor about
    runs that it is not for: of these the runtime has warned."""
    if full_steps == planned.full_count or num_steps != planned.num_steps:
        return None
    ran = f"{full_steps:g} of {num_steps:g} steps ran in full"
    return f"{ran}, {planned.full_count:g} were planned: what is reported is what ran"
