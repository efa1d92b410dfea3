"""Skipping one branch of guidance, on sd3-digits: ``python docs/benchmarks/guidance.py``.

The built-in models hand both branches to their denoiser in one call. Here that call is cut in two, so that one of them
can be skipped, as it can in pipelines that make two calls a step (Wan, FLUX with true guidance, Qwen-Image). Schedules
of equal compute are run on samples that nothing was fitted to; writes guidance.md and guidance.json beside itself.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SD3Transformer2DModel

from cemq.bench.machine import describe_machine, one_line
from cemq.pipelines.batches import EVALUATION_SEED_OFFSET, make_batches, read_conditions
from cemq.pipelines.opening import locate, open_pipeline
from cemq.prior.profile import profile, record_references
from cemq.quantize import CemqConfig, quantize_in_place
from cemq.recipe import find_calibration
from cemq.runtime.outcome import run_batch
from cemq.schedule import CacheSchedule, improve, plan_schedule, skip_branches, uniform_steps
from cemq.search.explore import BRANCH_SHARES
from cemq.search.propagation import sample_schedules
from cemq.search.trials import ClosedLoop

STEPS, SAMPLES, SCHEMES, BUDGETS = 50, 16, ("none", "w4a8"), (25, 15, 10)
CALL = {"guidance_scale": 3.0, "height": 32, "width": 32, "max_sequence_length": 16}


class OneByOne(SD3Transformer2DModel):
    """Both branches in two calls, the conditional one (the second half of the batch) first."""

    def __call__(self, **arguments: Any) -> Any:
        halves = {name: value.chunk(2) for name, value in arguments.items() if torch.is_tensor(value)}
        unconditional, conditional = ({name: pair[index] for name, pair in halves.items()} for index in (0, 1))
        outputs = [super(OneByOne, self).__call__(**arguments | own)[0] for own in (conditional, unconditional)]
        return (torch.cat(outputs[::-1]),)


def measure(scheme: str) -> list[dict[str, Any]]:
    pipe = open_pipeline(locate("builtin:sd3-digits").folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    prompts = read_conditions(find_calibration("digits_prompts.txt"))
    profiled, taught, judged = (
        make_batches(prompts, samples=samples, first_seed=seed, batch_size=8)
        for samples, seed in ((16, 0), (8, 100), (SAMPLES, EVALUATION_SEED_OFFSET))
    )
    references = record_references(pipe, profiled, steps=STEPS, call=CALL)
    aims = {key: [run_batch(pipe, b, steps=STEPS, call=CALL) for b in key] for key in (taught, judged)}
    if scheme != "none":  # rounded to nearest
        quantize_in_place(pipe.transformer, CemqConfig(scheme))
    prior = profile(pipe, profiled, references, steps=STEPS, call=CALL, scheme=scheme, dtype="float32")
    teacher, judge = (
        ClosedLoop(pipe=pipe, prior=prior, batches=key, references=aims[key], steps=STEPS, call=CALL)
        for key in (taught, judged)
    )
    for schedule in sample_schedules(STEPS, 20, ("taylor1", "reuse"), seed=0):
        teacher.teach(schedule)
    fitted = teacher.fit("combined").prior
    pipe.transformer.__class__ = OneByOne

    def plans(budget: int) -> dict[str, CacheSchedule]:
        evenly = CacheSchedule(num_steps=STEPS, full_steps=uniform_steps(STEPS, budget), predictor="taylor1")
        return {"uniform": evenly, "planned": improve(fitted, plan_schedule(fitted, budget))}

    rows = []
    for budget in BUDGETS:
        for share in (1.0, *BRANCH_SHARES[::-1]):
            for name, schedule in plans(min(round(2 * budget / (1 + share)), STEPS)).items():
                trial = judge.run(skip_branches(schedule, budget))
                found = {"psnr_db": trial.psnr_db, "branch_steps": len(trial.schedule.branch_steps)}
                rows.append({"scheme": scheme, "budget": budget, "plan": name, "share": share, **found})
                print(rows[-1], flush=True)
    assert judge.calls_per_step == 2
    return rows


def page(rows: list[dict[str, Any]], machine: dict[str, Any], minutes: float) -> str:
    shares = sorted({row["share"] for row in rows}, reverse=True)
    lines = [
        "# Skipping one branch of guidance",
        "",
        f"`python docs/benchmarks/guidance.py`, {minutes:.0f} minutes, {one_line(machine)}.",
        "",
        f"sd3-digits, its two branches of guidance called one by one, {STEPS} steps, guidance scale 3, taylor1,",
        f"{SAMPLES} samples that nothing was fitted to. A row has the same compute throughout; a column says on what",
        "share of its full-compute steps both branches are computed, the conditional one only on the others. PSNR in",
        "dB against full precision; W4A8 rounded to nearest.",
        "",
        "| scheme | full steps' worth | plan | " + " | ".join("both" if s == 1 else f"{s:g}" for s in shares) + " |",
        "|---|---|---|" + "---|" * len(shares),
    ]
    cells = {(row["scheme"], row["budget"], row["plan"], row["share"]): row["psnr_db"] for row in rows}
    for scheme, budget, plan in dict.fromkeys((row["scheme"], row["budget"], row["plan"]) for row in rows):
        found = [cells[scheme, budget, plan, share] for share in shares]
        marked = [f"**{value:.1f}**" if value == max(found) else f"{value:.1f}" for value in found]
        lines.append(f"| {scheme} | {budget} | {plan} | " + " | ".join(marked) + " |")
    gains = [
        max(cells[s, b, "planned", share] for share in shares[1:]) - cells[s, b, "planned", 1.0]
        for s, b in dict.fromkeys((row["scheme"], row["budget"]) for row in rows)
    ]
    text = (
        f"The best of these shares gains {np.mean(gains):.1f} dB on average over planned schedules with both branches"
    )
    lines += ["", f"{text}, {min(gains):.1f} to {max(gains):.1f}.", ""]
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    started, here = time.time(), Path(__file__).parent
    rows = [row for scheme in SCHEMES for row in measure(scheme)]
    machine = describe_machine()
    (here / "guidance.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    (here / "guidance.md").write_text(page(rows, machine, (time.time() - started) / 60))


if __name__ == "__main__":
    main()
