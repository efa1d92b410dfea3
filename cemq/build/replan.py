"""A bundle planned again: its quantized weights stay, everything that is measured and planned is new."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cemq.build import references, stages
from cemq.build.settings import OF_MEMORY, BuildSettings, Limit, check_recipe, merged
from cemq.build.work import Work
from cemq.bundle.hub import find_bundle
from cemq.bundle.load import open_quantized
from cemq.bundle.manifest import EVIDENCE, PICTURE, PRIOR, Manifest, read_bundle, read_listing
from cemq.bundle.original import find_model
from cemq.bundle.staging import staging
from cemq.errors import BundleError, InputError, ModelError, choose
from cemq.extensions import load_extensions
from cemq.files import absolute, link_or_copy
from cemq.parallel import ALONE, Processes
from cemq.pipelines.batches import Progress
from cemq.pipelines.lora import locate_again
from cemq.pipelines.opening import check_device, default_device, default_dtype, denoisers, open_pipeline
from cemq.recipe import OF_WEIGHTS, RENAMED, Recipe

_WORK = ".work"  # in the folder of the new bundle, until it is whole
_ALIKE = 0.01  # of the largest value: fusing a LoRA on another device rounds otherwise


def replan(
    bundle: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    processes: Processes = ALONE,
    **settings: Any,
) -> Manifest:
    """Plan a bundle's schedule again without quantizing again, and write another bundle with the same weights.

    Weight files are the old bundle's under another name where the file system can do that, and copies elsewhere.

    Args:
        bundle: The bundle's folder, or ``owner/name`` on the Hub.
        output: The new bundle's folder.
        model: Where the full-precision model lies by now, its LoRAs not fused; None takes where it lay.
        device: Where to run; None takes CUDA where there is one.
        overwrite: Replace a bundle of that name once the new one is whole.
        progress: Called with the stage's name and the share of it done.
        processes: Those that `cemq.parallel.launched` gives, to run a share of the samples each. The main one writes
            the bundle, which is there when this returns in any of them.
        **settings: Fields of `Recipe` that are of plans and samples: steps, budget, effort, solver, calib, samples,
            seed, call, ... The others, and what is not given, are as the bundle's recipe says. ``vram`` and
            ``host_memory``: bytes to stay within, as of a build.

    Raises:
        CemqError: Anything asked for cannot be done, or the model is not the one that the bundle was made from;
            nothing is written.
    """
    load_extensions()
    folder = absolute(find_bundle(bundle))
    made = read_bundle(folder, verify="once")
    asked = resolve_again(folder, made, model, device, settings)
    with staging(Path(output), overwrite=overwrite) if processes.is_main else nullcontext() as staged:
        references.agree(asked, processes)
        open_quantized(folder, made, dtype=made.dtype, device="cpu", aligned=False)  # or it is refused hours later
        work = Work(staged and staged / _WORK, processes, keeps=False)
        full = references.FullPrecision(asked, progress, work)
        _check_same(full, folder)
        opened, samples = full.describe(), references.draw_samples(full.runner, asked)
        originals, _ = references.run_originals(full, opened, samples, fits=False)
        runner = stages.open_quantized(folder, opened, full)
        prior = stages.profile(runner, samples, originals, asked)
        plans = stages.choose_plans(runner, prior, samples, originals, asked)
        checked = stages.check(runner, plans, samples, originals, asked)
        manifest = stages.describe(runner, asked, samples, originals, plans, checked)
        if staged is not None:
            shutil.rmtree(staged / _WORK, ignore_errors=True)  # weights that rested on disk
            _share_pipeline(folder, staged)
            stages.write_bundle(staged, plans, manifest, checked)
    processes.wait()  # until the bundle is there
    return manifest


def resolve_again(
    folder: Path, made: Manifest, model: str | None, device: str | None, settings: dict[str, Any]
) -> BuildSettings:
    """What `replan` was asked for, over the recipe of the bundle; the model and its LoRAs located.

    Raises:
        CemqError: Anything that can be said to be wrong without opening the model.
    """
    limit = Limit.of(**{name: settings.get(name) for name in OF_MEMORY})
    settings = {name: value for name, value in settings.items() if name not in OF_MEMORY}
    for name in settings:
        if name in OF_WEIGHTS:
            raise InputError(f"{name}: a bundle that is planned again keeps its weights: build another for that")
        choose("setting", name, Recipe.model_fields.keys() - OF_WEIGHTS)
    if made.recipe is None:
        raise BundleError(f"bundle '{folder}' does not say its recipe, so it cannot be planned again: build another")
    base = {RENAMED.get(name, name): value for name, value in made.recipe.items()}
    place = device or default_device()
    check_device(place)
    if made.dtype != default_dtype(place):
        base["dtype"] = made.dtype  # what a full build there would need to be told
    recipe = merged(base, settings | {"model": model})
    check_recipe(recipe)
    try:
        source = find_model(made, model)
    except ModelError as error:
        said = "" if model else "; --model says where the model that the bundle was made from lies by now"
        raise ModelError(f"{error}{said}") from error
    loras = tuple(locate_again(each) for each in made.lora)
    if limit and loras:
        raise InputError("vram: the bundle's LoRAs are fused in memory as a whole: leave vram out")
    return BuildSettings(recipe=recipe, source=source, device=place, dtype=made.dtype, loras=loras, limit=limit)


def _check_same(full: references.FullPrecision, folder: Path) -> None:
    """Hold the model against what the bundle kept of it in full precision.

    Raises:
        ModelError: It has other values, so that it is another model or one that was trained on.
    """
    settings, pipe = full.settings, full.runner.pipe
    if settings.limit:  # its weights may be anywhere
        source, variant = settings.source.folder, settings.recipe.variant
        pipe = open_pipeline(source, dtype=settings.dtype, device="cpu", aligned=False, variant=variant)
    for component, denoiser in denoisers(pipe):
        tensors = dict(denoiser.state_dict())
        for path in sorted((folder / component).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in tensors.keys() & set(file.keys()):
                    found, kept = tensors[name], file.get_tensor(name)
                    if found.dtype == kept.dtype and kept.is_floating_point() and not _alike(found.cpu(), kept):
                        raise ModelError(
                            f"'{settings.source.name}' is not the model that the bundle '{folder}' was made from: "
                            f"'{name}' of its {component} has other values; --model says where that one lies"
                        )


def _alike(found: torch.Tensor, kept: torch.Tensor) -> bool:
    if found.shape != kept.shape or not kept.numel():
        return found.shape == kept.shape
    most = _ALIKE * float(kept.abs().max())
    return torch.allclose(found.float(), kept.float(), rtol=0.0, atol=most, equal_nan=True)


def _share_pipeline(folder: Path, staged: Path) -> None:
    """Everything of a bundle but what plans make; text is copied, for people and libraries edit it in place."""
    for name in read_listing(folder).files:
        if name in (PRIOR, EVIDENCE, PICTURE):
            continue
        target = staged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (link_or_copy if target.suffix == ".safetensors" else shutil.copyfile)(folder / name, target)
