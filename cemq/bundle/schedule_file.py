"""A schedule outside its bundle: as JSON for `cemq.apply_schedule`, or as another engine takes it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from cemq.bundle.dpcache import FORMAT as DPCACHE
from cemq.bundle.dpcache import dpcache
from cemq.bundle.engines import ENGINES
from cemq.bundle.manifest import MANIFEST, Manifest, read_bundle
from cemq.errors import InputError, choose
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.schedule import CacheSchedule

FORMATS = ("json", *ENGINES, DPCACHE)
KIND, VERSION = "cemq-schedule", 1
_KEYS = {"kind", "version", "schedule", "sampler", "made_for", "cache"}


def export(bundle: str | Path, format: str = "json", *, request: str | Path | None = None) -> str:
    """The schedule of a bundle as text.

    ``json`` is what `cemq.apply_schedule` reads: full-compute steps, predictor, the sampler they belong to, and what
    they were planned for. ``cache-dit`` is YAML for ``cache_dit.load_configs``, ``sglang`` environment lines and
    ``sd.cpp`` flags; comments in them say what differs there. ``sglang-dpcache`` is JSON for SGLang's DPCache.

    Args:
        request: For ``sglang-dpcache`` alone: a schedule that SGLang calibrated on the server that is to follow this
            one, whose ``request`` block is taken over; None makes one up from the bundle.

    Raises:
        InputError: No such format, one that cannot say this schedule, or a policy decides and there is none.
        BundleError: The bundle is incomplete or damaged.
    """
    choose("export format", format, FORMATS)
    if request is not None and format != DPCACHE:
        raise InputError(f"request={request}: only the format {DPCACHE} has one, found {format}")
    manifest = _read_scheduled(Path(bundle))
    if format == DPCACHE:
        return dpcache(manifest, Path(bundle), request)
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
    if format in ENGINES:
        return ENGINES[format](manifest.schedule, made_for, manifest.cache)
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
