"""The exact dynamic program over (previous full step, this full step), and the segment cost.

A segment runs from one full-compute step to the next. What its steps do to the sample adds up with sign, so the cost is
the norm of the summed error rather than a sum of norms, raised to ``gamma`` to punish one bad segment more than
several mild ones (MeanCache's peak suppression, arXiv:2601.19961).
"""

from __future__ import annotations

import numpy as np

from cemq.predict import Predictor
from cemq.prior import View


def segment_costs(view: View, step_weights: np.ndarray, predictor: Predictor, gamma: float, max_gap: int) -> np.ndarray:
    """``|| sum_{s=p}^{n-1} w(s) (p(s) - y(s)) || ** gamma`` for every segment.

    Args:
        view: Gram matrices of what is cached (x) and what it should be (y), (num_steps, num_steps) each.
        step_weights: ``w``, (num_steps,).

    Returns:
        Shape (num_steps, max_gap + 1, max_gap + 1): [this full step p, gap to the previous one, gap to the next one].
        Gap 0 to the previous step means there is none (p is step 0). Impossible entries are infinite.
    """
    steps = len(step_weights)
    costs = np.full((steps, max_gap + 1, max_gap + 1), np.inf)
    weighted_xy = np.cumsum(np.pad(view.xy * step_weights, ((0, 0), (1, 0))), axis=1)
    block = np.pad(view.yy * np.outer(step_weights, step_weights), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    for start in range(steps):
        ends = np.arange(start + 1, min(start + max_gap, steps) + 1)
        inside = np.arange(start, ends[-1])
        target_energy = (block[ends, ends] - block[start, ends] - block[ends, start] + block[start, start]).clip(0)
        for gap in [0] if start == 0 else range(1, min(max_gap, start) + 1):
            sources = (start,) if gap == 0 else (start, start - gap)[: predictor.depth]
            serving = np.zeros((len(inside), len(sources)))
            for row, step in enumerate(inside):
                weights = (1.0,) if step == start else predictor.coefficients(int(step), sources)
                serving[row, : len(weights)] = weights
            summed = np.cumsum(serving * step_weights[inside, None], axis=0)
            index = np.array(sources)
            energy = np.einsum("ei,ij,ej->e", summed, view.xx[np.ix_(index, index)], summed)
            overlap = np.einsum("ei,ie->e", summed, weighted_xy[index][:, ends] - weighted_xy[index][:, [start]])
            squared = np.maximum(energy - 2 * overlap + target_energy, 0.0)
            costs[start, gap, ends - start] = squared ** (gamma / 2)
    return costs


def solve_segments(costs: np.ndarray, budget: int) -> tuple[tuple[int, ...], float]:
    """The ``budget`` full-compute steps with the least total cost, and that cost; step 0 is full, the last need not be.

    Exact: the state is the pair (previous full step, this full step), so a predictor that looks two full steps back is
    costed right on unequal gaps. Ties go to the smaller gap. The cost is infinite where no schedule fits.
    """
    steps, gaps = costs.shape[0], costs.shape[1]
    best = np.full((steps, gaps), np.inf)  # [this full step, gap to the previous one]
    best[0, 0] = 0.0
    history = []
    for _ in range(budget - 1):
        reached = np.full((steps, gaps), np.inf)
        came = np.zeros((steps, gaps), dtype=np.int64)
        for gap in range(1, min(gaps, steps)):
            totals = best[:-gap] + costs[:-gap, :, gap]
            came[gap:, gap] = totals.argmin(1)
            reached[gap:, gap] = totals.min(1)
        history.append(came)
        best = reached
    last_gaps = np.arange(steps, 0, -1)  # from each step to the virtual end
    closing = np.full((steps, gaps), np.inf)
    fits = last_gaps < gaps
    closing[fits] = best[fits] + costs[np.flatnonzero(fits), :, last_gaps[fits]]
    step, gap = np.unravel_index(closing.argmin(), closing.shape)
    total = float(closing[step, gap])
    path = [int(step)]
    for came in reversed(history):
        step, gap = step - gap, came[step, gap]
        path.append(int(step))
    return tuple(reversed(path)), total
