"""How a skipped step is served, and put right later: as linear combinations of the outputs of full-compute steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from cemq.errors import choose

# A predictor gets the step index, the full-compute steps so far (newest first) and what every earlier step was served
# as, one row of weights a step; it returns this step's row.
Rule = Callable[[int, Sequence[int], np.ndarray], np.ndarray]

DAMPING = 0.5  # of the slope, in `damped`
GOC_GAIN = 0.8  # the gain GOC publishes for its milder host
MEAN_WINDOW = 3  # steps that `mean-velocity` averages over


def _taylor(order: int, gain: float = 1.0) -> Rule:
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
    "reuse": _taylor(0),
    "damped": _taylor(1, DAMPING),
    "taylor1": _taylor(1),
    "taylor2": _taylor(2),
    "goc": _goc,
    "mean-velocity": _mean_velocity,
}

# What the steps skipped since the last full-compute step should have been, once there is another: the polynomial that
# the predictors continue, through the new output too, so that it is interpolated.
CORRECTORS: dict[str, Rule] = {"linear": _taylor(1), "quadratic": _taylor(2)}
NO_CORRECTOR = "none"
# dB that even spacing loses to full compute before correcting pays. Below, most of the error is that of quantization,
# and the difference between schedules that a corrector leaves is too small to be predicted.
WORTH_CORRECTING = 2.5
_ROUNDING = 1e-9  # weights below it are what is left of others that cancel
_UNFELT = 1e-6  # of the largest response: a step that moves the sample less pays nothing


def check_corrector(name: str) -> str:
    """The name itself if it is ``none`` or a corrector; raises InputError."""
    return choose("corrector", name, (NO_CORRECTOR, *CORRECTORS))


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


def integrated_matrix(served: np.ndarray, full_steps: Sequence[int], corrector: str) -> np.ndarray:
    """What the sampler has integrated of every step in the end, (num_steps, num_steps), rows as in `serving_matrix`.

    With a corrector, skipped steps between two full-compute ones count as what is interpolated between them; those
    after the last one stay as they were served.

    Args:
        served: `serving_matrix`.
        full_steps: Rising, beginning with 0.
    """
    if corrector == NO_CORRECTOR:
        return served
    integrated = served.copy()
    for index, (before, step) in enumerate(pairwise(full_steps), start=1):
        integrated[before + 1 : step] = _looked_back(served, full_steps, index, corrector)
    return integrated


def _looked_back(served: np.ndarray, full_steps: Sequence[int], index: int, corrector: str) -> np.ndarray:
    """Rows for the steps between two full-compute ones, once the later, ``full_steps[index]``, is known."""
    nodes, rule = full_steps[index::-1], CORRECTORS[corrector]
    between = range(full_steps[index - 1] + 1, full_steps[index])
    return np.array([rule(step, nodes, served) for step in between]).reshape(-1, served.shape[1])


def straying_matrix(served: np.ndarray, integrated: np.ndarray, step_sizes: np.ndarray) -> np.ndarray:
    """How far the sample has strayed when a step is computed in full, (num_steps, num_steps): weights of full-compute
    outputs, rows of zeros for skipped steps.

    That is what the steps skipped before it have moved the sample by too much or too little. The step puts it right,
    but is computed where the sample is before that. Without a corrector nothing is put right, and all is zero.

    Args:
        served: `serving_matrix`.
        integrated: `integrated_matrix`.
        step_sizes: (num_steps,), how far one unit of each prediction moves the sample.
    """
    strayed = np.zeros_like(served)
    full = np.flatnonzero(served.diagonal())
    strayed[full[1:]] = np.add.reduceat((served - integrated) * step_sizes[:, None], full)[:-1]
    return strayed


def correcting_matrix(
    served: np.ndarray, full_steps: Sequence[int], corrector: str, responses: np.ndarray
) -> np.ndarray:
    """What is added to the prediction of every step, (num_steps, num_steps): weights of full-compute outputs.

    With each full-compute step the steps skipped before it are known better. What they moved the sample by too much or
    too little is made up for at once: the sample that the sampler returns is the one it would have returned, had it
    been given what is interpolated. UniPC's corrector (arXiv:2302.04867, section 3.1) does so over one step of its own
    solver, without another evaluation either; here it is done over all that was skipped, for any linear sampler. A
    multistep sampler remembers what it was given, so it is compensated for that on the steps after.

    Args:
        served: `serving_matrix`.
        full_steps: Rising, beginning with 0.
        responses: `cemq.sampler.responses`: [s, j] is how far one unit of the prediction of step ``j`` has moved the
            sample after step ``s``.
    """
    known, consumed = served.copy(), served.copy()
    # a step of no length cannot pay: the next one does
    pays = np.abs(responses.diagonal()) > _UNFELT * np.abs(responses).max()
    position = {step: index for index, step in enumerate(full_steps)}
    for step in range(1, len(served)):
        if index := position.get(step):
            known[full_steps[index - 1] + 1 : step] = _looked_back(served, full_steps, index, corrector)
        if pays[step]:
            owed = responses[step, :step] @ (known[:step] - consumed[:step]) / responses[step, step]
            consumed[step] += np.where(np.abs(owed) > _ROUNDING, owed, 0.0)
    return consumed - served


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
