"""How a skipped step is served: as a linear combination of the outputs of full-compute steps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from cemq.errors import InputError, choose

# A predictor gets the step index, the full-compute steps so far (newest first) and what every earlier step was served
# as, one row of weights a step; it returns this step's row.
Rule = Callable[[int, Sequence[int], np.ndarray], np.ndarray]

DAMPING = 0.5  # of the slope, in `damped`
GOC_GAIN = 0.8  # the gain GOC publishes for its milder host
CHEBYSHEV_DEGREE, CHEBYSHEV_RIDGE, CHEBYSHEV_HORIZON = 4, 0.1, 50  # as Spectrum is released


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


def mean_velocity(count: int, *, latest: bool = True) -> Rule:
    """The latest output plus a slope that is averaged over the latest steps, served ones too (MeanCache,
    arXiv:2601.19961: v - J * dt with J = (v_start - mean) / dt), over the step index.

    The mean is that of ``count`` steps: with ``latest`` up to the latest one, as in the release; without it up to the
    one before, as the paper writes it. One step has no slope: that is `reuse`.
    """

    def rule(step: int, full: Sequence[int], served: np.ndarray) -> np.ndarray:
        end = step if latest else step - 1
        averaged = served[max(0, end - count) : end]
        if len(averaged) < 2:
            return served[step - 1]
        return served[step - 1] + (averaged.mean(0) - averaged[0]) / len(averaged)

    return rule


def chebyshev(degree: int, ridge: float, horizon: int) -> Rule:
    """Least squares through all full-compute steps so far, by Chebyshev polynomials up to ``degree`` with a penalty
    ``ridge`` on every coefficient, continued to this step (Spectrum, arXiv:2603.01623).

    Step 0 lies at -1 and step ``horizon`` at 1, so that weights depend a little on where in the run a step lies, and
    the penalty keeps them from adding up to one exactly. A single output is taken as it is.
    """

    @lru_cache(maxsize=4096)
    def weights(step: int, full: tuple[int, ...]) -> np.ndarray:
        basis = np.polynomial.chebyshev.chebvander(2 * np.array([*full, step]) / horizon - 1, degree)
        known = basis[:-1]
        return basis[-1] @ np.linalg.solve(known.T @ known + ridge * np.eye(degree + 1), known.T)

    def rule(step: int, full: Sequence[int], served: np.ndarray) -> np.ndarray:
        row = np.zeros(served.shape[1])
        row[list(full)] = weights(step, tuple(full)) if len(full) > 1 else 1.0
        return row

    return rule


PREDICTORS: dict[str, Rule] = {
    "reuse": taylor(0),
    "damped": taylor(1, DAMPING),
    "taylor1": taylor(1),
    "taylor2": taylor(2),
    "goc": _goc,
    "mean-velocity": mean_velocity(2, latest=False),
    **{f"mean-velocity-{count}": mean_velocity(count) for count in (2, 3, 4, 5)},
    "chebyshev": chebyshev(CHEBYSHEV_DEGREE, CHEBYSHEV_RIDGE, CHEBYSHEV_HORIZON),
}


def register_predictor(name: str, rule: Rule) -> None:
    """Make a rule known as a predictor, everywhere that one is named.

    It is planned by the very weights that it gives: exactly by the dynamic program, if those depend on no more than the
    two latest full-compute steps, and by local search in any case.

    Args:
        rule: Gets the step index, the full-compute steps so far (newest first) and what every earlier step was served
            as, one row of weights a step; returns this step's row, with weights of full-compute steps so far only. It
            must depend on distances between steps, not on where in the run they lie.

    Raises:
        InputError: The name is taken or no plain word, or the rule gives something else on a run of eight steps.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or name in PREDICTORS:
        raise InputError(f"predictor {name!r}: give a name of its own, of small letters, digits and hyphens")
    steps, full = 8, (0, 2, 5)
    PREDICTORS[name] = rule
    try:
        served = serving_matrix(steps, full, (name,) * len(full))
        known = np.array([[column in full and column <= row for column in range(steps)] for row in range(steps)])
        if not np.isfinite(served).all() or (served != 0)[~known].any():
            raise InputError(f"predictor '{name}': a row must hold finite weights, of full-compute steps so far only")
    except BaseException as error:
        del PREDICTORS[name]
        if isinstance(error, InputError) or not isinstance(error, Exception):
            raise
        raise InputError(f"predictor '{name}': the rule fails on a run of {steps} steps: {error}") from error


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
