"""Opening a pipeline by name: a built-in one, a folder, or a Hub id."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cemq.errors import InputError, ModelError, choose, first_line
from cemq.families import DENOISERS, SIZED_BY_CLASS
from cemq.files import absolute

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

BUILTIN_PREFIX = "builtin:"
BUILTIN_FOLDER = Path(__file__).parents[1] / "builtin"
BUILTINS = tuple(sorted(path.parent.name for path in BUILTIN_FOLDER.glob("*/model_index.json")))
DTYPES = ("float32", "bfloat16", "float16")
ALIGNMENT = 64  # bytes, as torch allocates on a CPU


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model's files lie; ``revision`` is the Hub commit, or None where there is none."""

    name: str
    folder: Path
    revision: str | None = None


def locate(name: str, *, variant: str | None = None, revision: str | None = None) -> ModelSource:
    """Find a model's folder, downloading it where it is a Hub id.

    Args:
        variant: Of the weights to download, such as ``fp16``; None takes the plain ones.
        revision: Commit on the Hub; None takes the main branch's.

    Raises:
        ModelError: No such built-in, folder or Hub model, or the folder is not a diffusers pipeline.
    """
    if name.startswith(BUILTIN_PREFIX):
        short = choose("built-in model", name.removeprefix(BUILTIN_PREFIX), BUILTINS, ModelError)
        return ModelSource(name=name, folder=BUILTIN_FOLDER / short)
    folder = absolute(name)
    if name and os.path.lexists(folder):
        if not os.path.isfile(folder / "model_index.json"):
            raise ModelError(f"'{name}' is not a diffusers pipeline folder: it holds no model_index.json")
        return ModelSource(name=os.path.realpath(folder), folder=folder)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(
            f"no such model '{name}': give builtin:NAME, a pipeline folder, or a Hub id such as owner/name"
        )
    from diffusers import DiffusionPipeline

    try:
        downloaded = Path(DiffusionPipeline.download(name, variant=variant, revision=revision))
    except Exception as error:  # huggingface_hub and its transport raise many unrelated types
        found = f"'{name}' is no folder here and cannot be fetched from the Hub: {first_line(error)}"
        raise ModelError(found + _variant_advice(error)) from error
    return ModelSource(name=name, folder=downloaded, revision=downloaded.name)


def open_pipeline(folder: Path, *, dtype: str, device: str, aligned: bool = True, variant: str | None = None) -> Any:
    """Load a pipeline folder in its own class.

    Without ``aligned``, tensors stay in the memory-mapped file until they are moved.

    Args:
        variant: Of the weights, such as ``fp16``; None takes the plain ones, or the variant where there is only one.

    Raises:
        ModelError: The folder cannot be loaded.
        InputError: Unknown dtype or device.
    """
    import torch
    from diffusers import DiffusionPipeline

    choose("dtype", dtype, DTYPES)
    place = check_device(device)
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        pipeline_class(str(index.get("_class_name")))
        # a component that is absent on purpose (SD3 without its T5) must be named, or diffusers misses it
        absent = {name: None for name, kind in index.items() if kind == [None, None]}
        pipe = DiffusionPipeline.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            variant=variant or _only_variant(folder),
            **absent,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, ImportError) as error:
        raise ModelError(f"'{folder}' cannot be loaded as a diffusers pipeline: {first_line(error)}") from error
    if type(pipe).__name__ in SIZED_BY_CLASS and pipe.vae is not None:
        pipe.default_sample_size = pipe.vae.config.sample_size // pipe.vae_scale_factor
    pipe = pipe.to(place)
    if aligned:
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                align(component)
    return pipe


def weight_files(component: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files that are loaded of those of a component, which may lie there as several variants.

    Args:
        variant: As of `open_pipeline`; a component that does not have it is loaded from the plain ones.
    """
    of: dict[str | None, list[Path]] = {}
    for path in sorted(component.glob("*.safetensors")):
        of.setdefault(_variant_of(path), []).append(path)
    if variant in of:
        return of[variant]
    return of[None] if None in of else [path for paths in of.values() for path in paths]


def _variant_of(path: Path) -> str | None:
    """``fp16`` of ``model.fp16-00001-of-00002.safetensors``; None of plain files."""
    return next(iter(re.sub(r"-\d+-of-\d+", "", path.name).split(".")[1:-1]), None)


def _only_variant(folder: Path) -> str | None:
    """The variant to load where a component has weights of no other kind.

    Raises:
        ModelError: There are several to choose from.
    """
    found: set[str | None] = set()
    for component in {path.parent for path in folder.glob("*/*.safetensors")}:
        variants = {_variant_of(path) for path in component.glob("*.safetensors")}
        if None not in variants:
            found |= variants
    if len(found) > 1:
        names = " and ".join(sorted(map(str, found)))
        raise ModelError(f"'{folder}' holds weights as {names}: give --variant with one of them")
    return next(iter(found), None)


def _variant_advice(error: Exception) -> str:
    """What to try where weights of no plain name were looked for."""
    return "; weights may be there as a variant, give --variant fp16" if "no file named" in str(error).lower() else ""


def pipeline_class(name: str) -> Any:
    """A pipeline class of diffusers. Raises ModelError for one that the installed diffusers does not have."""
    import diffusers

    if not name.isidentifier() or not hasattr(diffusers, name):
        raise ModelError(f"the installed diffusers {diffusers.__version__} has no {name}: install one that does")
    return getattr(diffusers, name)


def class_of_folder(folder: Path) -> Any:
    """The class of a pipeline folder, which is not loaded. Raises ModelError."""
    try:
        name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"'{folder}' cannot be read as a diffusers pipeline: {first_line(error)}") from error
    return pipeline_class(str(name))


def align(model: Any) -> None:
    """Copy CPU tensors that a memory-mapped file left unaligned: other alignments run other kernels, and a reloaded
    model would differ in the last bits."""
    from cemq.reclaim import give_back

    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            mapped = tensor.data
            tensor.data = mapped.clone()
            give_back(mapped)


def check_device(device: str) -> Any:
    """The torch device. Raises InputError for one that does not exist here."""
    import torch

    try:
        place = torch.device(device)
        torch.empty(0, dtype=torch.float32, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used here: {first_line(error)}") from None
    if place.type == "meta":
        raise InputError("device 'meta' cannot be used here: it holds no values")
    return place


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    return "float32" if device == "cpu" else "bfloat16"


def denoisers(pipe: DiffusionPipeline) -> list[tuple[str, Any]]:
    """The (component name, model) pairs that denoise, without `torch.compile`'s wrapper. Raises ModelError for none."""
    found = [(name, getattr(pipe, name)) for name in DENOISERS if getattr(pipe, name, None) is not None]
    found = [(name, getattr(model, "_orig_mod", model)) for name, model in found]
    if not found:
        raise ModelError(f"{type(pipe).__name__} has no {' or '.join(DENOISERS)}: cemq does not know what to quantize")
    return found


def refuse_lost_weights(model: Any) -> None:
    """Raises ModelError for parameters on the meta device that nothing will bring before they are needed.

    Sequential offloading keeps them there and brings them; an adapter that could not be loaded leaves some for good,
    and what is computed with those is NaN.
    """
    lost = list(_lost_weights(model, ""))
    if lost:
        shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise ModelError(
            f"{len(lost)} parameters of {type(model).__name__} are on the meta device, and nothing offloads them "
            f"({shown}): unload the adapter that failed to load, or load the model anew"
        )


def _lost_weights(module: Any, prefix: str, *, brought: bool = False) -> Iterator[str]:
    hook = getattr(module, "_hf_hook", None)  # accelerate's
    offloading: list[Any] = [
        each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False) is True
    ]
    if not brought and not offloading:
        yield from (prefix + name for name, tensor in module.named_parameters(recurse=False) if tensor.is_meta)
    brought = brought or any(each.place_submodules for each in offloading)
    for name, child in module.named_children():
        yield from _lost_weights(child, f"{prefix}{name}.", brought=brought)


def weight_bytes(pipe: DiffusionPipeline) -> int:
    """Bytes of the denoiser's parameters and buffers."""
    return sum(_bytes_of(model) for _, model in denoisers(pipe))


def component_bytes(pipe: DiffusionPipeline) -> dict[str, int]:
    """Bytes of every component's parameters and buffers, by its name."""
    import torch

    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {name: _bytes_of(model) for name, model in models.items()}


def _bytes_of(model: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
