"""How errors reach the final sample, fitted to runs in closed loop.

A prediction that is off at step ``s`` moves the sample by ``step_size(s)`` times as much; every later step bends that
displacement. What is left of it at the end differs by orders of magnitude between steps, and errors of far apart steps
no longer point the same way. Two quantities say so: the **sensitivity** of the final sample to each step, and the
**coherence**, the number of steps over which errors add up with sign rather than in squares. `ErrorPrior.propagation`
combines them.

They cannot be read off recorded trajectories, so two dozen schedules are run, and the final errors found are matched:
the logarithm of the sensitivity is a polynomial of low order in the step index, which leaves the dynamic program no
zeros to exploit (free weights for each step do, and then plan worse than evenly spaced steps).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.polynomial import legendre

from cemq.prior import ErrorPrior
from cemq.schedule import CacheSchedule, uniform_steps

SAMPLE = "sample"  # the solver of schedules that are drawn, not planned
DEGREE = 5
RIDGE = 0.15  # pulls the higher terms to zero: fewer runs than terms still give a smooth sensitivity
_COHERENCE = 8.0  # steps; where the fit begins, and where it stays if runs say nothing about it
_ITERATIONS = 60


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A prior that predicts final errors, and how well it matched the runs it was fitted to.

    ``rms_log_error`` is the root mean square of ``log(predicted / measured)``.
    """

    prior: ErrorPrior
    rms_log_error: float


def sample_schedules(num_steps: int, count: int, predictors: Sequence[str], seed: int) -> list[CacheSchedule]:
    """Schedules to fit to: budgets from a sixth to a half of the steps, half of them near uniform, half at random."""
    generator = np.random.default_rng(seed)
    found = []
    for index in range(count):
        budget = int(np.clip(round(num_steps * generator.uniform(1 / 6, 1 / 2)), 2, num_steps))
        if index % 2:
            chosen = set(generator.choice(np.arange(1, num_steps), budget - 1, replace=False).tolist())
        else:
            moved = np.array(uniform_steps(num_steps, budget)) + generator.normal(0, 0.02 * num_steps, budget)
            chosen = set(np.clip(moved.round(), 1, num_steps - 1).astype(int).tolist())
        found.append(
            CacheSchedule(
                num_steps=num_steps,
                full_steps=(0, *sorted(chosen)),
                predictor=predictors[index // 2 % len(predictors)],
                solver=SAMPLE,
            )
        )
    return found


def fit_propagation(
    prior: ErrorPrior,
    schedules: Sequence[CacheSchedule],
    errors: Sequence[float],
    *,
    counts: Sequence[float] | None = None,
    view: str = "combined",
) -> Fit:
    """Sensitivity and coherence with which `ErrorPrior.final_error` comes closest to what was measured.

    Args:
        schedules: That were run in closed loop.
        errors: What was found for each, in any unit that grows with the error in proportion.
        counts: As how many each counts; one, if not given.
    """
    grams = np.stack([prior.error_gram(schedule.served, view) for schedule in schedules])
    grams *= np.outer(prior.step_sizes, prior.step_sizes)
    wanted = np.log(np.maximum(errors, 1e-12))
    shares = np.sqrt(np.ones(len(wanted)) if counts is None else counts)
    basis = legendre.legvander(np.linspace(-1, 1, prior.num_steps), DEGREE)
    apart = np.abs(np.arange(prior.num_steps)[:, None] - np.arange(prior.num_steps))
    # errors come in the model's units: begin with a constant that is right on average
    parameters = np.zeros(DEGREE + 2)
    parameters[-1] = np.log(_COHERENCE)
    parameters[0] = np.mean(wanted - _predict(parameters, grams, basis, apart)[0])
    start = parameters.copy()
    penalty = RIDGE * np.r_[0.0, np.arange(1, DEGREE + 1), 0.1]

    def residuals(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        predicted, slopes = _predict(at, grams, basis, apart)
        misses, turns = shares * (predicted - wanted), shares[:, None] * slopes
        return np.r_[misses, penalty * (at - start)], np.vstack([turns, np.diag(penalty)])

    # Levenberg-Marquardt
    damping = 1e-2
    value, slopes = residuals(parameters)
    for _ in range(_ITERATIONS):
        normal = slopes.T @ slopes
        scaled = normal + damping * np.diag(np.diag(normal) + 1e-9)
        step = np.linalg.solve(scaled, -slopes.T @ value)
        trial = parameters + np.clip(step, -1.0, 1.0)
        trial[-1] = np.clip(trial[-1], np.log(0.2), np.log(100 * prior.num_steps))
        found, trial_slopes = residuals(trial)
        if found @ found < value @ value:
            converged = value @ value - found @ found < 1e-9 * (value @ value)
            parameters, value, slopes, damping = trial, found, trial_slopes, max(damping / 3, 1e-6)
            if converged:
                break
        else:
            damping = min(damping * 4, 1e6)
    fitted = replace(prior, sensitivity=np.exp(basis @ parameters[:-1]), coherence=float(np.exp(parameters[-1])))
    return Fit(prior=fitted, rms_log_error=float(np.sqrt(np.sum(value[: len(wanted)] ** 2) / np.sum(shares**2))))


def _predict(
    parameters: np.ndarray, grams: np.ndarray, basis: np.ndarray, apart: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the final errors, (runs,), and their derivatives, (runs, parameters)."""
    weights, coherence = np.exp(basis @ parameters[:-1]), np.exp(parameters[-1])
    kernel = np.outer(weights, weights) * np.exp(-apart / coherence)
    products = grams * kernel
    per_step = products.sum(2)
    total = np.maximum(per_step.sum(1), 1e-24)
    slopes = np.empty((len(grams), len(parameters)))
    slopes[:, :-1] = (per_step @ basis) / total[:, None]
    slopes[:, -1] = 0.5 * (products * (apart / coherence)).sum((1, 2)) / total
    return 0.5 * np.log(total), slopes
