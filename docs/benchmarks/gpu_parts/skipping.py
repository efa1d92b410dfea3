"""A FLUX-size pipeline on the device: 28 steps in full, 10 of them, and what a skipped step costs the host."""

from __future__ import annotations

import statistics
from functools import partial

from cemq.runtime import attach, detach, schedule_hook
from cemq.schedule import CacheSchedule
from gpu_parts import Case, Rows, Setting, flux
from gpu_parts.timing import clocks, elapsed


def cases(setting: Setting) -> list[Case]:
    sizes = flux.TINY if setting.tiny else flux.DEV
    return [
        Case(labels={"what": "bundle"}, measure=partial(_bundle, setting, sizes)),
        Case(labels={"what": "runs"}, measure=partial(_runs, setting, sizes)),
    ]


def _bundle(setting: Setting, sizes: flux.Sizes) -> Rows:
    seconds = elapsed(lambda: flux.bundle(setting, sizes), setting)
    files = [file.stat().st_size for file in flux.bundle(setting, sizes).rglob("*") if file.is_file()]
    yield {"seconds": seconds, "bytes": sum(files)}


def _runs(setting: Setting, sizes: flux.Sizes) -> Rows:
    folder, loaded = flux.bundle(setting, sizes), []
    yield {"loading_seconds": elapsed(lambda: loaded.append(flux.load(folder, setting.device)), setting)}
    (pipe,) = loaded
    scheduled = schedule_hook(pipe).plan
    every = CacheSchedule(num_steps=flux.STEPS, full_steps=tuple(range(flux.STEPS)))
    yield {"first_run_seconds": elapsed(lambda: flux.draw(pipe, folder, setting), setting)}  # compiles and tunes
    for plan in (every, scheduled):
        detach(pipe)
        hook = attach(pipe, plan)
        loops = [flux.loop_seconds(pipe, folder, setting) for _ in range(2)]
        drawn, full = flux.draw(pipe, folder, setting), set(hook.schedule.full_steps)
        row = {
            "steps": flux.STEPS, "full_steps": len(full), "loop_seconds": min(loops), "loops": loops,
            "full_step_seconds": statistics.median(drawn.seconds[step] for step in drawn.seconds if step in full),
        }  # fmt: skip
        skipped = [step for step in drawn.seconds if step not in full]
        if skipped:
            row |= {
                "skipped_step_seconds": statistics.median(drawn.seconds[step] for step in skipped),
                "skipped_step_host_microseconds": 1e6 * statistics.median(drawn.host_seconds[s] for s in skipped),
            }
        yield row | clocks(setting)
