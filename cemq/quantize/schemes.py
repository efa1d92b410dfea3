"""A quantization scheme is data."""

from __future__ import annotations

from dataclasses import dataclass

from cemq.errors import SchemeError, choose


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Bits of weights and activations. Activations are quantized per token while the model runs."""

    name: str
    weight_bits: int
    activation_bits: int
    group_size: int | None = None  # weights that share a group scale; None: one scale per output channel


SCHEMES = {
    "w8a8": Scheme(name="w8a8", weight_bits=8, activation_bits=8),
    "w4a8": Scheme(name="w4a8", weight_bits=4, activation_bits=8, group_size=64),
}
NO_SCHEME = "none"
BACKENDS = ("native",)


def check_scheme(name: str, backend: str = "native") -> None:
    """Raises SchemeError for a scheme or backend that does not exist; ``none`` is a scheme: nothing is quantized."""
    choose("scheme", name, [*SCHEMES, NO_SCHEME], SchemeError)
    choose("backend", backend, BACKENDS, SchemeError)
