"""``pipe.save_pretrained`` of a pipeline that came from a bundle: a bundle again."""

from __future__ import annotations

import functools
import inspect
import shutil
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cemq.bundle.dtypes import differing, tensor_dtypes
from cemq.bundle.manifest import MANIFEST, Manifest, seal, write_pipeline
from cemq.bundle.staging import staging
from cemq.errors import BundleError
from cemq.pipelines.lora import adapted_layers
from cemq.runtime.attach import find_hook
from cemq.runtime.policy_names import describe_policy

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_LEFT_TO_OTHERS = ("README.md", MANIFEST, "model_index.json")


def save_as_bundle(pipe: DiffusionPipeline, origin: Path, manifest: Manifest, *, dtype: str) -> None:
    """Give this one pipeline object a ``save_pretrained`` that writes a bundle; its class stays as it is."""
    saver = type(pipe).save_pretrained
    signature = inspect.signature(saver)

    @functools.wraps(saver)
    def save_pretrained(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, save_directory, *args, **kwargs)
        for name, value in bound.arguments.items():
            default = signature.parameters[name].default
            if default is not inspect.Parameter.empty and value != default:
                raise BundleError(f"save_pretrained({name}={value!r}): a bundle is written in one way; leave it out")
        if bound.arguments.get("kwargs"):
            raise BundleError(f"save_pretrained: unknown arguments {', '.join(bound.arguments['kwargs'])}")
        write_again(self, Path(save_directory), origin, manifest, dtype=dtype)

    pipe.save_pretrained = types.MethodType(save_pretrained, pipe)


def write_again(pipe: DiffusionPipeline, output: Path, origin: Path, manifest: Manifest, *, dtype: str) -> None:
    """Write a pipeline that was loaded from ``origin`` as a bundle.

    Raises:
        BundleError: The pipeline is not what the bundle's fidelity was measured on, its weights lie elsewhere, or the
            output cannot be written.
    """
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and adapted_layers(part):
            raise BundleError(f"{name} holds LoRA layers, and its bundle none: call unload_lora_weights() to save it")
    if getattr(pipe, "num_fused_loras", 0):
        raise BundleError(
            "a LoRA is fused into this pipeline, and its bundle was measured without: build another with --lora"
        )
    hook = find_hook(pipe)
    changed = []
    if hook is not None and hook.run.policy is not None:
        if describe_policy(hook.run.policy) != manifest.policy:
            changed.append(f"follows the policy {hook.run.policy.name}")
    elif hook is not None and hook.plan.schedule != manifest.schedule:
        changed.append(f"follows {hook.plan.schedule.budget} full-compute steps instead of {manifest.schedule.budget}")
    if dtype != manifest.dtype:
        changed.append(f"was loaded in {dtype} instead of {manifest.dtype}")
    else:
        for component, tensor, expected, found in differing(tensor_dtypes(pipe), manifest):
            if not _holds(found, expected):  # a wider one does: some pipelines cast their autoencoder to decode
                changed.append(f"has '{tensor}' of {component} in {found} instead of {expected}")
                break
    if changed:
        raise BundleError(
            f"this pipeline {' and '.join(changed)}, and the fidelity in its bundle was measured otherwise: "
            "load the bundle as it is to save it, or build another"
        )
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and _weights_are_elsewhere(pipe, part):
            raise BundleError(f"the weights of {name} are offloaded: load the bundle without vram= to save it")
    if not (origin / MANIFEST).is_file():
        raise BundleError(f"the bundle '{origin}' that this pipeline came from is gone, and its prior with it")
    with staging(output, overwrite=True) as folder:
        write_pipeline(pipe, folder, origin)
        for path in origin.iterdir():
            if path.is_file() and path.name not in _LEFT_TO_OTHERS:
                shutil.copyfile(path, folder / path.name)
        seal(folder, manifest)


def _holds(found: str, expected: str) -> bool:
    """Whether every number of one dtype is one of the other."""
    wide, narrow = getattr(torch, found, None), getattr(torch, expected)
    return wide is not None and torch.promote_types(wide, narrow) == wide


def _weights_are_elsewhere(pipe: DiffusionPipeline, model: nn.Module) -> bool:
    plan = getattr(pipe, "cemq_memory_plan", None)
    return (plan is not None and plan.chosen.placement.disk) or any(p.is_meta for p in model.parameters())
