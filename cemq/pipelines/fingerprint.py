"""What tells one noise scheduler, and the timesteps it runs, from another. Importing this loads no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

# Settings of a noise scheduler that only choose where on its curve the steps lie; a prior carries over to others.
_SPACING = {
    *("shift", "base_shift", "max_shift", "shift_terminal", "use_dynamic_shifting", "time_shift_type"),
    *("base_image_seq_len", "max_image_seq_len", "timestep_spacing", "steps_offset"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
}


@dataclass(frozen=True, kw_only=True)
class SamplerFingerprint:
    """What a prior is bound to: the noise scheduler, its settings and the timesteps it ran, in execution order."""

    scheduler: str
    config: dict[str, Any]
    timesteps: tuple[float, ...]

    def matches(self, other: SamplerFingerprint) -> bool:
        return (
            self.scheduler == other.scheduler
            and len(self.timesteps) == len(other.timesteps)
            and np.allclose(self.timesteps, other.timesteps, rtol=1e-4, atol=1e-4)
            and self.config == other.config
        )

    def ends_like(self, other: SamplerFingerprint) -> bool:
        """Whether its last timesteps are those of ``other``: an image-to-image run begins late."""
        return dataclasses.replace(self, timesteps=self.timesteps[-len(other.timesteps) :]).matches(other)

    def carries_over(self, other: SamplerFingerprint) -> bool:
        """Whether what was measured at these timesteps says something about those of ``other``: the same noise
        scheduler on the same curve, strictly falling, within the range measured (a tenth of it beyond is let pass)."""
        if self.scheduler != other.scheduler or len(self.timesteps) < 4 or len(other.timesteps) < 2:
            return False
        if any(np.any(np.diff(each.timesteps) >= 0) for each in (self, other)):
            return False
        names = (set(self.config) | set(other.config)) - _SPACING
        if any(self.config.get(name) != other.config.get(name) for name in names):
            return False
        margin = 0.1 * (self.timesteps[0] - self.timesteps[-1])
        return other.timesteps[0] <= self.timesteps[0] + margin and other.timesteps[-1] >= self.timesteps[-1] - margin

    def places_in(self, other: SamplerFingerprint) -> np.ndarray:
        """Where each of its timesteps lies among the steps of ``other``, in steps and parts of them; both fall."""
        old, new = (np.array(each.timesteps) for each in (self, other))
        return np.interp(-old, -new, np.arange(len(new)))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SamplerFingerprint:
        """Raises TypeError or ValueError where a field is of another type."""
        timesteps = tuple(float(timestep) for timestep in fields["timesteps"])
        return cls(scheduler=str(fields["scheduler"]), config=dict(fields["config"]), timesteps=timesteps)
