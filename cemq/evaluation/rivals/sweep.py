"""Which setting of a method's knob computes as much as is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable

from cemq.errors import InfeasibleBudgetError
from cemq.evaluation.rivals.methods import Knob, Steps, Threshold

CLOSE = 0.02  # of the compute ratio: as near as a setting is sought
_TRIES = 12  # settings of a threshold that are tried for one ratio at most
_STANDS_STILL = 0.005  # of the compute ratio, between two whole numbers


def settle(knob: Knob, target: float, measured: Callable[[float], float], num_steps: int) -> float:
    """The setting whose compute ratio is nearest to ``target``, on a logarithmic scale, of those that were tried; of
    several that are as near, the lowest.

    Args:
        measured: The compute ratio at a setting; it grows with thresholds and intervals, and falls with steps.

    Raises:
        InfeasibleBudgetError: The method has no schedule of any number of steps that was tried.
    """
    tried: dict[float, float] = {}

    def over(setting: float) -> float:
        """By how much too little is computed, as a logarithm; negative for too much."""
        tried[setting] = math.log(measured(setting) / target)
        return tried[setting]

    if isinstance(knob, Threshold):
        _bisect(over, knob)
    elif isinstance(knob, Steps):
        _walk(over, round(num_steps / target), 2, num_steps, upwards=-1)
    else:
        _walk(over, round(target), knob.low, knob.high, upwards=1)
    return min(tried, key=lambda setting: (round(abs(tried[setting]) / CLOSE), setting))


def _bisect(over: Callable[[float], float], knob: Threshold) -> None:
    low, high = math.log(knob.low), math.log(knob.high)
    for _ in range(_TRIES):
        middle = (low + high) / 2
        found = over(math.exp(middle))
        if abs(found) <= CLOSE:
            return
        low, high = (middle, high) if found < 0 else (low, middle)


def _walk(over: Callable[[float], float], guess: int, low: int, high: int, *, upwards: int) -> None:
    """From a guess on, one whole number after the other, until too little is computed where it was too much, or the
    other way round. ``upwards`` is the direction in which less is."""
    guess = min(max(guess, low), high)
    found, before = over(guess), math.inf
    side, step = found < 0, upwards if found < 0 else -upwards
    while abs(found) > CLOSE and (found < 0) == side and low <= guess + step <= high:
        if abs(found - before) < _STANDS_STILL:  # what it skips is all that it ever skips
            return
        guess, before = guess + step, found
        try:
            found = over(guess)
        except InfeasibleBudgetError:  # published rules have holes
            return
