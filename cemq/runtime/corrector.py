"""What full-compute steps make up for: the steps skipped before them, seen from the other side."""

from __future__ import annotations

import numpy as np
import torch

from cemq.schedule import CacheSchedule


class Corrector:
    """Adds to the prediction of a step what the steps before it owe the sample (`cemq.predict.correcting_matrix`).

    Sees what the sampler consumes, after guidance, so that two or three latents are all it keeps.

    Args:
        responses: Of the sampler that is run, `cemq.sampler.responses`.
    """

    def __init__(self, schedule: CacheSchedule, responses: np.ndarray):
        self._added = schedule.correcting(responses)
        steps = np.arange(schedule.num_steps)[:, None]
        self._last_use = np.where(self._added != 0, steps, -1).max(0)
        self._kept: dict[int, torch.Tensor] = {}

    def apply(self, prediction: torch.Tensor, step_index: int) -> torch.Tensor:
        """The prediction of a step with what is owed, in its dtype; itself if nothing is."""
        weights, known = self._added[step_index], {**self._kept, step_index: prediction}
        owed = [(float(weights[step]), known[step]) for step in np.flatnonzero(weights)]
        if self._last_use[step_index] > step_index:  # a copy, for the sampler may change what it is given in place
            known[step_index] = prediction.detach().clone()
        self._kept = {step: kept for step, kept in known.items() if self._last_use[step] > step_index}
        if not owed:
            return prediction
        return (prediction.float() + sum(weight * kept.float() for weight, kept in owed)).to(prediction.dtype)
