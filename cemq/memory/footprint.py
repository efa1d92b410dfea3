"""How many bytes a pipeline folder takes on a device, by its configs and the headers of its weights: nothing is loaded.

Weights are exact. Activations are estimates: fitted for transformers and for AutoencoderKL, rough for UNets and for
other autoencoders.
"""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cemq.errors import BundleError, InputError, ModelError, first_line
from cemq.families import BLOCK_LISTS, DENOISERS, EIGHT_BIT, cached_modules, matches
from cemq.memory.placement import (
    ComponentMemory,
    Role,
    transformer_activation_bytes,
    vae_activation_bytes,
)
from cemq.pipelines.opening import weight_files

_ITEMSIZE = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ANY_FLOAT = "any"  # stored, for what is not quantized: whatever float a file holds is loaded in one dtype
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FEW_ROWS = (*EIGHT_BIT, "*embed*", "*shared*", "*head*", "*pooler*")  # layers that do not see every token
_MULTIPLY_IN_FLOATS = ("a16", "a16-fp4")
_DEFAULT_SIZE = 1024  # pixels, where neither the call nor the pipeline says
_TEXT_TOKENS = 512
_CLIP_TOKENS = 77  # beside those of a second encoder (SD3)
_CHANNELS = (128, 256, 512, 512)  # of an autoencoder whose config says nothing cemq knows
_TILE = 512
_FRAMES_PER_LATENT = 4


def itemsize_of(dtype: str) -> int:
    """Bytes of a number, for the name of a float dtype."""
    return _ITEMSIZE[DTYPES[dtype]]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One entry of a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * _ITEMSIZE.get(self.dtype, 1)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is drawn at once: pixels, frames of a video, tokens of text, samples and guidance branches run together."""

    height: int
    width: int
    frames: int
    text_tokens: int
    samples: int
    branches: int

    def latent_frames(self, vae: Mapping[str, Any]) -> int:
        return 1 + (self.frames - 1) // (vae.get("scale_factor_temporal") or _FRAMES_PER_LATENT)


@dataclass(frozen=True, kw_only=True, eq=False)
class Headers:
    """A pipeline folder by its configs and the headers of its weights, and what is drawn with it.

    Args:
        pipeline: The class of it; None where the installed diffusers has none of that name.
        classes: Library and class of every component that has weights, by name.
        tensors: What its files hold, by the same names.
        configs: Their config.json.
    """

    pipeline: Any
    classes: Mapping[str, tuple[str, str]]
    tensors: Mapping[str, tuple[Tensor, ...]]
    configs: Mapping[str, dict[str, Any]]
    picture: Picture

    @property
    def first_denoiser(self) -> str:
        """Its name; there is one."""
        return next(name for name in DENOISERS if name in self.configs)

    def role(self, name: str) -> Role:
        return "denoiser" if name in DENOISERS else "vae" if name.startswith("vae") else "other"

    def rows(self, name: str) -> int:
        """Tokens that a component sees, of all samples and branches of guidance; text encoders see the text."""
        return _rows(self.role(name), self.configs, name, self.picture)


def read_headers(folder: Path, *, call: Mapping[str, Any], samples: int = 1, variant: str | None = None) -> Headers:
    """What `Headers` holds, for a call of the pipeline that draws so many samples at once.

    Args:
        call: Arguments of the pipeline; height, width, num_frames, max_sequence_length and guidance matter.
        samples: Pictures drawn at once.
        variant: Of the weights, as of `cemq.pipelines.opening.weight_files`.

    Raises:
        ModelError: The folder is not a pipeline's.
        BundleError: A file of weights is damaged.
    """
    index = _json(folder / "model_index.json")
    kinds = {name: tuple(kind) for name, kind in index.items() if isinstance(kind, list) and len(kind) == 2}
    named = [name for name, kind in kinds.items() if all(kind)]
    tensors = {name: found for name in named if (found := tuple(tensors_of(folder / name, variant)))}
    configs = {name: _json(folder / name / "config.json") for name in tensors}
    if not set(tensors) & set(DENOISERS):
        raise ModelError(f"'{folder}' holds no {' or '.join(DENOISERS)}: cemq cannot plan its memory")
    pipeline = _diffusers_class(index.get("_class_name"))
    return Headers(
        pipeline=pipeline,
        classes={name: kinds[name] for name in tensors},
        tensors=tensors,
        configs=configs,
        picture=_picture(pipeline, configs, call, samples),
    )


def read_footprint(
    headers: Headers,
    *,
    dtype: str,
    full_steps: int,
    stored_dtype: str | None = None,
    cache: str = "output",
    kept_steps: int = 0,
) -> tuple[ComponentMemory, ...]:
    """Bytes of every model in a pipeline folder, a bundle's or any other.

    Args:
        dtype: Of everything that is not quantized, once it is loaded.
        full_steps: Steps of a run that are computed in full.
        stored_dtype: Of what is not quantized, in the folder; None: ``dtype``; `ANY_FLOAT`: any.
        cache: What is kept of a full-compute step; see `cemq.runtime.Plan`.
        kept_steps: The most steps of which it is kept at a time.
    """
    configs, picture = headers.configs, headers.picture
    sequence = (getattr(headers.pipeline, "model_cpu_offload_seq", None) or "").split("->")
    excluded = getattr(headers.pipeline, "_exclude_from_cpu_offload", ())

    found = []
    for name, tensors in headers.tensors.items():
        role, (library, kind) = headers.role(name), headers.classes[name]
        known = _diffusers_class(kind) if library == "diffusers" else None
        loaded = [_as_loaded(tensor, stored_dtype or dtype, dtype) for tensor in tensors]
        whole, *fewer = _activations(role, tensors, configs, name, picture, dtype)
        is_first = name == headers.first_denoiser  # a second one (Wan 2.2) goes on with what the first one left
        kept = cached_bytes(headers, dtype=dtype, cache=cache, kept_steps=kept_steps) if is_first else 0
        found.append(
            ComponentMemory(
                name=name,
                role=role,
                weight_bytes=sum(tensor.bytes for tensor in loaded),
                activation_bytes=whole,
                cached_bytes=kept,
                calls=full_steps if role == "denoiser" else 1,
                blocks=_blocks(loaded),
                largest_leaves=_largest_leaves(loaded),
                in_sequence=name in sequence and name not in excluded,
                groups=getattr(known, "_supports_group_offloading", True),
                vae_activation_bytes=(fewer[0], fewer[1]) if fewer else None,
            )
        )
    return tuple(found)


def cached_bytes(headers: Headers, *, dtype: str, cache: str, kept_steps: int) -> int:
    """What is cached of so many full-compute steps at once; the other arguments are those of `read_footprint`."""
    name = headers.first_denoiser
    tensors = headers.tensors[name]
    features = output_features(headers.configs[name]) if cache == "output" else widths(tensors)[0]
    return kept_steps * _cached_tensors(cache, tensors) * features * headers.rows(name) * itemsize_of(dtype)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read: {first_line(error)}") from None


def tensors_of(component: Path, variant: str | None = None) -> Iterator[Tensor]:
    """What its files hold, those that are loaded. Raises BundleError for a damaged one."""
    for path in weight_files(component, variant):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118
                    entry = file.get_slice(name)
                    yield Tensor(name=name, dtype=entry.get_dtype(), shape=tuple(entry.get_shape()))
        except (OSError, SafetensorError) as error:
            raise BundleError(f"'{path}' is not a whole safetensors file ({error}): copy or write it again") from None


def _as_loaded(tensor: Tensor, stored: str, dtype: str) -> Tensor:
    """The tensor in the dtype it is loaded in; what a quantized layer stores in float32 stays so."""
    stored_as = DTYPES.values() if stored == ANY_FLOAT else (DTYPES[stored],)
    if tensor.dtype in stored_as and not tensor.name.endswith("_scale"):
        return Tensor(name=tensor.name, dtype=DTYPES[dtype], shape=tensor.shape)
    return tensor


def _diffusers_class(name: str | None) -> Any:
    import diffusers

    return getattr(diffusers, name or "", None)


def _blocks(tensors: list[Tensor]) -> tuple[int, ...]:
    """Bytes of the children of every list of modules at the top, as block-level offloading takes them."""
    sizes: dict[tuple[str, int], int] = {}
    for tensor in tensors:
        parts = tensor.name.split(".")
        if len(parts) > 2 and parts[1].isdigit():
            key = (parts[0], int(parts[1]))
            sizes[key] = sizes.get(key, 0) + tensor.bytes
    return tuple(size for _, size in sorted(sizes.items()))


def _cached_tensors(cache: str, tensors: Sequence[Tensor]) -> int:
    """How many tensors with a row for each token are cached of a full-compute step.

    Text and picture may have modules of their own: those of the text, which is shorter, are counted as if it were not.
    """
    if cache not in ("modules", "inside"):  # of the latter a policy keeps no more
        return 1
    blocks: dict[tuple[str, str], set[str]] = {}
    for tensor in tensors:
        parts = tensor.name.split(".")
        if len(parts) > 3 and parts[1].isdigit() and matches(parts[0], BLOCK_LISTS):
            child = parts[3] if parts[2] == "block" else parts[2]  # HiDream wraps its blocks
            blocks.setdefault((parts[0], parts[1]), set()).add(child)
    return sum(len(cached_modules(children)) for children in blocks.values())


def output_features(config: Mapping[str, Any]) -> int:
    """Values of the denoiser's output for each of its tokens."""
    patch = config.get("patch_size") or 1
    size = prod(patch) if isinstance(patch, (list, tuple)) else patch**2
    return size * (config.get("out_channels") or config.get("in_channels") or 1)


def _largest_leaves(tensors: list[Tensor]) -> tuple[int, int]:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.name.rpartition(".")[0]] += tensor.bytes
    first, second = [*sorted(sizes.values(), reverse=True), 0, 0][:2]
    return first, second


def _default(pipeline: Any, argument: str, call: Mapping[str, Any]) -> Any:
    """What the call says, else the pipeline's own default; None where neither says."""
    if (said := call.get(argument)) is not None:
        if not isinstance(said, (int, float)) or not math.isfinite(said):
            raise InputError(f"{argument}={said!r} is no number")
        return said
    parameter = inspect.signature(pipeline.__call__).parameters.get(argument) if pipeline else None
    return parameter.default if parameter is not None and isinstance(parameter.default, (int, float)) else None


def _count(pipeline: Any, argument: str, call: Mapping[str, Any], otherwise: int) -> int:
    """The same of something that there is one of at least; ``otherwise`` where neither says."""
    found = _default(pipeline, argument, call)
    if found is not None and found < 1:
        raise InputError(f"{argument}={found}: give at least 1")
    return otherwise if found is None else int(found)


def _picture(pipeline: Any, configs: Mapping[str, dict], call: Mapping[str, Any], samples: int) -> Picture:
    denoiser = next(configs[name] for name in DENOISERS if name in configs)
    native = denoiser.get("sample_size")
    if isinstance(native, (list, tuple)):
        native = native[-1]
    size = native * _vae_scale(configs.get("vae", {})) if native else _DEFAULT_SIZE
    texts = [config for name, config in configs.items() if "text_encoder" in name]
    longest = [config.get("max_position_embeddings") or _TEXT_TOKENS + 1 for config in texts]
    sequence = _count(pipeline, "max_sequence_length", call, 0)
    if longest and max(longest) <= _TEXT_TOKENS and not sequence:  # CLIP's: they cannot take more
        tokens = max(longest)
    else:  # SD3 pads its CLIP tokens with as many empty ones if it has no T5
        tokens = (sequence or _TEXT_TOKENS) + min([_CLIP_TOKENS, *longest])
    guided = (_default(pipeline, "guidance_scale", call) or 0) > 1 and not denoiser.get("guidance_embeds")
    guided = guided or (_default(pipeline, "true_cfg_scale", call) or 0) > 1
    return Picture(
        height=_count(pipeline, "height", call, size),
        width=_count(pipeline, "width", call, size),
        frames=_count(pipeline, "num_frames", call, 1),
        text_tokens=tokens if texts else 0,
        samples=samples * _count(pipeline, "num_images_per_prompt", call, 1),
        branches=2 if guided else 1,
    )


def _vae_scale(vae: Mapping[str, Any]) -> int:
    """Pixels a latent stands for, along one side."""
    if isinstance(vae.get("scale_factor_spatial"), int):
        return vae["scale_factor_spatial"]
    return 2 ** (len(_channels(vae)) - 1)


def _channels(vae: Mapping[str, Any]) -> tuple[int, ...]:
    for name in ("decoder_block_out_channels", "block_out_channels"):
        if vae.get(name):
            return tuple(vae[name])
    if vae.get("base_dim") and vae.get("dim_mult"):
        return tuple(vae["base_dim"] * factor for factor in vae["dim_mult"])
    return _CHANNELS


def _activations(
    role: Role, tensors: tuple[Tensor, ...], configs: Mapping[str, dict], name: str, picture: Picture, dtype: str
) -> tuple[int, ...]:
    """Bytes that a model works on; of an autoencoder also how few they get, see `_vae_activations`."""
    itemsize = itemsize_of(dtype)
    if role == "vae":
        return _vae_activations(configs[name], picture, dtype)
    if name == "unet":
        return (_unet_activations(configs[name], configs.get("vae", {}), picture, itemsize),)
    return (_transformer_activations(role, tensors, configs, name, picture, itemsize),)


def _vae_activations(vae: Mapping[str, Any], picture: Picture, dtype: str) -> tuple[int, int, int]:
    """Of the whole batch at once, sample by sample, and in tiles."""
    itemsize = 4 if vae.get("force_upcast") and dtype == "float16" else itemsize_of(dtype)
    channels, frames = _channels(vae), picture.frames

    def decode(samples: int, height: int, width: int) -> int:
        return vae_activation_bytes(
            samples=samples, height=height, width=width, channels=channels, itemsize=itemsize, frames=frames
        )

    sizes = vae.get("sample_size") or _TILE
    tile = max(sizes) if isinstance(sizes, (list, tuple)) else sizes
    outputs = 6 * picture.samples * frames * picture.height * picture.width * itemsize  # decoded, and joined
    sliced = decode(1, picture.height, picture.width) + (outputs if picture.samples > 1 else 0)
    tiled = decode(1, min(tile, picture.height), min(tile, picture.width)) + 2 * outputs
    whole = decode(picture.samples, picture.height, picture.width)
    return whole, min(whole, sliced), min(whole, sliced, tiled)


def _transformer_activations(
    role: Role,
    tensors: tuple[Tensor, ...],
    configs: Mapping[str, dict],
    name: str,
    picture: Picture,
    itemsize: int,
) -> int:
    hidden, widest = widths(tensors)
    if not hidden:
        return 0
    scheme = str((configs[name].get("quantization_config") or {}).get("scheme", ""))
    quantized = [prod(t.shape) * (2 if t.dtype == "U8" else 1) for t in tensors if t.dtype in ("I8", "U8")]
    packed = any(t.dtype == "U8" for t in tensors)
    return _expanded_bytes(scheme, quantized, packed=packed, itemsize=itemsize) + transformer_activation_bytes(
        rows=_rows(role, configs, name, picture),
        hidden=hidden,
        widest=widest,
        itemsize=itemsize,
        integer_activations=scheme.endswith("a8"),
    )


def _expanded_bytes(scheme: str, sizes: Sequence[int], *, packed: bool, itemsize: int) -> int:
    """Of the largest of the quantized weights, of so many numbers, as it is multiplied."""
    if sizes and scheme.endswith(_MULTIPLY_IN_FLOATS):
        return max(sizes) * (5 + itemsize)
    return max(sizes) if sizes and packed else 0


def quantized_activation_bytes(headers: Headers, name: str, *, scheme: str, dtype: str) -> int:
    """Bytes that a denoiser works on which is in full precision yet, once it is quantized to a scheme."""
    tensors, itemsize = headers.tensors[name], itemsize_of(dtype)
    hidden, widest = widths(tensors)
    sizes = [prod(tensor.shape) for tensor in tensors if len(tensor.shape) == 2]
    return _expanded_bytes(scheme, sizes, packed=scheme.startswith("w4"), itemsize=itemsize) + (
        transformer_activation_bytes(
            rows=headers.rows(name), hidden=hidden, widest=widest, itemsize=itemsize,
            integer_activations=scheme.endswith("a8"),
        )
    )  # fmt: skip


def widths(tensors: tuple[Tensor, ...]) -> tuple[int, int]:
    """Of a transformer's stream of tokens, and of the widest layer that sees it; zeros if none does."""
    layers = [
        tensor
        for tensor in tensors
        if len(tensor.shape) in (2, 3)
        and tensor.name.endswith(".weight")
        and not matches(tensor.name.removesuffix(".weight"), FEW_ROWS)
    ]
    if not layers:
        return 0, 0
    inputs = [tensor.shape[1] * (2 if tensor.dtype == "U8" else 1) for tensor in layers]
    return Counter(inputs).most_common(1)[0][0], max(*inputs, *(tensor.shape[0] for tensor in layers))


def _rows(role: Role, configs: Mapping[str, dict], name: str, picture: Picture) -> int:
    """Tokens of all samples and branches of guidance."""
    tokens = picture.text_tokens
    if role == "denoiser":
        tokens += picture.latent_frames(configs.get("vae", {})) * _picture_tokens(configs[name], configs, picture)
    return picture.samples * picture.branches * tokens


def _picture_tokens(config: Mapping[str, Any], configs: Mapping[str, dict], picture: Picture) -> int:
    """Tokens of one latent frame: one for each patch."""
    vae = configs.get("vae", {})
    patch = config.get("patch_size") or 1
    side = patch[-1] if isinstance(patch, (list, tuple)) else patch
    if side == 1 and vae.get("latent_channels") and config.get("in_channels") == 4 * vae["latent_channels"]:
        side = 2  # the pipeline packs two by two latents into one token (FLUX)
    pixels = _vae_scale(vae) * side
    return -(-picture.height // pixels) * -(-picture.width // pixels)


def _unet_activations(unet: Mapping[str, Any], vae: Mapping[str, Any], picture: Picture, itemsize: int) -> int:
    """A guess: as a decoder's of the latents, with the skip connections twice as much."""
    scale = _vae_scale(vae)
    return 2 * vae_activation_bytes(
        samples=picture.samples * picture.branches,
        height=picture.height // scale,
        width=picture.width // scale,
        channels=_channels(unet),
        itemsize=itemsize,
        frames=picture.frames,
    )
