"""A whole build of a built-in model, on the device and on the CPU beside it: seconds, and whether they agree."""

from __future__ import annotations

import time
from functools import partial

import cemq
from gpu_parts import Case, Rows, Setting

MODEL = "builtin:dit-digits"


def cases(setting: Setting) -> list[Case]:
    devices = dict.fromkeys([setting.device.type, "cpu"])
    return [Case(labels={"device": device}, measure=partial(_build, setting, device)) for device in devices]


def _build(setting: Setting, device: str) -> Rows:
    tiny = {"steps": 4, "budget": 2, "planning_samples": 1, "samples": 1, "solver": "uniform"}
    sizes = tiny if setting.tiny else {"budget": 15}
    started = time.perf_counter()
    manifest = cemq.quantize_and_schedule(
        MODEL, setting.scratch / f"built-{device}", scheme="w8a8", device=device, effort="quick", **sizes
    )
    seconds = time.perf_counter() - started
    schedule = manifest.schedule
    yield {"what": "build", "seconds": seconds, "steps": schedule.num_steps, "full_steps": list(schedule.full_steps)}
    found = cemq.evaluate(setting.scratch / f"built-{device}", samples=2 if setting.tiny else 16, device=device)
    yield {"what": "evaluation", "psnr_db": found.psnr_db, "wall_ratio": found.wall_ratio, "samples": found.samples}
