"""LoRAs: found by name, and fused into a pipeline, which is the full-precision one from then on."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cemq.errors import InputError, ModelError, first_line
from cemq.files import absolute, sha256

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

USUAL_FILE = "pytorch_lora_weights.safetensors"  # what save_lora_weights calls it
_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[^\\]+\.safetensors)?")
_LAYER = re.compile(r"\.(?:lora|lokr)[._]")  # what comes before is a layer's name


@dataclass(frozen=True, kw_only=True)
class FusedLora:
    """What a bundle says of a LoRA that is fused into it.

    Args:
        name: The file, or ``owner/name`` or ``owner/name/FILE`` on the Hub.
        scale: What its change of the weights was multiplied with.
        sha256: Of the file.
        revision: The Hub commit; None for a file.
    """

    name: str
    scale: float
    sha256: str
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class Lora:
    """One that is to be fused, and where its file lies."""

    file: Path
    fused: FusedLora


def read_lora(text: str) -> tuple[str, float]:
    """Name and scale of ``FILE_OR_ID[:scale]``.

    >>> read_lora("owner/name:0.8"), read_lora(r"C:\\loras\\ink.safetensors")
    (('owner/name', 0.8), ('C:\\\\loras\\\\ink.safetensors', 1.0))

    Raises:
        InputError: There is no name, or the scale is no finite number.
    """
    name, colon, scale = text.rpartition(":")
    if not colon or os.path.lexists(absolute(text)) or re.search(r"[\\/]", scale):  # the latter: C:\ is a drive
        name, scale = text, "1"
    if not name:
        raise InputError(f"lora {text!r}: write FILE_OR_ID, or FILE_OR_ID:SCALE")
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"lora {text!r}: the scale {scale!r} is no finite number: write FILE_OR_ID:0.8")
    return name, value


def locate_lora(name: str, scale: float, *, revision: str | None = None) -> Lora:
    """Find a LoRA's file, downloading it where it is named by its Hub id.

    Args:
        name: A safetensors file, a folder with one, ``owner/name`` on the Hub, or ``owner/name/FILE`` there.
        revision: Commit on the Hub; None takes the main branch's.

    Raises:
        ModelError: There is no such file, or it is none that can be fused; or peft, which diffusers fuses with, is not
            installed.
    """
    if find_spec("peft") is None:
        raise ModelError(
            f"lora '{name}': diffusers fuses it with peft, which is not installed: pip install 'cemq[lora]'"
        )
    place = absolute(name)
    if os.path.isdir(place):
        found = _only_file([path.name for path in place.iterdir()], name)
        file, name, revision = place / found, os.path.realpath(place / found), None
    elif os.path.lexists(place):
        file, name, revision = place, os.path.realpath(place), None
    elif _ON_HUB.fullmatch(name) and not (name.count("/") == 1 and name.endswith(".safetensors")):
        file, revision = _download(name, revision)
    else:
        raise ModelError(f"no such LoRA '{name}': give a safetensors file, a folder with one, or a Hub id (owner/name)")
    _check_file(file, name)
    return Lora(file=file, fused=FusedLora(name=name, scale=scale, sha256=sha256(file), revision=revision))


def locate_again(fused: FusedLora) -> Lora:
    """The LoRA that a bundle was made with.

    Raises:
        ModelError: As of `locate_lora`; or it is another by now.
    """
    found = locate_lora(fused.name, fused.scale, revision=fused.revision)
    if found.fused.sha256 != fused.sha256:
        raise ModelError(
            f"LoRA '{fused.name}' is another file than the bundle was made with (SHA-256 {found.fused.sha256[:12]}..., "
            f"not {fused.sha256[:12]}...): put that one there, or build another bundle"
        )
    return found


def check_fusing(kind: type, loras: Sequence[Lora]) -> None:
    """Raises ModelError where there are LoRAs and a pipeline class takes none."""
    if loras and not (hasattr(kind, "load_lora_weights") and hasattr(kind, "fuse_lora")):
        raise ModelError(f"{kind.__name__} loads no LoRAs: leave lora '{loras[0].fused.name}' out")


def fuse_loras(pipe: DiffusionPipeline, loras: Sequence[Lora]) -> None:
    """Fuse each into the weights, in order; no layer of theirs is left.

    Raises:
        ModelError: One does not fit the pipeline, or makes weights that are no finite numbers.
    """
    from cemq.pipelines.batches import BUILD_LOG  # loads torch

    check_fusing(type(pipe), loras)
    for lora in loras:
        name, kind = lora.fused.name, type(pipe).__name__
        with _said_by_nobody():
            try:
                names = _layer_names(pipe.lora_state_dict(str(lora.file), use_safetensors=True, local_files_only=True))
                pipe.load_lora_weights(str(lora.file), use_safetensors=True, local_files_only=True)
                found = _layers(pipe)
                if sum(found.values()):
                    components = [component for component, count in found.items() if count]
                    pipe.fuse_lora(components=components, lora_scale=lora.fused.scale, safe_fusing=True)
                    pipe.unload_lora_weights()
            except Exception as error:  # diffusers, peft and torch have many for a file that does not fit
                raise ModelError(f"LoRA '{name}' does not fit {kind}: {_reason(error)}") from error
        count = sum(found.values())
        if not count:
            raise ModelError(
                f"LoRA '{name}' does not fit {kind}: none of its {len(names)} layers is one of the pipeline's"
            )
        if count < len(names):
            logging.getLogger(BUILD_LOG).warning(
                f"LoRA '{name}': {count} of its {len(names)} layers are fused, {kind} has no others of these names"
            )


def adapted_layers(model: nn.Module) -> list[Any]:
    """PEFT's layers in a model: those that an adapter lies beside, or did."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # who has put layers there has loaded it
    return [] if tuners is None else [each for each in model.modules() if isinstance(each, tuners.BaseTunerLayer)]


def is_adapted(pipe: DiffusionPipeline) -> bool:
    """Whether what a pipeline computes is changed by adapters, beside its layers or fused into them."""
    from torch import nn

    if getattr(pipe, "num_fused_loras", 0):
        return True
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return any(_adds(layer) for part in parts for layer in adapted_layers(part))


def _adds(layer: Any) -> bool:
    scaling = getattr(layer, "scaling", {})
    return not layer.disable_adapters and any(scaling.get(name, 0) for name in layer.active_adapters)


def _reason(error: Exception) -> str:
    """The first line of what a library says, and the next where torch only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines and lines[0].endswith(":") else first_line(error)


def _layer_names(weights: Any) -> set[str]:
    """The layers that a LoRA has something for; diffusers gives alphas beside the weights, or does not."""
    tensors = weights[0] if isinstance(weights, tuple) else weights
    return {_LAYER.split(name)[0] for name in tensors if _LAYER.search(name)}


def _layers(pipe: DiffusionPipeline) -> dict[str, int]:
    """How many layers of each component are adapted."""
    from torch import nn

    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {name: len(adapted_layers(part)) for name, part in parts.items()}


@contextmanager
def _said_by_nobody() -> Iterator[None]:
    """Without what the libraries log of a LoRA: of each component that it has nothing for, and errors twice."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_file(file: Path, name: str) -> None:
    """Raises ModelError for a file that cannot be fused, as far as its header tells."""
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        raise ModelError(f"LoRA '{name}' is no safetensors file: other formats can hold a program")
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"LoRA '{name}' cannot be read: {getattr(error, 'strerror', None) or first_line(error)}"
        ) from None
    if any("dora_scale" in key for key in names):
        raise ModelError(f"LoRA '{name}' is a DoRA, and diffusers leaves its dora_scale out: it would be another one")


def _download(name: str, revision: str | None) -> tuple[Path, str]:
    """The file of a Hub id, and the commit it is of.

    Raises:
        ModelError: It cannot be fetched, or there are several to choose from.
    """
    from huggingface_hub import HfApi, hf_hub_download

    owner, repository, *rest = name.split("/")
    repo_id, inside = f"{owner}/{repository}", "/".join(rest)
    try:
        if not inside:
            siblings = HfApi().model_info(repo_id, revision=revision).siblings or []
            inside = _only_file([each.rfilename for each in siblings], name)
        file = Path(hf_hub_download(repo_id, inside, revision=revision))
    except ModelError:
        raise
    except Exception as error:  # huggingface_hub and its transport raise many unrelated types
        raise ModelError(
            f"LoRA '{name}' is no file here and cannot be fetched from the Hub: {first_line(error)}"
        ) from error
    return file, file.parts[-1 - len(inside.split("/"))]  # .../snapshots/COMMIT/FILE


def _only_file(names: Sequence[str], where: str) -> str:
    """Which file of a folder or repository is meant: the one of the usual name, else the only one.

    Raises:
        ModelError: There is none, or several to choose from.
    """
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if USUAL_FILE in found:
        return USUAL_FILE
    if len(found) != 1:
        held = f"several: {', '.join(found[:4])}{', ...' if len(found) > 4 else ''}; name one" if found else "none"
        raise ModelError(f"LoRA '{where}' is to be a safetensors file, and it holds {held}")
    return found[0]
