"""What multiplies the native integer layers: every kernel there is, where it runs, what it takes and how it rounds.

A kernel takes stored tensors as they are. Most do the arithmetic that `integers` spells out, so that their results
differ by the rounding of float32 sums alone; kernels that are ``symmetric`` round activations in their own way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F

from cemq.errors import InputError, choose, first_line
from cemq.quantize.kernels import others, own
from cemq.quantize.kernels.weights import LinearWeights

AUTO, FASTEST = "auto", "fastest"  # of the kernels with the arithmetic of `integers`; of all
Multiply = Callable[[torch.Tensor, LinearWeights], torch.Tensor]
Run = Callable[[torch.Tensor, LinearWeights, torch.Tensor | None, bool], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to multiply.

    Args:
        run: Values (rows, in), weights, the smoothing of `integers.quantize_tokens` or None, and whether the tanh form
            of GELU is applied to the result, to (rows, out) in the dtype of the values.
        obstacle: Why it cannot run on a device at all; empty where it can.
        bits: Of the weights that it takes.
        refuses: Why it cannot take these values and weights; empty where it can.
        symmetric: It rounds activations to -127..127 without a zero point, as most libraries do, at twice the error
            where they lie on one side of zero.
        compiles: torch compiles it when it is first used; for a CPU that takes ten seconds and is no match for C.
        last_resort: It is taken where no other can be.
        package: What must be installed for it, and what its version is looked up by.
    """

    name: str
    run: Run
    obstacle: Callable[[torch.device], str] = lambda device: ""
    bits: tuple[int, ...] = (8, 4)
    refuses: Callable[[torch.Tensor, LinearWeights], str] = lambda values, weights: ""
    symmetric: bool = False
    compiles: bool = False
    last_resort: bool = False
    package: str | None = None

    def missing(self) -> str:
        """Why its package is not there; empty where it is, or where it needs none."""
        return (
            ""
            if self.package is None or package_version(self.package)
            else f"not installed: pip install {self.package}"
        )

    def obstacle_on(self, device: torch.device) -> str:
        """`obstacle`, told for what somebody else's code raises as well."""
        try:
            return self.missing() or self.obstacle(device)
        except Exception as error:  # of a library that is broken
            return f"{type(error).__name__}: {first_line(error)}"

    def refuses_these(self, values: torch.Tensor, weights: LinearWeights) -> str:
        """Why it cannot take these values and weights, the device apart; empty where it can."""
        if weights.bits not in self.bits:
            return f"takes no {weights.bits}-bit weights"
        return self.refuses(values, weights)


def package_version(name: str) -> str | None:
    """Of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def around(multiply: Multiply) -> Run:
    """A kernel that smooths nothing and applies no GELU, with torch ops before and after it."""

    def run(values: torch.Tensor, weights: LinearWeights, smooth: torch.Tensor | None, gelu: bool) -> torch.Tensor:
        output = multiply(own.smoothed(values, smooth), weights)
        return F.gelu(output, approximate="tanh") if gelu else output

    return run


# in the order in which they are taken where none was timed
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel(name="triton", run=around(own.by_triton), obstacle=own.triton_obstacle),
        Kernel(name="cpu", run=own.on_the_cpu, obstacle=own.cpu_obstacle),
        Kernel(name="int-mm", run=own.by_int_mm, obstacle=own.int_mm_obstacle, compiles=True),
        Kernel(name="torch", run=own.by_torch_ops, last_resort=True),
        Kernel(
            name="comfy-kitchen", run=around(others.by_comfy_kitchen), bits=(8,), symmetric=True,
            refuses=others.one_column, package="comfy-kitchen",
        ),
        Kernel(
            name="gemlite", run=around(others.by_gemlite), obstacle=others.cuda_alone, bits=(8,), symmetric=True,
            refuses=others.not_in_blocks_of_32, package="gemlite",
        ),
        Kernel(
            name="torchao", run=around(others.by_torchao), bits=(8,), symmetric=True, refuses=others.one_column,
            package="torchao",
        ),
    )
}  # fmt: skip


def register_kernel(
    name: str,
    multiply: Multiply,
    *,
    bits: Sequence[int] = (8,),
    symmetric: bool = False,
    obstacle: Callable[[torch.device], str] | None = None,
    refuses: Callable[[torch.Tensor, LinearWeights], str] | None = None,
    package: str | None = None,
) -> None:
    """Make a kernel known, which the native layers' integer products may then be computed by.

    ``multiply`` takes values (rows, in), rows in a piece, and what a layer stores (`LinearWeights`), and gives (rows,
    out) in the dtype of the values. It is tried once for each shape and device against the arithmetic of cemq's own,
    and done without, with a warning or a line in ``cemq doctor``, where it raises or gives something else. One that is
    not ``symmetric`` is timed beside cemq's own kernels, and taken where it is the fastest.

    Args:
        bits: Of the weights it takes, 8 or 4.
        symmetric: It rounds activations to -127..127 without a zero point; it is then taken where it is asked for.
        obstacle: Why it cannot run on a device; an empty text where it can.
        refuses: Why it cannot take these values and weights; an empty text where it can.
        package: What must be installed; its version is a part of what choices are remembered by.

    Raises:
        InputError: There is a kernel of that name, it is no plain word, or the bits are no bits of weights.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or name in (AUTO, FASTEST, *KERNELS):
        raise InputError(f"kernel {name!r}: give a name of its own, of small letters, digits and dashes")
    if not bits or not set(bits) <= {4, 8}:
        raise InputError(f"kernel {name!r}: bits {tuple(bits)} of weights: there are those of 8 and of 4")
    kernel = Kernel(name=name, run=around(multiply), bits=tuple(bits), symmetric=symmetric, package=package)
    if obstacle is not None:
        kernel = replace(kernel, obstacle=obstacle)
    if refuses is not None:
        kernel = replace(kernel, refuses=refuses)
    KERNELS[name] = kernel


def check_kernel(name: str, device: torch.device | None = None) -> str:
    """The name of a kernel, or ``auto`` or ``fastest``, given back.

    Raises:
        InputError: There is none of that name, or it cannot run on the device.
    """
    choose("kernel", name, [AUTO, FASTEST, *KERNELS])
    if device is not None and name in KERNELS and (why := KERNELS[name].obstacle_on(device)):
        raise InputError(f"kernel '{name}' cannot be used on {device}: {why}")
    return name
