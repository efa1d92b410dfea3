"""A pipeline, how it is called, and who shares its runs: what every stage of a build and every benchmark runs with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from cemq.errors import ModelError, PriorMismatchError
from cemq.parallel import ALONE, Processes
from cemq.pipelines.batches import Batch, Progress, iterate, run
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.pipelines.outputs import as_array
from cemq.pipelines.trajectory import Trajectory, force, record, run_end
from cemq.prior.error_prior import ErrorPrior
from cemq.prior.profile import profiled
from cemq.runtime.attach import find_hook
from cemq.schedule import CacheSchedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a run made of one batch.

    Args:
        images: Images, videos or audio; `cemq.pipelines.outputs` knows the shapes.
        latents: The final ones.
        seconds: What the run took.
        sampler: The timesteps that it took.
        num_steps: How many steps it made.
        full_steps: How many of these were computed; with one branch of guidance a step is half a one.
    """

    images: np.ndarray
    latents: torch.Tensor
    seconds: float
    sampler: SamplerFingerprint | None = None
    num_steps: int = 0
    full_steps: float = 0.0


@dataclass(kw_only=True, eq=False)
class Generations:
    """What was run: denoising steps computed in full, summed over samples; one of which a guidance branch was left out
    is half a one. ``replayed`` are calls of the denoiser that quantization is fitted to, in steps too.

    ``steps`` is how many one generation takes, and ``calls_per_step`` how many calls of the denoiser a step of one
    sample does, less than one where samples share them; the first references say both.
    """

    KINDS: ClassVar[tuple[str, ...]] = ("full_precision", "quantized", "replayed")

    full_precision: float = 0.0
    quantized: float = 0.0
    replayed: float = 0.0
    steps: int | None = None
    calls_per_step: float = 1.0

    @property
    def counts(self) -> list[float]:
        """Those of the ``KINDS``, in steps."""
        return [getattr(self, kind) for kind in self.KINDS]

    @counts.setter
    def counts(self, counts: Sequence[float]) -> None:
        for kind, count in zip(self.KINDS, counts, strict=True):
            setattr(self, kind, count)

    def told(self, processes: Processes = ALONE) -> dict[str, float]:
        """In full generations of one sample, of all processes together."""
        found = zip(*processes.gather([self.counts]), strict=True)
        told = {kind: sum(each) / (self.steps or 1) for kind, each in zip(self.KINDS, found, strict=True)}
        return {kind: round(count, 2) for kind, count in (told | {"total": sum(told.values())}).items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Runner:
    """Runs one pipeline, always alike: batch by batch, this process's share of them.

    Args:
        pipe: The pipeline; what is attached to it and what its layers are is the business of whoever holds it.
        steps: ``num_inference_steps`` of every run.
        call: Other arguments of every run.
        progress: Told the name of what is being run, and the share of it done.
        processes: Those that share the batches; every list that is returned holds this process's share.
        quantized: Whether it is by now, for what ``generations`` counts.
    """

    pipe: DiffusionPipeline
    steps: int
    call: Mapping[str, Any]
    progress: Progress | None = None
    processes: Processes = ALONE
    quantized: bool = False
    generations: Generations = field(default_factory=Generations)

    def at(self, steps: int) -> Runner:
        """The same with another step count."""
        return replace(self, steps=steps)

    def run_one(self, batch: Batch, on_step: Callable[[], None] | None = None) -> Outcome:
        """Run one batch to images, frames or audio, and keep its final latents.

        Raises:
            ModelError: The run never steps the pipeline's scheduler, so that there are no steps to speak of.
        """
        with run_end(self.pipe) as end:
            started = time.perf_counter()
            images = self._run(batch, on_step)
            if end.sample is None:
                raise ModelError(
                    f"{type(self.pipe).__name__} never calls step() of its scheduler (it steps copies of it, or none): "
                    "none of its steps can be skipped; quantize it with cemq.quantize_in_place"
                )
            if end.sample.is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        values, hook = as_array(images), find_hook(self.pipe)
        num_steps, full_steps = (end.num_steps, end.num_steps) if hook is None else hook.steps_run
        self.count(full_steps * len(batch.seeds))
        # DiT denoises its samples twice over, for guidance, and decodes the first half
        return Outcome(
            images=values, latents=end.sample[: len(values)], seconds=seconds, sampler=end.sampler,
            num_steps=num_steps, full_steps=full_steps,
        )  # fmt: skip

    def run(self, batches: Sequence[Batch], stage: str = "runs") -> list[Outcome]:
        """What the pipeline makes of the batches as it is now; ``stage`` is what progress calls it."""
        return [self.run_one(batch, on_step) for batch, on_step in self._each(batches, stage)]

    def record(self, batches: Sequence[Batch], stage: str = "reference runs") -> list[Trajectory]:
        """Trajectories of the pipeline as it is now, with step sizes.

        Raises:
            ModelError: As of `run_one`.
        """
        return [self.record_one(batch, on_step)[0] for batch, on_step in self._each(batches, stage)]

    def record_one(self, batch: Batch, on_step: Callable[[], None] | None = None) -> tuple[Trajectory, Outcome]:
        """What `run_one` gives, and the trajectory that led there."""
        with record(self.pipe, measure_steps=True) as trajectory:
            outcome = self.run_one(batch, on_step)
        self.generations.steps = self.generations.steps or trajectory.num_steps
        return trajectory, outcome

    def force(self, batches: Sequence[Batch], references: Sequence[Trajectory]) -> Iterator[Trajectory]:
        """Run along the samples of ``references``, this process's share, and yield what is predicted there.

        Raises:
            PriorMismatchError: A run made another number of steps than its reference.
        """
        for (batch, on_step), reference in zip(self._each(batches, "forced runs"), references, strict=True):
            with force(self.pipe, reference) as forced:
                self._run(batch, on_step)
            self.count(forced.num_steps * len(batch.seeds))
            if forced.num_steps != reference.num_steps:
                raise PriorMismatchError(
                    f"the quantized run made {forced.num_steps} steps, its reference {reference.num_steps}: "
                    "profile both with the same sampler and step count"
                )
            yield forced

    def profile(
        self, batches: Sequence[Batch], references: Sequence[Trajectory], *, scheme: str, dtype: str
    ) -> ErrorPrior:
        """The combined error prior: the pipeline, quantized or not, is run along the references once.

        Two runs of a batch measure every cache interval at once: the reference, and this one.

        Args:
            batches: All batches that references were recorded from.
            references: Trajectories of the full-precision pipeline, of this process's share of the batches.

        Raises:
            PriorMismatchError: The two runs made different numbers of steps.
            ProcessError: Another process has failed.
        """
        pairs = zip(self.force(batches, references), references, strict=True)
        return profiled(pairs, batches, scheme=scheme, dtype=dtype, call=self.call, processes=self.processes)

    def _each(self, batches: Sequence[Batch], stage: str) -> Iterator[tuple[Batch, Callable[[], None]]]:
        return iterate(self.processes.share(batches), stage, self.progress, self.steps)

    def count(self, steps: float) -> None:
        """Add to ``generations`` what was run: steps computed in full, summed over samples."""
        if self.quantized:
            self.generations.quantized += steps
        else:
            self.generations.full_precision += steps

    def _run(self, batch: Batch, on_step: Callable[[], None] | None) -> Any:
        return run(self.pipe, batch, steps=self.steps, call=self.call, on_step=on_step)


def said_of_steps(planned: CacheSchedule, num_steps: float, full_steps: float) -> str | None:
    """What to say where other steps were computed than a schedule has; None where there is nothing to say, nor about
    runs that it is not for (of these the runtime has warned), nor where it has all: then a policy skipped the others.
    """
    if full_steps == planned.full_count or num_steps != planned.num_steps or planned.full_count == num_steps:
        return None
    ran = f"{full_steps:g} of {num_steps:g} steps ran in full"
    return f"{ran}, {planned.full_count:g} were planned: what is reported is what ran"
