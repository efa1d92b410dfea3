"""The noise scheduler: wrapping its methods safely, and knowing one sampler from another."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cemq.pipelines.fingerprint import SamplerFingerprint

# What samplers raise that want other arguments or shapes than most.
_UNSUITABLE = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


# How diffusers' samplers name what they are given; others may name it otherwise, in this order, or not at all.
_STEP = ("model_output", "timestep", "sample")


@dataclass(frozen=True)
class Call:
    """A call of a scheduler's method as it was made: whoever lies below gets positions as positions, names as names.

    ``names`` are those of the parameters by position, as far as the method's signature tells.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...] = _STEP

    def get(self, name: str) -> Any:
        """The argument of this name, however it was given; None where it was not."""
        place = self._place(name)
        return self.args[place] if isinstance(place, int) else self.kwargs.get(place)

    def replaced(self, **changes: Any) -> Call:
        """The same call with other values for some of its arguments; each stays where it was given."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, value in changes.items():
            place = self._place(name)
            if isinstance(place, int):
                args[place] = value
            else:
                kwargs[place] = value
        return Call(tuple(args), kwargs, self.names)

    def _place(self, name: str) -> int | str:
        """The position or the keyword that an argument was given at; its own name if it was not given."""
        known = self.names if name in self.names else _STEP
        if name in self.kwargs or name not in known:
            return name
        position = known.index(name)
        if position < len(self.args):
            return position
        return self.names[position] if position < len(self.names) else name


class Interception:
    """Lies in a scheduler in place of one of its methods, until it is ended.

    Others may have wrapped it since and call it for as long as they like: it then hands on what it is given.
    """

    def __init__(self, scheduler: Any, method: str, around: Callable[..., Any]) -> None:
        self._scheduler, self._method = scheduler, method
        self.below: Any = getattr(scheduler, method)
        self.before: Any = vars(scheduler).get(method)
        self.around: Callable[..., Any] | None = around
        functools.update_wrapper(self, self.below, updated=())  # pipelines inspect the signature
        self._names = _positional(self.below)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        around = self.around
        return around(self.below, Call(args, kwargs, self._names)) if around else self.below(*args, **kwargs)

    @property
    def is_seen(self) -> bool:
        """Whether it lies there with nothing but others of its kind above it."""
        found = vars(self._scheduler).get(self._method)
        while isinstance(found, Interception) and found is not self:
            found = found.before
        return found is self

    def __deepcopy__(self, memo: Any) -> Interception:
        return self  # of the attributes of a scheduler that are put back into it (panoramas); copies of it have none


def _positional(method: Callable[..., Any]) -> tuple[str, ...]:
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return _STEP
    return tuple(each.name for each in parameters if each.kind in by_position) or _STEP


@contextmanager
def intercepted(
    scheduler: Any, method: str, around: Callable[[Callable[..., Any], Call], Any]
) -> Iterator[Interception]:
    """Have ``around(original, call)`` called in place of ``scheduler.method``, on this one object.

    ``original(*call.args, **call.kwargs)`` is what would have been called. The signature stays visible, and copies of
    the scheduler, shallow or deep, run their own untouched methods. Interceptions nest, with each other and with what
    others put in the method's place, and may end in any order; each ends on exit, also after an exception.
    """
    found, attributes = Interception(scheduler, method, around), vars(scheduler)
    attributes[method] = found
    attributes["__getstate__"] = functools.partial(_state_of_copies, scheduler)
    try:
        yield found
    finally:
        found.around = None
        on_top = attributes.get(method)
        _put(attributes, method, _below(on_top, lambda each: each.around is None))
        is_buried = on_top is not None and not isinstance(on_top, Interception)
        if not is_buried and not any(isinstance(value, Interception) for value in attributes.values()):
            attributes.pop("__getstate__", None)


def _below(value: Any, is_left_out: Callable[[Interception], bool] = lambda _: True) -> Any:
    """What lies below the interceptions on top that are left out; None for the class's own method."""
    while isinstance(value, Interception) and is_left_out(value):
        value = value.before
    return value


def _put(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        attributes.pop(name, None)
    else:
        attributes[name] = value


def _state_of_copies(scheduler: Any) -> dict[str, Any]:
    """What a copy of a scheduler is given: all but the interceptions, which call the one they were made for."""
    state = dict(vars(scheduler))
    del state["__getstate__"]
    for name in [name for name, value in state.items() if isinstance(value, Interception)]:
        _put(state, name, _below(state[name]))
    return state


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

    Only for `cemq.schedule.rectify.STEPS_BY_SIGMA`: the denoiser is then called at the time that the sample is really
    at.
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
        if len(twin.timesteps) > steps and hasattr(twin, "set_begin_index"):
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
