"""Which steps run in full, and how the others are served."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from cemq.errors import InputError
from cemq.predict import check_predictor, serving_matrix


@dataclass(frozen=True, kw_only=True)
class CacheSchedule:
    """The full-compute steps of a run, in execution order; step 0, the noisiest, is always one of them.

    ``predictor`` serves the skipped steps: one name, or one for each full-compute step and the steps that follow it.
    """

    num_steps: int
    full_steps: tuple[int, ...]
    predictor: str | tuple[str, ...] = "taylor1"
    solver: str = "manual"

    def __post_init__(self) -> None:
        steps = tuple(self.full_steps)
        object.__setattr__(self, "full_steps", steps)
        if not steps or steps[0] != 0:
            raise InputError(f"cache schedule: the first full-compute step must be 0, found {steps[:1] or 'none'}")
        if list(steps) != sorted(set(steps)) or steps[-1] >= self.num_steps:
            raise InputError(
                f"cache schedule: full-compute steps must rise strictly and stay below {self.num_steps}, found {steps}"
            )
        if not isinstance(self.predictor, str):
            names = tuple(self.predictor)
            if len(names) != len(steps):
                raise InputError(f"cache schedule: {len(names)} predictors for {len(steps)} full-compute steps")
            object.__setattr__(self, "predictor", names[0] if len(set(names)) == 1 else names)
        for name in self.predictors:
            check_predictor(name)

    @property
    def budget(self) -> int:
        return len(self.full_steps)

    @property
    def compute_ratio(self) -> float:
        return self.num_steps / self.budget

    @property
    def predictors(self) -> tuple[str, ...]:
        """The predictor of each full-compute step's segment."""
        return (self.predictor,) * self.budget if isinstance(self.predictor, str) else self.predictor

    @cached_property
    def served(self) -> np.ndarray:
        """`serving_matrix` of this schedule, (num_steps, num_steps)."""
        return serving_matrix(self.num_steps, self.full_steps, self.predictors)

    def serving(self, step_index: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The full-compute steps a step is served from, newest first, and their weights; itself if it is full."""
        sources = np.flatnonzero(self.served[step_index])[::-1]
        return tuple(sources.tolist()), tuple(self.served[step_index, sources].tolist())

    @cached_property
    def last_use(self) -> np.ndarray:
        """The last step that each step serves, at least itself; shape (num_steps,), -1 for skipped steps."""
        return np.where(self.served != 0, np.arange(self.num_steps)[:, None], -1).max(0)

    @property
    def most_kept(self) -> int:
        """How many full-compute steps must be cached at once, at most."""
        steps = np.arange(self.num_steps)
        return int(((steps[:, None] <= steps) & (steps < self.last_use[:, None])).sum(0).max())

    def strip(self) -> str:
        """One character a step: ``█`` full compute, ``·`` skipped."""
        full = set(self.full_steps)
        return "".join("█" if step in full else "·" for step in range(self.num_steps))

    def predictor_text(self) -> str:
        """The predictor, or the run lengths of several: ``taylor1 x3, reuse x2``."""
        if isinstance(self.predictor, str):
            return self.predictor
        runs = [(name, len(list(group))) for name, group in groupby(self.predictor)]
        return ", ".join(f"{name} x{count}" if count > 1 else name for name, count in runs)

    def to_dict(self) -> dict[str, Any]:
        predictor = self.predictor if isinstance(self.predictor, str) else list(self.predictor)
        return {
            "num_steps": self.num_steps,
            "full_steps": list(self.full_steps),
            "predictor": predictor,
            "solver": self.solver,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CacheSchedule:
        """Raises InputError on a missing or unknown key."""
        expected = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != expected:
            raise InputError(f"cache schedule: expected the keys {sorted(expected)}, found {sorted(fields)}")
        return cls(**fields)
