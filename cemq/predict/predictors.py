"""How a skipped step is served: as a linear combination of the outputs of full-compute steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from cemq.errors import choose

# A predictor gets the step index, the full-compute steps so far (newest first) and what every earlier step was served
# as, one row of weights a step; it returns this step's row.
Rule = Callable[[int, Sequence[int], np.ndarray], np.ndarray]

DAMPING = 0.5  # of the slope, in `damped`
GOC_GAIN = 0.8  # the gain GOC publishes for its milder host
MEAN_WINDOW = 3  # steps that `mean-velocity` averages over


def taylor(order: int, gain: float = 1.0) -> Rule:
    """Newton's interpolation through the latest ``order + 1`` full-compute steps, continued to this step.

    Divided differences are right for unequal gaps, where TaylorSeer's (arXiv:2503.06923) finite differences are not
    from order 2 on. With fewer full-compute steps behind, the highest order they allow. ``gain`` scales every term but
    the first.
    """

    def rule(step: int, full: Sequence[int], served: np.ndarray) -> np.ndarray:
        nodes = full[: order + 1]
        row = np.zeros(served.shape[1])
        row[nodes[0]] = 1.0
        term = gain
        for degree in range(1, len(nodes)):
            term *= step - nodes[degree - 1]
            known = nodes[: degree + 1]
            for node in known:
                row[node] += term / math.prod(node - other for other in known if other != node)
        return row

    return rule


def _goc(step: int, full: Sequence[int], served: np.ndarray) -> np.ndarray:
    """Continue the latest two outputs, served ones too, with a gain (GOC, arXiv:2503.05156)."""
    return served[step - 1] if step < 2 else served[step - 1] + GOC_GAIN * (served[step - 1] - served[step - 2])


def _mean_velocity(step: int, full: Sequence[int], served: np.ndarray) -> np.ndarray:
    """The latest output plus a slope that is averaged over the latest steps, served ones too (MeanCache,
    arXiv:2601.19961: v - J * dt with J = (v_start - mean) / dt), over the step index."""
    start = max(0, step - MEAN_WINDOW)
    span = step - 1 - start
    if span < 1:
        return served[step - 1]
    mean = served[start : step - 1].mean(0)
    return served[step - 1] - (served[start] - mean) / span


PREDICTORS: dict[str, Rule] = {
    "reuse": taylor(0),
    "damped": taylor(1, DAMPING),
    "taylor1": taylor(1),
    "taylor2": taylor(2),
    "goc": _goc,
    "mean-velocity": _mean_velocity,
}


def check_predictor(name: str) -> str:
    """The name itself if there is such a predictor; raises InputError."""
    return choose("predictor", name, PREDICTORS)


def serving_matrix(num_steps: int, full_steps: Sequence[int], predictors: Sequence[str]) -> np.ndarray:
    """What every step is served as, shape (num_steps, num_steps): row ``s`` holds the weights of the full-compute
    outputs. Full-compute steps are served as themselves.

    Args:
        full_steps: Rising, beginning with 0.
        predictors: One for each of them: how the steps that follow it are served.
    """
    served = np.zeros((num_steps, num_steps))
    done: list[int] = []
    for index, start in enumerate(full_steps):
        end = full_steps[index + 1] if index + 1 < len(full_steps) else num_steps
        served[start, start] = 1.0
        done.insert(0, start)
        rule = PREDICTORS[predictors[index]]
        for step in range(start + 1, end):
            served[step] = rule(step, done, served)
    return served


def reused_steps(served: np.ndarray) -> np.ndarray:
    """Which steps are served as an earlier output as it is, by `reuse`, shape (num_steps,).

    With one output to go by every predictor does so; the steps before the second full-compute step count as those after
    it, since what becomes of their errors depends on what follows.

    Args:
        served: `serving_matrix`.
    """
    computed = served.diagonal() != 0
    reused = (np.count_nonzero(served, axis=1) == 1) & ~computed
    full, skipped = np.flatnonzero(computed), np.flatnonzero(~computed)
    later = skipped[skipped > full[1]] if len(full) > 1 else skipped[:0]
    if later.size and not reused[later[0]]:
        reused[: full[1]] = False
    return reused
