"""Which setting of a method's knob computes as much as is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from cemq.errors import InfeasibleBudgetError
from cemq.evaluation.rivals.methods import Knob, Steps, Threshold

CLOSE = 0.02  # of the compute ratio: as near as a setting is sought
_TRIES = 12  # settings of a threshold that are tried for one ratio at most
_NARROW = 0.005  # of a threshold: between two that are this near, none is sought
_STANDS_STILL = 0.005  # of the compute ratio, between two whole numbers


def settle(
    knob: Knob,
    target: float,
    measured: Callable[[float], float],
    num_steps: int,
    known: dict[float, float] | None = None,
) -> float:
    """The setting whose compute ratio is nearest to ``target``, on a logarithmic scale, of those that were tried; of
    several that are as near, the lowest.

    Args:
        measured: The compute ratio at a setting; it grows with thresholds and intervals, and falls with steps.
        known: Compute ratios at settings that were tried for other targets; those that are tried now are added to it.

    Raises:
        InfeasibleBudgetError: The method has no schedule of any number of steps that was tried.
    """
    tried = {} if known is None else known

    def over(setting: float) -> float:
        """By how much too little is computed, as a logarithm; negative for too much."""
        if setting not in tried:
            tried[setting] = measured(setting)
        return math.log(tried[setting] / target)

    if isinstance(knob, Threshold):
        _bisect(over, knob, tried)
    elif isinstance(knob, Steps):
        _walk(over, round(num_steps / target), 2, num_steps, upwards=-1)
    else:
        _walk(over, round(target), knob.low, knob.high, upwards=1)
    return min(tried, key=lambda setting: (round(abs(over(setting)) / CLOSE), setting))


def _bisect(over: Callable[[float], float], knob: Threshold, tried: Iterable[float]) -> None:
    """Between those of the settings that were tried which are next to the target on either side."""
    sides = {setting: over(setting) for setting in tried}
    if min(map(abs, sides.values()), default=math.inf) <= CLOSE:
        return
    low = math.log(max((setting for setting, found in sides.items() if found < 0), default=knob.low))
    high = math.log(min((setting for setting, found in sides.items() if found > 0), default=knob.high))
    for _ in range(_TRIES):
        if high - low <= _NARROW:
            return
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
