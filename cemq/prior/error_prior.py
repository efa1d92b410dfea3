"""The combined error prior: three Gram matrices, from which the error of every linear predictor follows.

``v(s)`` is the full-precision prediction at step index ``s`` and ``q(s)`` the quantized model's on the same inputs.
A skipped step is served as ``p(s) = sum_k a_k q(s_k)``; its squared distance to ``v(s)`` needs only ``<q_i, q_j>``,
``<q_i, v_j>`` and ``<v_i, v_j>``. So one profile answers for every gap, predictor, budget and solver.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cemq.errors import BundleError, InputError, PriorMismatchError, choose
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.predict.correctors import NO_CORRECTOR, straying_matrix
from cemq.predict.predictors import reused_steps

VIEWS = ("combined", "cache", "self")
RESPONSE = (0.0, 2.0)  # where nothing is known: across, and about as much as the built-in models show
_ARRAYS = ("qq", "qv", "vv", "step_sizes", "sensitivity", "coherence", "response")
_OPTIONAL = ("token_cosines", "channel_means", "channel_grams")


def _cubic_weights(old: np.ndarray, new: np.ndarray, points: int = 4) -> np.ndarray:
    """Weights (new, old) of Lagrange interpolation through the nearest ``points`` of falling nodes; beyond the ends the
    value of the end, since polynomials run away there."""
    weights = np.zeros((len(new), len(old)))
    for row, place in enumerate(np.clip(new, old[-1], old[0])):
        above = int(np.searchsorted(-old, -place, side="right")) - 1
        first = min(max(above - points // 2 + 1, 0), len(old) - points)
        for node in range(first, first + points):
            others = [other for other in range(first, first + points) if other != node]
            weights[row, node] = np.prod([(place - old[o]) / (old[node] - old[o]) for o in others])
    return weights


def _unshared(noise: np.ndarray) -> np.ndarray:
    """Of covariances between at least four steps: each step's variance that its neighbours do not share."""
    variances = np.diag(noise).clip(0)
    deviations = np.sqrt(np.maximum(variances, 1e-300))
    correlations = noise / np.outer(deviations, deviations)

    def apart(steps: int) -> np.ndarray:
        beside, none = np.diag(correlations, steps), np.full(steps, np.nan)
        return np.nanmean([np.r_[beside, none], np.r_[none, beside]], axis=0)

    # where a parabola through the correlations of one and of two steps apart meets the step itself
    shared = (4 * apart(1) - apart(2)) / 3
    return variances * (1 - shared).clip(0, 1)


@dataclass(frozen=True, kw_only=True)
class PriorMetadata:
    """Under which conditions the prior was measured; ``corrector`` is that of the corrected schedules that it was
    fitted to, if any were, and of one that was fitted to none that which plans have where skipping costs enough."""

    sampler: SamplerFingerprint
    scheme: str
    dtype: str
    call: dict[str, Any]
    samples: int
    seeds: tuple[int, ...]
    conditions: tuple[str | int, ...]
    corrector: str = NO_CORRECTOR

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
    (2, num_steps) how much one unit of displacement after that step moves the final sample: where the step is computed
    or extrapolated, and where it reuses an earlier output as it is. (num_steps,) is for both, (1,) for all steps.
    ``coherence`` is over how many steps errors keep their direction on the way to the final sample: those of two steps
    add up with sign if it is large, in squares if it is small. ``response`` (2, num_steps) is how far the output of a
    step moves for a unit that its sample has strayed by, the way it has strayed and across it; (2,) is that of all
    steps. `cemq.search.propagation` fits all three.

    ``token_cosines`` (3, num_steps, num_steps) is CEM's prior: the mean cosine of token means, of v with v, q with q
    and q with v. ``channel_means`` (2, num_steps, channels), the means of q and of v, and ``channel_grams``
    (2, channels, num_steps, num_steps), those of ``q_i q_j`` and ``q_i v_j``, are what corrections are made of. All
    three may be empty.
    """

    qq: np.ndarray
    qv: np.ndarray
    vv: np.ndarray
    step_sizes: np.ndarray
    sensitivity: np.ndarray = dataclasses.field(default_factory=lambda: np.ones(1))
    coherence: float = np.inf
    response: np.ndarray = dataclasses.field(default_factory=lambda: np.array(RESPONSE))
    token_cosines: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((3, 0, 0)))
    channel_means: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((2, 0, 0)))
    channel_grams: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((2, 0, 0, 0)))
    metadata: PriorMetadata | None = None

    def __post_init__(self) -> None:
        steps = len(self.step_sizes)
        if self.sensitivity.shape not in ((1,), (steps,), (2, steps)):
            raise InputError(f"error prior: sensitivity has shape {self.sensitivity.shape}, expected {(2, steps)}")
        object.__setattr__(self, "sensitivity", np.broadcast_to(self.sensitivity, (2, steps)))
        for name in ("qq", "qv", "vv"):
            matrix = getattr(self, name)
            if matrix.shape != (steps, steps):
                raise InputError(f"error prior: {name} has shape {matrix.shape}, expected {(steps, steps)}")
        object.__setattr__(self, "coherence", float(np.asarray(self.coherence).item()))  # a file holds an array
        if np.shape(self.response) not in ((2,), (2, steps)):
            raise InputError(f"error prior: response has shape {np.shape(self.response)}, expected {(2, steps)}")
        object.__setattr__(self, "response", np.broadcast_to(np.reshape(self.response, (2, -1)), (2, steps)))
        if not self.coherence > 0:
            raise InputError(f"error prior: coherence is {self.coherence}, expected more than 0 steps")
        for name in (*_ARRAYS, *_OPTIONAL):
            if name != "coherence" and not np.isfinite(getattr(self, name)).all():
                raise InputError(
                    f"error prior: {name} is not finite; the model produced NaN or infinity while profiled"
                )

    @property
    def num_steps(self) -> int:
        return len(self.step_sizes)

    @property
    def is_fitted(self) -> bool:
        """Whether runs in closed loop have said how errors reach the final sample."""
        return math.isfinite(self.coherence)

    @property
    def sampler(self) -> SamplerFingerprint:
        """That it was measured under. Raises PriorMismatchError where its file does not say so."""
        if self.metadata is None:
            raise PriorMismatchError("error prior: nothing says which sampler it was measured under: profile anew")
        return self.metadata.sampler

    @property
    def corrector(self) -> str:
        """Of the schedules that its response was fitted to, or else of plans where skipping costs enough."""
        return self.metadata.corrector if self.metadata else NO_CORRECTOR

    def with_corrector(self, name: str) -> ErrorPrior:
        """The same for plans that have this one; without metadata there is nowhere to say it."""
        return dataclasses.replace(self, metadata=self.metadata and dataclasses.replace(self.metadata, corrector=name))

    @cached_property  # local search weighs thousands of schedules by it
    def coherences(self) -> np.ndarray:
        """How far errors of two steps point the same way in the final sample, 0 to 1, shape (num_steps, num_steps)."""
        steps = np.arange(self.num_steps)
        return np.exp(-np.abs(steps[:, None] - steps) / self.coherence)

    @property
    def step_weights(self) -> np.ndarray:
        """How far one unit of error in the prediction of a step moves the final sample, (2, num_steps): where the step
        is computed or extrapolated, and where it reuses an earlier output."""
        return self.step_sizes * self.sensitivity

    def view(self, name: str = "combined") -> View:
        """``combined``: p[q] against v. ``cache``: p[v] against v. ``self``: p[q] against q."""
        choose("prior", name, VIEWS)
        if name == "combined":
            return View(xx=self.qq, xy=self.qv, yy=self.vv)
        gram = self.vv if name == "cache" else self.qq
        return View(xx=gram, xy=gram, yy=gram)

    def error_gram(self, served: np.ndarray, view: str = "combined") -> np.ndarray:
        """``<p(s) - y(s), p(t) - y(t)>`` of served steps, shape (num_steps, num_steps).

        Args:
            served: What each step is served as (`cemq.predict.predictors.serving_matrix`), or counts as in the end
                (`cemq.predict.correctors.integrated_matrix`).
        """
        gram = self.view(view)
        used = np.flatnonzero(served.any(0))  # of the many columns, those of full-compute steps
        weights = served[:, used]
        overlap = weights @ gram.xy[used]
        return weights @ gram.xx[np.ix_(used, used)] @ weights.T - overlap - overlap.T + gram.yy

    def step_errors(self, served: np.ndarray, view: str = "combined") -> np.ndarray:
        """Relative L2 error of the prediction at every step, shape (num_steps,)."""
        squared = np.diag(self.error_gram(served, view)).clip(0)
        return np.sqrt(squared / np.diag(self.view(view).yy))

    def final_error(
        self, served: np.ndarray, integrated: np.ndarray | None = None, view: str = "combined", *, since: int = 0
    ) -> float:
        """Predicted distance of the final sample from the full-precision one, root mean square per element.

        Args:
            served: `cemq.predict.predictors.serving_matrix`.
            integrated: `cemq.predict.correctors.integrated_matrix`; None where nothing is corrected later.
            since: The step from which on errors count.
        """
        counted = served if integrated is None else integrated
        if counted is served:
            errors = self.error_gram(counted, view)
        else:  # outputs of full-compute steps are off by what they answer to the strayed sample
            strayed = straying_matrix(served, counted, self.step_sizes)
            along, across = (counted @ (answer[:, None] * strayed) for answer in self.response)
            used = np.flatnonzero(across.any(0))
            beside = across[:, used] @ self.view(view).xx[np.ix_(used, used)] @ across[:, used].T
            errors = self.error_gram(counted + along, view) + beside
        weights = np.where(reused_steps(counted), *self.step_weights[::-1])
        weights[:since] = 0.0
        return float(np.sqrt(max(weights @ (self.coherences * errors) @ weights, 0.0)))

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
        """``1 - cos(x(s - C), y(s))``, shape (num_steps, num_steps): [C, s], 0 where s < C (CEM's storage).

        Of token means, as CEM's released code has it; of whole predictions where those were not measured.
        """
        gram, steps = self.view(view), self.num_steps
        if self.token_cosines.size:
            cosines = self.token_cosines[("cache", "self", "combined").index(view)]
        else:
            cosines = gram.xy / np.sqrt(np.outer(np.diag(gram.xx), np.diag(gram.yy)))
        table = np.zeros((steps, steps))
        for age in range(steps):
            table[age, age:] = np.maximum(1.0 - np.diag(cosines, age), 0.0)
        return table

    @property
    def quantization_floor(self) -> np.ndarray:
        """Relative L2 error of the quantized model at full compute, per step, shape (num_steps,)."""
        return self.reuse_errors("combined")[0]

    def resampled(self, sampler: SamplerFingerprint) -> ErrorPrior:
        """The prior at other timesteps of the same noise scheduler: predictions are smooth in the noise level.

        Gram matrices, means and sensitivity are interpolated over the timestep by cubics, step sizes as the share of
        the sample that a step moves per timestep. Quantization noise that no two steps share (nearly all of it where
        activations are rounded and weights are not, W8A8) is no function of the noise level: a mean of two steps would
        have less of it, and correlate with both. Its variance is interpolated by itself.

        Raises:
            PriorMismatchError: The sampler is not one that this prior carries over to.
        """
        if self.metadata is None or not self.metadata.sampler.carries_over(sampler):
            raise PriorMismatchError(
                f"error prior: measured under another noise scheduler than {sampler.scheduler} with "
                f"{len(sampler.timesteps)} steps: profile anew for it"
            )
        old, new = (np.array(each.timesteps) for each in (self.metadata.sampler, sampler))
        if len(old) != self.num_steps:
            raise PriorMismatchError("error prior: its sampler steps more often than it has timesteps: profile anew")
        between = _cubic_weights(old, new)
        linear = _cubic_weights(old, new, points=2)
        spans = [-np.diff(times, append=0.0) for times in (old, new)]
        spans = [np.maximum(span, 0.01 * span.mean()) for span in spans]  # some samplers end at timestep 0
        own_noise = _unshared(self.qq - self.qv - self.qv.T + self.vv)
        cosines, means, grams = self.token_cosines, self.channel_means, self.channel_grams
        return dataclasses.replace(
            self,
            qq=between @ (self.qq - np.diag(own_noise)) @ between.T + np.diag(linear @ own_noise),
            qv=between @ self.qv @ between.T,
            vv=between @ self.vv @ between.T,
            step_sizes=linear @ (self.step_sizes / spans[0]) * spans[1],
            sensitivity=np.exp(np.log(self.sensitivity) @ linear.T),
            response=self.response @ linear.T,
            coherence=self.coherence * len(new) / len(old),
            token_cosines=linear @ cosines @ linear.T if cosines.size else cosines,
            channel_means=between @ means if means.size else means,
            channel_grams=between @ grams @ between.T if grams.size else grams,
            metadata=dataclasses.replace(self.metadata, sampler=sampler),
        )

    def thinned(self, kept: Sequence[int]) -> ErrorPrior:
        """The prior of a run with ``kept`` of the steps, rising and beginning with 0, each as long as all up to the
        next: to plan many steps on few. Without sampler and channels, which nothing would be left to do with.
        """
        steps = np.asarray(kept)
        pairs = np.ix_(steps, steps)
        return ErrorPrior(
            qq=self.qq[pairs],
            qv=self.qv[pairs],
            vv=self.vv[pairs],
            step_sizes=np.add.reduceat(self.step_sizes, steps),
            sensitivity=self.sensitivity[:, steps],
            coherence=self.coherence * len(steps) / self.num_steps,
            response=self.response[:, steps],
        )

    def save(self, path: Path) -> None:
        """Write safetensors with the metadata in the header."""
        from safetensors.numpy import save_file

        header = {"cemq": json.dumps(dataclasses.asdict(self.metadata))} if self.metadata else None
        arrays = {name: np.ascontiguousarray(getattr(self, name), dtype=np.float64) for name in (*_ARRAYS, *_OPTIONAL)}
        save_file(arrays, str(path), metadata=header)

    @classmethod
    def load(cls, path: Path) -> ErrorPrior:
        """Raises BundleError if the file is damaged."""
        from safetensors import safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in (*_ARRAYS, *_OPTIONAL)}
                header = (file.metadata() or {}).get("cemq")
            metadata = PriorMetadata.from_dict(json.loads(header)) if header else None
        except Exception as error:  # safetensors raises several unrelated types for a damaged file
            raise BundleError(f"error prior '{path}' cannot be read ({error}); build the bundle again") from error
        return cls(**arrays, metadata=metadata)
