"""Instruments on ``scheduler.step``: record a run, or force it along another.

Every diffusers pipeline ends a denoising step in one ``scheduler.step(model_output, t, sample)``, after guidance and
after learned-sigma splitting, so none of this knows a model family.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from cemq.errors import PriorMismatchError
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.pipelines.noise_scheduler import Call, fingerprint, intercepted, next_sample, with_next_sample

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass
class Trajectory:
    """One batch of runs, filled step by step; lists are in execution order, tensors on the CPU.

    ``predictions[s]`` is the model output that ``scheduler.step`` consumed, ``samples[s]`` the sample it returned,
    ``step_sizes[s]`` how much one unit of model output moves that sample.
    """

    predictions: list[torch.Tensor] = field(default_factory=list)
    samples: list[torch.Tensor] = field(default_factory=list)
    step_sizes: list[float] = field(default_factory=list)
    sampler: SamplerFingerprint | None = None

    @property
    def num_steps(self) -> int:
        return len(self.predictions)


@dataclass
class End:
    """What is left of a run once it has ended."""

    sample: torch.Tensor | None = None
    sampler: SamplerFingerprint | None = None
    num_steps: int = 0


@contextmanager
def record(pipe: DiffusionPipeline, *, measure_steps: bool = False) -> Iterator[Trajectory]:
    """Keep what every step of the next run consumes and returns.

    Args:
        measure_steps: Also measure the step sizes, by handing copies of the scheduler a scaled model output. Works for
            any sampler, multistep and stochastic ones too, and leaves the run as it was.
    """
    trajectory, scheduler = Trajectory(), pipe.scheduler

    def step(original: Any, call: Call) -> Any:
        if measure_steps:
            trajectory.step_sizes.append(_step_size(scheduler, call))
        prediction = _kept(call.get("model_output"))  # before the sampler has had it
        result = original(*call.args, **call.kwargs)
        trajectory.predictions.append(prediction)
        trajectory.samples.append(_kept(next_sample(result)))
        return result

    with intercepted(scheduler, "step", step), run_end(pipe) as end:
        yield trajectory
    trajectory.sampler = end.sampler


@contextmanager
def run_end(pipe: DiffusionPipeline) -> Iterator[End]:
    """Once the block has ended: the final sample of the run in it, and the timesteps that it took."""
    end, scheduler, timesteps = End(), pipe.scheduler, []

    def step(original: Any, call: Call) -> Any:
        end.sampler = end.sampler or fingerprint(scheduler)
        timesteps.append(call.get("timestep"))  # read later: that may have to wait for the device
        result = original(*call.args, **call.kwargs)
        end.sample = next_sample(result).detach().clone()
        return result

    with intercepted(scheduler, "step", step):
        yield end
    end.num_steps = len(timesteps)
    if end.sampler and len(timesteps) < len(end.sampler.timesteps) and all(t is not None for t in timesteps):
        taken = tuple(float(torch.as_tensor(t, dtype=torch.float64, device="cpu").flatten()[0]) for t in timesteps)
        end.sampler = dataclasses.replace(end.sampler, timesteps=taken)  # image to image begins late


@contextmanager
def force(pipe: DiffusionPipeline, reference: Trajectory) -> Iterator[Trajectory]:
    """Run along the samples of ``reference`` (teacher forcing) and record the predictions made there.

    Raises:
        PriorMismatchError: The run has more steps than the reference.
    """
    trajectory = Trajectory(sampler=reference.sampler)

    def step(original: Any, call: Call) -> Any:
        index = trajectory.num_steps
        if index >= reference.num_steps:
            raise PriorMismatchError(
                f"forced run made more steps than the {reference.num_steps} of its reference: use the same step count"
            )
        trajectory.predictions.append(_kept(call.get("model_output")))
        result = original(*call.args, **call.kwargs)  # so that the scheduler's own state moves on
        computed, recorded = next_sample(result), reference.samples[index]
        trajectory.samples.append(recorded)
        return with_next_sample(result, recorded.to(computed.device, computed.dtype, copy=True))

    with intercepted(pipe.scheduler, "step", step):
        yield trajectory


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU: pipelines change samples in place (the first frame of a video, what a mask leaves alone)."""
    return tensor.detach().to("cpu", copy=True)


def _step_size(scheduler: Any, call: Call) -> float:
    """``|change of the next sample| / |change of the model output|`` at this step, in float32, on two twins."""
    output, generator = call.get("model_output").float(), call.get("generator")
    change = 0.1 * output
    results = []
    for model_output in (output.clone(), output + change):  # the twins may change what they are given in place
        twin = copy.deepcopy(scheduler)
        own = {"generator": _twin_generators(generator)} if generator is not None else {}
        sample = call.get("sample").to(torch.float32, copy=True)
        twins = call.replaced(model_output=model_output, sample=sample, **own)
        with torch.random.fork_rng(devices=[output.device] if output.is_cuda else []):
            results.append(next_sample(type(twin).step(twin, *twins.args, **twins.kwargs)).float())
    return ((results[1] - results[0]).norm() / change.norm().clamp_min(1e-20)).item()


def _twin_generators(generator: Any) -> Any:
    if isinstance(generator, list):
        return [_twin_generators(one) for one in generator]
    return torch.Generator(generator.device).set_state(generator.get_state())
