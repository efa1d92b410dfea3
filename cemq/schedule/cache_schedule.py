"""Which steps run in full, and how the others are served."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from numbers import Integral
from typing import Any

import numpy as np

from cemq.errors import InputError
from cemq.predict.correctors import NO_CORRECTOR, check_corrector, correcting_matrix, integrated_matrix
from cemq.predict.predictors import check_predictor, serving_matrix

FULL = "full"  # the solver of full compute
MOST_STEPS = 10_000  # what serves what is a table of steps by steps, then of 0.8 GB


@dataclass(frozen=True, kw_only=True)
class CacheSchedule:
    """The full-compute steps of a run, in execution order; step 0, the noisiest, is always one of them.

    ``predictor`` serves the skipped steps: one name, or one for each full-compute step and the steps that follow it.

    ``corrector`` puts right, at each full-compute step, what the skipped steps before it moved the sample by
    (`cemq.predict.correctors.correcting_matrix`).

    ``branch_steps`` are full-compute steps on which a denoiser that is called once for each branch of guidance computes
    the first (conditional) only. What the other adds to it is predicted, from the full-compute steps with both: step 0
    is one of them. Such a step costs half, so that ``budget`` counts two as one.
    """

    num_steps: int
    full_steps: tuple[int, ...]
    predictor: str | tuple[str, ...] = "taylor1"
    solver: str = "manual"
    branch_steps: tuple[int, ...] = ()
    corrector: str = NO_CORRECTOR

    def __post_init__(self) -> None:
        steps = tuple(self.full_steps)
        object.__setattr__(self, "full_steps", steps)
        if not all(isinstance(number, Integral) for number in (self.num_steps, *steps)):
            raise InputError("cache schedule: num_steps and full_steps must be whole numbers")
        if self.num_steps > MOST_STEPS:
            raise InputError(f"cache schedule: num_steps is {self.num_steps}, at most {MOST_STEPS} can be planned")
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
        check_corrector(self.corrector)
        object.__setattr__(self, "branch_steps", tuple(self.branch_steps))
        if list(self.branch_steps) != sorted(set(self.branch_steps) & set(steps) - {0}):
            raise InputError(
                "cache schedule: steps with one branch must rise strictly and be full-compute steps after the first, "
                f"found {self.branch_steps}"
            )

    @property
    def budget(self) -> int:
        """What it costs, in full-compute steps with all branches; half a one counts as one."""
        return len(self.full_steps) - len(self.branch_steps) // 2

    @property
    def full_count(self) -> float:
        """What it costs, in full-compute steps with all branches; one with the first branch only is half a one."""
        return len(self.full_steps) - len(self.branch_steps) / 2

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What tells it from schedules that do something else, whoever made it and whatever its predictors are called:
        a segment that skips nothing is served alike by all of them."""
        served = tuple(self.serving(step) for step in range(self.num_steps))
        branches = (self.branch_steps, self.between_branches.key) if self.branch_steps else ()
        return (served, self.corrector if self.corrects else NO_CORRECTOR, *branches)

    @property
    def compute_ratio(self) -> float:
        return self.num_steps / self.full_count

    @cached_property
    def between_branches(self) -> CacheSchedule:
        """The schedule of what the other branches add to the first."""
        kept = [index for index, step in enumerate(self.full_steps) if step not in self.branch_steps]
        return CacheSchedule(
            num_steps=self.num_steps,
            full_steps=tuple(self.full_steps[index] for index in kept),
            predictor=tuple(self.predictors[index] for index in kept),
            solver=self.solver,
        )

    def from_step(self, first: int) -> CacheSchedule:
        """What a run follows that begins late, at step ``first`` of this schedule: it is computed in full."""
        later = [index for index, step in enumerate(self.full_steps) if step > first]
        begun = self.predictors[len(self.full_steps) - len(later) - 1]
        return dataclasses.replace(
            self,
            num_steps=self.num_steps - first,
            full_steps=(0, *(self.full_steps[index] - first for index in later)),
            predictor=(begun, *(self.predictors[index] for index in later)),
            branch_steps=tuple(step - first for step in self.branch_steps if step > first),
        )

    @property
    def predictors(self) -> tuple[str, ...]:
        """The predictor of each full-compute step's segment."""
        return (self.predictor,) * len(self.full_steps) if isinstance(self.predictor, str) else self.predictor

    @cached_property
    def served(self) -> np.ndarray:
        """`serving_matrix` of this schedule, (num_steps, num_steps)."""
        return serving_matrix(self.num_steps, self.full_steps, self.predictors)

    @property
    def corrects(self) -> bool:
        """Whether the corrector has anything to do: a step is skipped between two full-compute ones."""
        full = self.full_steps
        return self.corrector != NO_CORRECTOR and full[-1] >= len(full)

    @cached_property
    def integrated(self) -> np.ndarray:
        """`integrated_matrix` of this schedule, (num_steps, num_steps): what errors of the final sample come from."""
        return integrated_matrix(self.served, self.full_steps, self.corrector)

    def correcting(self, responses: np.ndarray) -> np.ndarray:
        """`correcting_matrix` of this schedule under a sampler, (num_steps, num_steps)."""
        return correcting_matrix(self.served, self.full_steps, self.corrector, responses)

    @cached_property
    def last_use(self) -> np.ndarray:
        """The last step that is served from each step, (num_steps,); -1 for skipped steps."""
        return np.where(self.served != 0, np.arange(self.num_steps)[:, None], -1).max(0)

    @property
    def most_kept(self) -> int:
        """The most full-compute steps of which something is cached at a time."""
        full = np.array(self.full_steps)
        return max(int((self.last_use[full[full <= step]] > step).sum()) for step in full)

    def serving(self, step_index: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The full-compute steps a step is served from, newest first, and their weights; itself if it is full."""
        sources = np.flatnonzero(self.served[step_index])[::-1]
        return tuple(sources.tolist()), tuple(self.served[step_index, sources].tolist())

    def strip(self) -> str:
        """One character a step: ``█`` full compute, ``▌`` the first branch only, ``·`` skipped."""
        marks = dict.fromkeys(self.full_steps, "█") | dict.fromkeys(self.branch_steps, "▌")
        return "".join(marks.get(step, "·") for step in range(self.num_steps))

    def predictor_text(self) -> str:
        """The predictor, or the run lengths of several: ``taylor1 x3, reuse x2``."""
        if isinstance(self.predictor, str):
            return self.predictor
        runs = [(name, len(list(group))) for name, group in groupby(self.predictor)]
        return ", ".join(f"{name} x{count}" if count > 1 else name for name, count in runs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; no ``branch_steps`` and no ``corrector`` where there are none."""
        predictor = self.predictor if isinstance(self.predictor, str) else list(self.predictor)
        return {
            "num_steps": self.num_steps,
            "full_steps": list(self.full_steps),
            "predictor": predictor,
            "solver": self.solver,
            **({"branch_steps": list(self.branch_steps)} if self.branch_steps else {}),
            **({"corrector": self.corrector} if self.corrector != NO_CORRECTOR else {}),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CacheSchedule:
        """Raises InputError on a missing or unknown key."""
        expected = {field.name for field in dataclasses.fields(cls)}
        if set(fields) | {"branch_steps", "corrector"} != expected:
            raise InputError(f"cache schedule: expected the keys {sorted(expected)}, found {sorted(fields)}")
        return cls(**fields)


def full_compute(num_steps: int) -> CacheSchedule:
    """Every step in full, by the solver `FULL`."""
    return CacheSchedule(num_steps=num_steps, full_steps=tuple(range(num_steps)), solver=FULL)
