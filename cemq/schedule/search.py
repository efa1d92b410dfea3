"""Local search: better schedules in small moves, by whatever says how good one is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cemq.prior import ErrorPrior
from cemq.schedule.cache_schedule import CacheSchedule

SEGMENT_PREDICTORS = ("reuse", "damped", "taylor1", "taylor2")  # that it gives to single segments
SHIFTS = (-1, 1, -2, 2, -4, 4)


def neighbours(schedule: CacheSchedule, predictors: Sequence[str] = ()) -> Iterator[CacheSchedule]:
    """Schedules of the same budget with one full-compute step moved, or one segment served by another predictor."""
    full, names = schedule.full_steps, schedule.predictors
    for index in range(1, len(full)):
        for shift in SHIFTS:
            moved = full[index] + shift
            below, above = full[index - 1], full[index + 1] if index + 1 < len(full) else schedule.num_steps
            if below < moved < above:
                yield _changed(schedule, (*full[:index], moved, *full[index + 1 :]), names)
    for index, name in enumerate(names):
        for other in predictors:
            if other != name:
                yield _changed(schedule, full, (*names[:index], other, *names[index + 1 :]))
    for removed in range(1, len(full)):  # a step from where it is needed least to the middle of the longest gap
        kept, kept_names = full[:removed] + full[removed + 1 :], names[:removed] + names[removed + 1 :]
        gaps = np.diff(kept, append=schedule.num_steps)
        wide = int(gaps.argmax())
        if gaps[wide] > 1 and (added := kept[wide] + int(gaps[wide]) // 2) != full[removed]:
            yield _changed(
                schedule,
                (*kept[: wide + 1], added, *kept[wide + 1 :]),
                (*kept_names[: wide + 1], kept_names[wide], *kept_names[wide + 1 :]),
            )


def _changed(schedule: CacheSchedule, full_steps: tuple[int, ...], predictors: tuple[str, ...]) -> CacheSchedule:
    return CacheSchedule(num_steps=schedule.num_steps, full_steps=full_steps, predictor=predictors, solver="search")


def improve(
    prior: ErrorPrior, schedule: CacheSchedule, *, predictors: Sequence[str] = (), view: str = "combined", rounds=200
) -> CacheSchedule:
    """Move by move to a schedule whose predicted error no single move lowers."""

    def predicted(candidate: CacheSchedule) -> float:
        return prior.final_error(candidate.served, view)

    return descend(schedule, predicted, lambda best: neighbours(best, predictors), rounds=rounds)


def descend(
    schedule: CacheSchedule,
    error: Callable[[CacheSchedule], float],
    moves: Callable[[CacheSchedule], Iterator[CacheSchedule]],
    *,
    rounds: int,
) -> CacheSchedule:
    """Steepest descent: the best move of each round, until none helps."""
    best, least = schedule, error(schedule)
    for _ in range(rounds):
        found, candidate = min(((error(move), index, move) for index, move in enumerate(moves(best))))[::2]
        if found >= least * (1 - 1e-9):
            break
        best, least = candidate, found
    return best
