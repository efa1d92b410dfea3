"""Timing, and nothing else: variants take turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cemq.pipelines.batches import Progress

BUSY = 1.5  # median over fastest round from which on a result is not to be trusted


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each round, and what a call allocated on the CUDA device at most, beyond what was there before it."""

    seconds: tuple[float, ...]
    working_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(
    variants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warm_up: int = 2,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Timing]:
    """Call each variant once a round, another one first each time."""
    names, place = list(variants), torch.device(device)
    cuda = place.type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in names}
    working: dict[str, int] = dict.fromkeys(names, 0)
    for turn in range(-warm_up, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if cuda:
                torch.cuda.synchronize(place)
                torch.cuda.reset_peak_memory_stats(place)
                before = torch.cuda.memory_allocated(place)
            started = clock()
            variants[name]()
            if cuda:
                torch.cuda.synchronize(place)
            taken = clock() - started
            if turn < 0:
                continue
            seconds[name].append(taken)
            if cuda:
                working[name] = max(working[name], torch.cuda.max_memory_allocated(place) - before)
        if progress:
            progress((turn + 1 + warm_up) / (rounds + warm_up))
    return {name: Timing(seconds=tuple(seconds[name]), working_bytes=working[name] if cuda else None) for name in names}


def of_stage(progress: Progress | None, stage: str) -> Callable[[float], None]:
    """What is told the share of one stage that is done, and may have nobody to tell; the stage begins now."""
    if progress is None:
        return lambda _: None
    progress(stage, 0.0)
    return partial(progress, stage)


def make_rows(
    timings: Mapping[str, Timing], weight_bytes: Mapping[str, int], errors: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Rows of a result; ratios are to the first variant, and ``peak_bytes`` is what a variant takes alone."""
    first = next(iter(timings))
    return [
        {
            "variant": name,
            "median_ms": 1e3 * timing.median,
            "min_ms": 1e3 * min(timing.seconds),
            "time_ratio": timing.median / timings[first].median,
            "weight_bytes": weight_bytes[name],
            "bytes_ratio": weight_bytes[name] / weight_bytes[first],
            "relative_l2": errors.get(name),
            "peak_bytes": None if timing.working_bytes is None else timing.working_bytes + weight_bytes[name],
        }
        for name, timing in timings.items()
    ]


def busy_note(timings: Mapping[str, Timing]) -> list[str]:
    """A note, where rounds differ so much that the medians say little."""
    spread = max(timing.median / min(timing.seconds) for timing in timings.values())
    if spread < BUSY:
        return []
    return [
        f"the machine was busy: medians are up to {spread:.1f} times the fastest round, run it again when it is not"
    ]
