"""The noise scheduler: wrapping its methods safely, and knowing one sampler from another."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cemq.prior import SamplerFingerprint


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
