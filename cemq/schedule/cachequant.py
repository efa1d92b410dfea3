"""CacheQuant's dynamic programming schedule (arXiv:2503.01323): steps in order are parted into groups of like features.

The first step of a group runs in full and serves the others; the group costs what they are away from it.
"""

from __future__ import annotations

import numpy as np

from cemq.errors import InfeasibleBudgetError
from cemq.schedule.solvers import parse_budget


def l1_distances(features: np.ndarray) -> np.ndarray:
    """``distances[anchor, step]`` of features (samples, steps, elements): the mean over samples and elements, which
    orders schedules as the release's sum does."""
    return np.array([np.abs(features - features[:, [each]]).mean((0, 2)) for each in range(features.shape[1])])


def group_lengths(num_steps: int, budget: int) -> tuple[int, int]:
    """The shortest and the longest group allowed: half and twice the mean length, rounded."""
    mean = round(num_steps / budget)
    return -(-mean // 2), 2 * mean


def cachequant_steps(distances: np.ndarray, budget: int) -> tuple[int, ...]:
    """The first steps of ``budget`` groups whose distances to their own first step add up to the least.

    The last step need not be full. Ties go to the earlier group start.

    Args:
        distances: [anchor, step], of the features that are reused (`l1_distances`); those of a step before its anchor
            are never looked at.

    Raises:
        InfeasibleBudgetError: Not within 2..steps, or distances are infinite wherever groups of the lengths allowed
            would lie.
    """
    steps = len(distances)
    count = parse_budget(budget, steps)
    shortest, longest = group_lengths(steps, count)
    totals = np.cumsum(np.triu(distances), axis=1)  # [anchor, last step of the group]
    best = np.full((count + 1, steps + 1), np.inf)  # [groups, steps that they cover]
    came = np.zeros(best.shape, dtype=int)
    best[0, 0] = 0.0
    for used in range(1, count + 1):
        for end in range(shortest, steps + 1):
            starts = np.arange(max(end - longest, 0), end - shortest + 1)
            found = best[used - 1, starts] + totals[starts, end - 1]
            chosen = int(found.argmin())
            best[used, end], came[used, end] = found[chosen], starts[chosen]
    if not np.isfinite(best[count, steps]):
        raise InfeasibleBudgetError(
            f"CacheQuant's rule cannot part {steps} steps into budget={count} groups of {shortest} to {longest} "
            "with finite distances"
        )
    path, end = [], steps
    for used in range(count, 0, -1):
        end = int(came[used, end])
        path.append(end)
    return tuple(reversed(path))
