"""A quantization scheme is data; so is what each backend offers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from cemq.errors import InputError, SchemeError, choose
from cemq.quantize.fp8 import E4M3, scaled_product

if TYPE_CHECKING:
    import torch


class Codec(Protocol):
    """Turns floats into codes and back, row by row; for number formats that nothing multiplies as they are."""

    stored: str  # the torch dtype of codes; an integer one, or models would take it for what the layer computes in
    packed: int  # numbers in one code

    def encode(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 (rows, columns) to codes (rows, columns / packed, rounded up) and float32 scales (rows, 1)."""
        ...

    def decode(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The opposite, float32 (rows, at least columns)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Format:
    """A number format.

    Args:
        bits: Of one number, scales apart.
        codec: How floats are stored in it; None for those that backends multiply by kernels of their own.
        product: Multiplies codes as they are, where the device can: codes (rows, in) and (out, in), each followed by
            its scales, bias and the dtype of the result (rows, out); gives None where it cannot. Without one, codes are
            decoded and floats multiplied.
    """

    name: str
    bits: int
    codec: Codec | None = None
    product: Callable[..., torch.Tensor | None] | None = None


INT8, INT4 = Format(name="int8", bits=8), Format(name="int4", bits=4)
FP4 = Format(name="fp4", bits=4)
FP8 = Format(name="fp8", bits=8, codec=E4M3(), product=scaled_product)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Number formats of weights and activations; without one for activations only the weights are quantized.

    Args:
        low_rank: Rank of a correction kept beside the weight, 0 for none; native backend.
        smoothed: Whether inputs are scaled per channel before they are quantized; native backend.
    """

    name: str
    weight: Format
    activation: Format | None = None
    low_rank: int = 0
    smoothed: bool = False

    @property
    def weight_bits(self) -> int:
        return self.weight.bits

    @property
    def activation_bits(self) -> int:
        return 16 if self.activation is None else self.activation.bits

    @property
    def is_coded(self) -> bool:
        """Whether weights are stored by a codec, which knows no rank, smoothing or wider scheme."""
        return self.weight.codec is not None


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What computes quantized layers.

    Args:
        layers: The class of a quantized layer for each scheme, as ``module:class``, imported when it is used.
        package: The package that must be installed, and the extra of cemq that installs it.
        note: What a user should know before choosing it.
    """

    layers: dict[str, str]
    package: str | None = None
    extra: str | None = None
    note: str = ""


SCHEMES = {
    "w8a8": Scheme(name="w8a8", weight=INT8, activation=INT8),
    "w4a8": Scheme(name="w4a8", weight=INT4, activation=INT8),
    "w8a16": Scheme(name="w8a16", weight=INT8),
    "w4a16": Scheme(name="w4a16", weight=INT4),
    "w4a16-fp4": Scheme(name="w4a16-fp4", weight=FP4),
    "w8a8-fp8": Scheme(name="w8a8-fp8", weight=FP8, activation=FP8),
}
NO_SCHEME = "none"

_CODED = "cemq.quantize.coded:CodedLinear"

BACKENDS = {
    "native": Backend(
        layers=dict.fromkeys(("w8a8", "w4a8", "w8a16", "w4a16"), "cemq.quantize.layers:NativeLinear")
        | {"w8a8-fp8": _CODED}
    ),
    "quanto": Backend(
        layers=dict.fromkeys(("w8a8", "w4a8", "w8a16", "w4a16"), "cemq.quantize.backends.quanto:QuantoLinear"),
        package="optimum.quanto",
        extra="quanto",
        note="w4a8 is simulated: quanto multiplies dequantized weights and activations",
    ),
    "bitsandbytes": Backend(
        layers={
            "w8a8": "cemq.quantize.backends.bitsandbytes:Int8Linear",
            "w4a16": "cemq.quantize.backends.bitsandbytes:FourBitLinear",
            "w4a16-fp4": "cemq.quantize.backends.bitsandbytes:FourBitLinear",
        },
        package="bitsandbytes",
        extra="bitsandbytes",
        note="w8a8 is LLM.int8(), w4a16 is nf4",
    ),
    "torchao": Backend(
        layers={"w8a8": "cemq.quantize.backends.torchao:TorchaoLinear"},
        package="torchao",
        extra="torchao",
        note="int8 weights, int8 activations quantized per token while the model runs",
    ),
}


def register_format(format: Format) -> tuple[str, str]:
    """Make a number format known by two schemes of the native backend, whose names are returned: ``wNa16-NAME`` stores
    weights in it, ``wNaN-NAME`` rounds activations to it as well, token by token.

    Storage is real, arithmetic is not: layers decode and multiply floats, unless the format has a product.

    Raises:
        InputError: There is a scheme of that name, the name is no plain word, or the codec does not do what it says.
    """
    if format.codec is None or not re.fullmatch(r"[a-z][a-z0-9]*", format.name):
        raise InputError(f"format {format.name!r}: give a codec, and a name of small letters and digits")
    _check_codec(format, format.codec)
    schemes = [
        Scheme(name=f"w{format.bits}a{'16' if activation is None else format.bits}-{format.name}", weight=format,
               activation=activation)
        for activation in (None, format)
    ]  # fmt: skip
    for scheme in schemes:
        if scheme.name in SCHEMES:
            raise InputError(f"scheme '{scheme.name}': there is one of that name already")
    for scheme in schemes:
        SCHEMES[scheme.name] = scheme
        BACKENDS["native"].layers[scheme.name] = _CODED
    return schemes[0].name, schemes[1].name


def _check_codec(format: Format, codec: Codec) -> None:
    """Raises InputError unless a row of numbers comes back, near enough, from codes of the size that was promised."""
    import torch

    values = torch.linspace(-3, 3, 66, dtype=torch.float32, device="cpu").reshape(2, 33)
    dtype = getattr(torch, codec.stored)
    codes, scale = codec.encode(values)
    found = codec.decode(codes, scale)[:, :33]
    wanted = (2, -(-33 // codec.packed))
    if dtype.is_floating_point or codes.dtype != dtype or tuple(codes.shape) != wanted or tuple(scale.shape) != (2, 1):
        raise InputError(
            f"format '{format.name}': of two rows of 33 encode gives {codes.dtype} {tuple(codes.shape)} and scales "
            f"{tuple(scale.shape)}, expected integers of {codec.stored} {wanted} and (2, 1)"
        )
    error = ((found - values).norm() / values.norm()).item()
    if not error < 0.5:
        raise InputError(f"format '{format.name}': what is decoded is off by {error:.2g} of what was encoded")


def check_scheme(name: str, backend: str = "native") -> None:
    """Raises SchemeError for a scheme or backend that does not exist, is not installed, or does not go together.

    ``none`` is a scheme: nothing is quantized.
    """
    choose("scheme", name, [*SCHEMES, NO_SCHEME], SchemeError)
    choose("backend", backend, BACKENDS, SchemeError)
    if name == NO_SCHEME:
        return
    offered = BACKENDS[backend]
    if name not in offered.layers:
        others = [other for other, candidate in BACKENDS.items() if name in candidate.layers]
        raise SchemeError(
            f"backend '{backend}' does not offer {name}, only {', '.join(offered.layers)}: "
            f"take one of those, or --backend {' or '.join(others)}"
        )
    if not installed(backend):
        raise SchemeError(
            f"backend '{backend}' needs the package {offered.package}, which is not installed: "
            f"pip install 'cemq[{offered.extra}]', or take --backend native"
        )


def installed(backend: str) -> bool:
    """Whether the package of a backend can be imported."""
    package = BACKENDS[backend].package
    if package is None:
        return True
    parent = package.partition(".")[0]
    return find_spec(parent) is not None and find_spec(package) is not None
