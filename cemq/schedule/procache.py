"""ProCache's constrained sampling (arXiv:2512.17298): a few lists of gaps that never grow, and the best by a loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from cemq.errors import InfeasibleBudgetError
from cemq.schedule.solvers import parse_budget

CANDIDATES = 5
REUSED = (1, 4)  # steps served after each full-compute one, at least and at most
_ROUNDS, _DRAWS = 10, 1000


def nonincreasing_gaps(
    num_steps: int,
    budget: int,
    *,
    seed: int = 0,
    candidates: int = CANDIDATES,
    reused: tuple[int, int] = REUSED,
) -> list[tuple[int, ...]]:
    """Different lists of ``budget`` gaps that add up to ``num_steps`` and never grow, in the order they were drawn in.

    A list is drawn by cutting what the shortest gaps leave over at random places, and dropped if a gap is too long.
    There are fewer than ``candidates`` if no more were found; the most even list is there if none was.

    Raises:
        InfeasibleBudgetError: No gaps so short and so long add up.
    """
    count = parse_budget(budget, num_steps)
    shortest, longest = (each + 1 for each in reused)
    spare, most = num_steps - shortest * count, longest - shortest
    if not 0 <= spare <= most * count:
        raise InfeasibleBudgetError(
            f"ProCache's gaps of {shortest} to {longest} steps cannot spend budget={count} on {num_steps} steps: "
            f"choose {-(-num_steps // longest)}..{num_steps // shortest}"
        )
    random, found = np.random.default_rng(seed), {}
    for _ in range(_ROUNDS):
        cuts = np.sort(random.integers(0, spare + 1, (_DRAWS, count - 1)))
        parts = np.sort(np.diff(cuts, prepend=0, append=spare))[:, ::-1]
        found |= dict.fromkeys(map(tuple, (shortest + parts[parts[:, 0] <= most]).tolist()))
        if len(found) >= candidates:
            break
    each, more = divmod(num_steps, count)
    return list(found)[:candidates] or [(each + 1,) * more + (each,) * (count - more)]


def procache_steps(
    loss: Callable[[tuple[int, ...]], float],
    num_steps: int,
    budget: int,
    *,
    seed: int = 0,
    candidates: int = CANDIDATES,
    reused: tuple[int, int] = REUSED,
) -> tuple[tuple[int, ...], float]:
    """The full-compute steps of the best of `nonincreasing_gaps`, and their loss; FID in the paper.

    What ProCache computes of skipped steps, the deep blocks on the tokens that matter most, is no part of it.

    Args:
        loss: Of full-compute steps, lower is better; NaN counts as infinite.

    Raises:
        InfeasibleBudgetError: See `nonincreasing_gaps`.
    """
    drawn = nonincreasing_gaps(num_steps, budget, seed=seed, candidates=candidates, reused=reused)
    paths = [(0, *np.cumsum(gaps[:-1]).tolist()) for gaps in drawn]
    losses = [float(loss(path)) for path in paths]
    best = min(range(len(paths)), key=lambda index: math.inf if math.isnan(losses[index]) else losses[index])
    return paths[best], losses[best]
