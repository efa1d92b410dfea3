"""Numbers to what a drawing needs: places in a plot of a hundred by a hundred, ticks, and the colours of heat maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A range of numbers along one side of a plot."""

    label: str
    low: float
    high: float
    logarithmic: bool = False

    @classmethod
    def over(cls, label: str, *values: float, logarithmic: bool = False) -> Axis:
        """One that holds all of ``values``, with some room; zeros have no place on a logarithmic one."""
        known = [value for value in values if math.isfinite(value) and (value > 0 or not logarithmic)] or [1.0]
        low, high = min(known), max(known)
        if logarithmic:
            room = max((high / low) ** 0.05, 1.05)
            low, high = low / room, high * room
        else:
            room = 0.05 * (high - low) or 0.5
            low, high = low - room, high + room
        return cls(label=label, low=low, high=high, logarithmic=logarithmic)

    def place(self, value: float) -> float:
        """From 0, where the plot begins, to 100.

        >>> Axis(label="", low=1, high=100, logarithmic=True).place(10)
        50.0
        """
        low, high, value = (
            math.log10(max(each, self.low)) if self.logarithmic else each for each in (self.low, self.high, value)
        )
        return round(100 * (value - low) / (high - low), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places, and what stands there."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        locator = LogLocator(subs=(1, 2, 5), numticks=9) if self.logarithmic else MaxNLocator(5, steps=[1, 2, 5, 10])
        values = [float(value) for value in locator.tick_values(self.low, self.high)]
        return [(self.place(value), f"{value:.6g}") for value in values if self.low <= value <= self.high]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points that belong together: joined by a line, or each a dot with what it is."""

    name: str
    points: Sequence[tuple[float, float]]
    titles: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Series over two axes; ``chosen`` is one point that is set apart, ``background`` a picture that fills the plot."""

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Series] = ()
    dots: Sequence[Series] = ()
    chosen: tuple[float, float] | None = None
    background: str = ""

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        """Of a point, from the upper left corner."""
        return self.x.place(point[0]), round(100 - self.y.place(point[1]), 2)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """Of an SVG polyline."""
        return " ".join("{:g},{:g}".format(*self.place(point)) for point in points)


def as_colours(tables: Sequence[np.ndarray]) -> tuple[list[np.ndarray], float, float]:
    """Tables of errors as colours (rows, columns, 4), 0 to 255, all on one logarithmic scale; NaN is transparent.

    Returns:
        The colours, and the values of the darkest and of the brightest; what is below has the darkest.
    """
    from matplotlib import colormaps

    positive = np.concatenate([table[table > 0] for table in tables])
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1.0, 1.0)
    low = max(low, 1e-4 * high)
    found = []
    for table in tables:
        shares = np.log(np.fmax(table, low) / low) / (math.log(high / low) or 1.0)
        colours = colormaps["viridis"](shares, bytes=True)
        colours[np.isnan(table)] = 0
        found.append(colours)
    return found, low, high
