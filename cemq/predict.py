"""How a skipped step is served: as a linear combination of earlier full-compute steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cemq.errors import choose


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Coefficients of the latest full-compute steps, newest first.

    ``depth`` is how many of them are used once there are that many; with fewer, the highest order they allow.
    """

    name: str
    depth: int
    weights: Callable[[int, Sequence[int]], tuple[float, ...]]

    def coefficients(self, step_index: int, full_steps: Sequence[int]) -> tuple[float, ...]:
        """Weights of ``full_steps`` (newest first, at least one, all before ``step_index``) at ``step_index``."""
        return self.weights(step_index, full_steps[: self.depth])


def _reuse(step_index: int, full_steps: Sequence[int]) -> tuple[float, ...]:
    return (1.0,)


def _taylor1(step_index: int, full_steps: Sequence[int]) -> tuple[float, ...]:
    """Linear extrapolation over the step index, exact for unequal gaps (TaylorSeer, arXiv:2503.06923, order 1)."""
    if len(full_steps) < 2:
        return (1.0,)
    newest, older = full_steps
    ratio = (step_index - newest) / (newest - older)
    return (1.0 + ratio, -ratio)


PREDICTORS = {p.name: p for p in (Predictor(name="reuse", depth=1, weights=_reuse),
                                  Predictor(name="taylor1", depth=2, weights=_taylor1))}  # fmt: skip


def get_predictor(name: str) -> Predictor:
    """Look a predictor up by name; raises InputError."""
    return PREDICTORS[choose("predictor", name, PREDICTORS)]
