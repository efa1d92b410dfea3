"""What a closed loop needs to plan on `pipelines.make_dit`, and the quickest plan by it."""

from __future__ import annotations

from typing import Any

from cemq.pipelines.batches import make_batches
from cemq.quantize import CemqConfig, quantize_in_place
from cemq.runtime.runner import Runner
from cemq.search.choose import plan
from cemq.search.settings import PlanSettings
from cemq.search.trials import ClosedLoop
from support.pipelines import CALL, STEPS, make_dit

BUDGET = 3


def prepared(scheme: str = "w4a8", batch_size: int = 2, pipe: Any = None, samples: int | None = None) -> dict[str, Any]:
    """A quantized pipeline, its prior, and planning samples as full precision drew them: two, or three one by one."""
    pipe = pipe or make_dit()
    profiled, planning = (
        make_batches((1, 2), samples=samples or 4 - batch_size, first_seed=seed, batch_size=batch_size)
        for seed in (0, 5)
    )
    runner = Runner(pipe=pipe, steps=STEPS, call=CALL)
    trajectories, references = runner.record(profiled), runner.run(planning)
    if scheme != "none":
        quantize_in_place(pipe.transformer, CemqConfig(scheme))
    prior = runner.profile(profiled, trajectories, scheme=scheme, dtype="float32")
    return {"runner": runner, "prior": prior, "batches": planning, "references": references}


def quickly(loop: ClosedLoop, budget: int, **settings: Any) -> Any:
    """A search that learns from runs first, in nine runs' worth."""
    return plan(loop, PlanSettings(budget=budget, effort="thorough", allowed=9.0, **settings))
