"""What full-compute steps make up for: the steps skipped before them, seen from the other side."""

from __future__ import annotations

import numpy as np
import torch

from cemq.pipelines.outputs import channel_axis
from cemq.runtime.history import layout
from cemq.schedule import CacheSchedule

# Pipelines may cast latents to bfloat16 and back between steps, which leaves 8 bits of them: what is off by no more is
# the same. So small a change also leaves what is owed as good as it was.
_ROUNDING = 2.0**-8
_NEXT_TO_NOTHING = 1e-6  # above what float16 makes of its smallest numbers

Where = torch.Tensor | bool  # positions of a sample, or all or none


class Corrector:
    """Adds to the prediction of a step what the steps before it owe the sample (`correcting_matrix`).

    Sees what the sampler consumes, after guidance, so that two or three latents are all it keeps, and between
    full-compute steps a copy of the sample. What is owed belongs to that sample: positions that hold another one by now
    (an inpainting mask, a callback that replaces latents) are owed nothing by the steps skipped before; nor is any
    where the predictions have another shape, or where a skipped step was computed after all.

    Args:
        added: What is added at each step under the sampler that is run, `CacheSchedule.correcting`.
    """

    def __init__(self, schedule: CacheSchedule, added: np.ndarray):
        self._added = added
        steps = np.arange(schedule.num_steps)[:, None]
        self._last_use = np.where(self._added != 0, steps, -1).max(0)
        self._full = frozenset(schedule.full_steps)
        self._last_full = schedule.full_steps[-1]
        self._kept: dict[int, torch.Tensor] = {}
        self._layout: object = None
        self._returned: _Returned | None = None
        self._owed: Where = True  # by the steps since the last full-compute one
        self._paid: Where = True  # with the full-compute step that came last; a multistep sampler remembers for a while

    def apply(
        self, prediction: torch.Tensor, step_index: int, sample: torch.Tensor | None, *, as_planned: bool = True
    ) -> torch.Tensor:
        """The prediction of a step with what is owed to ``sample``, in its dtype; itself if nothing is.

        Args:
            sample: That the sampler is handed with it.
            as_planned: False where the prediction, or a part of it, was computed on a skipped step.
        """
        found = layout(prediction)
        if self._layout not in (None, found):
            self._kept, self._owed = {}, False
        self._layout = found
        if self._returned is not None:
            self._owed = self._owed & self._returned.equals(sample, prediction.shape)
        if step_index in self._full:
            if step_index - 1 not in self._full:
                self._paid = self._owed
            self._owed = True
        elif not as_planned:
            self._owed = False
        return self._pay(prediction, step_index)

    def _pay(self, prediction: torch.Tensor, step_index: int) -> torch.Tensor:
        weights, known = self._added[step_index], {**self._kept, step_index: prediction}
        sources = np.flatnonzero(weights).tolist()
        if self._last_use[step_index] > step_index:  # a copy, for the sampler may change what it is given in place
            known[step_index] = prediction.detach().clone()
        self._kept = {step: kept for step, kept in known.items() if self._last_use[step] > step_index}
        if not sources or self._paid is False or not known.keys() >= set(sources):
            return prediction
        owed = sum(float(weights[step]) * known[step].float() for step in sources)
        if self._paid is not True:
            owed = torch.where(self._paid, owed, 0.0)
        return (prediction.float() + owed).to(prediction.dtype)

    def returned(self, sample: torch.Tensor, step_index: int) -> None:
        """The sampler has returned this sample; what skipped steps moved it by is owed until the next full one."""
        owes = step_index not in self._full and step_index < self._last_full and self._owed is not False
        self._returned = _Returned(sample) if owes else None


class _Returned:
    """A sample as a step returned it, to be compared with the one that the next step is handed.

    Nothing waits for the device: the copy and the comparison, of a few latents, are queued behind the step, and what
    comes out is a mask that stays there. Most pipelines hand the very tensor on; then nothing is compared.
    """

    def __init__(self, sample: torch.Tensor):
        self._sample, self._values = sample, sample.detach().clone()  # a callback may change it in place
        self._version = _version(sample)

    def equals(self, sample: torch.Tensor | None, shape: torch.Size) -> Where:
        """Where the sample is the same, within rounding, in all of its channels (one of another may be alike by
        chance); nowhere if it has another shape. One answer for all where predictions, of ``shape``, lie elsewhere.
        """
        if sample is None:
            return False
        if sample is self._sample and self._version is not None and _version(sample) == self._version:
            return True
        if layout(sample) != layout(self._values):
            return False
        same = torch.isclose(sample.float(), self._values.float(), rtol=_ROUNDING, atol=_NEXT_TO_NOTHING)
        same = same.all(dim=(axis := channel_axis(sample.ndim)), keepdim=True)
        fits = len(shape) == sample.ndim and [*shape[:axis], 1, *shape[axis + 1 :]] == list(same.shape)
        return same if fits else same.all()


def _version(sample: torch.Tensor) -> int | None:
    """How often it was changed in place; None in inference mode, which does not count."""
    return None if sample.is_inference() else sample._version
