"""The combined error prior: three Gram matrices, from which the error of every linear predictor follows.

``v(s)`` is the full-precision prediction at step index ``s`` and ``q(s)`` the quantized model's on the same inputs.
A skipped step is served as ``p(s) = sum_k a_k q(s_k)``; its squared distance to ``v(s)`` needs only ``<q_i, q_j>``,
``<q_i, v_j>`` and ``<v_i, v_j>``. So one profile answers for every gap, predictor, budget and solver.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cemq.errors import BundleError, InputError, choose

VIEWS = ("combined", "cache", "self")
_ARRAYS = ("qq", "qv", "vv", "step_sizes", "sensitivity")


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

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SamplerFingerprint:
        return cls(scheduler=fields["scheduler"], config=fields["config"], timesteps=tuple(fields["timesteps"]))


@dataclass(frozen=True, kw_only=True)
class PriorMetadata:
    """Under which conditions the prior was measured."""

    sampler: SamplerFingerprint
    scheme: str
    dtype: str
    call: dict[str, Any]
    samples: int
    seeds: tuple[int, ...]
    conditions: tuple[str | int, ...]

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> PriorMetadata:
        fields = dict(fields)
        fields["sampler"] = SamplerFingerprint.from_dict(fields["sampler"])
        return cls(**{**fields, "seeds": tuple(fields["seeds"]), "conditions": tuple(fields["conditions"])})


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """One question put to the prior: how far is ``p[x]`` from ``y``? All three are (num_steps, num_steps), float64.

    ``xx[i, j] = <x_i, x_j>``, ``xy[i, j] = <x_i, y_j>``, ``yy[i, j] = <y_i, y_j>``, per latent element.
    """

    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class ErrorPrior:
    """Gram matrices of quantized (q) and full-precision (v) predictions, averaged over calibration samples.

    ``qq``, ``qv`` and ``vv`` are (num_steps, num_steps), float64, divided by the number of latent elements.
    ``step_sizes`` (num_steps,) is how much one unit of model output moves the sample at each step, ``sensitivity``
    (num_steps,) how much one unit of displacement after that step moves the final sample; None counts as ones.
    """

    qq: np.ndarray
    qv: np.ndarray
    vv: np.ndarray
    step_sizes: np.ndarray
    sensitivity: np.ndarray | None = None
    metadata: PriorMetadata | None = None

    def __post_init__(self) -> None:
        steps = len(self.step_sizes)
        if self.sensitivity is None:
            object.__setattr__(self, "sensitivity", np.ones(steps))
        if self.sensitivity.shape != (steps,):
            raise InputError(f"error prior: sensitivity has shape {self.sensitivity.shape}, expected {(steps,)}")
        for name in ("qq", "qv", "vv"):
            matrix = getattr(self, name)
            if matrix.shape != (steps, steps):
                raise InputError(f"error prior: {name} has shape {matrix.shape}, expected {(steps, steps)}")
        for name in _ARRAYS:
            if not np.isfinite(getattr(self, name)).all():
                raise InputError(
                    f"error prior: {name} is not finite; the model produced NaN or infinity while profiled"
                )

    @property
    def num_steps(self) -> int:
        return len(self.step_sizes)

    @property
    def step_weights(self) -> np.ndarray:
        """How far one unit of error in the prediction of a step moves the final sample, shape (num_steps,)."""
        return self.step_sizes * self.sensitivity

    def view(self, name: str = "combined") -> View:
        """``combined``: p[q] against v. ``cache``: p[v] against v. ``self``: p[q] against q."""
        choose("prior", name, VIEWS)
        if name == "combined":
            return View(xx=self.qq, xy=self.qv, yy=self.vv)
        gram = self.vv if name == "cache" else self.qq
        return View(xx=gram, xy=gram, yy=gram)

    def error(
        self, step_index: int, sources: Sequence[int], coefficients: Sequence[float], view: str = "combined"
    ) -> float:
        """Relative L2 error of serving ``step_index`` as ``sum(coefficients * x[sources])``."""
        gram, weights = self.view(view), np.asarray(coefficients)
        index = np.asarray(sources)
        squared = (
            weights @ gram.xx[np.ix_(index, index)] @ weights
            - 2 * weights @ gram.xy[index, step_index]
            + gram.yy[step_index, step_index]
        )
        return float(np.sqrt(max(squared, 0.0) / gram.yy[step_index, step_index]))

    def reuse_errors(self, view: str = "combined") -> np.ndarray:
        """Relative L2 error of reuse, shape (num_steps, num_steps): [cache_interval, step_index], NaN before step 0.

        Row 0 is full compute: the quantization floor in the combined view, zero in the others.
        """
        gram, steps = self.view(view), self.num_steps
        table = np.full((steps, steps), np.nan)
        for age in range(steps):
            later = np.arange(age, steps)
            earlier = later - age
            squared = gram.xx[earlier, earlier] - 2 * gram.xy[earlier, later] + gram.yy[later, later]
            table[age, age:] = np.sqrt(np.maximum(squared, 0.0) / gram.yy[later, later])
        return table

    def cosine_distances(self, view: str = "combined") -> np.ndarray:
        """``1 - cos(x(s - C), y(s))``, shape (num_steps, num_steps): [C, s], 0 where s < C (CEM's storage)."""
        gram, steps = self.view(view), self.num_steps
        table = np.zeros((steps, steps))
        for age in range(steps):
            later = np.arange(age, steps)
            earlier = later - age
            norms = np.sqrt(gram.xx[earlier, earlier] * gram.yy[later, later])
            table[age, age:] = np.maximum(1.0 - gram.xy[earlier, later] / norms, 0.0)
        return table

    @property
    def quantization_floor(self) -> np.ndarray:
        """Relative L2 error of the quantized model at full compute, per step, shape (num_steps,)."""
        return self.reuse_errors("combined")[0]

    def save(self, path: Path) -> None:
        """Write safetensors with the metadata in the header."""
        from safetensors.numpy import save_file

        header = {"cemq": json.dumps(dataclasses.asdict(self.metadata))} if self.metadata else None
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        save_file(arrays, str(path), metadata=header)

    @classmethod
    def load(cls, path: Path) -> ErrorPrior:
        """Raises BundleError if the file is damaged."""
        from safetensors import safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
                header = (file.metadata() or {}).get("cemq")
            metadata = PriorMetadata.from_dict(json.loads(header)) if header else None
        except Exception as error:  # safetensors raises several unrelated types for a damaged file
            raise BundleError(f"error prior '{path}' cannot be read ({error}); build the bundle again") from error
        return cls(**arrays, metadata=metadata)
