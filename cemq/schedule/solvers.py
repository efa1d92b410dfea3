"""From an error prior and a budget to a schedule."""

from __future__ import annotations

import re
from typing import TypedDict, Unpack

import numpy as np

from cemq.errors import InfeasibleBudgetError, InputError, check_keywords, choose
from cemq.predict.correctors import NO_CORRECTOR, WORTH_CORRECTING, check_corrector
from cemq.predict.predictors import check_predictor
from cemq.prior.error_prior import ErrorPrior
from cemq.schedule.cache_schedule import CacheSchedule
from cemq.schedule.cem import CEM_RULES, CemRule
from cemq.schedule.segment import SLOPES, SegmentCosts, segment_costs, solve_segments
from cemq.schedule.threshold import threshold_steps

SOLVERS = ("segment", "cem", "cem-relaxed", "threshold", "uniform")
AUTO = "auto"  # as a predictor: the best of `SLOPES` for each segment
GAMMA = 2.0
_UNLIMITED = 64  # runs of so many steps or fewer are solved with gaps of any length


def parse_budget(budget: int | str, num_steps: int) -> int:
    """Full-compute steps from ``15``, ``"15"`` or a compute ratio such as ``"3x"``.

    Raises:
        InfeasibleBudgetError: Not within 2..num_steps.
        InputError: Neither an integer nor a ratio.
    """
    text = str(budget).strip()
    if re.fullmatch(r"\d+", text):
        steps = int(text)
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?)x", text):
        ratio = float(match[1])
        if ratio < 1:
            raise InfeasibleBudgetError(f"budget={text}: a compute ratio is at least 1x")
        steps = max(2, round(num_steps / ratio))
    else:
        raise InputError(f"budget {text!r} is neither a number of full-compute steps nor a compute ratio such as 3x")
    if not 2 <= steps <= num_steps:
        raise InfeasibleBudgetError(f"budget={text} is out of range for {num_steps} steps: choose 2..{num_steps}")
    return steps


def check_budget(budget: int | str, num_steps: int, solver: str) -> int:
    """`parse_budget`, and whether ``solver`` can spend it: known before anything is profiled.

    Raises:
        InfeasibleBudgetError: Out of range, or the CEM rule has no path of so many steps.
        InputError: No such solver.
    """
    steps = parse_budget(budget, num_steps)
    if choose("solver", solver, SOLVERS) in CEM_RULES:
        CEM_RULES[solver].solve(np.ones((num_steps, num_steps)), steps)
    return steps


def usual_budget(num_steps: int) -> int:
    """Three in ten: what schedules are tried with where none was asked for."""
    return max(2, round(0.3 * num_steps))


def check_predictors(name: str) -> str:
    """The name itself if it is ``auto`` or a predictor; raises InputError."""
    return name if name == AUTO else check_predictor(name)


def uniform_steps(num_steps: int, budget: int) -> tuple[int, ...]:
    """``budget`` steps with gaps as equal as integers allow, beginning with step 0."""
    return tuple(i * num_steps // budget for i in range(budget))


def longest_gap(num_steps: int, budget: int) -> int:
    """Between full-compute steps, where none is asked for."""
    return num_steps if num_steps <= _UNLIMITED else max(_UNLIMITED // 4, 3 * -(-num_steps // budget))


class Aims(TypedDict):
    """What a plan is made for: how skipped steps are put right later, and which errors of the prior count."""

    corrector: str
    view: str


class Rules(TypedDict, total=False):
    """The finer rules of `plan_schedule`, each of which has a default there."""

    gamma: float
    max_gap: int | None
    cem: CemRule | None


def plan_schedule(
    prior: ErrorPrior,
    budget: int | str,
    *,
    solver: str = "segment",
    predictor: str = "taylor1",
    corrector: str = NO_CORRECTOR,
    view: str = "combined",
    **rules: Unpack[Rules],
) -> CacheSchedule:
    """Choose the full-compute steps with the least predicted error.

    ``segment`` minimises the summed error of each segment (`segment_costs`) and spends less than the budget where that
    predicts less error; ``cem`` is the published rule on cosine distances, ``cem-relaxed`` its variant whose last step
    need not be full, ``threshold`` ERTACache's policy, ``uniform`` spaces evenly.

    Args:
        budget: Full-compute steps to spend, counting step 0, or a compute ratio such as ``"3x"``. The number of steps
            itself means full compute.
        predictor: One of `PREDICTORS`, or ``auto``: the one of `SLOPES` that suits each segment best.
        corrector: Of `CORRECTORS`, or ``none``: what full-compute steps make up for.
        view: Which errors of the prior to minimise: ``combined``, ``cache`` or ``self``.
        gamma: Exponent on each segment's error; 2 by default.
        max_gap: Longest gap between full-compute steps; None allows any, thrice the mean gap beyond 64 steps.
        cem: Weighter, gap rules and so on for ``cem`` and ``cem-relaxed``; None takes those published.

    Raises:
        InfeasibleBudgetError: The budget is out of range, or no path fits the gaps allowed.

    >>> import numpy as np
    >>> angles = np.linspace(0, 1, 9)
    >>> gram = np.cos(angles[:, None] - angles)  # predictions that turn at a constant rate
    >>> prior = ErrorPrior(qq=gram, qv=gram, vv=gram, step_sizes=np.ones(9))
    >>> plan_schedule(prior, budget=3, predictor="reuse").full_steps
    (0, 3, 6)
    """
    check_keywords("plan_schedule", rules, Rules)
    cem = rules.get("cem")
    count = check_budget(budget, prior.num_steps, solver if cem is None else "segment")
    choose("solver", solver, SOLVERS)
    check_predictors(predictor)
    check_corrector(corrector)
    single = "taylor1" if predictor == AUTO else predictor
    if solver == "segment" and count < prior.num_steps:
        gamma, max_gap = rules.get("gamma", GAMMA), rules.get("max_gap")
        settings = {"predictor": predictor, "corrector": corrector, "view": view, "gamma": gamma, "max_gap": max_gap}
        return _plan_within(prior, count, **settings)[-1]
    if solver in CEM_RULES:
        full_steps = (cem or CEM_RULES[solver]).solve(prior.cosine_distances(view), count)
    elif solver == "threshold":
        full_steps = threshold_steps(prior.reuse_errors(view), count)
    else:
        full_steps = uniform_steps(prior.num_steps, count)
    return CacheSchedule(
        num_steps=prior.num_steps, full_steps=full_steps, predictor=single, solver=solver, corrector=corrector
    )


def suited_corrector(
    prior: ErrorPrior,
    budget: int | str,
    *,
    predictor: str = AUTO,
    view: str = "combined",
    corrector: str | None = None,
) -> str:
    """``corrector``, by default that of the schedules which the prior was fitted to, if evenly spaced ones of this
    budget are predicted to lose enough to full compute (`WORTH_CORRECTING`); else ``none``.

    Raises:
        InfeasibleBudgetError: The budget is out of range.
    """
    even = plan_schedule(prior, budget, solver="uniform", predictor=predictor, view=view)
    full = prior.final_error(np.eye(prior.num_steps), view=view)
    worth = prior.final_error(even.served, view=view) > full * 10 ** (WORTH_CORRECTING / 20)
    return (corrector or prior.corrector) if worth else NO_CORRECTOR


def plan_all(
    prior: ErrorPrior,
    largest: int,
    *,
    predictor: str = AUTO,
    corrector: str = NO_CORRECTOR,
    view: str = "combined",
    gamma: float = GAMMA,
    max_gap: int | None = None,
) -> list[CacheSchedule]:
    """The ``segment`` schedule for every budget 2..largest, in one solution; none costs more than the one before it.

    With ``max_gap`` only for those that are large enough for such gaps.

    Raises:
        InfeasibleBudgetError: No path of at most ``largest`` steps fits the gaps allowed.
    """
    settings = {"predictor": predictor, "corrector": corrector, "view": view, "gamma": gamma}
    schedules = _plan_within(prior, largest, max_gap=max_gap, **settings)
    small = largest - len(schedules)  # budgets too small for these gaps; they are planned with longer ones
    if max_gap is None and small > 1:
        return [*plan_all(prior, small, **settings), *schedules]
    return schedules if small else schedules[1:]


def _plan_within(
    prior: ErrorPrior, largest: int, *, predictor: str, corrector: str, view: str, gamma: float, max_gap: int | None
) -> list[CacheSchedule]:
    """Those of `plan_all` with the gaps that suit the largest: from the first budget on, 1 or more, that these reach.

    Raises:
        InfeasibleBudgetError: They are for the largest.
    """
    if max_gap is not None and max_gap < 1:
        raise InputError(f"max_gap={max_gap}: a gap between full-compute steps is at least 1")
    num_steps = prior.num_steps
    longest = min(max_gap or longest_gap(num_steps, largest), num_steps)
    names = tuple(SLOPES) if predictor == AUTO else (predictor,)
    table = segment_costs(prior, names, view=view, corrector=corrector, gamma=gamma, max_gap=longest)
    schedules: list[CacheSchedule] = []
    cheapest = np.inf
    for full_steps, total in solve_segments(table.costs, largest):
        if total < cheapest:
            cheapest = total
            chosen = _chosen(table, full_steps) if predictor == AUTO else predictor
            latest = CacheSchedule(
                num_steps=num_steps, full_steps=full_steps, predictor=chosen, solver="segment", corrector=corrector
            )
        if np.isfinite(cheapest):
            schedules.append(latest)
    if not schedules:
        raise InfeasibleBudgetError(
            f"budget={largest} cannot cover {num_steps} steps with gaps of at most {longest}: "
            f"choose {-(-num_steps // longest)}..{num_steps}, or a larger max_gap"
        )
    return schedules


def _chosen(table: SegmentCosts, full_steps: tuple[int, ...]) -> tuple[str, ...]:
    """The predictors that the costs of these segments were taken with."""
    num_steps = len(table.costs)
    gaps = np.diff(full_steps, prepend=0)
    ends = np.diff(full_steps, append=num_steps)
    return tuple(table.predictors[table.choices[p, g, n]] for p, g, n in zip(full_steps, gaps, ends, strict=True))
