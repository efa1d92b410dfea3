"""Which dtype each tensor of a pipeline has: a bundle is loaded in those that it was measured in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import nn

from cemq.bundle.manifest import ComponentDtypes, Manifest
from cemq.errors import BundleError
from cemq.quantize import QuantizedLinear

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Dtypes = dict[str, dict[str, str]]  # of every tensor, by component and name


def tensor_dtypes(pipe: DiffusionPipeline) -> Dtypes:
    """Of all parameters and buffers, stored or not; those that a quantized layer's scheme fixes are left out."""
    return {
        name: {tensor: str(values.dtype).removeprefix("torch.") for tensor, values in _tensors(part)}
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module)
    }


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    fixed = {
        f"{name}.{tensor}"
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
        for tensor in layer.layout(layer.in_features, layer.out_features, layer.scheme)
    }
    for name, values in (*model.named_parameters(), *model.named_buffers()):
        if name not in fixed:
            yield name, values


def as_loaded(opened: Dtypes, quantized: Dtypes) -> dict[str, ComponentDtypes]:
    """What a load must give of a pipeline that was ``opened`` with these dtypes and then quantized.

    Not what it has in the end: some pipelines cast their autoencoder when they first decode, and will again.
    """
    return {
        name: _summary({tensor: opened[name][tensor] for tensor in tensors})
        for name, tensors in quantized.items()
        if tensors
    }


def restore_dtypes(pipe: DiffusionPipeline, opened: Dtypes, *, but_for: Set[str]) -> None:
    """Give every tensor the dtype with which it was opened, but for components that are quantized.

    Some pipelines cast their autoencoder when they first decode: what is written shall not depend on who has run it.
    """
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in but_for:
            for tensor, values in _tensors(part):
                kind = getattr(torch, opened[name].get(tensor, ""), values.dtype)
                values.data = values.data.to(kind)


def _summary(dtypes: Mapping[str, str]) -> ComponentDtypes:
    ((default, _),) = Counter(dtypes.values()).most_common(1)
    exceptions = {kind: sorted(name for name in dtypes if dtypes[name] == kind) for kind in sorted({*dtypes.values()})}
    del exceptions[default]
    return ComponentDtypes(default=default, exceptions={kind: tuple(names) for kind, names in exceptions.items()})


def check_dtypes(pipe: DiffusionPipeline, folder: Path, manifest: Manifest) -> None:
    """Raises BundleError, naming file and tensor, unless every tensor has the dtype that it was measured in."""
    for component, tensor, expected, found in differing(tensor_dtypes(pipe), manifest):
        libraries = ", ".join(f"{name} {manifest.libraries.get(name, '?')}" for name in ("diffusers", "transformers"))
        raise BundleError(
            f"bundle '{folder}': tensor '{tensor}' of {_file_of(folder, component, tensor)} is {found}, and what was "
            f"measured is {expected}: install {libraries}, which it was made with, or write the bundle again"
        )


def differing(found: Dtypes, manifest: Manifest) -> Iterator[tuple[str, str, str, str]]:
    """Component, tensor, expected and found dtype of every tensor that is not as the manifest says, if it says."""
    for component, expected in (manifest.dtypes or {}).items():
        tensors = found.get(component, {})
        special = {name: kind for kind, names in expected.exceptions.items() for name in names}
        for name in (*tensors, *(special.keys() - tensors.keys())):
            wanted, has = special.get(name, expected.default), tensors.get(name, "missing")
            if has != wanted:
                yield component, name, wanted, has


def _file_of(folder: Path, component: str, tensor: str) -> str:
    """Which file of the bundle holds it; for a buffer that is computed, which component."""
    for path in sorted((folder / component).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if tensor in file.keys():  # noqa: SIM118
                return f"'{component}/{path.name}'"
    return f"'{component}', computed when it is loaded,"
