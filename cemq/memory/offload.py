"""Carrying out a placement, with diffusers' and accelerate's own offloading.

Only what `cemq.memory.placement` planned is applied here; `runtime.registration` keeps the schedule above all of it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import accelerate
import torch
from accelerate.utils import offload_weight, save_offload_index
from diffusers.hooks import apply_group_offloading
from torch import nn
from torch.overrides import TorchFunctionMode

from cemq.errors import PlacementError, first_line, refuse_method
from cemq.families import DENOISERS
from cemq.files import absolute, cache_folder
from cemq.memory.placement import MAPPED, ON_DEVICE, MemoryPlan
from cemq.pipelines.opening import ALIGNMENT, align, open_pipeline
from cemq.reclaim import give_back, map_large_allocations

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_COMPLETE = "complete.json"
_LAYOUT = "2"  # of the files that weights rest in; raised when what was written before is not to be read
_GAP = "after "
_WRITERS = ("diffusers", "accelerate", "transformers")


def free_host_memory() -> int | None:
    """Bytes that this process could still take; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def open_placed(
    folder: Path,
    plan: MemoryPlan,
    *,
    dtype: str,
    device: torch.device,
    offload_folder: Path | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """A pipeline folder, opened with its weights where the plan wants them; the other arguments are those of `place`
    and of `open_pipeline`.

    Raises:
        ModelError: It cannot be loaded.
        PlacementError: It has parts that the placement's offloading cannot follow.
    """
    pipe = open_pipeline(folder, dtype=dtype, variant=variant, **before_placing(plan, device))
    place(pipe, plan, device=device, offload_folder=offload_folder)
    return pipe


class BeforePlacing(TypedDict):
    """Where `open_pipeline` lays weights that are then placed."""

    device: str
    aligned: bool


def before_placing(plan: MemoryPlan | None, device: torch.device) -> BeforePlacing:
    """How to open what `place` is then given. Without a plan all of it is to run on the device, and lies there."""
    placement = ON_DEVICE if plan is None else plan.chosen.placement
    if placement.disk and device.type == "cpu":
        map_large_allocations()  # before diffusers takes memory for every weight of the models that it is to fill
    stays = placement is ON_DEVICE
    return {"device": str(device) if stays else "cpu", "aligned": stays}


def place(
    pipe: DiffusionPipeline, plan: MemoryPlan, *, device: torch.device, offload_folder: Path | None = None
) -> None:
    """Put a pipeline that lies in host memory where the plan wants it; ``pipe.cemq_memory_plan`` is the plan then.

    Args:
        offload_folder: Where weights rest that the plan keeps on disk, see `disk_folder`.

    Raises:
        PlacementError: The pipeline has parts that this offloading cannot follow.
    """
    chosen = plan.chosen
    vae = getattr(pipe, "vae", None)
    if vae is not None and chosen.vae != "whole":
        for enable in ("enable_slicing", *(["enable_tiling"] if chosen.vae == "tiled" else [])):
            _enable(vae, enable)
    placement, models = chosen.placement, _models(pipe)
    if placement.unit == "nothing":
        pipe.to(device)
    elif placement.unit == "component":
        pipe.enable_model_cpu_offload(device=device)
    elif placement.hooks == "accelerate" and not placement.disk:
        pipe.enable_sequential_cpu_offload(device=device)
    elif placement is MAPPED:
        pass  # they lie there
    elif placement.disk:
        if device.type == "cpu":
            map_large_allocations()
        assert offload_folder is not None  # whoever plans for a disk has one
        with whole_folder(offload_folder) as folder:
            for name, model in models.items():
                _to_disk(name, model, plan, device, folder / name)
    else:
        for name, model in models.items():
            _in_groups(name, model, plan, device)
    pipe.cemq_memory_plan = plan


def _models(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _enable(vae: Any, name: str) -> None:
    try:
        getattr(vae, name)()
    except (AttributeError, NotImplementedError) as error:
        raise PlacementError(f"the plan wants {type(vae).__name__}.{name}(), which it does not have") from error


def _in_groups(name: str, model: nn.Module, plan: MemoryPlan, device: torch.device, **options: Any) -> None:
    placement, component = plan.chosen.placement, next(c for c in plan.components if c.name == name)
    _check_leaves(name, model, placement.unit == "block" and name in DENOISERS)
    if not component.groups:
        align(model.to(device))
        return
    # only the denoiser is worth prefetching, and only there the order of layers is traced: decoding is no forward
    blocks = placement.unit == "block" and name in DENOISERS
    apply_group_offloading(
        model,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level" if blocks else "leaf_level",
        num_blocks_per_group=1 if blocks else None,
        use_stream=placement.streams and name in DENOISERS,
        **options,
    )


def _check_leaves(name: str, model: nn.Module, blocks: bool) -> None:
    if not blocks and any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        raise PlacementError(
            f"{name}: its attention uses weights of a layer without running it, so layers cannot be offloaded one by "
            "one: allow more memory"
        )


def _to_disk(name: str, model: nn.Module, plan: MemoryPlan, device: torch.device, folder: Path) -> None:
    component = next(c for c in plan.components if c.name == name)
    if component.groups or plan.chosen.placement.hooks != "groups":
        on_disk = (
            f"the weights of {name} rest on disk, without a LoRA: allow more vram, or build the bundle with --lora"
        )
        for method in ("load_lora_adapter", "load_adapter"):  # they offload anew, to files that are taken as they are
            refuse_method(model, method, f"{method}(): {on_disk}")
    if plan.chosen.placement.hooks == "groups" or (name not in DENOISERS and component.groups):
        _untie(model)
        with _GivenBack():
            _in_groups(name, model, plan, device, offload_to_disk_path=str(folder))
        if device.type == "cpu":  # where layers run on the mapped files themselves
            for file in folder.glob("*.safetensors"):
                _align_file(file)
    else:
        _write_weights(model, folder)
        accelerate.disk_offload(model, folder, execution_device=device)


def _untie(model: nn.Module) -> None:
    """Give modules that share a tensor (T5's embeddings) one each, over the same memory.

    diffusers writes the weights of one group after the other and puts empty tensors in their place: of a tensor that
    two groups share, the second one's file would hold whatever lay in that memory.
    """
    seen: set[int] = set()
    for module in model.modules():
        owned = cast("tuple[dict[str, Any], ...]", (module._parameters, module._buffers))
        for tensors in owned:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) in seen:
                    own = tensor.detach()
                    tensors[name] = nn.Parameter(own, tensor.requires_grad) if tensors is module._parameters else own
                seen.add(id(tensors[name]))


def _align_file(path: Path) -> None:
    """Have every tensor of a safetensors file begin at a multiple of `ALIGNMENT`, with zeros between where needed.

    Layers run on the mapped file itself, and other alignments run other kernels: see `cemq.pipelines.opening.align`.
    """
    with path.open("rb") as old:
        size = int.from_bytes(old.read(8), "little")
        header = json.loads(old.read(size))
        tensors = {name: entry for name, entry in header.items() if not name.startswith(("__", _GAP))}
        spans = [entry["data_offsets"] for entry in tensors.values()]
        if not any((8 + size + start) % ALIGNMENT for start, _ in spans):
            return
        header, offset = {}, 0
        for name, entry in tensors.items():
            start, end = entry["data_offsets"]
            header[name] = entry | {"data_offsets": [offset, offset + end - start]}
            offset += end - start
            if gap := -offset % ALIGNMENT:  # the format allows none but that of another tensor
                header[_GAP + name] = {"dtype": "U8", "shape": [gap], "data_offsets": [offset, offset + gap]}
                offset += gap
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as new:
            new.write(len(text).to_bytes(8, "little") + text)
            for start, end in spans:
                old.seek(8 + size + start)
                new.write(old.read(end - start))
                new.write(bytes((start - end) % ALIGNMENT))
    partial.replace(path)


class _GivenBack(TorchFunctionMode):
    """Weights leave memory one by one, as diffusers puts an empty tensor in the place of each that it has written.

    All of a model's weights are views of one mapped file, which would otherwise be in memory as a whole when the last
    one has been read.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.empty_like:
            give_back(args[0])
        return result


def _write_weights(model: nn.Module, folder: Path) -> None:
    """What `accelerate.disk_offload` would write first, one weight in memory at a time."""
    if (folder / "index.json").is_file():
        return
    folder.mkdir(exist_ok=True)
    index: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        offload_weight(tensor, name, folder, index)
        give_back(tensor)
    save_offload_index(index, folder)


def disk_folder(
    checksum: str, plan: MemoryPlan, dtypes: Mapping[str, Mapping[str, str]], root: Path | None = None
) -> Path:
    """Where the weights of a bundle rest when they are offloaded to disk.

    Its name is a hash of everything that decides what the files hold: diffusers takes any file that lies there for its
    own, whatever model wrote it.

    Args:
        checksum: Of the bundle's manifest.
        dtypes: Of the pipeline as it was loaded, by component and name of the tensor.
        root: None takes ``cemq/offload`` in the user's cache folder.
    """
    kinds = json.dumps(dtypes, sort_keys=True)
    parts = (_LAYOUT, checksum, kinds, plan.chosen.placement.name, *map(version, _WRITERS))
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    return absolute(root or cache_folder() / "offload") / key


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that is either whole or begun anew; one process at a time writes it."""
    from filelock import FileLock
    from safetensors import SafetensorError  # of a full disk; it is no OSError

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            yield folder
            sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
            (folder / _COMPLETE).write_text(json.dumps(sizes) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise PlacementError(f"offload folder '{folder.parent}' cannot be written: {reason}") from error


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _COMPLETE)


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return sizes == {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
