"""Local search: better schedules in small moves, by the error that the prior predicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Unpack

import numpy as np

from cemq.predict.correctors import NO_CORRECTOR, straying_matrix
from cemq.prior.error_prior import ErrorPrior
from cemq.schedule.cache_schedule import CacheSchedule
from cemq.schedule.segment import SLOPES
from cemq.schedule.solvers import AUTO, Aims, longest_gap, parse_budget, plan_schedule

SEARCH = "search"  # the solver that is all of this, and of `cemq.search.explore`
SEGMENT_PREDICTORS = ("reuse", "damped", "taylor1", "taylor2")  # that it gives to single segments
SHIFTS = (-1, 1, -2, 2, -4, 4)
# Beyond so many steps there is no local search, whose time grows with their third power or worse, while a user waits.
# Nor is there much to find: the more steps, the less each matters.
_MOST_STEPS = 100
_LARGEST_TABLE = 200_000  # of the dynamic program's costs, steps x gaps x gaps: half a second


def neighbours(schedule: CacheSchedule, predictors: Sequence[str] = ()) -> Iterator[CacheSchedule]:
    """Schedules of the same budget with one full-compute step moved, or one segment served by another predictor."""
    for index in range(len(schedule.full_steps)):
        yield from _moves(schedule, index, predictors)


def _moves(schedule: CacheSchedule, index: int, predictors: Sequence[str]) -> Iterator[CacheSchedule]:
    """Those of one full-compute step and its segment."""
    full, names = schedule.full_steps, schedule.predictors
    below, above = full[index - 1] if index else -1, full[index + 1] if index + 1 < len(full) else schedule.num_steps
    for other in predictors if above - full[index] > 1 else ():  # else there is nothing to predict
        if other != names[index]:
            yield _changed(schedule, full, (*names[:index], other, *names[index + 1 :]))
    if index == 0:
        return
    for shift in SHIFTS:
        moved = full[index] + shift
        if below < moved < above:
            yield _changed(schedule, (*full[:index], moved, *full[index + 1 :]), names)
    # from where it is to the middle of the longest gap
    kept, kept_names = full[:index] + full[index + 1 :], names[:index] + names[index + 1 :]
    gaps = np.diff(kept, append=schedule.num_steps)
    wide = int(gaps.argmax())
    if gaps[wide] > 1 and (added := kept[wide] + int(gaps[wide]) // 2) != full[index]:
        yield _changed(
            schedule,
            (*kept[: wide + 1], added, *kept[wide + 1 :]),
            (*kept_names[: wide + 1], kept_names[wide], *kept_names[wide + 1 :]),
        )


def _changed(schedule: CacheSchedule, full_steps: tuple[int, ...], predictors: tuple[str, ...]) -> CacheSchedule:
    return replace(schedule, full_steps=full_steps, predictor=predictors, solver=SEARCH)


def improve(
    prior: ErrorPrior,
    starts: CacheSchedule | Iterable[CacheSchedule],
    *,
    predictors: Sequence[str] = (),
    view: str = "combined",
    moves: int | None = None,
) -> CacheSchedule:
    """Move by move to a schedule whose predicted error no single move lowers; the best of several starts.

    Args:
        starts: There are many such schedules, and which is found depends on where the search begins.
        predictors: That a segment may be served by instead; none leaves them as they are.
        moves: The most that are made, each the best of all there are, so as not to go far; None goes on to the end and
            takes the best of each step in turn, which is faster.
    """

    @cache  # what one round weighed comes up in the next, and from other starts
    def predicted(candidate: CacheSchedule) -> float:
        return prior.final_error(candidate.served, candidate.integrated, view)

    def better(best: CacheSchedule, candidates: Iterator[CacheSchedule]) -> CacheSchedule:
        move = min(candidates, key=predicted, default=best)
        return move if predicted(move) < predicted(best) * (1 - 1e-9) else best

    def descend(best: CacheSchedule) -> CacheSchedule:
        if moves is not None:
            for _ in range(moves):
                best = better(best, neighbours(best, predictors))
            return best
        before = None
        while best is not before:
            before = best
            for index in range(len(best.full_steps)):
                best = better(best, _moves(best, index, predictors))
        return best

    found = [descend(start) for start in ([starts] if isinstance(starts, CacheSchedule) else starts)]
    return min(found, key=predicted)


def plan_predicted(
    prior: ErrorPrior,
    budget: int | str,
    *,
    predictor: str = AUTO,
    corrector: str = NO_CORRECTOR,
    view: str = "combined",
    known: CacheSchedule | None = None,
) -> CacheSchedule:
    """The schedule with the least predicted error that is found without running any.

    Local search from the schedules of the dynamic program, from even spacing, and from ``known``. Of more than 100
    steps the best of these as they are; where the program would take long it plans 100 of them, and the others lie
    between.

    Args:
        predictor: One for all, or ``auto``: one for each segment.
        corrector: Of `CORRECTORS`, or ``none``.
        known: Another start, like one that was found good in closed loop.

    Raises:
        InfeasibleBudgetError: The budget is out of range.
    """
    count, whole = parse_budget(budget, prior.num_steps), "taylor1" if predictor == AUTO else predictor
    settings: Aims = {"corrector": corrector, "view": view}
    names = dict.fromkeys((predictor, whole))
    if prior.num_steps > _MOST_STEPS and count < prior.num_steps:
        starts = [_plan_many(prior, count, predictor, **settings)]
    else:
        starts = [plan_schedule(prior, count, predictor=name, **settings) for name in names]
    evenly = plan_schedule(prior, count, solver="uniform", predictor=whole, **settings)
    starts += [evenly] if known is None else [evenly, known]
    if prior.num_steps > _MOST_STEPS:
        return min(starts, key=lambda start: prior.final_error(start.served, start.integrated, view))
    if corrector != NO_CORRECTOR:  # moves of predictors exploit what is predicted of how the sample strays
        found = improve(prior, starts, view=view)
        return settle(prior, found, view=view) if predictor == AUTO else found
    return improve(prior, starts, predictors=SEGMENT_PREDICTORS if predictor == AUTO else (), view=view)


def _plan_many(prior: ErrorPrior, count: int, predictor: str, **settings: Unpack[Aims]) -> CacheSchedule:
    """`plan_schedule`, or what it plans for fewer steps, stretched over all."""
    steps = prior.num_steps
    if steps * longest_gap(steps, count) ** 2 <= _LARGEST_TABLE:
        return plan_schedule(prior, count, predictor=predictor, **settings)
    kept = np.linspace(0, steps, _MOST_STEPS, endpoint=False).astype(int).tolist()
    fewer = max(2, round(count * _MOST_STEPS / steps))
    few = plan_schedule(prior.thinned(kept), fewer, predictor=predictor, **settings)
    return stretched(few, [kept[step] for step in few.full_steps], steps, count)


def settle(prior: ErrorPrior, schedule: CacheSchedule, *, view: str = "combined") -> CacheSchedule:
    """Serve each segment that is corrected later by the predictor of `SLOPES` that lets the sample stray least until
    then, and the last one, which nothing puts right, by the one with the least error of its own: whether that would
    cancel what the others leave is not predicted well enough. Without a corrector the schedule as it is.
    """
    if not schedule.corrects:
        return schedule
    ways = [replace(schedule, predictor=name) for name in SLOPES]
    strayed = [straying_matrix(way.served, way.integrated, prior.step_sizes)[list(way.full_steps)] for way in ways]
    energies = np.einsum("wsk,kl,wsl->ws", strayed, prior.view(view).xx, strayed)
    closed = [ways[index].predictor for index in energies[:, 1:].argmin(0)]
    ways = [replace(schedule, predictor=(*closed, name)) for name in SLOPES]
    return min(ways, key=lambda way: prior.final_error(way.served, view=view, since=schedule.full_steps[-1]))


def stretched(schedule: CacheSchedule, places: Sequence[float], num_steps: int, budget: int) -> CacheSchedule:
    """As many full-compute steps as ``budget`` among ``num_steps``, lying as those of another schedule would.

    Args:
        places: Where its full-compute steps would lie among the new steps, rising, in steps and parts of them. Each new
            one takes the predictor of the one that it stands in for.
    """
    ranks = np.linspace(0, len(places), budget, endpoint=False)
    knots = [0.0, *places[1:], num_steps]  # the first step is full wherever the run begins
    wanted = np.interp(ranks, np.arange(len(knots)), knots).round().astype(int)
    order = np.arange(budget)
    apart = np.maximum.accumulate(wanted - order) + order  # no two on one step
    full_steps = np.minimum(apart, num_steps - budget + order)
    names = tuple(schedule.predictors[int(rank)] for rank in ranks)
    return replace(schedule, num_steps=num_steps, full_steps=full_steps.tolist(), predictor=names)
