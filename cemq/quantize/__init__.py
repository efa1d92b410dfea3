"""Quantization of denoisers."""

from cemq.quantize.linear import QuantizedLinear
from cemq.quantize.native import CemqConfig, quantize_in_place
from cemq.quantize.schemes import BACKENDS, NO_SCHEME, SCHEMES, Scheme, check_scheme

__all__ = [
    "BACKENDS",
    "NO_SCHEME",
    "SCHEMES",
    "CemqConfig",
    "QuantizedLinear",
    "Scheme",
    "check_scheme",
    "quantize_in_place",
]
