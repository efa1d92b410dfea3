"""A schedule as SGLang's DPCache takes one: JSON of its schema ``sglang-dpcache-schedule-v2``.

DPCache computes given steps and, on the others, extrapolates what the last block returns in a line through the two
latest computed ones, for requests that are exactly what the file says they are. What it is served for is the server's:
a bundle knows neither its attention backend nor its class of pipeline, so that the ``request`` block is best taken from
a file that SGLang's own ``dpcache_calibrate`` wrote.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from cemq.bundle.manifest import CACHED, MANIFEST, Manifest
from cemq.errors import InputError, first_line
from cemq.families import PICTURE_ARGUMENTS
from cemq.files import absolute

FORMAT = "sglang-dpcache"
_SCHEMA = "sglang-dpcache-schedule-v2"
_PREDICTOR = {
    "name": "final-feature-linear-extrapolation", "order": 1, "arithmetic": "feature-dtype-elementwise-v1",
}  # fmt: skip
_OBJECTIVE = "pact-mean-abs-final-feature-predicted-steps-only-v1"  # SGLang reads no other
_REQUEST = (
    *("pipeline", "checkpoint", "num_inference_steps", "height", "width", "guidance_scale"),
    *("do_classifier_free_guidance", "quality", "attention_backend", "dtype", "scheduler", "scheduler_config_sha256"),
    *("timesteps", "sigmas"),
)
_UNKNOWN = ("pipeline", "quality", "attention_backend", "scheduler_config_sha256", "sigmas")  # to a bundle


def dpcache(manifest: Manifest, folder: Path, request: str | Path | None = None) -> str:
    """The JSON.

    Args:
        request: A schedule that SGLang calibrated on the server that is to follow this one; its ``request`` is taken
            over. None makes one up from the bundle.

    Raises:
        InputError: The plan is none that DPCache could follow, or is for another request; says why.
    """
    schedule = manifest.schedule
    _check_schedule(manifest)
    served_to = _made_up(manifest, folder) if request is None else _read_request(request, manifest)
    _check_request(served_to)
    keys = [*schedule.full_steps, schedule.num_steps]
    fidelity = manifest.fidelity or {}
    content = {
        "schema": _SCHEMA,
        "schedule_method": f"cemq-{schedule.solver}",
        "predictor": _PREDICTOR,
        "objective": _OBJECTIVE,
        "source_commit": f"cemq {manifest.cemq_version}",
        "request": served_to,
        "mandatory_full_steps": list(range(_leading(schedule.full_steps))),
        "force_last_full": schedule.full_steps[-1] == schedule.num_steps - 1,
        "max_gap": max(after - before for before, after in itertools.pairwise(keys)),
        "num_full_steps": len(schedule.full_steps),
        "full_steps": list(schedule.full_steps),
        "calibrated_cost": float(fidelity.get("relative_l2", 0.0)),
        "calibration": {
            "manifest_sha256": hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(),
            "num_samples": len(manifest.profiled_seeds),
            "calibrated_cost_semantics": "relative error of the final latents that cemq measured; not what DPCache "
            "minimizes, and 0 where nothing was measured",
            "notes": _notes(manifest, is_made_up=request is None),
        },
    }
    return json.dumps(content, indent=2) + "\n"


def _refuse(reason: str) -> InputError:
    return InputError(f"export format {FORMAT}: {reason}")


def _leading(full_steps: tuple[int, ...]) -> int:
    """How many steps from the first on are computed."""
    return next((number for number, step in enumerate(full_steps) if step != number), len(full_steps))


def _check_schedule(manifest: Manifest) -> None:
    """Raises InputError for what DPCache cannot do, whatever it is asked for."""
    schedule = manifest.schedule
    if schedule.predictor_text() != "taylor1":
        raise _refuse(
            f"DPCache extrapolates in a line, this plan predicts with {schedule.predictor_text()}: plan with "
            "--predictor taylor1"
        )
    if _leading(schedule.full_steps) < 2:
        raise _refuse("DPCache extrapolates from two computed steps, and this plan skips the second step")
    if schedule.branch_steps:
        raise _refuse("DPCache has no guidance, of which this plan skips a branch on some steps")
    if manifest.dtype != "bfloat16":
        raise _refuse(
            f"DPCache runs in bfloat16 alone, this bundle is of {manifest.dtype}: build with --dtype bfloat16"
        )
    if manifest.lora:
        raise _refuse("DPCache refuses LoRAs, and this bundle was planned with some fused")
    if len(manifest.denoisers) > 1:
        raise _refuse(f"DPCache follows one transformer, this pipeline has {len(manifest.denoisers)}")
    if pictures := sorted(set(manifest.call) & set(PICTURE_ARGUMENTS)):
        raise _refuse(f"DPCache takes no pictures, this bundle was planned with {', '.join(pictures)}")
    if not manifest.sampler.scheduler.startswith("FlowMatchEuler"):
        raise _refuse(f"DPCache was made for flow matching, this plan is for {manifest.sampler.scheduler}")


def _check_request(request: dict[str, Any]) -> None:
    if request["do_classifier_free_guidance"]:
        raise _refuse("DPCache refuses guidance with two branches: plan with it off, say --call guidance_scale=1")
    if request["dtype"] != "bfloat16":
        raise _refuse(f"DPCache runs in bfloat16 alone, the request is for {request['dtype']}")


def _read_request(path: str | Path, manifest: Manifest) -> dict[str, Any]:
    """Of a schedule that SGLang calibrated, held against what this one was planned for."""
    try:
        request = dict(json.loads(absolute(path).read_text(encoding="utf-8"))["request"])
        if set(request) != set(_REQUEST):
            raise KeyError(*sorted(set(request) ^ set(_REQUEST)))
        timesteps = np.array(request["timesteps"], dtype=np.float64)
    except OSError as error:
        raise _refuse(f"request '{path}' cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _refuse(f"request '{path}' is no schedule of SGLang's dpcache_calibrate ({first_line(error)})") from None
    planned = np.array(manifest.sampler.timesteps)
    if timesteps.shape != planned.shape or not np.allclose(timesteps, planned, rtol=1e-3, atol=1e-3):
        raise _refuse(
            f"request '{path}' is for {len(timesteps)} steps at other timesteps than the {len(planned)} that this plan "
            "was made for: plan at those of the server"
        )
    return request


def _made_up(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """What the bundle was planned for, in SGLang's words as far as they can be guessed."""
    from cemq.pipelines.opening import class_of_folder

    sizes = {name: manifest.call.get(name) for name in ("height", "width")}
    if None in sizes.values():
        raise _refuse("the request has a height and a width, and this bundle was planned without: build with --call")
    known = inspect.signature(class_of_folder(folder).__call__).parameters
    scales = {
        name: manifest.call.get(name, known[name].default)
        for name in ("guidance_scale", "true_cfg_scale")
        if name in known
    }
    scale = float(scales.get("guidance_scale", 1.0) or 1.0)
    config = json.loads((folder / manifest.denoisers[0] / "config.json").read_text(encoding="utf-8"))
    # pipelines with both scales hand the first one to the denoiser, as one of its inputs; so do distilled ones
    branches = float(scales.get("true_cfg_scale", 1.0 if config.get("guidance_embeds") else scale) or 1.0) > 1
    divisor = float(manifest.sampler.config.get("num_train_timesteps", 1000))
    timesteps = np.array(manifest.sampler.timesteps, dtype=np.float32)
    return {
        "pipeline": f"{manifest.pipeline_class}Config",
        "checkpoint": manifest.revision or manifest.model,
        "num_inference_steps": manifest.schedule.num_steps,
        **sizes,
        "guidance_scale": scale,
        "do_classifier_free_guidance": branches,
        "quality": "lossless",
        "attention_backend": None,
        "dtype": manifest.dtype,
        "scheduler": manifest.sampler.scheduler,
        "scheduler_config_sha256": hashlib.sha256(
            json.dumps(manifest.sampler.config, sort_keys=True, default=repr).encode()
        ).hexdigest(),
        "timesteps": timesteps.tolist(),
        "sigmas": [*(timesteps / np.float32(divisor)).tolist(), 0.0],
    }


def _notes(manifest: Manifest, *, is_made_up: bool) -> list[str]:
    notes = [
        f"steps that cemq chose for {manifest.model}, {manifest.scheme}: {len(manifest.schedule.full_steps)} of "
        f"{manifest.schedule.num_steps} in full",
        "the steps are the same, the way skipped ones are served is not: DPCache extrapolates what the last block "
        f"returns, cemq {CACHED[manifest.cache]}",
        "Fidelity measured with cemq does not carry over",
    ]
    if manifest.schedule.corrects:
        notes.append("cemq corrects skipped steps once it has computed the next one; DPCache has no counterpart")
    if is_made_up:
        notes.append(
            f"a bundle does not know a server's {', '.join(_UNKNOWN)}: where SGLang says that the schedule is for "
            "another request, export again with --request and a schedule of its dpcache_calibrate"
        )
    return notes
