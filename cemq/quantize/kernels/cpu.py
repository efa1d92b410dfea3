"""The CPU kernels of cpu.c, compiled by the machine's own C compiler the first time they are needed.

That takes a second, once per machine: the library is kept in the user's cache folder under a name that says what it was
built from. Without a compiler, or where the result is not what the torch ops give, everything runs on the torch ops.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from cemq.errors import ModelError
from cemq.files import cache_folder
from cemq.quantize import integers

SOURCE = Path(__file__).with_name("cpu.c")
SWITCH = "CEMQ_CPU_KERNELS"  # 0 in the environment keeps them off
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES = {
    "quantize_tokens_float32": (5, 2),
    "quantize_tokens_bfloat16": (5, 2),
    "rescale_float32": (7, 3),
    "rescale_bfloat16": (7, 3),
    "expand_int4": (3, 3),
    "few_rows": (6, 4),
    "linear_float32": (8, 5),
    "linear_bfloat16": (8, 5),
}


class Kernels:
    """The compiled library. Tensors are contiguous, on the CPU, and of the dtypes of `integers`.

    C reads and writes where it is told to, so every buffer is checked before it is called, and none is made in torch's
    default dtype or device: another thread that loads a model changes the former for the whole process.

    Raises:
        ModelError: A tensor is of another dtype, size or device than the kernel takes it for, or not contiguous.
    """

    def __init__(self, library: ctypes.CDLL):
        for name, (pointers, sizes) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = [_POINTER] * pointers + [_SIZE] * sizes, None
        for dtype in DTYPES.values():
            getattr(library, f"linear_{dtype}").restype = _SIZE
        self._library = library

    def quantize_tokens(
        self, values: torch.Tensor, smooth: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `integers.quantize_tokens`, bit for bit."""
        rows, columns = values.shape
        quantized = torch.empty(rows, columns, dtype=torch.int8, device="cpu")
        scale = torch.empty(rows, 1, dtype=torch.float32, device="cpu")
        zero_point = torch.empty(rows, 1, dtype=torch.int32, device="cpu")
        self._in("quantize_tokens", values.dtype)(
            _address("values", values, values.dtype, rows * columns),
            _address("smooth", smooth, torch.float32, columns),
            _address("tokens", quantized, torch.int8, rows * columns),
            _address("scale", scale, torch.float32, rows),
            _address("zero_point", zero_point, torch.int32, rows),
            rows,
            columns,
        )
        return quantized, scale, zero_point

    def rescale(
        self,
        product: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_sum: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        gelu: bool = False,
    ) -> torch.Tensor:
        """As `integers.rescale`, bit for bit; with ``gelu`` to float32's rounding."""
        rows, columns = product.shape
        output = torch.empty(rows, columns, dtype=dtype, device="cpu")
        self._in("rescale", dtype)(
            _address("product", product, torch.int32, rows * columns),
            _address("scale", scale, torch.float32, rows),
            _address("zero_point", zero_point, torch.int32, rows),
            _address("weight_scale", weight_scale, torch.float32, columns),
            _address("weight_sum", weight_sum, torch.int32, columns),
            _address("bias", bias, dtype, columns),
            _address("output", output, dtype, rows * columns),
            rows,
            columns,
            gelu,
        )
        return output

    def expand_int4(self, packed: torch.Tensor, group_scale: torch.Tensor, columns: int) -> torch.Tensor:
        """As `integers.expand_int4`."""
        (rows, groups), half = group_scale.shape, packed.shape[1] // group_scale.shape[1]
        weight = torch.empty(rows, groups * 2 * half, dtype=torch.int8, device="cpu")
        self._library.expand_int4(
            _address("weight", packed, torch.uint8, rows * groups * half),
            _address("group_scale", group_scale, torch.int8, rows * groups),
            _address("integers", weight, torch.int8, rows * groups * 2 * half),
            rows,
            groups,
            half,
        )
        return weight[:, :columns]

    def linear(
        self,
        values: torch.Tensor,
        smooth: torch.Tensor | None,
        weight: torch.Tensor,
        group_scale: torch.Tensor | None,
        weight_scale: torch.Tensor,
        weight_sum: torch.Tensor,
        bias: torch.Tensor | None,
        gelu: bool = False,
    ) -> torch.Tensor:
        """A whole layer: `quantize_tokens`, the product with int8 or packed int4 weights, and `rescale`.

        Raises:
            ModelError: As above, or the tokens do not fit in memory.
        """
        (rows, columns), outputs = values.shape, weight.shape[0]
        *stored, group = _stored(weight, group_scale, columns)
        output = torch.empty(rows, outputs, dtype=values.dtype, device="cpu")
        done = self._in("linear", values.dtype)(
            _address("values", values, values.dtype, rows * columns),
            _address("smooth", smooth, torch.float32, columns),
            *stored,
            _address("weight_scale", weight_scale, torch.float32, outputs),
            _address("weight_sum", weight_sum, torch.int32, outputs),
            _address("bias", bias, values.dtype, outputs),
            _address("output", output, values.dtype, rows * outputs),
            rows,
            columns,
            outputs,
            group,
            gelu,
        )
        if not done:
            raise ModelError(f"no memory for {rows} x {columns} quantized activations: run a smaller batch")
        return output

    def few_rows(
        self,
        values: torch.Tensor,
        weight: torch.Tensor,
        group_scale: torch.Tensor | None,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """``values @ (integer weight * scale)^T + bias`` in float32, reading the integer weight once."""
        (rows, columns), outputs = values.shape, weight.shape[0]
        exact, offset = values.float(), None if bias is None else bias.float()
        output = torch.empty(rows, outputs, dtype=torch.float32, device="cpu")
        *stored, group = _stored(weight, group_scale, columns)
        if group and _COLUMNS_AT_ONCE % group:
            raise ModelError(f"groups of {group} weights: the CPU kernels take those that divide {_COLUMNS_AT_ONCE}")
        self._library.few_rows(
            _address("values", exact, torch.float32, rows * columns),
            *stored,
            _address("weight_scale", weight_scale, torch.float32, outputs),
            _address("bias", offset, torch.float32, outputs),
            _address("output", output, torch.float32, rows * outputs),
            rows,
            columns,
            outputs,
            group,
        )
        return output.to(values.dtype)

    def _in(self, kernel: str, dtype: torch.dtype) -> Callable[..., None]:
        if dtype not in DTYPES:
            raise ModelError(
                f"a quantized layer's values are {_short(dtype)}, no CPU kernel takes that: load the model anew"
            )
        return getattr(self._library, f"{kernel}_{DTYPES[dtype]}")


_COLUMNS_AT_ONCE = 1024  # BLOCK of cpu.c


def _address(name: str, tensor: torch.Tensor | None, dtype: torch.dtype, values: int) -> int | None:
    """Where a tensor of this dtype and so many values lies in the CPU's memory; None for none."""
    if tensor is None:
        return None
    if tensor.dtype != dtype or tensor.numel() != values or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ModelError(
            f"a quantized layer's {name} is {_short(tensor.dtype)} {tuple(tensor.shape)} on {tensor.device}"
            f"{'' if tensor.is_contiguous() else ', not contiguous'}, and its kernel takes {values} contiguous values "
            f"of {_short(dtype)} on the CPU: load the model anew"
        )
    return tensor.data_ptr()


def _stored(weight: torch.Tensor, group_scale: torch.Tensor | None, columns: int) -> tuple[int | None, int | None, int]:
    """Addresses of a weight of so many columns and of its group scales, and how many columns share one: 0 of int8."""
    outputs = weight.shape[0]
    if group_scale is None:
        return _address("weight", weight, torch.int8, outputs * columns), None, 0
    group = 2 * weight.shape[1] // group_scale.shape[1]
    groups = -(-columns // group)
    packed = _address("weight", weight, torch.uint8, outputs * groups * group // 2)
    return packed, _address("group_scale", group_scale, torch.int8, outputs * groups), group


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def kernels() -> Kernels | None:
    """The kernels, built if need be; None where they cannot be had (`why_not` says why)."""
    return _loaded()[0]


def why_not() -> str:
    """Why there are no kernels; empty where there are."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[Kernels | None, str]:
    return load()


def load(source: Path = SOURCE) -> tuple[Kernels | None, str]:
    """The kernels of a C file, built unless they were before, or None; and why there are none.

    `kernels` and `why_not` do this once in a process.
    """
    if os.environ.get(SWITCH) == "0":
        return None, f"switched off by {SWITCH}=0"
    try:
        loaded = _build_and_load(source)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        reason = reason.decode(errors="replace") if isinstance(reason, bytes) else reason
        reason = (reason.strip().splitlines() or [type(error).__name__])[0]
        logging.getLogger("cemq").info("no CPU kernels (%s): torch ops are used instead", reason)
        return None, reason
    if not _agrees(loaded):
        return None, "the compiled kernels do not give what the torch ops give"
    return loaded, ""


def _build_and_load(source: Path) -> Kernels:
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise OSError("no C compiler: neither cc, gcc nor clang is on the PATH")
    built_from = hashlib.sha256(source.read_bytes())
    built_from.update(repr((compiler, _FLAGS, platform.machine(), features())).encode())
    name = f"cpu-{built_from.hexdigest()[:16]}.so"
    try:
        cache = cache_folder()
        if (cache / name).is_file():
            with suppress(OSError):  # a damaged library is built anew
                return Kernels(ctypes.CDLL(str(cache / name)))
        cache.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=cache)
    except OSError:  # no home, or none to write to: build for this process alone
        cache, scratch = None, tempfile.TemporaryDirectory()
    with scratch as folder:
        built = Path(folder) / name
        _compile(compiler, source, built)
        loaded = Kernels(ctypes.CDLL(str(built)))
        if cache is not None:
            os.replace(built, cache / name)  # whole or not there, whoever else builds it now
    return loaded


def _compile(compiler: str, source: Path, library: Path) -> None:
    """With OpenMP where the compiler has it; without, one thread."""
    command = [*compiler.split(), *_FLAGS, str(source), "-o", str(library)]
    try:
        subprocess.run([*command, "-fopenmp"], check=True, capture_output=True, text=True, timeout=120)
    except subprocess.CalledProcessError:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def features() -> str:
    """What ``-march=native`` depends on: a home folder may be shared between unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _agrees(loaded: Kernels) -> bool:
    """Try the library once: a miscompiled kernel must not go unnoticed."""
    generator = torch.Generator("cpu").manual_seed(0)
    values, weight = (
        torch.randn(rows, 2 * integers.GROUP_SIZE, generator=generator, dtype=torch.float32, device="cpu")
        for rows in (3, 5)
    )
    packed, group_scale, scale = integers.quantize_int4(weight, integers.GROUP_SIZE)
    expanded = integers.expand_int4(packed, group_scale, weight.shape[1])
    sums = expanded.sum(1, keepdim=True, dtype=torch.int32)
    tokens = integers.quantize_tokens(values, None)
    product = tokens[0].int() @ expanded.int().T
    arguments = (product, *tokens[1:], scale, sums, None, torch.float32)
    stored = (packed, group_scale), (expanded, None)
    return (
        all(torch.equal(a, b) for a, b in zip(loaded.quantize_tokens(values, None), tokens, strict=True))
        and torch.equal(loaded.expand_int4(packed, group_scale, weight.shape[1]), expanded)
        and torch.equal(loaded.rescale(*arguments), integers.rescale(*arguments))
        and all(
            torch.equal(loaded.linear(values, None, *weight, scale, sums, None), integers.rescale(*arguments))
            for weight in stored
        )
        and torch.allclose(loaded.rescale(*arguments, gelu=True), integers.rescale(*arguments, gelu=True), 1e-4, 1e-5)
        and torch.allclose(
            loaded.few_rows(values, packed, group_scale, scale, None).double(),
            values.double() @ (expanded * scale).double().T,  # float64, which autocast leaves alone
            rtol=1e-4,
            atol=1e-4,
        )
    )
