"""Error priors: of predictions that are drawn, and of a run of `pipelines.make_dit`."""

from __future__ import annotations

import numpy as np

from cemq.pipelines.batches import make_batches
from cemq.prior.error_prior import ErrorPrior
from cemq.runtime.runner import Runner
from support.pipelines import CALL, STEPS


def trajectories(steps: int, seed: int = 0, elements: int = 5, noise: float = 0.3):
    """Quantized and full-precision predictions, (steps, elements), that wander off from 3; and the steps' sizes."""
    random = np.random.default_rng(seed)
    v = 3 + np.cumsum(random.normal(size=(steps, elements)), axis=0)
    return v + noise * random.normal(size=v.shape), v, random.uniform(0.5, 2.0, steps)


def prior_of(q: np.ndarray, v: np.ndarray, step_sizes: np.ndarray | None = None, **fields) -> ErrorPrior:
    """The prior of quantized and full-precision predictions, (steps, elements), of steps that are all of size 1."""
    steps, elements = q.shape
    sizes = np.ones(steps) if step_sizes is None else step_sizes
    return ErrorPrior(qq=q @ q.T / elements, qv=q @ v.T / elements, vv=v @ v.T / elements, step_sizes=sizes, **fields)


def profiled(pipe, steps: int = STEPS) -> ErrorPrior:
    batches = make_batches((1, 2), samples=2, first_seed=0, batch_size=2)
    runner = Runner(pipe=pipe, steps=steps, call=CALL)
    return runner.profile(batches, runner.record(batches), scheme="none", dtype="float32")
