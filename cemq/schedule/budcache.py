"""BudCache's first stage (arXiv:2606.13496): simulated annealing, then hill climbing, over the full-compute steps of a
fixed budget, by whatever loss is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from cemq.schedule.solvers import parse_budget

ANNEALING_STEPS, SWEEPS = 200, 20  # as released for FLUX; 5 sweeps for Wan
# First and last, in units of the loss, which is the squared error of the final latent there; 0.1 to 1e-4 for Wan.
TEMPERATURES = (0.05, 1e-5)
_NEAR = 3  # steps that a move goes at most, if it is a near one
_FAR_MOVES = 2  # of each full-compute step, in a sweep

Loss = Callable[[tuple[int, ...]], float]


def budcache_steps(
    loss: Loss,
    num_steps: int,
    budget: int,
    *,
    seed: int = 0,
    annealing_steps: int = ANNEALING_STEPS,
    sweeps: int = SWEEPS,
    temperatures: tuple[float, float] = TEMPERATURES,
    evaluations: int | None = None,
) -> tuple[tuple[int, ...], float]:
    """The best ``budget`` full-compute steps that are found, and their loss.

    The first quarter of the budget, at least step 0, is spent on the first steps and stays there; the search begins
    with the others drawn at random. No steps are evaluated twice.

    Args:
        loss: Of full-compute steps, lower is better; NaN counts as infinite.
        temperatures: Between which annealing cools geometrically.
        evaluations: The most calls of ``loss``, at least 1; None for as many as the rule makes.

    Raises:
        InfeasibleBudgetError: Not within 2..num_steps.
    """
    count = parse_budget(budget, num_steps)
    random, known = np.random.default_rng(seed), {}

    def weigh(steps: tuple[int, ...]) -> float:
        if steps not in known:
            if evaluations is not None and len(known) >= max(evaluations, 1):
                return math.inf  # is not taken
            value = float(loss(steps))
            known[steps] = math.inf if math.isnan(value) else value
        return known[steps]

    first = _fixed(count)
    rest = random.choice(np.arange(first, num_steps), count - first, replace=False)
    current = (*range(first), *sorted(rest.tolist()))
    cost = weigh(current)
    hot, cold = temperatures
    for turn in range(annealing_steps):
        candidate = _moved(current, num_steps, random)
        change = weigh(candidate) - cost
        heat = hot * (cold / hot) ** (turn / annealing_steps)
        if change < 0 or random.random() < math.exp(-change / heat):
            current, cost = candidate, weigh(candidate)
    for _ in range(sweeps):
        better = min(_around(current, num_steps, random), key=weigh, default=current)
        if weigh(better) >= cost:
            break
        current, cost = better, weigh(better)
    best = min(known, key=known.__getitem__)
    return best, known[best]


def _fixed(count: int) -> int:
    """How many first steps stay full."""
    return max(1, count // 4)


def _moved(steps: tuple[int, ...], num_steps: int, random: np.random.Generator) -> tuple[int, ...]:
    """One step moved, mostly near where it was, or now and then two anywhere; as they are if none can be."""
    first = _fixed(len(steps))
    movable, free = list(steps[first:]), [step for step in range(first, num_steps) if step not in steps]
    if not movable or not free:
        return steps
    if random.random() < 0.9 or min(len(movable), len(free)) < 2:
        source = int(random.choice(movable))
        near = [step for step in free if abs(step - source) <= _NEAR]
        target = int(random.choice(near if near and random.random() < 0.7 else free))
        return _replaced(steps, {source}, {target})
    sources, targets = (set(random.choice(each, 2, replace=False).tolist()) for each in (movable, free))
    return _replaced(steps, sources, targets)


def _around(steps: tuple[int, ...], num_steps: int, random: np.random.Generator) -> Iterator[tuple[int, ...]]:
    """Each step that may move, moved to every place near it, and to a few drawn anywhere."""
    first = _fixed(len(steps))
    for source in steps[first:]:
        near = range(max(first, source - _NEAR), min(num_steps, source + _NEAR + 1))
        far = random.integers(first, num_steps, _FAR_MOVES).tolist()
        yield from (_replaced(steps, {source}, {target}) for target in (*near, *far) if target not in steps)


def _replaced(steps: tuple[int, ...], sources: set[int], targets: set[int]) -> tuple[int, ...]:
    return tuple(sorted((set(steps) - sources) | targets))
