"""A quantization scheme is data; so is what each backend offers."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from cemq.errors import SchemeError, choose


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Bits of weights and activations; with 16 activation bits only the weights are quantized.

    Args:
        low_rank: Rank of a correction kept beside the weight, 0 for none; native backend.
        smoothed: Whether inputs are scaled per channel before they are quantized; native backend.
    """

    name: str
    weight_bits: int
    activation_bits: int
    low_rank: int = 0
    smoothed: bool = False


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
    "w8a8": Scheme(name="w8a8", weight_bits=8, activation_bits=8),
    "w4a8": Scheme(name="w4a8", weight_bits=4, activation_bits=8),
    "w8a16": Scheme(name="w8a16", weight_bits=8, activation_bits=16),
    "w4a16": Scheme(name="w4a16", weight_bits=4, activation_bits=16),
    "w4a16-fp4": Scheme(name="w4a16-fp4", weight_bits=4, activation_bits=16),
}
NO_SCHEME = "none"

BACKENDS = {
    "native": Backend(layers=dict.fromkeys(("w8a8", "w4a8", "w8a16", "w4a16"), "cemq.quantize.layers:NativeLinear")),
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
