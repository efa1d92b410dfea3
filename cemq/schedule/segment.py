"""The exact dynamic program over (previous full step, this full step), and the segment cost.

A segment runs from one full-compute step to the next. What its steps do to the final sample adds up as far as errors
keep their direction on the way (`ErrorPrior.coherence`); the cost of a segment is that sum, raised to ``gamma / 2``
to punish one bad segment more than several mild ones (MeanCache's peak suppression, arXiv:2601.19961).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cemq.predict.correctors import NO_CORRECTOR
from cemq.predict.predictors import DAMPING
from cemq.prior.error_prior import ErrorPrior, View

# Predictors that a segment can be costed with from its own and the previous full step: their share of the slope.
SLOPES = {"reuse": 0.0, "damped": DAMPING, "taylor1": 1.0}


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentCosts:
    """``costs[p, g, n]`` of the segment that begins with full-compute step ``p``, ``g`` steps after the full-compute
    step before it (0: there is none), and ends ``n`` steps later; infinite where there is no such segment.
    ``choices[p, g, n]`` is the index of the predictor that serves it best."""

    costs: np.ndarray
    choices: np.ndarray
    predictors: tuple[str, ...]


def segment_costs(
    prior: ErrorPrior,
    predictors: Sequence[str],
    *,
    view: str = "combined",
    corrector: str = NO_CORRECTOR,
    gamma: float,
    max_gap: int,
) -> SegmentCosts:
    """``(sum_{s,t in segment} P[s, t] <p(s) - y(s), p(t) - y(t)>) ** (gamma / 2)`` for every segment.

    ``P[s, t]`` is how errors of two steps add up in the final sample: the product of their weights and coherence.

    Args:
        view: Of the prior: what is cached (x) and what it should be (y).
        predictors: Of `SLOPES`; each segment is costed with the best of them.
        corrector: With one, segments that end with a full-compute step are costed as what is interpolated between,
            and by what that step answers to the sample that has strayed by then, which depends on the predictor.
        max_gap: The longest segment.
    """
    steps, gram = prior.num_steps, prior.view(view)
    extrapolated, reused = prior.step_weights
    apart = prior.coherences
    costs = np.full((steps, max_gap + 1, max_gap + 1), np.inf)
    choices = np.zeros(costs.shape, dtype=np.int8)
    for start in range(steps):
        inside = np.arange(start, min(start + max_gap, steps))
        ages, coherences = inside - start, apart[np.ix_(inside, inside)]
        unmoved = (
            gram.xx[start, start]
            - gram.xy[start, inside][:, None]
            - gram.xy[start, inside]
            + gram.yy[np.ix_(inside, inside)]
        )
        alike = np.where(ages == 0, extrapolated[inside], reused[inside])
        repeated = _sums_of_corners(np.outer(alike, alike) * coherences * unmoved)
        weights = np.outer(extrapolated[inside], extrapolated[inside]) * coherences
        held = _sums_of_corners(weights * unmoved)
        if start == 0:  # with one output known, every predictor reuses it; what follows tells what that does
            costs[0, 0, 1 : len(inside) + 1] = repeated if set(predictors) == {"reuse"} else held
            continue
        # p(s) = x(start) + age * slope: what the slopes to each earlier full step add to that
        earlier = np.arange(start - 1, max(start - max_gap, 0) - 1, -1)
        gaps = start - earlier
        slope_energy = (gram.xx[start, start] - 2 * gram.xx[start, earlier] + gram.xx[earlier, earlier]) / gaps**2
        slope_overlap = (gram.xx[start, start] - gram.xx[start, earlier])[:, None] - gram.xy[start, inside]
        slope_overlap = (slope_overlap + gram.xy[np.ix_(earlier, inside)]) / gaps[:, None]
        aged = weights * ages
        added = slope_overlap @ np.tril(aged.T, -1).T + slope_overlap * np.tril(aged).sum(1)
        linear, square = 2 * np.cumsum(added, 1), slope_energy[:, None] * _sums_of_corners(aged * ages[:, None])
        shares = np.array([SLOPES[name] for name in predictors])[:, None, None]
        totals = held + shares * linear + shares**2 * square
        totals = np.where(shares == 0, repeated, totals)
        costs[start, gaps, 1 : len(inside) + 1] = totals.min(0)
        choices[start, gaps, 1 : len(inside) + 1] = totals.argmin(0)
    if corrector != NO_CORRECTOR:
        bent = corrector == "quadratic"
        interpolated = _interpolated_costs(prior, view, max_gap, bent=bent)
        answers = np.stack([_answers(prior, view, max_gap, SLOPES[name], bent=bent) for name in predictors])
        closed = np.isfinite(interpolated)
        costs = np.where(closed, interpolated + answers.min(0), costs)
        choices = np.where(closed, answers.argmin(0), choices)
    with np.errstate(invalid="ignore"):
        costs = np.maximum(costs, 0.0) ** (gamma / 2)
    return SegmentCosts(costs=costs, choices=choices, predictors=tuple(predictors))


def _interpolated_costs(prior: ErrorPrior, view: str, max_gap: int, *, bent: bool) -> np.ndarray:
    """The sums of `segment_costs` where steps are interpolated between the ends of their segment; infinite where a
    segment has no end to go by.

    On a straight line, or ``bent`` through the full-compute step before: by ``age (age - length)`` times the second
    divided difference of the three outputs.
    """
    steps, gram, sizes = prior.num_steps, prior.view(view), prior.step_weights[0]
    totals = np.full((steps, max_gap + 1, max_gap + 1), np.inf)
    gaps = np.arange(1, max_gap + 1)
    for length in range(1, min(max_gap, steps - 1) + 1):
        ages = np.arange(length)
        start, far = np.arange(steps - length)[:, None], ages / length
        end, inside = start + length, start + ages  # (starts, 1), (starts, ages)
        weights = sizes[inside][:, :, None] * sizes[inside][:, None] * prior.coherences[:length, :length]
        to_start, to_end = _line_errors(gram, inside, far, np.hstack([start, end])).transpose(2, 0, 1)
        wanted = (1 - far)[:, None] * gram.xy[start, inside][:, None] + far[:, None] * gram.xy[end, inside][:, None]
        errors = to_start[:, :, None] * (1 - far) + to_end[:, :, None] * far - wanted
        errors += gram.yy[inside[:, :, None], inside[:, None]]
        straight = (weights * errors).sum((1, 2))[:, None]
        totals[start[:, 0], :, length] = np.where(np.arange(max_gap + 1) <= start, straight, np.inf)
        if bent:
            shape = ages * (ages - length)
            pulled = weights @ shape  # (starts, ages)
            before = np.maximum(start - gaps, 0)
            nodes = before, np.broadcast_to(start, before.shape), np.broadcast_to(end, before.shape)
            shares = 1 / (gaps * (gaps + length)), -1 / (gaps * length), 1 / (length * (gaps + length))
            terms = list(zip(shares, nodes, strict=True))
            linear = sum(
                a * np.einsum("sak,sa->sk", _line_errors(gram, inside, far, node), pulled) for a, node in terms
            )
            square = sum(a * b * gram.xx[one, other] for a, one in terms for b, other in terms)
            totals[start[:, 0], 1:, length] += 2 * linear + square * (pulled @ shape)[:, None]
    return totals


def _answers(prior: ErrorPrior, view: str, max_gap: int, share: float, *, bent: bool) -> np.ndarray:
    """What the full-compute step that ends a segment answers to where the sample has strayed by then
    (`ErrorPrior.response`), in the final sample, squared; shaped like `segment_costs`.

    It reaches the final sample by the steps that its output counts in: those interpolated before it and, since it is
    not known which those after it are, as many after it, less and less. All pull the same way.

    Args:
        share: Of the slope between the two full-compute steps before, that the skipped steps were served with.
    """
    steps, gram, weights = prior.num_steps, prior.view(view).xx, prior.step_weights[0]
    found = np.zeros((steps, max_gap + 1, max_gap + 1))
    gaps = np.arange(max_gap + 1)
    inverse = 1 / np.maximum(gaps, 1) * (gaps > 0)
    for length in range(1, min(max_gap, steps - 1) + 1):
        ages, start = np.arange(length), np.arange(steps - length)[:, None]
        before, end = np.maximum(start - gaps, 0), start + length
        inside = start + ages
        once, twice = (prior.step_sizes[inside] @ ages**power for power in (1, 2))  # (starts,)
        # served less interpolated, summed over the segment, in outputs of the steps before, at its start and at its end
        straight = np.outer(once, share * inverse)
        counts = np.stack([-straight, straight + once[:, None] / length, 0 * straight - once[:, None] / length])
        reach = (weights[inside] @ ages / length)[:, None]
        if bent:
            span = length + gaps
            slope, lift = np.outer(once, (1 - share) * inverse), (twice[:, None] + np.outer(once, gaps)) / span
            curved = np.stack([slope - lift * inverse, lift * span * inverse / length - slope, -lift / length])
            counts = np.where(gaps > 0, curved, counts)
            pulled = (weights[inside] @ ages**2)[:, None] + np.outer(weights[inside] @ ages, gaps)
            reach = np.where(gaps > 0, pulled / (length * span), reach)
        after = np.append(weights, np.zeros(length))[end + ages] @ (1 - ages / length)
        nodes = before, np.broadcast_to(start, before.shape), np.broadcast_to(end, before.shape)
        terms = list(zip(counts, nodes, strict=True))
        strayed = sum(a * b * gram[one, other] for a, one in terms for b, other in terms)
        answer = (prior.response**2).sum(0)[end]
        found[start[:, 0], :, length] = answer * strayed * (reach + after[:, None]) ** 2
    return found


def _line_errors(gram: View, inside: np.ndarray, far: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """``<p(s) - y(s), x(node)>``, (starts, ages, nodes), with p on the straight line between the ends of a segment.

    Args:
        inside: The steps of each segment, (starts, ages); they end one before the next full-compute step.
        far: How far along each age is, 0 at the first, (ages,).
        nodes: (starts, nodes).
    """
    start, end = inside[:, :1], inside[:, -1:] + 1
    line = (1 - far)[:, None] * gram.xx[start, nodes][:, None] + far[:, None] * gram.xx[end, nodes][:, None]
    return line - gram.xy[nodes[:, None], inside[:, :, None]]


def _sums_of_corners(matrix: np.ndarray) -> np.ndarray:
    """The sums of the leading 1x1, 2x2, ... blocks."""
    lower = np.tril(matrix, -1).sum(1) + np.triu(matrix, 1).sum(0) + np.diag(matrix)
    return np.cumsum(lower)


def solve_segments(costs: np.ndarray, largest: int) -> list[tuple[tuple[int, ...], float]]:
    """For every budget 1..largest: the full-compute steps with the least total cost, and that cost.

    Step 0 is full, the last step need not be. Exact: the state is the pair (previous full step, this full step), so a
    predictor that looks two full steps back is costed right on unequal gaps. Ties go to the smaller gap. The cost is
    infinite, and the steps are empty, where no schedule fits.
    """
    steps, gaps = costs.shape[0], costs.shape[1]
    best = np.full((steps, gaps), np.inf)  # [this full step, gap to the previous one]
    best[0, 0] = 0.0
    left = np.arange(steps, 0, -1)  # from each step to the virtual end
    ending = np.flatnonzero(left < gaps)
    landing, gap_to = np.nonzero(np.arange(steps)[:, None] - np.arange(gaps) >= 0)
    keep = gap_to > 0
    landing, gap_to = landing[keep], gap_to[keep]
    by_next = np.ascontiguousarray(costs.transpose(0, 2, 1))  # [this full step, gap to the next, gap to the previous]
    history: list[np.ndarray] = []
    found = []
    came = np.zeros((steps, gaps), dtype=np.int64)
    least = np.full((steps, gaps), np.inf)
    for used in range(largest):  # full steps before this one, so it is not below their number
        closing = best[ending] + costs[ending, :, left[ending]]
        row, gap = np.unravel_index(closing.argmin(), closing.shape)
        found.append(_trace(int(ending[row]), int(gap), float(closing[row, gap]), history))
        totals = by_next[used:] + best[used:, None, :]
        came[used:] = totals.argmin(2)
        least[used:] = np.take_along_axis(totals, came[used:, :, None], 2)[:, :, 0]
        least[:used] = np.inf
        best = np.full((steps, gaps), np.inf)
        best[landing, gap_to] = least[landing - gap_to, gap_to]
        previous = np.zeros((steps, gaps), dtype=np.int64)
        previous[landing, gap_to] = came[landing - gap_to, gap_to]
        history.append(previous)
    return found


def _trace(step: int, gap: int, total: float, history: list[np.ndarray]) -> tuple[tuple[int, ...], float]:
    if not np.isfinite(total):
        return (), total
    path = [step]
    for previous in reversed(history):
        step, gap = step - gap, int(previous[step, gap])
        path.append(step)
    return tuple(reversed(path)), total
