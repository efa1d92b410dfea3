"""Full-compute steps that are published as they are, for any model: nothing is measured."""

from __future__ import annotations

import math

from cemq.errors import InputError


def spectrum_steps(num_steps: int, window: float = 2.0, flex: float = 0.75, warmup: int = 5) -> tuple[int, ...]:
    """Spectrum's own steps (arXiv:2603.01623): ``warmup`` full ones, then gaps of ``window`` steps, rounded down, which
    grows by ``flex`` with each. Defaults as released, for 3.5x; ``flex=3`` is for 5x.

    >>> spectrum_steps(20)
    (0, 1, 2, 3, 4, 6, 8, 11, 15)
    """
    if warmup < 1 or flex < 0:
        raise InputError(f"warmup={warmup}, flex={flex}: Spectrum warms up for at least 1 step, and gaps do not shrink")
    full = list(range(min(warmup, num_steps)))
    while (step := full[-1] + max(1, math.floor(window))) < num_steps:
        full.append(step)
        window = round(window + flex, 3)
    return tuple(full)
