"""Nothing depends on torch's default dtype, which any thread changes for all while it loads a model, or device."""

import ast
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from support.comparing import identical
from support.models import Toy, toy_calls
from support.pipelines import make_denoiser
from support.quantized import PAIRS
from torch import nn

import cemq
from cemq.metrics import ssim
from cemq.pipelines.noise_scheduler import responses
from cemq.pipelines.outputs import as_pictures
from cemq.quantize import SCHEMES, CemqConfig, InputStatistics, installed, integers, quantize_calibrated
from cemq.quantize import quantize_in_place as quantize
from cemq.quantize.calls import replay
from cemq.quantize.kernels import cpu


@contextmanager
def default(kind):
    """A default dtype, or ``meta`` as the default device."""
    if kind == "meta":
        torch.set_default_device("meta")
        try:
            yield
        finally:
            torch.set_default_device(None)
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, kind))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


KINDS = ("float32", "float64", "float16", "bfloat16", "meta")
every_default = pytest.mark.parametrize("kind", KINDS)
DRAWN = ("arange", "as_tensor", "asarray", "empty", "eye", "full", "hann_window", "linspace", "logspace", "normal")
DRAWN += ("ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros")


def made_tensors(source):
    """Line and code of every call in a module that makes a tensor out of nothing."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=made)) if made in DRAWN:
                yield node, {keyword.arg for keyword in node.keywords}


def test_whoever_makes_a_tensor_names_its_dtype_and_device():
    root, found = Path(cemq.__file__).parent, 0
    for path in sorted(root.rglob("*.py")):
        if "training" in path.parts:  # a program of its own
            continue
        for node, given in made_tensors(path.read_text(encoding="utf-8")):
            assert given >= {"dtype", "device"}, f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node)}"
            found += 1
    assert found > 20


def same(found, expected):
    assert (found.dtype, found.device, found.shape) == (expected.dtype, expected.device, expected.shape)
    assert torch.equal(found, expected)


@every_default
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("backend", "scheme"), PAIRS)
@torch.no_grad()
def test_every_layer_is_made_and_computes_alike_under_any_default(backend, scheme, dtype, kind):
    torch.manual_seed(0)
    linear, inputs = nn.Linear(128, 64).to(dtype), [torch.randn(rows, 128).to(dtype) for rows in (3, 40)]
    rows = inputs[1].float()
    known = InputStatistics(largest=(3.0, 2.0), channel_largest=rows.abs().amax(0), hessian=rows.T @ rows)
    native = backend == "native"
    asked = replace(SCHEMES[scheme], low_rank=4 if native else 0, smoothed=native)
    make = CemqConfig(scheme, backend=backend).layer_class(asked).from_linear
    layer = make(linear, asked, known)
    outputs = [layer(values) for values in inputs]
    with default(kind):
        again = make(linear, asked, known)
        found = [[each(values) for values in inputs] for each in (layer, again)]
    assert identical(again, layer)
    for each in found:
        for one, other in zip(each, outputs, strict=True):
            same(one, other)


@every_default
@pytest.mark.parametrize("options", [{"scheme": "w8a8", "smoothed": True}, {"scheme": "w4a8", "low_rank": 4}])
@torch.no_grad()
def test_a_fitted_model_is_made_and_loaded_alike_under_any_default(options, kind, tmp_path):
    (expected, found), calls, config = (Toy(), Toy()), toy_calls(), CemqConfig(**options)
    quantize_calibrated(expected, config, calls)
    expected.save_pretrained(tmp_path)
    with default(kind):
        quantize_calibrated(found, config, calls)
        loaded = Toy.from_pretrained(tmp_path, torch_dtype=torch.float32)
        same(replay(loaded, calls[0])["sample"], replay(expected, calls[0])["sample"])
    assert identical(found, expected)
    assert identical(loaded, expected)


@every_default
def test_a_model_quantized_while_it_loads_is_the_same_under_any_default(kind, tmp_path):
    expected = make_denoiser()
    expected.save_pretrained(tmp_path)
    quantize(expected, CemqConfig("w4a8"))
    options = {"quantization_config": CemqConfig("w4a8"), "torch_dtype": torch.float32}
    with default(kind):
        found = type(expected).from_pretrained(tmp_path, **options)
    assert identical(found, expected)


@pytest.mark.skipif(cpu.kernels() is None, reason=f"no CPU kernels: {cpu.why_not()}")
@every_default
def test_the_kernels_are_found_right_under_any_default(kind):
    with default(kind):
        assert cpu.load()[1] == ""
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu.load()[1] == ""


@every_default
def test_the_integer_product_is_tried_out_under_any_default(kind):
    with default(kind):
        assert integers.probe_int8_units.__wrapped__() == integers.has_int8_units()


@pytest.mark.skipif(not installed("bitsandbytes"), reason="is not installed")
@every_default
@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_the_tables_of_bitsandbytes_are_the_same_under_any_default(table, kind):
    from cemq.quantize.backends.bitsandbytes import code_of

    expected = code_of.__wrapped__(table, torch.device("cpu"))
    assert expected.dtype == torch.float32
    with default(kind):
        same(code_of.__wrapped__(table, torch.device("cpu")), expected)


@every_default
@pytest.mark.parametrize("kept", [DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_sampler_responds_alike_under_any_default(kept, kind):
    scheduler = kept(**({"clip_sample": False} if kept is DDIMScheduler else {}))
    scheduler.set_timesteps(6)
    expected = responses(scheduler, 6)
    assert expected is not None
    with default(kind):
        found = responses(scheduler, 6)
    assert np.array_equal(found, expected)


@every_default
def test_what_is_measured_of_outputs_is_the_same_under_any_default(kind):
    draw = np.random.default_rng(0)
    images, audio = draw.random((2, 2, 16, 16, 3), dtype=np.float32), draw.random((2, 1, 400), dtype=np.float32)
    expected = ssim(*images), as_pictures(audio)
    with default(kind):
        found = ssim(*images), as_pictures(audio)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)
