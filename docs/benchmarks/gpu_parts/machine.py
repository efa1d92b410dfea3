"""What the device can do at all: its rates on a large product of each kind and on copies, by torch's own libraries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from cemq.bench.machine import describe_machine, one_line
from gpu_parts import Case, Rows, Setting
from gpu_parts.timing import clocks, milliseconds


def cases(setting: Setting) -> list[Case]:
    products = {"bfloat16": _bfloat16, "int8": _int8, "fp8 by rows": _fp8}
    side, size = (256, 1 << 20) if setting.tiny else (8192, 1 << 30)
    return [
        Case(labels={"what": "machine"}, measure=partial(_describe, setting)),
        *(
            Case(labels={"what": f"{name} product"}, measure=partial(_product, setting, make, side))
            for name, make in products.items()
        ),
        *(
            Case(labels={"what": f"copy {name}"}, measure=partial(_copy, setting, name, size))
            for name in ("on the device", "to the device", "to the device, pinned")
        ),
    ]


def _describe(setting: Setting) -> Rows:
    machine = describe_machine()
    row = {"machine": machine | {"line": one_line(machine)}, "clocks": clocks(setting)}
    if setting.cuda:
        found = torch.cuda.get_device_properties(setting.device)
        row |= {"multiprocessors": found.multi_processor_count, "l2_bytes": found.L2_cache_size}
    yield row


def _bfloat16(left: torch.Tensor, right: torch.Tensor) -> Callable[[], torch.Tensor]:
    left, right = left.bfloat16(), right.bfloat16()
    return lambda: left @ right.t()


def _int8(left: torch.Tensor, right: torch.Tensor) -> Callable[[], torch.Tensor]:
    left, right = ((40 * part).clamp(-127, 127).to(torch.int8) for part in (left, right))
    return lambda: torch._int_mm(left, right.t())


def _fp8(left: torch.Tensor, right: torch.Tensor) -> Callable[[], torch.Tensor]:
    left, right = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)
    ones = torch.ones(len(left), 1, device=left.device)
    return lambda: torch._scaled_mm(left, right.t(), ones, ones.t(), out_dtype=torch.bfloat16, use_fast_accum=True)


def _product(setting: Setting, make: Callable, side: int) -> Rows:
    left, right = torch.randn(2, side, side, device=setting.device)
    row = milliseconds(make(left, right), setting)
    yield row | {"tera_per_second": 2 * side**3 / row["ms"] / 1e9} | clocks(setting)


def _copy(setting: Setting, name: str, size: int) -> Rows:
    source = torch.empty(size, dtype=torch.uint8).random_()
    if name == "on the device":
        source = source.to(setting.device)
    elif "pinned" in name and setting.cuda:
        source = source.pin_memory()
    target = torch.empty_like(source, device=setting.device)
    row = milliseconds(lambda: target.copy_(source, non_blocking=True), setting)
    passes = 2 if name == "on the device" else 1  # read and written in the same memory
    yield row | {"bytes_per_second": 1e3 * passes * size / row["ms"]}
