"""The saved form: a diffusers pipeline folder plus cemq.json, prior.safetensors and a model card.

`docs/bundle-format.md` specifies it, and `staging` puts it in its place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cemq.bundle.checksums import Listed, Verify, check_verify, find_faults
from cemq.errors import BundleError, CemqError, choose, first_line
from cemq.files import sha256
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.pipelines.lora import FusedLora
from cemq.pipelines.opening import DTYPES
from cemq.schedule import CacheSchedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FORMAT_VERSION = 5
MANIFEST = "cemq.json"
PRIOR = "prior.safetensors"
EVIDENCE = "evidence.json"
CARD = "README.md"
PICTURE = "samples.webp"  # that the card shows; not of audio, nor where nothing was run to see
CACHED = {  # what skipped steps are predicted from, in words
    "output": "the model's output",
    "residual": "the residual of all blocks",
    "modules": "the outputs of attention and feed-forward modules",
    "inside": "what its policy keeps of blocks and modules",
}
_MALFORMED = (AttributeError, LookupError, RecursionError, TypeError, ValueError)  # what reading damaged JSON raises
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_LOADED = (".safetensors", ".json", ".txt", ".model", ".jinja", *_PICKLED)  # what diffusers and transformers look for


@dataclass(frozen=True, kw_only=True)
class OtherRun:
    """Of cemq.json, what was planned for another step count; keys as in `Manifest`."""

    num_inference_steps: int
    schedule: CacheSchedule
    correction: str | None
    sampler: SamplerFingerprint

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> OtherRun:
        _checked(cls, fields)
        return _typed(cls, fields | _parsed(fields))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"schedule": self.schedule.to_dict()}


@dataclass(frozen=True, kw_only=True)
class ComponentDtypes:
    """Of one component's parameters and buffers, but for those that a quantized layer's scheme fixes."""

    default: str
    exceptions: dict[str, tuple[str, ...]]  # names of the tensors that have another dtype, by dtype

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ComponentDtypes:
        _checked(cls, fields)
        exceptions = {kind: tuple(names) for kind, names in fields["exceptions"].items()}
        return cls(default=fields["default"], exceptions=exceptions)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What cemq.json says; `docs/bundle-format.md` explains each key."""

    cemq_version: str
    model: str
    revision: str | None
    pipeline_class: str
    denoisers: tuple[str, ...]
    scheme: str
    backend: str
    dtype: str
    view: str
    num_inference_steps: int
    schedule: CacheSchedule
    correction: str | None
    sampler: SamplerFingerprint
    call: dict[str, Any]
    profiled_seeds: tuple[int, ...]
    held_out_conditions: tuple[str | int, ...]
    fidelity: dict[str, Any] | None  # None: nothing was run to measure it
    model_bytes: int
    reference_bytes: int
    libraries: dict[str, str]
    recipe: dict[str, Any] | None = None
    cache: str = "output"
    other_runs: tuple[OtherRun, ...] = ()
    dtypes: dict[str, ComponentDtypes] | None = None  # by component
    policy: dict[str, Any] | None = None  # its name and settings, where one decides in place of the schedule
    generations: dict[str, float] | None = None  # that the build took, in full ones of one sample
    lora: tuple[FusedLora, ...] = ()  # that full precision was fused with, in order
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        choose("dtype", self.dtype, DTYPES, BundleError)
        choose("cache", self.cache, CACHED, BundleError)
        if self.fidelity is not None and (missing := {"psnr_db", "ssim", "relative_l2", "samples"} - {*self.fidelity}):
            raise BundleError(f"missing keys of fidelity: {', '.join(sorted(missing))}")

    @property
    def variant(self) -> str | None:
        """Of the model's files that it was made from."""
        return (self.recipe or {}).get("variant")

    @property
    def full_steps(self) -> float:
        """Full-compute steps of a run, as counted where the fidelity was measured; as planned in bundles of before."""
        return (self.fidelity or {}).get("full_steps", self.schedule.full_count)

    @property
    def fidelity_text(self) -> str:
        if self.fidelity is None:
            return "not measured: effort instant runs nothing to see"
        return f"{quality_text(self.fidelity)} to full precision on {held_out_text(self.fidelity['samples'])}"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Manifest:
        # bundles of before have none of these
        _checked(cls, fields, optional={"cache", "other_runs", "dtypes", "policy", "generations", "lora"})
        others = tuple(OtherRun.from_dict(each) for each in fields.get("other_runs", ()))
        dtypes = {name: ComponentDtypes.from_dict(each) for name, each in (fields.get("dtypes") or {}).items()} or None
        lora = tuple(_typed(FusedLora, _checked(FusedLora, each)) for each in fields.get("lora", ()))
        return _typed(cls, fields | _parsed(fields) | {"other_runs": others, "dtypes": dtypes, "lora": lora})

    def to_dict(self) -> dict[str, Any]:
        others = [run.to_dict() for run in self.other_runs]
        return dataclasses.asdict(self) | {"schedule": self.schedule.to_dict(), "other_runs": others}


def _checked(kind: type, fields: dict[str, Any], optional: Set[str] = frozenset()) -> dict[str, Any]:
    expected = {field.name for field in dataclasses.fields(kind)}
    if unknown := set(fields) - expected:
        raise BundleError(f"unknown keys: {', '.join(sorted(unknown))}")
    if missing := expected - optional - set(fields):
        raise BundleError(f"missing keys: {', '.join(sorted(missing))}")
    return fields


def _typed(kind: type, fields: dict[str, Any]) -> Any:
    """One of a dataclass, its lists as tuples. Raises ValueError for a value of another type than its field's."""
    from pydantic import ConfigDict, create_model

    hints = typing.get_type_hints(kind)
    config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())
    wanted: dict[str, Any] = {name: (hints[name], ...) for name in fields}
    model = create_model(kind.__name__, __config__=config, **wanted)
    checked = model(**fields)
    return kind(**{name: getattr(checked, name) for name in fields})


def _parsed(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "schedule": CacheSchedule.from_dict(fields["schedule"]),
        "sampler": SamplerFingerprint.from_dict(fields["sampler"]),
    }


def write_pipeline(pipe: DiffusionPipeline, folder: Path, source: Path) -> None:
    """``save_pretrained``, plus what it forgets."""
    type(pipe).save_pretrained(pipe, folder, safe_serialization=True)  # a loaded bundle's own writes a bundle
    complete_index(folder, source)


def complete_index(folder: Path, source: Path, *, absent: Collection[str] = ()) -> None:
    """Put into model_index.json what a pipeline does not write of the one it was loaded from: plain entries (DiT's
    id2label), and components that it has no more, for they are ``absent``."""
    index = folder / "model_index.json"
    written, original = (json.loads((f / index.name).read_text(encoding="utf-8")) for f in (folder, source))
    forgotten = {name: value for name, value in original.items() if name not in written and not name.startswith("_")}
    forgotten |= {name: original[name] for name in absent}
    index.write_text(json.dumps(written | forgotten, indent=2) + "\n", encoding="utf-8")
    forget_paths(folder)


def forget_paths(folder: Path) -> None:
    """Take out of every config.json where on this machine it was loaded from: that is nobody's business elsewhere."""
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def seal(folder: Path, manifest: Manifest, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write the model card, with its picture if that is there, and, last, cemq.json with the sizes and checksums of
    everything else.

    Args:
        known: Checksums of files that were taken when these were written: to read gigabytes again is a minute.
    """
    card = _model_card(manifest, is_pictured=(folder / PICTURE).is_file())
    (folder / CARD).write_text(card, encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        if path.suffix in _PICKLED:
            raise BundleError(f"'{path.relative_to(folder)}' may hold a pickle: bundles hold safetensors and text only")
    content = manifest.to_dict()
    content["files"] = {
        (name := path.relative_to(folder).as_posix()): {
            "bytes": path.stat().st_size,
            "sha256": known.get(name) or sha256(path),
        }
        for path in files
        if path != folder / CARD  # people edit it, on the Hub with a button
    }
    content["checksum"] = _checksum(content)
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What cemq.json holds, of which nothing is believed yet but that it is as it was written."""

    content: dict[str, Any]
    files: dict[str, Listed]
    checksum: str


def read_bundle(folder: Path, *, verify: Verify | bool = "never") -> Manifest:
    """Read cemq.json and check that every file is there and of its size and, with ``verify``, of its content.

    Raises:
        BundleError: Names the file that is missing, truncated or edited, or that would be loaded and does not belong.
        InputError: ``verify`` is no word of `check_verify`.
    """
    when = check_verify(verify)
    listing = read_listing(folder)
    for name, fault in find_all_faults(folder, listing, verify=when):
        raise BundleError(f"bundle '{folder}': file '{name}' {fault}")
    try:
        return Manifest.from_dict(listing.content)
    except CemqError as error:
        raise BundleError(f"bundle '{folder}': {MANIFEST}: {error}") from error
    except _MALFORMED as error:
        raise BundleError(f"bundle '{folder}': {MANIFEST} is damaged ({first_line(error)}); write it again") from error


def read_listing(folder: Path) -> Listing:
    """Read cemq.json and hold it against its own checksum.

    Raises:
        BundleError: It is not there, damaged, or of another format.
    """
    path = folder / MANIFEST
    if not os.path.isfile(path):
        found = "no such folder" if not os.path.isdir(folder) else f"it holds no {MANIFEST}"
        raise BundleError(f"'{folder}' is not a cemq bundle: {found}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        checksum, files = content.pop("checksum"), content["files"]
        listed = {name: Listed(bytes=int(each["bytes"]), sha256=str(each["sha256"])) for name, each in files.items()}
        version = content["format_version"]
    except OSError as error:
        raise BundleError(f"bundle '{folder}': {MANIFEST} cannot be read: {error.strerror}") from error
    except _MALFORMED as error:
        raise BundleError(f"bundle '{folder}': {MANIFEST} is damaged ({error}); write the bundle again") from error
    if version != FORMAT_VERSION:
        raise BundleError(f"bundle '{folder}' has format {version}, this cemq reads {FORMAT_VERSION}: write it again")
    if checksum != _checksum(content):
        raise BundleError(f"bundle '{folder}': {MANIFEST} was edited or damaged; write the bundle again")
    del content["files"]
    listed.pop(CARD, None)  # bundles of before listed it
    return Listing(content=content, files=listed, checksum=checksum)


def find_all_faults(folder: Path, listing: Listing, *, verify: Verify) -> Iterator[tuple[str, str]]:
    """`find_faults`, and files that do not belong, before any content is compared."""
    for name in _strangers(folder, listing.files):
        yield name, "is none of the bundle's, and could be loaded in their place: remove it"
    yield from find_faults(folder, listing.files, listing.checksum, verify=verify)


def _strangers(folder: Path, files: Iterable[str]) -> Iterator[str]:
    """Files that a library could take for a component's, as the index of weights that are there no more."""
    for component in sorted({name.split("/")[0] for name in files if "/" in name}):
        for path in sorted((folder / component).rglob("*")):
            name = path.relative_to(folder).as_posix()
            if name not in files and path.suffix in _LOADED and not path.name.startswith("."):
                yield name


def read_checksum(folder: Path) -> str:
    """The checksum over everything in a bundle, as its cemq.json has it."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["checksum"]


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def lora_text(lora: Iterable[Mapping[str, Any]]) -> str:
    """Names and scales of those that are fused."""
    return ", ".join(f"{each['name']} ({each['scale']:g})" for each in lora) or "none"


def held_out_text(count: int) -> str:
    return f"{count} held-out sample{'s'[: count != 1]}"


def quality_text(fidelity: Mapping[str, Any]) -> str:
    """PSNR, that of the samples that fare badly, and whose the worst is; of what bundles of before say, the mean.

    Of less than eight samples a percentile says no more than the worst.
    """
    told = fidelity.get("scores", {}).get("psnr_db")
    if not told or fidelity["samples"] < 2:
        return f"{fidelity['psnr_db']:.1f} dB"
    whose = f" with seed {told['seed']}, {told['condition']!r}" if "seed" in told else ""
    low = f"5th percentile {told['p5']:.1f}, " if fidelity["samples"] >= 8 else ""
    return f"{fidelity['psnr_db']:.1f} dB ({low}worst {told['worst']:.1f}{whose})"


def policy_text(policy: dict[str, Any] | None) -> str:
    if policy is None:
        return "none: the schedule decides"
    return f"{policy['name']}, {', '.join(f'{key} {value}' for key, value in policy['settings'].items())}"


def _in_a_cell(text: str) -> str:
    """Of a table in Markdown, where prompts may hold what ends one."""
    return text.replace("|", "\\|")


def _model_card(manifest: Manifest, *, is_pictured: bool) -> str:
    schedule, measured, picture = manifest.schedule, "", ""
    if is_pictured:
        told = "" if manifest.policy else "; below them a strip that shows which steps are computed"
        picture = (
            f"![Held-out samples in full precision, and from this bundle with the same seeds{told}]({PICTURE})\n\n"
        )
    if fidelity := manifest.fidelity:
        measured = f"""
| SSIM | {fidelity["ssim"]:.4f} |
| relative L2 of the final latent | {fidelity["relative_l2"]:.4f} |"""
    others = [f"{run.schedule.num_steps} steps, {run.schedule.budget} in full" for run in manifest.other_runs]
    return f"""---
library_name: diffusers
base_model: {json.dumps(manifest.model)}
tags: [cemq, quantized, step-caching]
---
# {manifest.model}, {manifest.scheme}, {manifest.full_steps:g} of {schedule.num_steps} steps in full

A cemq bundle: a diffusers {manifest.pipeline_class} whose denoiser is stored as {manifest.scheme} and which skips the
denoising steps that its own quantization noise allows.

{picture}```python
import cemq

pipe = cemq.from_pretrained("this-folder")  # a plain {manifest.pipeline_class}
```

| | |
|---|---|
| schedule | `{schedule.strip()}` |
| compute ratio | {schedule.num_steps / manifest.full_steps:.2f} |
| denoiser | {manifest.model_bytes / 1e6:.1f} MB (full precision {manifest.reference_bytes / 1e6:.1f} MB) |
| PSNR, same seeds | {_in_a_cell(manifest.fidelity_text)} |{measured}
| predictor | {schedule.predictor_text()}, of {CACHED[manifest.cache]} |
| corrector | {schedule.corrector} |
| correction | {manifest.correction or "none"} |
| sampler | {manifest.sampler.scheduler}, {schedule.num_steps} steps |
| LoRA, fused | {lora_text(dataclasses.asdict(each) for each in manifest.lora)} |
| policy | {policy_text(manifest.policy)} |
| planned for as well | {"; ".join(others) or "no other step count"} |
"""
