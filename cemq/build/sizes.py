"""Bytes that a build writes and holds in host memory, from configs and headers: nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from torch import nn

from cemq.build.fitting import calls_apart
from cemq.build.settings import BuildSettings
from cemq.errors import ModelError, first_line
from cemq.families import DENOISERS
from cemq.memory.footprint import ComponentMemory, Headers, itemsize_of, output_features
from cemq.prior.profile import LARGEST_CHANNEL_GRAMS
from cemq.quantize import CemqConfig
from cemq.quantize.allocate import layer_bytes
from cemq.quantize.calibrate import HESSIAN_BYTES
from cemq.quantize.in_diffusers import quantizable
from cemq.quantize.schemes import NO_SCHEME, SCHEMES, Scheme

_HEADER = 110  # bytes a tensor takes in a file's header: name, shape and place
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf")
_RECORDS = 16_000  # bytes of cemq.json, the model card and what evidence.json holds of no run
_TRIAL = 1_000  # bytes of evidence.json for each schedule that is run


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A linear layer that is going to be quantized."""

    component: str
    name: str
    linear: nn.Linear
    scheme: Scheme


@dataclass(frozen=True, kw_only=True, eq=False)
class Sketch:
    """What quantization makes of a pipeline: the layers that it replaces, with no values, and how."""

    layers: tuple[Layer, ...]
    configs: dict[str, CemqConfig]  # of each component

    def config_of_denoiser(self) -> CemqConfig | None:
        return next((self.configs[name] for name in DENOISERS if name in self.configs), None)

    def stored_bytes(self, layer: Layer) -> int:
        """Of a quantized layer but for its bias."""
        return layer_bytes(self.configs[layer.component], layer.linear, layer.scheme)

    def tensors(self, layer: Layer) -> int:
        """How many a quantized layer stores, but for its bias."""
        linear, config = layer.linear, self.configs[layer.component]
        return len(config.layer_class(layer.scheme).layout(linear.in_features, linear.out_features, layer.scheme))


def sketch(settings: BuildSettings, headers: Headers) -> Sketch:
    """Raises ModelError for a component that cannot be built from its config."""
    asked, layers, configs = settings.quantization, [], {}
    names = asked.components or [name for name in DENOISERS if name in headers.tensors]
    for name in names if asked.scheme != NO_SCHEME else ():
        model = _empty_model(settings.source.folder / name, *headers.classes[name])
        if name in DENOISERS:
            configs[name] = asked.config(model)
            found: Any = quantizable(model, configs[name])
        else:
            from cemq.quantize.in_transformers import TextEncoderConfig, quantizable_layers

            configs[name] = TextEncoderConfig(f"w{SCHEMES[asked.scheme].weight_bits}a16")
            found = ((each, linear, scheme) for each, linear, _, scheme in quantizable_layers(model, configs[name]))
        layers += [Layer(component=name, name=each, linear=linear, scheme=scheme) for each, linear, scheme in found]
    return Sketch(layers=tuple(layers), configs=configs)


def bundle_bytes(
    settings: BuildSettings,
    headers: Headers,
    components: Sequence[ComponentMemory],
    sketched: Sketch,
    *,
    steps: int,
    runs: float,
) -> int:
    """What the bundle takes on disk.

    Layers whose weights a model reads past their forward stay in full precision, which no config says: they are counted
    as quantized.

    Args:
        components: With weights as they are loaded.
        runs: Of schedules, which evidence.json lists.
    """
    itemsize = itemsize_of(settings.dtype)
    found = sum(component.weight_bytes for component in components)
    tensors = sum(map(len, headers.tensors.values()))
    for layer in sketched.layers:
        found += sketched.stored_bytes(layer) - layer.linear.weight.numel() * itemsize
        tensors += sketched.tensors(layer) - 1
    return (
        found
        + tensors * _HEADER
        + _other_files(settings.source.folder)
        + _prior_bytes(headers, steps)
        + int(_RECORDS + _TRIAL * runs)
    )


def _other_files(folder: Path) -> int:
    """Configs, tokenizers and what else lies beside weights."""
    named = (folder / "model_index.json", *folder.glob("*/*"))
    return sum(file.stat().st_size for file in named if file.is_file() and file.suffix not in _WEIGHTS)


def _prior_bytes(headers: Headers, steps: int) -> int:
    """Six matrices of all pairs of steps, and two for each channel of the latents where these are not too many."""
    config = next(headers.configs[name] for name in DENOISERS if name in headers.configs)
    channels = config.get("in_channels") or 1
    grams = 2 * channels if channels * steps**2 <= LARGEST_CHANNEL_GRAMS else 0
    return 8 * (steps**2 * (6 + grams) + 2 * steps * (channels + 2)) + _RECORDS // 4


def host_memory_bytes(
    settings: BuildSettings,
    headers: Headers,
    components: Sequence[ComponentMemory],
    sketched: Sketch,
    *,
    steps: int,
) -> int:
    """What the build holds in host memory at its peak, at the least, with what this process holds already.

    The weights, which are opened there whatever the device; every recorded run; what GPTQ sums up. On a CPU also the
    activations of the largest model, and the layer that GPTQ rounds. A ``vram`` changes nothing.
    """
    samples, fits = settings.effort.samples, fitted_calls(settings, steps)
    name = next(name for name in DENOISERS if name in headers.tensors)
    picture = headers.picture
    latents = headers.rows(name) / (picture.samples * picture.branches) * output_features(headers.configs[name])
    recorded = 2 * 4 * steps * samples * latents  # a prediction and a sample of every step, float32 at most
    found = psutil.Process().memory_info().rss + sum(component.weight_bytes for component in components) + recorded
    fitted = [layer for layer in sketched.layers if layer.component in DENOISERS]
    if fits:  # what is summed up, and the bytes of it that are written, to go on from
        found += 2 * min(HESSIAN_BYTES, _hessian_bytes(fitted))
    if torch.device(settings.device).type == "cpu":
        found += max(component.activation_bytes for component in components)
        if fits:
            sizes = [tuple(layer.linear.weight.shape) for layer in fitted]
            found += max((12 * (columns**2 + rows * columns) for rows, columns in sizes), default=0)
    return int(found)


def _hessian_bytes(layers: Sequence[Layer]) -> int:
    """Of the sums for GPTQ; layers of one module that are as wide, as q, k and v are, share theirs."""
    sums = {(layer.component, layer.name.rpartition(".")[0], layer.linear.in_features) for layer in layers}
    return sum(4 * columns**2 for *_, columns in sums)


def fitted_calls(settings: BuildSettings, steps: int) -> int:
    """How many steps' calls quantization is fitted to; none where weights are rounded to nearest."""
    asked = settings.quantization
    if not asked.quantizes_denoiser or asked.backend != "native" or SCHEMES[asked.scheme].is_coded:
        return 0
    if not (asked.gptq or asked.smoothed):
        return 0
    total = settings.effort.samples * steps
    return -(-total // calls_apart(total))


def _empty_model(folder: Path, library: str, kind: str) -> nn.Module:
    """A component with its parameters on the meta device."""
    try:
        model_class = getattr(import_module(library), kind)
        with init_empty_weights(include_buffers=False):
            if hasattr(model_class, "from_config"):
                return model_class.from_config(model_class.load_config(folder, local_files_only=True))
            return model_class(model_class.config_class.from_pretrained(folder, local_files_only=True))
    except (ImportError, AttributeError, OSError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"'{folder}' cannot be built as {library}'s {kind} from its config: {first_line(error)}"
        ) from error
