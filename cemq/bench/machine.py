"""What a number was measured on: processor, devices, compilers, library versions."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cemq.quantize.integers import has_int8_units
from cemq.quantize.kernels import cpu
from cemq.quantize.kernels.own import compile_obstacle, product_on_the_cpu

LIBRARIES = (
    "cemq", "torch", "diffusers", "transformers", "accelerate", "triton", "optimum-quanto", "bitsandbytes", "torchao",
    "comfy-kitchen", "gemlite",
)  # fmt: skip
# what speeds up int8 and bfloat16 products, and the flags of /proc/cpuinfo that stand for it
CPU_FEATURES = {
    "VNNI": {"avx512_vnni", "avx_vnni"},
    "AMX int8": {"amx_int8"},
    "AMX bf16": {"amx_bf16"},
    "AVX-512 bf16": {"avx512_bf16"},
    "Arm i8mm": {"i8mm"},
    "Arm bf16": {"bf16"},
}


def describe_machine() -> dict[str, Any]:
    """Everything a benchmark should say of where it ran, as plain data."""
    name, flags = _cpu_info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [feature for feature, marks in CPU_FEATURES.items() if marks & flags],
        "int8_units": has_int8_units(),
        "int8_product": product_on_the_cpu(),
        "c_kernels": cpu.why_not() or "in use",
        "compile_on_cpu": compile_obstacle("cpu") or "yes",
        "cuda": [_cuda_device(index) for index in range(torch.cuda.device_count())],
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
    }


def one_line(machine: dict[str, Any]) -> str:
    """The same, short enough for the head of a table."""
    libraries = ", ".join(
        f"{name} {machine['libraries'][name]}"
        for name in ("torch", "diffusers", "cemq")
        if name in machine["libraries"]
    )
    devices = [device["name"] for device in machine["cuda"]]
    return "; ".join([f"{machine['cpu']}, {threads_text(machine)}", *devices, libraries])


def threads_text(machine: dict[str, Any]) -> str:
    return f"{machine['threads']} thread{'s'[: machine['threads'] != 1]}"


def _cpu_info() -> tuple[str, set[str]]:
    """Name and feature flags; without /proc/cpuinfo (macOS, Windows) no flags."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    entries: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            entries.setdefault(key.strip(), value.strip())
    flags = set((entries.get("flags") or entries.get("Features") or "").split())
    return entries.get("model name") or platform.processor() or platform.machine(), flags


def _cuda_device(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    return {"name": found.name, "capability": f"{found.major}.{found.minor}", "bytes": found.total_memory}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
