"""Two runs per batch measure every cache interval at once: a reference run, and a forced run of the quantized model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from cemq.errors import ModelError, PriorMismatchError
from cemq.parallel import ALONE, Processes
from cemq.pipelines.batches import Batch, Progress, iterate, run
from cemq.pipelines.outputs import channel_axis
from cemq.pipelines.trajectory import Trajectory, force, record
from cemq.prior.error_prior import ErrorPrior, PriorMetadata

_CHUNK = 1 << 20  # latent elements turned to float64 at a time
_LARGEST_CHANNEL_GRAMS = 1 << 18  # numbers; 16 channels at 128 steps


def record_references(
    pipe: Any,
    batches: Sequence[Batch],
    *,
    steps: int,
    call: Mapping[str, Any],
    progress: Progress | None = None,
    watch: Callable[[Batch], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> list[Trajectory]:
    """Run the full-precision pipeline once per batch and keep its trajectories; ``watch`` is entered for each run.

    Raises:
        ModelError: The first run never steps the pipeline's scheduler, so that there are no steps to speak of.
    """
    references = []
    for batch, on_step in iterate(batches, "reference runs", progress, steps):
        with watch(batch), record(pipe, measure_steps=True) as trajectory:
            run(pipe, batch, steps=steps, call=call, on_step=on_step)
        if not trajectory.num_steps:
            raise ModelError(
                f"{type(pipe).__name__} never calls step() of its scheduler (it steps copies of it, or none): none of "
                "its steps can be skipped; quantize it with cemq.quantize_in_place"
            )
        references.append(trajectory)
    return references


def profile(
    pipe: Any,
    batches: Sequence[Batch],
    references: Sequence[Trajectory],
    *,
    steps: int,
    call: Mapping[str, Any],
    scheme: str,
    dtype: str,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> ErrorPrior:
    """Run the quantized pipeline along the references and return the combined error prior.

    Args:
        pipe: The pipeline with its quantized denoiser (or the full-precision one: then all views are equal).
        batches: All batches that references were recorded from.
        references: Trajectories of the full-precision pipeline, with step sizes, of this process's share of them.

    Raises:
        PriorMismatchError: The two runs made different numbers of steps.
        ProcessError: Another process has failed.
    """
    mine = iterate(processes.share(batches), "forced runs", progress, steps)
    measured = []
    for (batch, on_step), reference in zip(mine, references, strict=True):
        with force(pipe, reference) as forced:
            run(pipe, batch, steps=steps, call=call, on_step=on_step)
        if forced.num_steps != reference.num_steps:
            raise PriorMismatchError(
                f"the quantized run made {forced.num_steps} steps, its reference {reference.num_steps}: "
                "profile both with the same sampler and step count"
            )
        statistics = _statistics(forced.predictions, reference.predictions)
        measured.append((len(batch.seeds), statistics, reference.step_sizes, reference.sampler))
    found = processes.gather(measured)
    total = sum(count for count, *_ in found)
    averages = {name: sum(count / total * each[name] for count, each, *_ in found) for name in found[0][1]}
    metadata = PriorMetadata(
        sampler=found[0][3],
        scheme=scheme,
        dtype=dtype,
        call=dict(call),
        samples=sum(len(batch.seeds) for batch in batches),
        seeds=tuple(seed for batch in batches for seed in batch.seeds),
        conditions=tuple(condition for batch in batches for condition in batch.conditions),
    )
    step_sizes = np.mean([sizes for _, _, sizes, _ in found], axis=0)
    return ErrorPrior(**averages, step_sizes=step_sizes, metadata=metadata)


def _statistics(q: Sequence[torch.Tensor], v: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
    """What `ErrorPrior` holds of one batch of quantized and full-precision predictions."""
    qq, qv, vv = _grams(q, v)
    axis = channel_axis(q[0].ndim)
    # (2 * num_steps, samples, channels, places)
    tokens = torch.stack([tensor.movedim(axis, 1).flatten(2) for tensor in (*q, *v)])
    steps, channels = len(q), tokens.shape[2]
    pooled = torch.nn.functional.normalize(tokens.double().mean(3), dim=-1).transpose(0, 1)
    cosines = (pooled @ pooled.transpose(1, 2)).mean(0).numpy()
    statistics = {
        "qq": qq,
        "qv": qv,
        "vv": vv,
        "token_cosines": np.stack([cosines[steps:, steps:], cosines[:steps, :steps], cosines[:steps, steps:]]),
        "channel_means": tokens.double().mean((1, 3)).numpy().reshape(2, steps, channels),
    }
    if channels * steps**2 <= _LARGEST_CHANNEL_GRAMS:
        by_channel = tokens.permute(2, 0, 1, 3).flatten(2)
        grams = torch.stack([(each[:steps].double() @ each.double().T) / each.shape[1] for each in by_channel]).numpy()
        statistics["channel_grams"] = np.stack([grams[:, :, :steps], grams[:, :, steps:]])
    return statistics


def _grams(q: Sequence[torch.Tensor], v: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``<q_i, q_j>``, ``<q_i, v_j>``, ``<v_i, v_j>`` per element, in float64: small errors are differences of these."""
    q_flat, v_flat = ([tensor.reshape(-1) for tensor in tensors] for tensors in (q, v))
    elements, steps = q_flat[0].numel(), len(q_flat)
    gram = torch.zeros(2 * steps, 2 * steps, dtype=torch.float64, device="cpu")
    for start in range(0, elements, _CHUNK):
        part = torch.stack([tensor[start : start + _CHUNK].double() for tensor in (*q_flat, *v_flat)])
        gram += part @ part.T
    gram /= elements
    return gram[:steps, :steps].numpy(), gram[:steps, steps:].numpy(), gram[steps:, steps:].numpy()
