"""A reference and the quantized model forced along it measure every cache interval at once: from runs to the prior."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cemq.parallel import ALONE, Processes
from cemq.pipelines.batches import Batch
from cemq.pipelines.outputs import channel_axis
from cemq.pipelines.trajectory import Trajectory
from cemq.prior.error_prior import ErrorPrior, PriorMetadata

_CHUNK = 1 << 20  # latent elements turned to float64 at a time
_LEAST_STEP = 1e-3  # of the largest: a step of no size moves nothing, however sensitive
_UNDONE = 0.75  # power of the step size; docs/notebook/search.md, "Few generations"
LARGEST_CHANNEL_GRAMS = 1 << 18  # numbers; 16 channels at 128 steps


def profiled(
    runs: Iterable[tuple[Trajectory, Trajectory]],
    batches: Sequence[Batch],
    *,
    scheme: str,
    dtype: str,
    call: Mapping[str, Any],
    processes: Processes = ALONE,
) -> ErrorPrior:
    """The combined error prior of runs of the quantized pipeline along references of the full-precision one.

    Args:
        runs: Of this process's share of the batches, the forced run and its reference, with step sizes. Each is reduced
            to its statistics before the next is asked for.
        batches: All batches.

    Raises:
        ProcessError: Another process has failed.
    """
    measured = []
    for batch, (forced, reference) in zip(processes.share(batches), runs, strict=True):
        statistics = _statistics(forced.predictions, reference.predictions)
        measured.append((len(batch.seeds), statistics, reference.step_sizes, reference.sampler))
    found = processes.gather(measured)
    total = sum(count for count, *_ in found)
    averages: dict[str, Any] = {
        name: sum(count / total * each[name] for count, each, *_ in found) for name in found[0][1]
    }
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
    sensitivity = expected_sensitivity(step_sizes)
    return ErrorPrior(**averages, step_sizes=step_sizes, sensitivity=sensitivity, metadata=metadata)


def expected_sensitivity(step_sizes: np.ndarray) -> np.ndarray:
    """What is taken for the sensitivity before any run has said better, (num_steps,): the more a step moves the sample,
    the more of an error made there is undone later.

    >>> expected_sensitivity(np.array([1.0, 16.0])).tolist()
    [8.0, 1.0]
    """
    largest = step_sizes.max(initial=0.0)
    if not largest:
        return np.ones_like(step_sizes)
    return (largest / np.maximum(step_sizes, _LEAST_STEP * largest)) ** _UNDONE


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
    if channels * steps**2 <= LARGEST_CHANNEL_GRAMS:
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
