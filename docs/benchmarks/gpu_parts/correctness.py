"""What a CPU cannot show: the kernels, streams, graphs and placements of a GPU, against an exact reference.

A layer's reference is float64, from the integers that `cemq.quantize.integers` gives on the CPU. ``worst`` is the
largest deviation as a share of what the roundings of float32 and of the output's dtype may add up to; up to 1 is right.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from cemq.quantize import integers
from cemq.quantize.integers import GROUP_SIZE
from cemq.quantize.kernels import integer_linear
from gpu_parts import Case, Rows, Setting, flux

ROOT = Path(__file__).parents[3]
TESTS = ("tests/test_triton_kernels.py", "tests/test_backends.py", "tests/test_fp8.py", "tests/test_kernel_registry.py")
TEST_SECONDS = 60
WORKERS = 8  # compiling takes most of the time
SCHEMES = ("w8a8", "w4a8")
DTYPES = ("bfloat16", "float16", "float32")
ODD = ((33, 70, 63), (129, 100, 5), (77, 1000, 257), (40, 64, 1))  # rows, in, out
LARGE = ((4608, 3072, 3072), (4096, 12288, 3072), (1000, 15360, 3072))
RELATIVE = 2**-7  # of outputs that are rounded more than once, in bfloat16


def cases(setting: Setting) -> list[Case]:
    def case(what: str, measure: Callable[..., Rows], **labels: str) -> Case:
        return Case(labels={"what": what} | labels, measure=partial(measure, setting, **labels))

    tests = Tests(setting)
    large = ((48, 96, 80),) if setting.tiny else LARGE
    kinds = [{"scheme": scheme, "dtype": dtype} for scheme in SCHEMES for dtype in DTYPES]
    return [
        Case(labels={"what": "tests"}, measure=tests.begin),
        *(case("large layers", partial(_shapes, shapes=large), **kind) for kind in kinds if kind["dtype"] == DTYPES[0]),
        *(case("odd layers", _odd_shapes, **kind) for kind in kinds),
        *(case("1 to 33 rows", _few_rows, scheme=scheme) for scheme in SCHEMES),
        *(case("smooth and GELU", _smooth_and_gelu, scheme=scheme) for scheme in SCHEMES),
        *(case("rows that are not finite", _not_finite, scheme=scheme) for scheme in SCHEMES),
        *(case("two streams", _two_streams, scheme=scheme) for scheme in SCHEMES),
        *(case("default dtype", _default_dtype, dtype=dtype) for dtype in ("float16", "float64")),
        *(
            case("compiled", _compiled, scheme=scheme, mode=mode)
            for mode in ("default", "reduce-overhead")
            for scheme in SCHEMES
        ),
        Case(labels={"what": "tests"}, measure=tests.outcomes),
        case("placements", _placements),
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A layer of random integers on the device; ``whole`` is the int8 weight that they stand for."""

    operands: tuple[torch.Tensor | None, ...]  # as `integer_linear` takes them
    whole: torch.Tensor

    @classmethod
    def draw(
        cls, setting: Setting, scheme: str, columns: int, outputs: int, dtype: torch.dtype, seed: int, bias: bool = True
    ) -> Layer:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(outputs, columns, generator=generator) / columns**0.5
        offset = torch.randn(outputs, generator=generator).to(dtype) if bias else None
        if scheme == "w8a8":
            (whole, scale), group_scale = integers.quantize_channels(weight), None
            stored = whole
        else:
            stored, group_scale, scale = integers.quantize_int4(weight, GROUP_SIZE)
            whole = integers.expand_int4(stored, group_scale, columns)
        total = whole.sum(1, keepdim=True, dtype=torch.int32)
        parts = (stored, group_scale, scale, total, offset)
        return cls(operands=tuple(None if part is None else part.to(setting.device) for part in parts), whole=whole)

    def __call__(self, values: torch.Tensor, by: str | None = None, **options: Any) -> torch.Tensor:
        """By the Triton kernels on CUDA, unless another one is asked for."""
        own = "triton" if values.is_cuda else "cpu"
        return integer_linear(values, *self.operands, by=by or own, **options)

    def exact(self, values: torch.Tensor, smooth: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """In float64 on the values' device: the product in floats, and with the bias."""
        tokens, scale, zero = integers.quantize_tokens(values.cpu(), None if smooth is None else smooth.cpu())
        _, _, weight_scale, _, bias = self.operands
        tokens, scale, zero, whole = (part.to(values.device) for part in (tokens, scale, zero, self.whole))
        product = (tokens.double() - zero) @ whole.double().t() * scale.double() * weight_scale.double().t()
        return product, product if bias is None else product + bias.double()

    def worst(self, values: torch.Tensor) -> float:
        """Of the output for these values, see the head of this file."""
        output = self(values)
        product, expected = self.exact(values)
        limits = torch.finfo(output.dtype)
        spacing = limits.eps * expected.abs().clamp_min(limits.smallest_normal)
        slack = 2**-22 * (product.abs() + (expected - product).abs()) + spacing
        assert output.dtype == values.dtype
        return float(((output.double() - expected).abs() / slack).max())


def some_values(setting: Setting, rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows on one side of zero and on both, large and small ones, and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) + 2 * torch.randn(rows, 1, generator=generator)
    values *= 10.0 ** torch.randint(-3, 2, (rows, 1), generator=generator)
    values[rows // 2] = 0
    return values.to(setting.device, dtype)


def verdict(worst: float) -> dict[str, Any]:
    return {"worst": worst, "right": worst <= 1}  # NaN is not


@contextmanager
def one_block_shape(setting: Setting) -> Iterator[None]:
    """No autotuning, which compiles seven kernels for each kind of layer; the tests try every block shape."""
    with ExitStack() as stack:
        if setting.cuda:
            from cemq.quantize.kernels import triton_cuda

            for kernel in (triton_cuda.w8_kernel, triton_cuda.w4_kernel):
                stack.enter_context(patch.object(kernel, "configs", kernel.configs[-1:]))
        yield


def _shapes(setting: Setting, scheme: str, dtype: str, shapes: tuple[tuple[int, int, int], ...]) -> Rows:
    kind = getattr(torch, dtype)
    for seed, (rows, columns, outputs) in enumerate(shapes):
        layer = Layer.draw(setting, scheme, columns, outputs, kind, seed, bias=rows % 2 == 0)
        values = some_values(setting, rows, columns, kind, seed)
        yield {"rows": rows, "in": columns, "out": outputs} | verdict(layer.worst(values))


def _odd_shapes(setting: Setting, scheme: str, dtype: str) -> Rows:
    with one_block_shape(setting):
        yield from _shapes(setting, scheme, dtype, ODD)


def _few_rows(setting: Setting, scheme: str) -> Rows:
    layer = Layer.draw(setting, scheme, 320, 96, torch.bfloat16, 1)
    with one_block_shape(setting):
        worst = {rows: layer.worst(some_values(setting, rows, 320, torch.bfloat16)) for rows in range(1, 34)}
    most = max(worst, key=worst.get)
    yield {"rows": most} | verdict(worst[most])


def _smooth_and_gelu(setting: Setting, scheme: str) -> Rows:
    layer = Layer.draw(setting, scheme, 256, 128, torch.bfloat16, 1)
    values = some_values(setting, 64, 256, torch.bfloat16)
    smooth = torch.rand(256, device=setting.device) + 0.5
    for options in ({"smooth": smooth}, {"gelu": True}, {"smooth": smooth, "gelu": True}):
        expected = layer.exact(values, options.get("smooth"))[1]
        if "gelu" in options:
            expected = F.gelu(expected, approximate="tanh")
        with one_block_shape(setting):
            found = layer(values, **options).double()
        yield {"options": sorted(options)} | verdict(float((found - expected).norm() / expected.norm()) / RELATIVE)


def _not_finite(setting: Setting, scheme: str) -> Rows:
    layer = Layer.draw(setting, scheme, 128, 64, torch.bfloat16, 1)
    for bad in (float("nan"), float("inf"), -float("inf")):
        values = some_values(setting, 40, 128, torch.bfloat16)
        values[7, 3] = bad
        with one_block_shape(setting):
            finite = layer(values).isfinite().all(1)
        yield {"value": str(bad), "right": [row for row in range(40) if not finite[row]] == [7]}


def _two_streams(setting: Setting, scheme: str) -> Rows:
    """Two streams that run different layers at a time give what each gives alone."""
    rows, columns = (40, 64) if setting.tiny else (2048, 2048)
    layers = [Layer.draw(setting, scheme, columns, columns, torch.bfloat16, seed) for seed in (1, 2)]
    values = [some_values(setting, rows, columns, torch.bfloat16, seed) for seed in (1, 2)]
    with one_block_shape(setting):
        alone = [layer(each) for layer, each in zip(layers, values, strict=True)]
        setting.synchronize()
        streams = [torch.cuda.Stream() if setting.cuda else None for _ in layers]
        found: list[list[torch.Tensor]] = [[], []]
        for _ in range(20):
            for stream, layer, each, outputs in zip(streams, layers, values, found, strict=True):
                with torch.cuda.stream(stream):
                    outputs.append(layer(each))
        setting.synchronize()
    different = sum(
        not torch.equal(output, expected) for outputs, expected in zip(found, alone, strict=True) for output in outputs
    )
    yield {"runs": 40, "different": different, "right": different == 0}


def _default_dtype(setting: Setting, dtype: str) -> Rows:
    before = torch.get_default_dtype()
    for scheme in SCHEMES:
        layer = Layer.draw(setting, scheme, 256, 96, torch.bfloat16, 1)
        values = some_values(setting, 40, 256, torch.bfloat16)
        with one_block_shape(setting):
            expected = layer(values)
            torch.set_default_dtype(getattr(torch, dtype))
            try:
                found = layer(values)
            finally:
                torch.set_default_dtype(before)
        yield {"scheme": scheme, "right": torch.equal(found, expected)}


def _compiled(setting: Setting, scheme: str, mode: str) -> Rows:
    """Under torch.compile, with new values each time, as a CUDA graph too, by the kernel that its first run chooses."""
    drawn = Layer.draw(setting, scheme, 256, 128, torch.bfloat16, 1)

    def layer(values: torch.Tensor) -> torch.Tensor:
        return drawn(values, by="auto")

    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    with one_block_shape(setting):
        for turn in range(4):
            values = some_values(setting, 64, 256, torch.bfloat16, seed=turn)
            yield {"turn": turn, "right": torch.equal(compiled(values).clone(), layer(values))}


class Tests:
    """pytest beside the other cases: compiling kernels takes its time, and other cores."""

    def __init__(self, setting: Setting):
        self.report, self.process = setting.scratch / "tests.xml", None
        self.tiny, self.cuda = setting.tiny, setting.cuda

    def begin(self) -> Rows:
        command = [
            sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junit-xml={self.report}",
            "-W", "default", *(["-n", str(WORKERS)] if self.cuda else []), *(TESTS[:1] if self.tiny else TESTS),
        ]  # fmt: skip
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        yield {"test": "begun"}

    def outcomes(self) -> Rows:
        """Of each test, with the first line of each failure."""
        if self.process is None:  # the process in which they were begun is gone
            yield from self.begin()
        try:
            said, _ = self.process.communicate(timeout=10 * TEST_SECONDS if self.tiny else TEST_SECONDS)
            ending = f"exit code {self.process.returncode}: {(said.strip().splitlines() or ['nothing was said'])[-1]}"
        except subprocess.TimeoutExpired as error:
            self.process.kill()
            ending = f"stopped after {error.timeout:g} s more"
        found = list(ElementTree.parse(self.report).iter("testcase")) if self.report.exists() else []
        for test in found:
            outcome = next((part for part in test if part.tag in ("failure", "error", "skipped")), None)
            row = {"test": f"{test.get('classname')}::{test.get('name')}", "seconds": float(test.get("time", 0))}
            if outcome is None:
                yield row | {"right": True}
            elif outcome.tag == "skipped":
                yield row | {"skipped": outcome.get("message")}
            else:
                yield row | {"right": False, "why": (outcome.get("message") or "").strip().partition("\n")[0][:300]}
        yield {"test": "all", "tests": len(found), "ending": ending}


def _placements(setting: Setting) -> Rows:
    """Each placement draws the picture of the weights on the device, and skipped steps move none of them."""
    folder = flux.bundle(setting, flux.TINY)
    expected = None
    for estimate in flux.placements(folder, setting):
        pipe = flux.load_placed(folder, estimate, setting)
        drawn = flux.draw(pipe, folder, setting)
        expected = drawn.picture if expected is None else expected
        same = bool((drawn.picture == expected).all())
        yield {
            "placement": estimate.name, "same_picture": same, "moved_on_skipped_steps": drawn.moved_on_skipped,
            "planned_bytes": estimate.device_bytes, "peak_bytes": drawn.peak_bytes,
            "right": same and drawn.moved_on_skipped == 0,
        }  # fmt: skip
