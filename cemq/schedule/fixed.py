"""Full-compute steps that are published as they are, for any model: nothing is measured."""

from __future__ import annotations

import math

import numpy as np

from cemq.errors import InputError


def interval_steps(num_steps: int, interval: int, first_enhance: int = 1) -> tuple[int, ...]:
    """Every ``interval`` steps, after ``first_enhance`` full ones; the last step need not be full.

    FORA (arXiv:2407.01425) is released with ``first_enhance=1``; TaylorSeer (arXiv:2503.06923) with 2 for DiT, 3 for
    FLUX and 1 for Wan; ToCa (arXiv:2410.05317) with 3.

    >>> interval_steps(12, 4, first_enhance=2)
    (0, 1, 5, 9)
    """
    if interval < 1 or not 1 <= first_enhance <= num_steps:
        raise InputError(
            f"interval={interval}, first_enhance={first_enhance}: both are at least 1, and the second at most "
            f"the {num_steps} steps"
        )
    return (*range(first_enhance), *range(first_enhance - 1 + interval, num_steps, interval))


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


def cache_dit_steps(num_steps: int, preset: str = "medium") -> tuple[int, ...]:
    """What cache-dit computes under its step mask ``slow``, ``medium``, ``fast`` or ``ultra``, as that package says.

    Raises:
        InputError: It is not installed, or has no such mask for so many steps.
    """
    try:
        from cache_dit import steps_mask
    except ImportError as error:
        raise InputError(f"step masks of cache-dit need the package: pip install cache-dit ({error})") from error
    try:
        mask = steps_mask(total_steps=num_steps, mask_policy=preset)
    except (AssertionError, ValueError) as error:
        raise InputError(f"cache-dit has no mask '{preset}' for {num_steps} steps: {error}") from error
    return tuple(np.flatnonzero(mask).tolist())
