"""How skipped steps are put right once a later step is computed: again as linear combinations of outputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from cemq.errors import choose
from cemq.predict.predictors import Rule, taylor

# What the steps skipped since the last full-compute step should have been, once there is another: the polynomial that
# the predictors continue, through the new output too, so that it is interpolated.
CORRECTORS: dict[str, Rule] = {"linear": taylor(1), "quadratic": taylor(2)}
NO_CORRECTOR = "none"
# dB that even spacing loses to full compute before correcting pays. Below, most of the error is that of quantization,
# and the difference between schedules that a corrector leaves is too small to be predicted.
WORTH_CORRECTING = 2.5
_ROUNDING = 1e-9  # weights below it are what is left of others that cancel
_UNFELT = 1e-6  # of the largest response: a step that moves the sample less pays nothing


def check_corrector(name: str) -> str:
    """The name itself if it is ``none`` or a corrector; raises InputError."""
    return choose("corrector", name, (NO_CORRECTOR, *CORRECTORS))


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
        responses: `noise_scheduler.responses`: [s, j] is how far one unit of the prediction of step ``j`` has moved the
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
