"""The one loop that trains every part of every built-in model, and goes on where it was ended."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

WARM_UP_STEPS = 200
LARGEST_NORM = 1.0  # of a gradient
MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of each parameter


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Where checkpoints lie, what is trained on, and which fraction of the steps is run."""

    folder: Path
    device: torch.device
    scale: float = 1.0
    seconds_between_checkpoints: float = 60.0

    def precision(self) -> contextlib.AbstractContextManager:
        """bfloat16 where there are units for it; without them it takes longer than float32."""
        if self.device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


class Average:
    """Exponential moving average of the parameters, with a warm-up so that early weights are forgotten."""

    def __init__(self, live: list[torch.nn.Parameter], decay: float):
        self.live: list[torch.nn.Parameter] = live
        self.mean: list[torch.Tensor] = [p.detach().clone() for p in self.live]
        self.decay: float = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the step of this number, counted from 0."""
        decay = min(self.decay, (2 + step) / (11 + step))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        for live, mean in zip(self.live, self.mean, strict=True):
            live.copy_(mean)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Settings of one run of the loop; a checkpoint made with others is not gone on with.

    The randomness of a step follows from ``seed`` and its number alone, so that a run which was ended and goes on
    gives the same weights.
    """

    name: str
    steps: int
    learning_rate: float
    seed: int
    last_rate: float = 0.0  # as a share of the learning rate
    decay: float = 0.999  # of the average of the weights, by step; less where they are still far from their end

    def rate(self, step: int) -> float:
        """Learning rate: warm-up, then a falling cosine."""
        rising = (step + 1) / min(WARM_UP_STEPS, self.steps / 5)
        falling = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return self.learning_rate * min(rising, self.last_rate + (1 - self.last_rate) * falling)

    def generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_000 + step)

    def settings(self) -> dict[str, str]:
        return {field.name: str(getattr(self, field.name)) for field in fields(self)}


class Checkpoint:
    """One stage's parameters in a safetensors file; with their averages and Adam's moments until it is done."""

    def __init__(self, path: Path, stage: Stage, average: Average, optimizer: torch.optim.Optimizer):
        self.path, self.stage, self.average, self.optimizer = path, stage, average, optimizer

    def load(self) -> int:
        """How many steps were done; 0 where there is no checkpoint of this stage."""
        if not self.path.exists():
            return 0
        with safe_open(self.path, "pt") as file:
            found = dict(file.metadata())
            done = int(found.pop("done"))
            if found != self.stage.settings():
                print(f"{self.path} was made with other settings: {self.stage.name} begins anew", flush=True)
                return 0
            with torch.no_grad():
                for number, (live, mean) in enumerate(zip(self.average.live, self.average.mean, strict=True)):
                    live.copy_(file.get_tensor(f"{number}.value"))
                    if done < self.stage.steps:
                        mean.copy_(file.get_tensor(f"{number}.mean"))
                        moments = {name: file.get_tensor(f"{number}.{name}").to(live.device) for name in MOMENTS}
                        self.optimizer.state[live] = {"step": torch.tensor(float(done)), **moments}
        return done

    def save(self, done: int) -> None:
        tensors = {}
        for number, (live, mean) in enumerate(zip(self.average.live, self.average.mean, strict=True)):
            tensors[f"{number}.value"] = live.detach()
            if done < self.stage.steps:
                tensors[f"{number}.mean"] = mean
                tensors |= {f"{number}.{name}": self.optimizer.state[live][name] for name in MOMENTS}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        save_file(whole, unfinished, metadata=self.stage.settings() | {"done": str(done)})
        unfinished.replace(self.path)


def fit(
    workshop: Workshop,
    stage: Stage,
    modules: list[torch.nn.Module],
    loss: Callable[[torch.Generator], torch.Tensor],
) -> None:
    """AdamW with warm-up, cosine decay and weight averaging; the modules end as the averaged weights, in eval mode.

    Args:
        loss: Of one step, given the generator of all its randomness (on the CPU, so that each device draws the same).
    """
    live = [p for module in modules for p in module.to(workshop.device).parameters()]
    optimizer = torch.optim.AdamW(live, lr=stage.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    average = Average(live, stage.decay)
    checkpoint = Checkpoint(workshop.folder / f"{stage.name}.safetensors", stage, average, optimizer)
    done = checkpoint.load()
    began = saved = time.monotonic()
    recent = 0.0
    for step in range(done, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step)
        value = loss(stage.generator(step))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(live, LARGEST_NORM)
        optimizer.step()
        average.update(step)
        recent += (value.item() - recent) / min(step - done + 1, 50)
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - began
            print(f"{stage.name} {step + 1}/{stage.steps} loss {recent:.4f} {seconds:.0f} s", flush=True)
        if time.monotonic() - saved > workshop.seconds_between_checkpoints:
            checkpoint.save(step + 1)
            saved = time.monotonic()
    if done < stage.steps:
        average.apply()
        checkpoint.save(stage.steps)
    for module in modules:
        module.eval().requires_grad_(False)
