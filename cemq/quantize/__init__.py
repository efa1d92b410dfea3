"""Quantization: schemes and backends, layers, calibration, and the glue to diffusers."""

from cemq.quantize.allocate import choose_eight_bit, stored_bits
from cemq.quantize.calibrate import Observer, quantize_calibrated
from cemq.quantize.calls import RECORDED_BYTES, Call, record_calls
from cemq.quantize.in_diffusers import CemqConfig, quantize_in_place, quantized_layers
from cemq.quantize.layers import InputStatistics, NativeLinear, QuantizedLinear
from cemq.quantize.pipeline import QuantizationSettings, quantize_pipeline
from cemq.quantize.schemes import (
    BACKENDS,
    NO_SCHEME,
    SCHEMES,
    Backend,
    Codec,
    Format,
    Scheme,
    check_scheme,
    installed,
    register_format,
)
from cemq.quantize.sharded import ShardWriter

__all__ = [
    "BACKENDS",
    "NO_SCHEME",
    "RECORDED_BYTES",
    "SCHEMES",
    "Backend",
    "Call",
    "CemqConfig",
    "Codec",
    "Format",
    "InputStatistics",
    "NativeLinear",
    "Observer",
    "QuantizationSettings",
    "QuantizedLinear",
    "Scheme",
    "ShardWriter",
    "check_scheme",
    "choose_eight_bit",
    "installed",
    "quantize_calibrated",
    "quantize_in_place",
    "quantize_pipeline",
    "quantized_layers",
    "record_calls",
    "register_format",
    "stored_bits",
]
