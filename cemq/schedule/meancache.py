"""MeanCache's path of least peaks (arXiv:2601.19961): which steps run in full, and how long a mean serves each gap.

A gap costs what the average velocity over it is off by, raised to a power so that one bad gap counts more than several
mild ones. First and last step are full.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cemq.predict.predictors import PREDICTORS
from cemq.schedule.cache_schedule import CacheSchedule
from cemq.schedule.solvers import parse_budget

MEANS = ("reuse", "mean-velocity-2", "mean-velocity-3", "mean-velocity-4", "mean-velocity-5")  # over 1 to 5 steps
GAMMA = 4.0


def velocity_errors(
    grams: np.ndarray, step_sizes: np.ndarray | None = None, predictors: Sequence[str] = MEANS
) -> np.ndarray:
    """``errors[m, p, q]``: how far the average velocity from full-compute step ``p`` to the next one, ``q``, is off
    where predictor ``m`` serves the steps between; the root mean square, averaged over samples.

    The steps up to ``p`` are taken to have run in full, as in the trajectories that MeanCache calibrates on. Infinite
    where not ``p < q``.

    Args:
        grams: ``<v_i, v_j>`` per element of predictions in full, (steps, steps), or (samples, steps, steps).
        step_sizes: (steps,), that velocities are averaged with; None counts as ones.
    """
    steps = grams.shape[-1]
    sizes = np.ones(steps) if step_sizes is None else np.abs(step_sizes)
    errors = np.full((len(predictors), steps, steps), np.inf)
    for index, name in enumerate(predictors):
        rule = PREDICTORS[name]
        for start in range(steps - 1):
            served, before = np.eye(steps), range(start, -1, -1)
            for step in range(start + 1, steps - 1):
                served[step] = rule(step, before, served)
            inside = slice(start, steps - 1)
            off = np.cumsum(sizes[inside, None] * (served - np.eye(steps))[inside], axis=0)
            off /= np.cumsum(sizes[inside])[:, None]
            squared = np.einsum("qi,nij,qj->nq", off, grams.reshape(-1, steps, steps), off)
            errors[index, start, start + 1 :] = np.sqrt(squared.clip(0)).mean(0)
    return errors


def plan_meancache(
    errors: np.ndarray, budget: int, *, gamma: float = GAMMA, predictors: Sequence[str] = MEANS
) -> CacheSchedule:
    """The schedule of at most ``budget`` full-compute steps whose gaps' errors, to the power ``gamma``, sum to the
    least, with the best predictor for each gap.

    Ties go to fewer steps, then to the smaller one.

    Args:
        errors: [predictor, step, next full-compute step], from `velocity_errors`.

    Raises:
        InfeasibleBudgetError: Not within 2..steps.
    """
    steps = errors.shape[1]
    count = parse_budget(budget, steps)
    costs = errors.min(0) ** gamma
    best = np.full((count, steps), np.inf)  # [gaps so far, full-compute step]
    came = np.zeros(best.shape, dtype=int)
    best[0, 0] = 0.0
    for used in range(1, count):
        totals = best[used - 1, :, None] + costs
        came[used], best[used] = totals.argmin(0), totals.min(0)
    path = [steps - 1]
    for used in range(int(best[:, -1].argmin()), 0, -1):
        path.append(int(came[used, path[-1]]))
    full = tuple(reversed(path))
    chosen = [predictors[int(index)] for index in errors[:, full[:-1], full[1:]].argmin(0)]
    return CacheSchedule(num_steps=steps, full_steps=full, predictor=(*chosen, chosen[-1]), solver="meancache")
