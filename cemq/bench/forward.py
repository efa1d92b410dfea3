"""One forward of a denoiser of real size: full precision against quantized, all in memory, taking turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypedDict, Unpack

import psutil
import torch

from cemq.bench.answers import predict, relative_error
from cemq.bench.architectures import ARCHITECTURES, Architecture, Inputs
from cemq.bench.machine import compile_obstacle, describe_machine
from cemq.bench.measure import busy_note, make_rows, measure, of_stage
from cemq.bench.random_models import (
    empty_model,
    needs_float_model,
    parse_scheme,
    planned_bytes,
    quantization_config,
    random_model,
    tensor_bytes,
)
from cemq.errors import CemqError, InputError, check_keywords, choose, first_line
from cemq.pipelines.batches import Progress
from cemq.pipelines.opening import DTYPES, check_device, default_device
from cemq.quantize import SCHEMES, CemqConfig, NativeLinear
from cemq.quantize.kernels import AUTO, check_kernel, choices
from cemq.quantize.layers import use_kernel

FULL_PRECISION = "full precision"
USABLE = 0.9  # of the free memory may go into weights; the rest is for what they work on


class Variants(TypedDict, total=False):
    """Whether full precision is timed beside the schemes, whether all are compiled, and what multiplies the integers of
    native layers; each may be left out."""

    full_precision: bool
    compiled: bool
    kernel: str


def bench_architecture(
    architecture: str | Architecture = "dit-small",
    *,
    schemes: Sequence[str] = ("w8a8", "w4a8"),
    dtype: str = "bfloat16",
    batch: int | None = None,
    rounds: int = 15,
    device: str | None = None,
    progress: Progress | None = None,
    **variants: Unpack[Variants],
) -> dict[str, Any]:
    """Time forwards of one architecture with random weights, the same ones in every variant.

    Args:
        schemes: Names such as ``w8a8``, of another backend as ``quanto:w8a8``.
        dtype: Of everything that is not quantized.
        batch: Inputs of one forward; None takes what one picture needs.
        full_precision: Time the model that is not quantized as well, first; it is unless this is False.
        compiled: Put every variant through torch.compile.
        kernel: What multiplies integers (`cemq.from_pretrained`).

    Returns:
        Plain data: machine, settings, notes, tables of rows (`measure.make_rows`), and the kernel that was taken for
        each shape.

    Raises:
        CemqError: Something is unknown, not installed or does not fit in memory; before anything is built.
    """
    check_keywords("bench_architecture", variants, Variants)
    subject = _subject(architecture, schemes, dtype, batch, device, **variants)
    usable = USABLE * _free_memory(subject.place)
    check_fit(subject.architecture.name, *subject.needs(), usable, subject.device)
    inputs = subject.inputs()
    notes, reference = [], None
    whole = FULL_PRECISION in subject.configs
    if planned_bytes(subject.empty, torch.float32) > usable:
        other = f"the {dtype} output instead" if whole else "nothing, so there is no error"
        notes.append(f"a float32 model does not fit in memory: outputs are compared with {other}")
    elif not (whole and subject.kind == torch.float32):
        told = of_stage(progress, "float32 reference")
        reference = subject.float32_output(inputs)
        told(1.0)
    models, told = {}, of_stage(progress, "building")
    for done, name in enumerate(subject.configs):
        told(done / len(subject.configs))
        models[name] = subject.build(name)
    told(1.0)
    calls = {name: subject.call(model, inputs) for name, model in models.items()}
    errors, strange = _relative_errors(calls, reference)
    timings = measure(calls, rounds=rounds, device=subject.place, progress=of_stage(progress, "timing"))
    rows = make_rows(timings, {name: tensor_bytes(model) for name, model in models.items()}, errors)
    return {
        "machine": describe_machine(),
        "settings": subject.settings(inputs, rounds),
        "notes": notes + strange + busy_note(timings),
        "tables": [{"title": f"{subject}, median of {rounds}", "rows": rows}],
        "kernels": kernels_taken(subject.kernel),
    }


def kernels_taken(asked: str) -> list[dict[str, Any]]:
    """What computed the integer products of this process, by shape, where it was asked for so."""
    return [
        {"device": made.device, "shape": str(made.shape)} | asdict(made.choice)
        for made in choices().made()
        if made.asked == asked
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Subject:
    """What is timed, and where: the variants of one architecture, by name, with None for full precision."""

    architecture: Architecture
    empty: torch.nn.Module
    configs: Mapping[str, CemqConfig | None]
    dtype: str
    batch: int
    device: str
    place: torch.device
    compiled: bool
    kernel: str

    @property
    def kind(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.empty.parameters())

    def __str__(self) -> str:
        return (
            f"{self.architecture.name} ({self.parameters / 1e6:,.0f} M parameters), one forward, batch {self.batch}, "
            f"{self.dtype} on {self.device}{', torch.compile' if self.compiled else ''}"
        )

    def settings(self, inputs: Inputs, rounds: int) -> dict[str, Any]:
        return {
            "architecture": self.architecture.name,
            "model_class": self.architecture.model_class,
            "parameters": self.parameters,
            "dtype": self.dtype,
            "batch": self.batch,
            "inputs": {key: list(value.shape) for key, value in inputs.items() if torch.is_tensor(value)},
            "rounds": rounds,
            "device": self.device,
            "compiled": self.compiled,
            "kernel": self.kernel,
        }

    def needs(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes of each variant, and of the float model that must be there while one of them is calibrated."""
        calibrated = [
            name for name, each in self.configs.items() if each is not None and needs_float_model(self.empty, each)
        ]
        kept = {name: planned_bytes(self.empty, self.kind, each) for name, each in self.configs.items()}
        return kept, dict.fromkeys(calibrated, planned_bytes(self.empty, self.kind))

    def inputs(self) -> Inputs:
        """Those of one forward. Raises InputError where there is no room for them."""
        try:
            return self.architecture.inputs(self.batch, dtype=self.kind, device=self.place)
        except (MemoryError, OverflowError, RuntimeError, TypeError) as error:  # torch has all of them for a huge size
            found = first_line(error)
            raise InputError(f"batch={self.batch}: inputs of that size cannot be made: {found}") from error

    def float32_output(self, inputs: Inputs) -> torch.Tensor:
        """What the same weights make of the inputs in float32."""
        exact = random_model(self.architecture, dtype=torch.float32, device=self.place, weights_rounded_to=self.kind)
        return predict(exact, _cast(inputs, torch.float32))

    def build(self, name: str) -> torch.nn.Module:
        """The model of a variant."""
        model = random_model(
            self.architecture, dtype=self.kind, device=self.place, config=self.configs[name], batch=self.batch
        )
        if _multiplies_integers(self.configs[name]):
            use_kernel([model], self.kernel)
        return model

    def call(self, model: torch.nn.Module, inputs: Inputs) -> Callable[[], torch.Tensor]:
        """One forward of a variant's model."""
        return partial(predict, torch.compile(model) if self.compiled else model, inputs)


def _subject(
    architecture: str | Architecture,
    schemes: Sequence[str],
    dtype: str,
    batch: int | None,
    device: str | None,
    *,
    full_precision: bool = True,
    compiled: bool = False,
    kernel: str = AUTO,
) -> _Subject:
    """Raises CemqError for anything that is unknown, not installed or cannot be compiled; nothing is built yet."""
    if isinstance(architecture, str):
        architecture = ARCHITECTURES[choose("architecture", architecture, ARCHITECTURES)]
    choose("dtype", dtype, DTYPES)
    wanted = {scheme: parse_scheme(scheme) for scheme in schemes}
    if not wanted and not full_precision:
        raise InputError("nothing to time: name --schemes, or keep full precision")
    device = device or default_device()
    place = check_device(device)
    check_kernel(kernel, place)
    if compiled and (obstacle := compile_obstacle(device)):
        raise InputError(f"torch.compile cannot be used here: {obstacle}")
    empty = empty_model(architecture)
    configs: dict[str, CemqConfig | None] = {FULL_PRECISION: None} if full_precision else {}
    configs |= {name: quantization_config(empty, *pair) for name, pair in wanted.items()}
    return _Subject(
        architecture=architecture, empty=empty, configs=configs, dtype=dtype, batch=batch or architecture.batch,
        device=device, place=place, compiled=compiled, kernel=kernel,
    )  # fmt: skip


def _multiplies_integers(config: CemqConfig | None) -> bool:
    """Whether layers are native ones with int8 activations, which have kernels to choose from."""
    if config is None:
        return False
    scheme = SCHEMES[config.scheme]
    return config.layer_class(scheme) is NativeLinear and scheme.activation_bits == 8


def _relative_errors(
    calls: Mapping[str, Callable[[], torch.Tensor]], reference: torch.Tensor | None
) -> tuple[dict[str, float | None], list[str]]:
    """Of each variant's output to the reference, or to full precision's without one; and notes on outputs that are not
    finite."""
    errors: dict[str, float | None] = {}
    notes = []
    for name, call in calls.items():
        output = _output(name, call)
        reference = output if reference is None and name == FULL_PRECISION else reference
        error = math.nan if reference is None else relative_error(reference, output)
        errors[name] = None if math.isnan(error) else error
        if not output.isfinite().all():
            notes.append(f"{name}: the output is not finite")
    return errors, notes


def _output(name: str, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The first call, which compiles where that is asked for. Raises CemqError where the variant does not run."""
    try:
        return call()
    except Exception as error:  # libraries raise many unrelated types
        raise CemqError(f"{name} does not run here: {first_line(error)}; cemq doctor shows what does") from error


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def check_fit(what: str, kept: dict[str, int], passing: Mapping[str, int], usable: float, device: str) -> None:
    """Raises InputError, naming what to leave out, unless all variants fit in memory together.

    Args:
        kept: Bytes of each variant.
        passing: Bytes of the float model that must be there, too, while some of them are calibrated one by one.
    """

    def needed(names: Mapping[str, int]) -> int:
        return sum(names.values()) + max((passing.get(name, 0) for name in names), default=0)

    total, kept, left_out = needed(kept), dict(kept), []
    while needed(kept) > usable and len(kept) > 1:
        name = max(kept, key=lambda name: kept[name] + passing.get(name, 0))
        size = kept.pop(name) + passing.get(name, 0)
        flag = ", --no-full-precision" if name == FULL_PRECISION else ""
        left_out.append(f"{name} ({size / 1e9:.1f} GB{flag})")
    found = f"{what} needs {total / 1e9:.1f} GB for its variants, and {device} has {usable / 1e9:.1f} GB to give"
    if needed(kept) > usable:
        raise InputError(f"{found}: not even {next(iter(kept))} fits, take a smaller --arch")
    if left_out:
        raise InputError(f"{found}: leave out {' and '.join(left_out)}")
