"""A schedule outside its bundle: as JSON for `cemq.apply_schedule`, or as a cache-dit configuration."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from cemq.bundle.manifest import CACHED, MANIFEST, Manifest, read_bundle
from cemq.errors import InputError, choose
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.schedule import CacheSchedule

FORMATS = ("json", "cache-dit")
KIND, VERSION = "cemq-schedule", 1
_KEYS = {"kind", "version", "schedule", "sampler", "made_for", "cache"}


def export(bundle: str | Path, format: str = "json") -> str:
    """The schedule of a bundle as text.

    ``json`` is what `cemq.apply_schedule` reads: full-compute steps, predictor, the sampler they belong to, and what
    they were planned for. ``cache-dit`` is YAML for ``cache_dit.load_configs``; its head says what differs there.

    Raises:
        InputError: No such format, or a policy decides and there is no schedule.
        BundleError: The bundle is incomplete or damaged.
    """
    choose("export format", format, FORMATS)
    manifest = _read_scheduled(Path(bundle))
    made_for = {
        "model": manifest.model,
        "revision": manifest.revision,
        "pipeline_class": manifest.pipeline_class,
        "scheme": manifest.scheme,
        "backend": manifest.backend,
        "num_inference_steps": manifest.num_inference_steps,
        "call": manifest.call,
        "correction": manifest.correction,  # which stays behind: its tables are the bundle's
    }
    if format == "cache-dit":
        return _cache_dit(manifest.schedule, made_for, manifest.cache)
    content = {
        "kind": KIND,
        "version": VERSION,
        "schedule": manifest.schedule.to_dict(),
        "sampler": dataclasses.asdict(manifest.sampler),
        "made_for": made_for,
        "cache": manifest.cache,
    }
    return json.dumps(content, indent=2) + "\n"


def _read_scheduled(folder: Path) -> Manifest:
    """The manifest of a bundle that a schedule was planned for. Raises InputError where a policy decides instead."""
    manifest = read_bundle(folder)
    if manifest.policy is not None:
        raise InputError(
            f"bundle '{folder}': the policy {manifest.policy['name']} decides while drawing, so there is no schedule: "
            "apply the policy with cemq.apply_policy"
        )
    return manifest


def read_schedule(source: str | Path | CacheSchedule) -> tuple[CacheSchedule, SamplerFingerprint | None, str]:
    """A schedule, the sampler it was planned for (None where the source does not say), and the cache.

    Args:
        source: A `CacheSchedule`, a bundle's folder, or a file that `export` wrote as ``json``.

    Raises:
        InputError: Neither of these, or a key is missing or unknown, or a policy decides and there is no schedule.
        BundleError: The bundle is incomplete or damaged.
    """
    if isinstance(source, CacheSchedule):
        return source, None, "output"
    path = Path(source)
    if path.is_dir() or (path / MANIFEST).is_file():
        manifest = _read_scheduled(path)
        return manifest.schedule, manifest.sampler, manifest.cache
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(
            f"schedule '{path}' cannot be read ({reason}): give a bundle or a file of cemq export"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"schedule '{path}' is not JSON ({error}): write it with cemq export --format json") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise InputError(f"schedule '{path}' is not one: write it with cemq export --format json")
    if content.get("version") != VERSION:
        raise InputError(f"schedule '{path}' has version {content.get('version')}, this cemq reads {VERSION}")
    content.setdefault("cache", "output")  # files of before do not say
    if set(content) != _KEYS:
        raise InputError(f"schedule '{path}': expected the keys {sorted(_KEYS)}, found {sorted(content)}")
    try:
        schedule = CacheSchedule.from_dict(content["schedule"])
        return schedule, SamplerFingerprint.from_dict(content["sampler"]), content["cache"]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"schedule '{path}' is damaged ({error}): export it again") from None


def _cache_dit(schedule: CacheSchedule, made_for: dict[str, Any], cache: str) -> str:
    full = set(schedule.full_steps)
    mask = ", ".join("1" if step in full else "0" for step in range(schedule.num_steps))
    order = re.fullmatch(r"taylor(\d)", schedule.predictor_text())
    if order:
        served = f"  enable_taylorseer: true\n  taylorseer_order: {order[1]}\n"
    elif schedule.predictor == "reuse":
        served = ""
    else:
        served = f"  # no counterpart of the predictor {schedule.predictor_text()}: the cached residual is used again\n"
    corrected = "# cemq corrects skipped steps once it has computed the next one; cache-dit has no counterpart.\n"
    branches = (
        f"# cemq skips one branch of guidance on {len(schedule.branch_steps)} of these steps; a mask cannot say so.\n"
    )
    return f"""\
# Steps that cemq chose for {made_for["model"]}, {made_for["scheme"]}: {schedule.budget} of {schedule.num_steps} in full.
# cache_dit.enable_cache(pipe, **cache_dit.load_configs("this-file.yaml"))
#
# The steps are the same, the way skipped ones are served is not: cache-dit always runs the first block and extrapolates
# the residual of the others, cemq {CACHED[cache]}. Fidelity measured with cemq does not carry over.
# The mask holds for {made_for["num_inference_steps"]} inference steps under the sampler it was planned for; cache-dit checks neither.
{branches if schedule.branch_steps else ""}{corrected if schedule.corrects else ""}cache_config:
  num_inference_steps: {schedule.num_steps}
  steps_computation_mask: [{mask}]
  steps_computation_policy: static
  max_warmup_steps: 1
  Fn_compute_blocks: 1
  Bn_compute_blocks: 0
{served}"""  # noqa: E501
