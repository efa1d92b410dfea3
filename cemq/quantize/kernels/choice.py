"""Which kernel computes a product: tried once for each shape and device, remembered on disk.

A kernel that is to be used is first run on the layer at hand and its result compared (`wrong`); of several that may be
used, the fastest is taken. What was found is kept in ``kernels.json`` of the user's cache folder,
under the name of the device and the versions of everything that matters.
"""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from cemq.errors import first_line
from cemq.files import cache_folder, kept_whole
from cemq.quantize.kernels import cpu, own
from cemq.quantize.kernels.registry import AUTO, FASTEST, KERNELS, Kernel, package_version
from cemq.quantize.kernels.weights import LinearWeights, is_plain

FILE = "kernels.json"
SYMMETRIC = 1.3  # libraries round a little differently; comfy-kitchen divides in bfloat16 on a CPU: 1.21
_COMPARED_ROWS, _COMPARED_OUTPUTS = 256, 2048
_ROUNDS, _WARM_UP = 5, 1  # beside the run that is compared
_FLOAT32 = 1e-5  # relative, what sums of float32 in another order come to


class Shape(NamedTuple):
    """What a choice is made for; rows are rounded up to a power of two."""

    bits: int
    dtype: str
    rows: int
    columns: int
    outputs: int

    def __str__(self) -> str:
        return f"w{self.bits}a8 {self.dtype} {self.rows}x{self.columns}x{self.outputs}"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was found for one shape on one device.

    Args:
        kernel: The name of the one that is taken.
        milliseconds: Of a product, by each kernel that gave what it should; empty where there was but one.
        failed: Why others did not, by name.
    """

    kernel: str
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A choice with what it was made for."""

    asked: str
    device: str
    shape: Shape
    choice: Choice


class Choices:
    """The choices of this process, and those of earlier ones on disk.

    Args:
        folder: Of the file; None: the user's cache folder. What cannot be written there is done without.
        time_of: Milliseconds of a call on a device.
    """

    def __init__(
        self,
        folder: Path | None = None,
        time_of: Callable[[Callable[[], Any], torch.device], float] | None = None,
    ):
        self._folder = folder
        self._time_of = time_of or milliseconds
        self._known: dict[tuple[str, torch.device, Shape], tuple[Kernel, Choice]] = {}
        self._told: set[str] = set()  # why a kernel that was asked for is not used

    def kernel(self, asked: str, values: torch.Tensor, weights: LinearWeights) -> Kernel:
        """The kernel to compute a product with.

        Args:
            asked: A kernel's name, or ``auto`` or ``fastest``.
            values: (rows, in), rows in a piece.
        """
        device = values.device
        if not is_plain(values):
            return _traced(device)
        rows = 1 << max(values.shape[0] - 1, 0).bit_length()
        shape = Shape(weights.bits, str(values.dtype).removeprefix("torch."), rows, weights.columns, weights.outputs)
        if (known := self._known.get((asked, device, shape))) is not None:
            return known[0]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # where nothing can be timed
            return self._untried(asked, values, weights)
        if asked in KERNELS:
            kernel, choice = self._named(asked, values, weights)
        else:
            kernel, choice = self._chosen(asked, shape, values, weights)
        if choice is not None:
            self._known[asked, device, shape] = kernel, choice
        return kernel

    def made(self) -> list[Made]:
        """Those of this process, in the order in which they were made."""
        return [
            Made(asked=asked, device=str(device), shape=shape, choice=choice)
            for (asked, device, shape), (_, choice) in self._known.items()
        ]

    def remembered(self, device: torch.device) -> dict[str, Choice]:
        """Those on disk for a device, under the versions that are installed, by what was asked for and the shape."""
        return self._stored().get(environment_of(device), {})

    def reset(self) -> None:
        """Forget those of this process; those on disk stay."""
        self._known.clear()
        self._told.clear()

    def _untried(self, asked: str, values: torch.Tensor, weights: LinearWeights) -> Kernel:
        """What may be used, without a run of it."""
        return next(iter(_candidates(asked, values, weights)), KERNELS["torch"])

    def _named(self, asked: str, values: torch.Tensor, weights: LinearWeights) -> tuple[Kernel, Choice | None]:
        """The kernel of that name; where it does not take the layer, or gives something else, what ``auto`` takes."""
        kernel = KERNELS[asked]
        if why := kernel.obstacle_on(values.device) or kernel.refuses_these(values, weights):
            found = f"{asked} {why}" if why.startswith("takes") else f"{asked}: {why}"
        elif not _comparable(values):
            return kernel, None
        elif why := wrong(kernel, values, weights):
            found = f"{asked}: {why}"
        else:
            return kernel, Choice(kernel=asked)
        instead = self.kernel(AUTO, values, weights)
        if found not in self._told:
            self._told.add(found)
            warnings.warn(f"cemq: kernel {found}; {instead.name} computes such layers", stacklevel=2)
        return instead, Choice(kernel=instead.name, failed={asked: why})

    def _chosen(
        self, asked: str, shape: Shape, values: torch.Tensor, weights: LinearWeights
    ) -> tuple[Kernel, Choice | None]:
        candidates = _candidates(asked, values, weights)
        if [kernel.name for kernel in candidates] in (["cpu"], ["torch"]):  # C was compared when it was built
            return candidates[0], Choice(kernel=candidates[0].name)
        key = f"{asked} {shape}"
        if (stored := self._usable(key, values.device, candidates)) is None:
            if not _comparable(values):
                return candidates[0], None
            tried = self._tried(candidates, values, weights)
            # where another process was first, that one's: all of them are to compute alike
            stored = self._usable(key, values.device, candidates)
            if stored is None:
                stored = tried
                self._store(environment_of(values.device), key, tried)
        return KERNELS[stored.kernel], stored

    def _usable(self, key: str, device: torch.device, candidates: Iterable[Kernel]) -> Choice | None:
        """What is stored, if it is of a kernel that may be used."""
        stored = self.remembered(device).get(key)
        names = {kernel.name for kernel in candidates} | {"torch"}
        return stored if stored is not None and stored.kernel in names else None

    def _tried(self, candidates: Iterable[Kernel], values: torch.Tensor, weights: LinearWeights) -> Choice:
        taken, failed = {}, {}
        for kernel in candidates:
            if why := wrong(kernel, values, weights):
                failed[kernel.name] = why
                continue
            taken[kernel.name] = self._time_of(partial(kernel.run, values, weights, None, False), values.device)
        fastest = min(taken, key=taken.__getitem__) if taken else "torch"
        return Choice(kernel=fastest, milliseconds=taken, failed=failed)

    def _file(self) -> Path:
        """Raises OSError where the user has no home."""
        return (self._folder or cache_folder()) / FILE

    def _stored(self) -> dict[str, dict[str, Choice]]:
        """By environment and shape; nothing where there is no file that can be made sense of."""
        try:
            content = json.loads(self._file().read_text(encoding="utf-8"))
            return {
                environment: {key: Choice(**choice) for key, choice in choices.items()}
                for environment, choices in content.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _store(self, environment: str, key: str, choice: Choice) -> None:
        """Beside what others have stored meanwhile. Without room for it, the next process tries again."""
        content = self._stored()
        content.setdefault(environment, {})[key] = choice
        try:
            file = self._file()
            file.parent.mkdir(parents=True, exist_ok=True)
            with kept_whole(file) as partial:
                plain = {name: {key: asdict(one) for key, one in ones.items()} for name, ones in content.items()}
                partial.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        except OSError:
            return


@functools.cache
def choices() -> Choices:
    """Those that the layers of this process go by."""
    return Choices()


def _candidates(asked: str, values: torch.Tensor, weights: LinearWeights) -> list[Kernel]:
    """The kernels that may be used, in their order; the last resort only where it is alone."""
    if asked in KERNELS:
        wanted = [KERNELS[asked]]
    else:
        wanted = [kernel for kernel in KERNELS.values() if asked == FASTEST or not kernel.symmetric]
    found = [
        kernel
        for kernel in wanted
        if not (kernel.obstacle_on(values.device) or kernel.refuses_these(values, weights))
        and (asked in KERNELS or not (kernel.compiles and values.device.type == "cpu"))
    ]
    return [kernel for kernel in found if not kernel.last_resort] or found


def wrong(kernel: Kernel, values: torch.Tensor, weights: LinearWeights) -> str:
    """Why a kernel cannot compute a product, or how its result is not what it should be; empty where it is.

    What one with cemq's arithmetic gives must be the reference's to `tolerance`; what a symmetric one gives must be no
    farther than `SYMMETRIC` times what `own.by_symmetric_tokens` gives from the product with activations as they are.
    """
    rows = _compared_rows(values)
    try:
        found = kernel.run(values, weights, None, False)
        if found.shape != (values.shape[0], weights.outputs) or found.dtype != values.dtype:
            return f"gives {found.dtype} {tuple(found.shape)}"
        found = found[: len(rows)].float()
        if kernel.symmetric:
            exact = _unrounded(rows, weights)
            allowed = _FLOAT32 + SYMMETRIC * _error(own.by_symmetric_tokens(rows, weights, None, False), exact)
            error, what = _error(found, exact), "of the product with activations as they are"
        else:
            allowed = tolerance(values.dtype)
            error, what = _error(found, own.by_torch_ops(rows, weights, None, False)), "of the reference"
    except Exception as error:  # whatever libraries raise
        return f"{type(error).__name__}: {first_line(error)}"
    return "" if error <= allowed else f"off by {error:.2g} {what}, expected {allowed:.2g} at most"


def tolerance(dtype: torch.dtype) -> float:
    """How far a result may be from the reference's, relative L2: two roundings to the dtype."""
    return max(torch.finfo(dtype).eps, _FLOAT32)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 of the outputs that both have."""
    outputs = min(found.shape[1], expected.shape[1])
    found, expected = found[:, :outputs].float(), expected[:, :outputs].float()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def _unrounded(rows: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
    """The product with the weight that the integers stand for, of some outputs: a whole weight in float32 is large."""
    weight = weights.expanded()[:_COMPARED_OUTPUTS].float() * weights.weight_scale[:_COMPARED_OUTPUTS]
    bias = None if weights.bias is None else weights.bias[:_COMPARED_OUTPUTS].float()
    return F.linear(rows.float(), weight, bias)


def _compared_rows(values: torch.Tensor) -> torch.Tensor:
    return values[:_COMPARED_ROWS]


def _comparable(values: torch.Tensor) -> bool:
    """Whether results mean anything; where they do not, the next call may decide."""
    return bool(_compared_rows(values).isfinite().all())


def _traced(device: torch.device) -> Kernel:
    """For tensors that hold no numbers."""
    for name in ("triton", "cpu"):
        if not KERNELS[name].obstacle_on(device):
            return KERNELS[name]
    return KERNELS["torch"]


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median of some calls; a CUDA device's own clock, where it is one."""
    cuda = device.type == "cuda"
    taken = []
    for turn in range(-_WARM_UP, _ROUNDS):
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(torch.cuda.current_stream(device))
            call()
            end.record(torch.cuda.current_stream(device))
            end.synchronize()
            spent = start.elapsed_time(end)
        else:
            started = time.perf_counter()
            call()
            spent = 1e3 * (time.perf_counter() - started)
        if turn >= 0:
            taken.append(spent)
    return statistics.median(taken)


def environment_of(device: torch.device) -> str:
    """The device's name, and the versions of what its choices depend on."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
    else:
        name = f"{device.type} {hashlib.sha256(cpu.features().encode()).hexdigest()[:8]}"
    packages = ("cemq", "torch", "triton", *(kernel.package for kernel in KERNELS.values() if kernel.package))
    found = {package: package_version(package) for package in packages}
    return ", ".join([name, *(f"{package} {number}" for package, number in found.items() if number)])
