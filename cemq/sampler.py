"""The noise scheduler: wrapping its methods safely, and knowing one sampler from another."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from cemq.prior import SamplerFingerprint

# What samplers raise that want other arguments or shapes than most.
_UNSUITABLE = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def intercepted(scheduler: Any, method: str, around: Callable[..., Any]) -> Iterator[None]:
    """Have ``around(original, **arguments)`` called in place of ``scheduler.method``, on this one object.

    The signature stays visible (pipelines inspect it), the arguments arrive by name, and a deep copy of the scheduler
    runs its own untouched method. Interceptions nest; each is undone on exit, also after an exception.
    """
    function = getattr(type(scheduler), method)
    signature = inspect.signature(function)
    original = getattr(scheduler, method)
    before = scheduler.__dict__.get(method)

    @functools.wraps(function)
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not scheduler:
            return function(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs).arguments
        named = {name: value for name, value in bound.items() if name != "self"}
        named.update(named.pop("kwargs", {}))
        return around(original, **named)

    setattr(scheduler, method, types.MethodType(replacement, scheduler))
    try:
        yield
    finally:
        if before is None:
            delattr(scheduler, method)
        else:
            setattr(scheduler, method, before)


def landing_lengths(lengths: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Step lengths, scaled by ``factors`` and spread anew after each step so that they still end where they should.

    What is left to go is shared among the steps to come in proportion to their lengths, as ERTACache does with equal
    ones; the last step goes all that is left, whatever its factor.
    """
    landed, left, planned = np.empty(len(lengths)), float(lengths.sum()), float(lengths.sum())
    for step, length in enumerate(lengths[:-1]):
        landed[step] = length * (left / planned) * factors[step]
        left, planned = left - landed[step], planned - length
    landed[-1] = left
    return landed


def retimed(scheduler: Any, factors: np.ndarray) -> tuple[float, ...]:
    """Scale the last ``len(factors)`` steps of a sampler that has just been given its timesteps; it ends where it did.

    Only for `cemq.correction.STEPS_BY_SIGMA`: the denoiser is then called at the time that the sample is really at.
    Where a pipeline has set timesteps that its sigmas do not imply, nothing changes. Returns the steps' timesteps.
    """
    steps, scale = len(factors), scheduler.config.num_train_timesteps
    sigmas, timesteps = scheduler.sigmas.clone(), scheduler.timesteps.clone()
    if torch.allclose(timesteps.cpu(), sigmas[:-1].cpu() * scale):
        planned = sigmas[-steps - 1 :].double().cpu().numpy()
        places = planned[0] + np.cumsum(landing_lengths(np.diff(planned), factors))
        sigmas[-steps:-1] = torch.from_numpy(places[:-1]).to(sigmas)
        timesteps[-steps:] = (sigmas[-steps - 1 : -1] * scale).to(timesteps)
        scheduler.sigmas, scheduler.timesteps = sigmas, timesteps
    return tuple(float(t) for t in timesteps[-steps:])


def responses(scheduler: Any, steps: int) -> np.ndarray | None:
    """How far one unit of the model output at each of the last ``steps`` steps has moved the sample after every step.

    Measured on twins of a scheduler that has just been given its timesteps: each step gets a channel of its own, in
    which it alone predicts anything.

    Returns:
        (steps, steps), float64: [s, j] of the output of step ``j`` in the sample that step ``s`` returns, 0 for
        ``j > s``. None where this cannot be said: steps that are not linear in the output (samples are clipped), or
        want more than an output, a timestep and a sample.
    """

    def moved(amount: float) -> np.ndarray:
        twin = copy.deepcopy(scheduler)
        outputs = amount * torch.eye(steps, dtype=torch.float64, device="cpu")
        if len(twin.timesteps) > steps:
            twin.set_begin_index(len(twin.timesteps) - steps)
        random = {"generator": torch.Generator("cpu")} if "generator" in inspect.signature(twin.step).parameters else {}
        sample, rows = torch.zeros(1, steps, 1, 1, dtype=torch.float64, device="cpu"), []
        for timestep, output in zip(twin.timesteps.cpu()[-steps:], outputs, strict=True):
            for generator in random.values():
                generator.manual_seed(0)
            sample = next_sample(type(twin).step(twin, output.view(1, -1, 1, 1), timestep, sample, **random)).double()
            rows.append(sample.flatten().numpy())
        return np.stack(rows)

    try:
        with torch.random.fork_rng(devices=[]):
            nothing, once, twice = (moved(amount) for amount in (0.0, 1.0, 2.0))
    except _UNSUITABLE:
        return None
    found = once - nothing
    linear = np.allclose(twice - nothing, 2 * found, rtol=1e-3, atol=1e-6 * np.abs(found).max())
    moves = found.shape == (steps, steps) and np.isfinite(found).all() and found.diagonal().any()
    return found if linear and moves else None


def is_linear(scheduler: Any, steps: int) -> bool:
    """Whether its `responses` can be known; also of a scheduler that has not been given its timesteps yet."""
    twin = copy.deepcopy(scheduler)
    try:
        twin.set_timesteps(steps, **({"mu": 1.0} if twin.config.get("use_dynamic_shifting") else {}))
    except _UNSUITABLE:
        return False
    return responses(twin, len(twin.timesteps)) is not None


def next_sample(result: Any) -> torch.Tensor:
    """The denoised sample in what ``scheduler.step`` returned, a tuple or an output object."""
    return result[0] if isinstance(result, tuple) else result.prev_sample


def with_next_sample(result: Any, sample: torch.Tensor) -> Any:
    """The same result with another sample in it."""
    if isinstance(result, tuple):
        return (sample, *result[1:])
    result.prev_sample = sample
    return result


def fingerprint(scheduler: Any) -> SamplerFingerprint:
    """Class, settings and current timesteps; valid after ``set_timesteps``."""
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return SamplerFingerprint(
        scheduler=type(scheduler).__name__,
        config=_plain(config),
        timesteps=tuple(float(t) for t in scheduler.timesteps),
    )


def _plain(value: Any) -> Any:
    """What JSON would give back, so that a fingerprint equals itself after a round trip."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # an array or a tensor
        return _plain(value.tolist())
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
