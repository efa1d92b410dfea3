"""EasyCache (arXiv:2507.02860): compute when the output must have changed enough, by how fast it follows the sample.

Over many steps the output changes with the sample at a stable rate. With ``x_s`` and ``v_s`` for sample and output at
step ``s``, ``c`` for the last computed step, ``b`` for the computed one before it and mean absolute values for norms, a
step is served as long as

    sum over the steps since c of  k |x_s - x_{s-1}| / |v_c|  <  threshold,    k = |v_c - v_b| / |x_c - x_b|

It is served ``x_s + (v_c - x_c)``: what the denoiser makes of a sample is reused, not its output. The first steps and
the last one are always computed. Of branches of guidance that are called one by one the first decides for all.

Channels that sample and output do not share (a variance, a picture that is a condition) are left out of all this, and
served as they were. Nothing of the published method is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from cemq.errors import InputError
from cemq.pipelines.outputs import channel_axis, first_tensor, shared_channels
from cemq.runtime.policies import FirstDecides, Serving, StepCall, refuse_fewer, refuse_negative, register_policy

_TINY = 1e-20


@register_policy
@dataclass(frozen=True, kw_only=True)
class EasyCache:
    """Settings of EasyCache.

    Args:
        threshold: Accumulated relative change of the output at which a step is computed; 0 computes every one.
        warm_up: First steps, always computed; as released 5 or 10.
        cache: The output; no other will do.

    Raises:
        InputError: A negative threshold or warm-up, or another cache.
    """

    name: ClassVar[str] = "easycache"
    threshold: float
    warm_up: int = 5
    cache: str = "output"

    def __post_init__(self) -> None:
        refuse_negative(self, "threshold")
        refuse_fewer(self, at_least=0, warm_up=self.warm_up)
        if self.cache != "output":
            raise InputError(f"easycache: cache={self.cache}: it reuses the output, take cache=output")

    def begin(self, num_steps: int) -> _Following:
        return _Following(self)


class _Computed(NamedTuple):
    """What a call was given and returned."""

    sample: torch.Tensor
    output: torch.Tensor


@dataclass
class _Stream:
    latest: torch.Tensor | None = None  # sample of the latest call
    computed: _Computed | None = None  # the latest call that was
    rate: float | None = None
    accumulated: float = 0.0


class _Following:
    """EasyCache in one run."""

    most_kept = 1

    def __init__(self, settings: EasyCache) -> None:
        self._settings = settings
        self._branches = FirstDecides()
        self._streams: defaultdict[Hashable, _Stream] = defaultdict(_Stream)

    def decide(self, call: StepCall) -> Serving | None:
        source, computed = self._branches.source(call, self._skips), self._streams[call.stream].computed
        if source is None or computed is None or computed.sample.shape != call.sample.shape:
            return None
        return Serving((source,), (1.0,), added=_moved(computed, call.sample))

    def keeps(self, call: StepCall, *, served: bool) -> Collection[int]:
        if not served:
            self._streams[call.stream].accumulated = 0.0
        return self._branches.keeps(call, served=served)

    def computed(self, call: StepCall, output: Any) -> None:
        stream, now = self._streams[call.stream], _Computed(call.sample.detach().clone(), first_tensor(output))
        before, stream.computed, stream.accumulated = stream.computed, now, 0.0
        if before is not None and before.sample.shape == now.sample.shape:
            changed, moved = _difference(now, before)
            stream.rate = _size(changed) / max(_size(moved), _TINY)

    def _skips(self, call: StepCall) -> bool:
        stream = self._streams[call.stream]
        before, stream.latest = stream.latest, call.sample.detach().clone()
        if call.step < self._settings.warm_up or call.step == call.num_steps - 1:
            return False
        if stream.computed is None or stream.rate is None or before is None or before.shape != call.sample.shape:
            return False
        output, moved = shared_channels(stream.computed.output, call.sample.float() - before.float())
        stream.accumulated += stream.rate * _size(moved) / max(_size(output), _TINY)
        return stream.accumulated < self._settings.threshold


def _difference(now: _Computed, before: _Computed) -> tuple[torch.Tensor, torch.Tensor]:
    """Of outputs and samples, in the channels that they share."""
    return shared_channels(now.output.float() - before.output.float(), now.sample.float() - before.sample.float())


def _size(values: torch.Tensor) -> float:
    return values.float().abs().mean().item()


def _moved(computed: _Computed, sample: torch.Tensor) -> torch.Tensor:
    """How far the sample is from the computed one, in the shape of the output."""
    _, moved = shared_channels(computed.output, sample.float() - computed.sample.float())
    missing = computed.output.shape[axis := channel_axis(moved.dim())] - moved.shape[axis]
    shape = list(moved.shape)
    shape[axis] = missing
    return torch.cat([moved, moved.new_zeros(shape)], dim=axis) if missing else moved
