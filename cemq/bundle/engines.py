"""A schedule as other engines take one: the steps carry over, the way skipped ones are served does not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

from cemq.bundle.manifest import CACHED
from cemq.errors import InputError
from cemq.schedule import CacheSchedule

_LEAST_STEPS = 8  # below which SGLang switches step masks off


def cache_dit(schedule: CacheSchedule, made_for: dict[str, Any], cache: str) -> str:
    """YAML for ``cache_dit.load_configs``, and for SGLang's diffusers backend."""
    usage = 'cache_dit.enable_cache(pipe, **cache_dit.load_configs("FILE"))'
    head = _head(schedule, made_for, cache, "cache-dit", usage)
    order = _order(schedule)
    served = f"  enable_taylorseer: true\n  taylorseer_order: {order}\n" if order else ""
    return f"""{head}cache_config:
  num_inference_steps: {schedule.num_steps}
  steps_computation_mask: [{", ".join(map(str, _mask(schedule)))}]
  steps_computation_policy: static
  max_warmup_steps: 1
  Fn_compute_blocks: 1
  Bn_compute_blocks: 0
{served}"""


def sglang(schedule: CacheSchedule, made_for: dict[str, Any], cache: str) -> str:
    """Environment of SGLang's native backend, whose masks are runs of computed and of cached steps in turn.

    Raises:
        InputError: The schedule has fewer steps than SGLang takes a mask for.
    """
    if schedule.num_steps < _LEAST_STEPS:
        raise InputError(
            f"export format sglang: the schedule has {schedule.num_steps} steps, and SGLang takes masks from "
            f"{_LEAST_STEPS} on: plan the bundle for more with cemq replan --steps"
        )
    computed, cached = bins(_mask(schedule))
    order = _order(schedule)
    settings = {
        "ENABLED": "true", "SCM_POLICY": "static", "SCM_COMPUTE_BINS": ",".join(map(str, computed)),
        "SCM_CACHE_BINS": ",".join(map(str, cached)), "FN": 1, "BN": 0, "WARMUP": 1, "MC": -1,
        "TAYLORSEER": "true" if order else "false", "TS_ORDER": order or 1,
    }  # fmt: skip
    head = _head(schedule, made_for, cache, "SGLang", "set -a; . FILE; sglang generate --model-path ...")
    return head + "".join(f"SGLANG_CACHE_DIT_{key}={value}\n" for key, value in settings.items())


def sd_cpp(schedule: CacheSchedule, made_for: dict[str, Any], cache: str) -> str:
    """Flags of stable-diffusion.cpp."""
    head = _head(schedule, made_for, cache, "stable-diffusion.cpp", "sd-cli -m ... $(grep -v '^#' FILE)")
    mask = ",".join(map(str, _mask(schedule)))
    return f"{head}--cache-mode cache-dit --scm-policy static --scm-mask {mask} --cache-option Fn=1,Bn=0,warmup=1\n"


ENGINES: dict[str, Callable[[CacheSchedule, dict[str, Any], str], str]] = {
    "cache-dit": cache_dit,
    "sglang": sglang,
    "sd.cpp": sd_cpp,
}


def bins(mask: list[int]) -> tuple[list[int], list[int]]:
    """Lengths of the runs of ones and of zeros in turn.

    >>> bins([1, 1, 0, 1, 0, 0])
    ([2, 1], [1, 2])
    """
    runs = [(mark, len(list(group))) for mark, group in itertools.groupby(mask)]
    return [length for mark, length in runs if mark], [length for mark, length in runs if not mark]


def _mask(schedule: CacheSchedule) -> list[int]:
    full = set(schedule.full_steps)
    return [int(step in full) for step in range(schedule.num_steps)]


def _order(schedule: CacheSchedule) -> int | None:
    """Of TaylorSeer, where that is what serves all skipped steps."""
    found = re.fullmatch(r"taylor(\d)", schedule.predictor_text())
    return int(found[1]) if found else None


def _head(schedule: CacheSchedule, made_for: dict[str, Any], cache: str, engine: str, usage: str) -> str:
    """Comments: what this is, how it is used, and what is not promised."""
    model = " ".join(made_for["model"].split())  # or what a name holds after a line's end would be no comment
    steps = f"{schedule.budget} of {schedule.num_steps} in full"
    lines = [
        f"# Steps that cemq chose for {model}, {made_for['scheme']}: {steps}.",
        f"# {usage}",
        "#",
        "# The steps are the same, the way skipped ones are served is not:",
        f"# {engine} always runs the first block and extrapolates the residual of the others, cemq {CACHED[cache]}.",
        "# Fidelity measured with cemq does not carry over.",
        f"# The mask holds for {made_for['num_inference_steps']} inference steps under the sampler it was planned for; "
        f"{engine} checks neither.",
    ]
    if _order(schedule) is None and schedule.predictor != "reuse":
        lines.append(
            f"# no counterpart of the predictor {schedule.predictor_text()}: the cached residual is used again"
        )
    if schedule.branch_steps:
        lines.append(
            f"# cemq skips one branch of guidance on {len(schedule.branch_steps)} of these steps; a mask cannot say so."
        )
    if schedule.corrects:
        lines.append(f"# cemq corrects skipped steps once it has computed the next one; {engine} has no counterpart.")
    return "\n".join(lines) + "\n"
