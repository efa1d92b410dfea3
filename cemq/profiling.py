"""Two runs per batch measure every cache interval at once: a reference run, and a forced run of the quantized model.

A few more runs of one batch measure how much each step matters for the final sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cemq.errors import PriorMismatchError
from cemq.prior import ErrorPrior, PriorMetadata
from cemq.sampling import Batch, Progress, iterate, run
from cemq.trajectory import Trajectory, final_sample, force, inject, record

_CHUNK = 1 << 20  # latent elements turned to float64 at a time


def record_references(
    pipe: Any, batches: Sequence[Batch], *, steps: int, call: Mapping[str, Any], progress: Progress | None = None
) -> list[Trajectory]:
    """Run the full-precision pipeline once per batch and keep its trajectories."""
    references = []
    for batch, on_step in iterate(batches, "reference runs", progress, steps):
        with record(pipe, measure_steps=True) as trajectory:
            run(pipe, batch, steps=steps, call=call, on_step=on_step)
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
    sensitivity: np.ndarray | None = None,
    progress: Progress | None = None,
) -> ErrorPrior:
    """Run the quantized pipeline along the references and return the combined error prior.

    Args:
        pipe: The pipeline with its quantized denoiser (or the full-precision one: then all views are equal).
        batches: The batches that the references were recorded from.
        references: Trajectories of the full-precision pipeline, with step sizes.
        sensitivity: From `measure_sensitivity`; None counts every step's displacement alike.

    Raises:
        PriorMismatchError: The two runs made different numbers of steps.
    """
    grams = []
    for (batch, on_step), reference in zip(iterate(batches, "forced runs", progress, steps), references, strict=True):
        with force(pipe, reference) as forced:
            run(pipe, batch, steps=steps, call=call, on_step=on_step)
        if forced.num_steps != reference.num_steps:
            raise PriorMismatchError(
                f"the quantized run made {forced.num_steps} steps, its reference {reference.num_steps}: "
                "profile both with the same sampler and step count"
            )
        grams.append((len(batch.seeds), *_grams(forced.predictions, reference.predictions)))
    shares = np.array([gram[0] for gram in grams], dtype=float)
    shares /= shares.sum()
    qq, qv, vv = (sum(share * gram[i] for share, gram in zip(shares, grams, strict=True)) for i in (1, 2, 3))
    metadata = PriorMetadata(
        sampler=references[0].sampler,
        scheme=scheme,
        dtype=dtype,
        call=dict(call),
        samples=sum(len(batch.seeds) for batch in batches),
        seeds=tuple(seed for batch in batches for seed in batch.seeds),
        conditions=tuple(condition for batch in batches for condition in batch.conditions),
    )
    step_sizes = np.mean([reference.step_sizes for reference in references], axis=0)
    return ErrorPrior(qq=qq, qv=qv, vv=vv, step_sizes=step_sizes, sensitivity=sensitivity, metadata=metadata)


def _grams(q: Sequence[torch.Tensor], v: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``<q_i, q_j>``, ``<q_i, v_j>``, ``<v_i, v_j>`` per element, in float64: small errors are differences of these."""
    q_flat, v_flat = ([tensor.reshape(-1) for tensor in tensors] for tensors in (q, v))
    elements, steps = q_flat[0].numel(), len(q_flat)
    gram = torch.zeros(2 * steps, 2 * steps, dtype=torch.float64)
    for start in range(0, elements, _CHUNK):
        part = torch.stack([tensor[start : start + _CHUNK].double() for tensor in (*q_flat, *v_flat)])
        gram += part @ part.T
    gram /= elements
    return gram[:steps, :steps].numpy(), gram[:steps, steps:].numpy(), gram[steps:, steps:].numpy()


def measure_sensitivity(
    pipe: Any,
    batch: Batch,
    reference: Trajectory,
    *,
    points: int,
    steps: int,
    call: Mapping[str, Any],
    relative: float = 0.05,
    progress: Progress | None = None,
) -> np.ndarray:
    """Deviation of the final sample per unit of displacement after each step, shape (num_steps,).

    Measured by one run at each of ``points`` steps spread evenly, the last one included, and interpolated in the
    logarithm between them. The displacement is white noise of ``relative`` times the sample's norm, large enough to
    stand above rounding and small enough to stay near the reference.

    Args:
        reference: The trajectory that ``pipe`` ran for ``batch``.
        points: 0 measures nothing and returns ones.
    """
    last = reference.num_steps - 1
    if points == 0:
        return np.ones(last + 1)
    measured = np.unique(np.linspace(0 if points > 1 else last, last, points).round().astype(int))
    noise, gains = torch.Generator().manual_seed(0), []
    for step_index, (_, on_step) in zip(
        measured, iterate([batch] * len(measured), "sensitivity runs", progress, steps), strict=True
    ):
        sample = reference.samples[step_index].float()
        displacement = torch.randn(sample.shape, generator=noise)
        displacement *= relative * sample.norm() / displacement.norm()
        with inject(pipe, int(step_index), displacement), final_sample(pipe) as moved:
            run(pipe, batch, steps=steps, call=call, on_step=on_step)
        deviation = moved[0].cpu().float() - reference.samples[-1].float()
        gains.append(max((deviation.norm() / displacement.norm()).item(), 1e-6))
    return np.exp(np.interp(np.arange(last + 1), measured, np.log(gains)))
