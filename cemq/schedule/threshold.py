"""ERTACache's offline policy (arXiv:2508.21091, section 3.2): keep reusing until the error passes a threshold."""

from __future__ import annotations

import numpy as np


def threshold_steps(reuse_errors: np.ndarray, budget: int) -> tuple[int, ...]:
    """The full-compute steps of the lowest threshold that needs no more than ``budget`` of them.

    Args:
        reuse_errors: Relative error of reuse, [cache_interval, step_index] (`ErrorPrior.reuse_errors`); the paper's is
            L1 of the residual to the latent, which differs from it by a term that is the same for both.
    """
    errors = reuse_errors[1:]
    thresholds = np.r_[-np.inf, np.unique(errors[np.isfinite(errors)])]  # the lowest computes in full
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        if len(_walk(reuse_errors, thresholds[middle])) <= budget:
            high = middle
        else:
            low = middle + 1
    return _walk(reuse_errors, thresholds[low])


def _walk(reuse_errors: np.ndarray, threshold: float) -> tuple[int, ...]:
    full = [0]
    for step in range(1, reuse_errors.shape[1]):
        if reuse_errors[step - full[-1], step] > threshold:
            full.append(step)
    return tuple(full)
