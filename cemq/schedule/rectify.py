"""Corrections of the prediction, per channel and step: free at run time, and made from means over calibration samples.

A correction is applied to what ``scheduler.step`` consumes, on full-compute and skipped steps alike, so that it takes
away what caching and quantization both add; its target is always the full-precision prediction. Each is judged in
closed loop on samples it was not made from, and dropped where it does not help.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from cemq.errors import InputError, choose
from cemq.pipelines.outputs import channel_axis
from cemq.prior.error_prior import ErrorPrior
from cemq.schedule import CacheSchedule

EOC_STRENGTH = 0.01  # theta, as published
# Samplers whose steps are differences of their sigmas, and whose timesteps are proportional to these.
STEPS_BY_SIGMA = ("FlowMatchEulerDiscreteScheduler",)

Tables = tuple[np.ndarray, np.ndarray]  # gain and offset, (num_steps, channels) each


@dataclass(frozen=True, kw_only=True, eq=False)
class Correction:
    """``prediction * gain + offset`` at each step; ``gain`` and ``offset`` are (num_steps, channels).

    ``step_factors`` (num_steps,), where there are any, say how much of its length each step goes; what is left out is
    made up for later (`cemq.pipelines.noise_scheduler.landing_lengths`).
    """

    method: str
    gain: np.ndarray
    offset: np.ndarray
    step_factors: np.ndarray | None = None

    def apply(self, prediction: torch.Tensor, step_index: int) -> torch.Tensor:
        """The corrected prediction, in its dtype; of another number of channels, the prediction itself."""
        axis = channel_axis(prediction.ndim)
        if prediction.shape[axis] != self.gain.shape[1]:
            return prediction
        shape = [1] * prediction.ndim
        shape[axis] = -1
        gain, offset = (
            torch.as_tensor(table[step_index], dtype=torch.float32, device=prediction.device).view(shape)
            for table in (self.gain, self.offset)
        )
        return (prediction.float() * gain + offset).to(prediction.dtype)

    def from_step(self, first: int) -> Correction:
        """That of a run which begins late, at this step; where steps are scaled, they are so already."""
        return replace(self, gain=self.gain[first:], offset=self.offset[first:], step_factors=None)

    def carried_over(self, prior: ErrorPrior, schedule: CacheSchedule) -> Correction:
        """The same method for another schedule or, with a resampled prior, other timesteps."""
        return make_correction(self.method, prior, schedule)


def make_correction(method: str, prior: ErrorPrior, schedule: CacheSchedule) -> Correction:
    """Make a correction for a schedule from the channel statistics of a prior.

    Raises:
        InputError: No such method, or the prior lacks what it needs.
    """
    make = METHODS[choose("correction", method, METHODS)]
    if schedule.branch_steps:
        raise InputError(f"correction '{method}': the error prior cannot tell branches of guidance apart")
    if not prior.channel_means.size or (make is _affine and not prior.channel_grams.size):
        raise InputError(f"correction '{method}': the error prior holds no channel statistics; profile anew")
    factors = None
    if method == "erta":
        sampler = prior.metadata and prior.metadata.sampler.scheduler
        if sampler not in STEPS_BY_SIGMA:
            raise InputError(f"correction 'erta': the lengths of {sampler} steps cannot be set; choose affine")
        factors = step_factors(prior, schedule)
    gain, offset = make(prior, schedule)
    return Correction(method=method, gain=gain, offset=offset, step_factors=factors)


def step_factors(prior: ErrorPrior, schedule: CacheSchedule) -> np.ndarray:
    """How much of its length each step goes, (num_steps,): ``1 - |p(s) - v(s)| / |v(s) - v(s - 1)|`` within 0 and 1 on
    skipped steps, 1 on full-compute ones.

    ERTACache's timestep adjustment (arXiv:2508.21091, section 3.3), in L2 instead of L1 and from means over calibration
    samples, since nobody knows v(s) where it is skipped.
    """
    vv, factors = prior.vv, np.ones(prior.num_steps)
    errors = np.sqrt(np.diag(prior.error_gram(schedule.served)).clip(0))
    changes = np.sqrt((np.diag(vv)[1:] - 2 * np.diag(vv, 1) + np.diag(vv)[:-1]).clip(0))
    skipped = np.setdiff1d(np.arange(1, prior.num_steps), schedule.full_steps)
    factors[skipped] = (1 - errors[skipped] / np.maximum(changes[skipped - 1], 1e-12)).clip(0, 1)
    return factors


def _drift(prior: ErrorPrior, schedule: CacheSchedule) -> Tables:
    """Add ``mean v(s) - mean p(s)``: mean caching drift and mean quantization bias at once.

    EOC's idea (arXiv:2501.19243) in its additive form, over the actual age, with full precision as the target.
    """
    q, v = prior.channel_means
    return np.ones_like(v), v - schedule.integrated @ q


def _affine(prior: ErrorPrior, schedule: CacheSchedule) -> Tables:
    """Regress v(s) on p(s), channel by channel: ``a = cov(p, v) / var(p)``, ``b = mean v - a mean p``.

    CacheQuant's decoupled error correction (arXiv:2503.01323) with both parts in one, and ERTACache's linear
    rectification (arXiv:2508.21091, section 3.4), which is the same regression written for the error.
    """
    (q, v), (qq, qv) = prior.channel_means, prior.channel_grams
    served, mean = schedule.integrated, schedule.integrated @ q
    variance = np.einsum("sk,ckl,sl->sc", served, qq, served) - mean**2
    covariance = np.einsum("sk,cks->sc", served, qv) - mean * v
    gain = np.where(variance > 1e-12, covariance / np.maximum(variance, 1e-12), 1.0)
    return gain, v - gain * mean


def _eoc(prior: ErrorPrior, schedule: CacheSchedule) -> Tables:
    """Multiply by ``1 + theta (mean v(s) - mean v(s - 1))`` on skipped steps, compounding since the last full step.

    As published (EOC, arXiv:2501.19243), on the output instead of each module and per channel instead of a map.
    """
    _, v = prior.channel_means
    gain, full = np.ones_like(v), set(schedule.full_steps)
    for step in range(1, len(v)):
        if step not in full:
            gain[step] = gain[step - 1] * (1 + EOC_STRENGTH * (v[step] - v[step - 1]))
    return gain, np.zeros_like(v)


METHODS: dict[str, Callable[[ErrorPrior, CacheSchedule], Tables]] = {
    "drift": _drift,
    "affine": _affine,
    "eoc": _eoc,
    "erta": _affine,  # and `step_factors`
}
