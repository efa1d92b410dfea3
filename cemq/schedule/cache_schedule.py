"""Which steps run in full, and how the others are served."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cemq.errors import InputError
from cemq.predict import get_predictor


@dataclass(frozen=True, kw_only=True)
class CacheSchedule:
    """The full-compute steps of a run, in execution order; step 0, the noisiest, is always one of them."""

    num_steps: int
    full_steps: tuple[int, ...]
    predictor: str = "taylor1"
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
        get_predictor(self.predictor)

    @property
    def budget(self) -> int:
        return len(self.full_steps)

    @property
    def compute_ratio(self) -> float:
        return self.num_steps / self.budget

    def serving(self, step_index: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The full-compute steps a step is served from, newest first, and their weights; itself if it is full."""
        done = [step for step in self.full_steps if step <= step_index][::-1]
        if done[0] == step_index:
            return (step_index,), (1.0,)
        weights = get_predictor(self.predictor).coefficients(step_index, done)
        return tuple(done[: len(weights)]), weights

    def strip(self) -> str:
        """One character a step: ``█`` full compute, ``·`` skipped."""
        full = set(self.full_steps)
        return "".join("█" if step in full else "·" for step in range(self.num_steps))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"full_steps": list(self.full_steps)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CacheSchedule:
        """Raises InputError on a missing or unknown key."""
        expected = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != expected:
            raise InputError(f"cache schedule: expected the keys {sorted(expected)}, found {sorted(fields)}")
        return cls(**fields)
