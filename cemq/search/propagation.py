"""How errors reach the final sample, fitted to runs in closed loop.

A prediction that is off at step ``s`` moves the sample by ``step_size(s)`` times as much; every later step bends that
displacement. What is left of it at the end differs by orders of magnitude between steps, and errors of far apart steps
no longer point the same way. Two quantities say so: the **sensitivity** of the final sample to each step, and the
**coherence**, the number of steps over which errors add up with sign rather than in squares. Where a corrector puts the
sample right at each full-compute step, that step is still computed where the sample had strayed to, and a third
quantity says what that does to its output: the **response**. `ErrorPrior.final_error` combines them.

They cannot be read off recorded trajectories, so some schedules are run, and the final errors found are matched. The
logarithm of the sensitivity is a polynomial of low order in the step index, which leaves the dynamic program no zeros
to exploit (free weights for each step do, and then plan worse than evenly spaced steps). Steps that reuse an earlier
output have a polynomial of their own: they err along the trajectory, which the network corrects in part, and others
across it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.polynomial import legendre
from scipy.optimize import least_squares

from cemq.predict.correctors import NO_CORRECTOR, straying_matrix
from cemq.predict.predictors import reused_steps
from cemq.prior.error_prior import RESPONSE, ErrorPrior
from cemq.schedule import CacheSchedule, uniform_steps

SAMPLE = "sample"  # the solver of schedules that are drawn, not planned
DEGREE = 7
RIDGE = 0.2  # pulls the higher terms to zero: fewer runs than terms still give a smooth sensitivity
_APART = 0.4  # pulls the two polynomials together, where runs do not tell them apart
_COHERENCE = 8.0  # steps; where the fit begins
_HELD = 0.015  # keeps it there if runs say nothing about it
_ANSWERED = (0.05, 0.05)  # and likewise the response: what it is on average, and what it is more at the end
_TOLERANCE = 1e-6  # of the fit; errors found scatter by percents


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A prior that predicts final errors, and how well it matched the runs it was fitted to.

    ``rms_log_error`` is the root mean square of ``log(predicted / measured)``.
    """

    prior: ErrorPrior
    rms_log_error: float


def sample_schedules(
    num_steps: int,
    count: int,
    predictors: Sequence[str],
    seed: int,
    budget: int | None = None,
    corrector: str = NO_CORRECTOR,
) -> list[CacheSchedule]:
    """Schedules to fit to, or to test a fit with: half of them near uniform, half at random.

    Args:
        budget: Full-compute steps of each; None draws from a sixth to a half of the steps.
    """
    generator = np.random.default_rng(seed)
    found = []
    for index in range(count):
        wanted = budget or int(np.clip(round(num_steps * generator.uniform(1 / 6, 1 / 2)), 2, num_steps))
        chosen = {0}
        if index % 2 == 0:
            moved = np.array(uniform_steps(num_steps, wanted)) + generator.normal(0, 0.02 * num_steps, wanted)
            chosen |= set(np.clip(moved[1:].round(), 1, num_steps - 1).astype(int).tolist())
        others = [step for step in range(1, num_steps) if step not in chosen]  # two may have moved to one place
        chosen |= set(generator.choice(others, wanted - len(chosen), replace=False).tolist())
        found.append(
            CacheSchedule(
                num_steps=num_steps,
                full_steps=tuple(sorted(chosen)),
                predictor=predictors[index // 2 % len(predictors)],
                solver=SAMPLE,
                corrector=corrector,
            )
        )
    return found


def fit_propagation(
    prior: ErrorPrior,
    schedules: Sequence[CacheSchedule],
    errors: Sequence[float],
    *,
    counts: Sequence[float] | None = None,
    groups: Sequence[int] | None = None,
    view: str = "combined",
) -> Fit:
    """Sensitivity, coherence and response with which `ErrorPrior.final_error` comes closest to what was measured.

    Args:
        schedules: That were run in closed loop.
        errors: What was found for each, in any unit that grows with the error in proportion.
        counts: As how many each counts; one, if not given.
        groups: Which samples each was run on, by any number; errors of different samples may differ by a factor. What
            is fitted is what groups show on average, each as much as another.
    """
    integrated = [schedule.integrated for schedule in schedules]
    moved = np.outer(prior.step_sizes, prior.step_sizes)
    grams = np.stack([prior.error_gram(each, view) for each in integrated]) * moved
    places = np.linspace(-1, 1, prior.num_steps)
    answers = legendre.legvander(places, len(_ANSWERED) - 1).T
    strayed = None
    if any(schedule.corrects for schedule in schedules):
        terms = (_strayed_terms(prior, schedule, answers, view) for schedule in schedules)
        first, second = (np.stack(each, axis=-3) * moved for each in zip(*terms, strict=True))
        strayed = first, second
    wanted = np.log(np.maximum(errors, 1e-12))
    shares = np.sqrt(np.ones(len(wanted)) if counts is None else counts)
    signs = np.where([reused_steps(each) for each in integrated], 1.0, -1.0)
    model = _Model(
        grams=grams,
        strayed=strayed,
        signs=signs,
        base=np.where(signs < 0, *prior.sensitivity),
        basis=legendre.legvander(places, DEGREE),
    )
    known, group = np.unique(np.zeros(len(wanted)) if groups is None else groups, return_inverse=True)
    free = len(known) - 1  # what sets each group apart is 0 on average; the model's own parameters come after
    apart = np.vstack([np.eye(free), -np.ones(free)])[group]
    # errors come in the model's units: begin with a constant that is right on average
    start = np.zeros(free + 2 * (DEGREE + 1) + 1 + 2 * len(answers))
    at_coherence, at_response = free + 2 * (DEGREE + 1), slice(-2 * len(answers), None)
    start[at_coherence] = np.log(_COHERENCE)
    start[at_response].reshape(2, -1)[:, 0] = RESPONSE
    start[free] = np.mean(wanted - model.predict(start[free:])[0])
    orders = np.arange(DEGREE + 1)
    penalty = np.r_[np.zeros(free), RIDGE * orders, _APART * (1 + orders), _HELD, _ANSWERED, _ANSWERED]

    def residuals(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        predicted, slopes = model.predict(at[free:])
        misses = shares * (predicted + apart @ at[:free] - wanted)
        turns = shares[:, None] * np.hstack([apart, slopes])
        return np.r_[misses, penalty * (at - start)], np.vstack([turns, np.diag(penalty)])

    lowest, highest = np.full(len(start), -np.inf), np.full(len(start), np.inf)
    lowest[at_coherence], highest[at_coherence] = np.log(0.2), np.log(100 * prior.num_steps)
    solution = least_squares(
        lambda at: residuals(at)[0], start, lambda at: residuals(at)[1],  # pyright: ignore[reportArgumentType]  # SciPy has no types
        (lowest, highest),
        ftol=_TOLERANCE, xtol=_TOLERANCE, gtol=_TOLERANCE,
    )  # fmt: skip
    parameters, value = solution.x, solution.fun
    adjusted = np.stack([np.exp(model.exponents(parameters[free:], sign)) for sign in (-1.0, 1.0)])
    sensitivity = prior.sensitivity * adjusted
    coherence = float(np.exp(parameters[at_coherence]))
    response = parameters[at_response].reshape(2, -1) @ answers
    fitted = replace(prior, sensitivity=sensitivity, coherence=coherence, response=response)
    return Fit(prior=fitted, rms_log_error=float(np.sqrt(np.sum(value[: len(wanted)] ** 2) / np.sum(shares**2))))


def _strayed_terms(
    prior: ErrorPrior, schedule: CacheSchedule, answers: np.ndarray, view: str
) -> tuple[np.ndarray, np.ndarray]:
    """What a response adds to the error gram of what is integrated: ``sum_k a_k first[k] + sum_kl (a_k a_l + b_k b_l)
    second[k, l]`` for one of ``a @ answers`` along and ``b @ answers`` across; (terms, steps, steps) and
    (terms, terms, steps, steps)."""
    gram, integrated = prior.view(view), schedule.integrated
    strayed = straying_matrix(schedule.served, integrated, prior.step_sizes)
    moved = integrated @ (answers[:, :, None] * strayed)
    energy = moved @ gram.xx
    overlap = energy @ integrated.T - moved @ gram.xy
    return overlap + overlap.swapaxes(1, 2), energy[:, None] @ moved.swapaxes(1, 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Model:
    """Final errors of runs as a function of the parameters: the mean of the two polynomials, half of what lies between
    them, the logarithm of the coherence, and the response.

    ``grams`` (runs, steps, steps) are of displacements, ``strayed`` what the response adds to them (`_strayed_terms`,
    with runs before steps), None where nothing is corrected; ``signs`` (runs, steps) are 1 where a step reuses an
    output and -1 elsewhere, ``base`` (runs, steps) the sensitivity that the polynomials of ``basis`` (steps, terms)
    are to adjust.
    """

    grams: np.ndarray
    strayed: tuple[np.ndarray, np.ndarray] | None
    signs: np.ndarray
    base: np.ndarray
    basis: np.ndarray

    def exponents(self, parameters: np.ndarray, signs: np.ndarray | float) -> np.ndarray:
        mean, half = parameters[: 2 * self.basis.shape[1]].reshape(2, -1)
        return self.basis @ mean + signs * (self.basis @ half)

    def predict(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of the final errors, (runs,), and their derivatives, (runs, parameters)."""
        log_coherence, *response = parameters[2 * self.basis.shape[1] :]
        steps, (along, across) = np.arange(len(self.basis)), np.reshape(response, (2, -1))
        apart = np.abs(steps[:, None] - steps) / np.exp(log_coherence)
        weights = self.base * np.exp(self.exponents(parameters, self.signs))
        kernel = np.exp(-apart) * weights[:, :, None] * weights[:, None, :]
        products, answered = self.grams * kernel, np.zeros((len(weights), len(response)))
        if self.strayed is not None:
            first, second = (terms * kernel for terms in self.strayed)
            both = np.outer(along, along) + np.outer(across, across)
            products += np.tensordot(along, first, 1) + np.tensordot(both, second, 2)
            first, second = first.sum((-2, -1)), second.sum((-2, -1))
            second = (second + second.swapaxes(0, 1)) / 2
            answered = np.vstack([first / 2 + np.tensordot(along, second, 1), np.tensordot(across, second, 1)]).T
        per_step = products.sum(2)
        total = np.maximum(per_step.sum(1), 1e-24)[:, None]
        slopes = [
            per_step @ self.basis,
            (per_step * self.signs) @ self.basis,
            0.5 * (products * apart).sum((1, 2))[:, None],
            answered,
        ]
        return 0.5 * np.log(total[:, 0]), np.hstack(slopes) / total
