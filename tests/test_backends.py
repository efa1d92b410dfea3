"""Layers computed by quanto, bitsandbytes and torchao; each test is skipped where its library is missing."""

import copy
import itertools
import logging

import accelerate
import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.hooks import apply_group_offloading
from safetensors.torch import load_file, save_file
from support.comparing import identical, relative
from support.pipelines import make_denoiser, predict
from support.processes import run_python
from torch import nn

from cemq.errors import BundleError, SchemeError
from cemq.families import FULL_PRECISION
from cemq.quantize import BACKENDS, SCHEMES, CemqConfig, InputStatistics, QuantizedLinear, quantize_in_place
from cemq.quantize.schemes import installed

FILE = "diffusion_pytorch_model.safetensors"
FOREIGN = [name for name in BACKENDS if name != "native"]
PAIRS = [(backend, scheme) for backend in FOREIGN for scheme in BACKENDS[backend].layers]
# relative errors of a layer and of the model below, about 1.3 times the largest measured in float32
LAYER_ERROR = {
    ("quanto", "w8a8"): 0.0125, ("quanto", "w4a8"): 0.09, ("quanto", "w8a16"): 0.0065, ("quanto", "w4a16"): 0.09,
    ("bitsandbytes", "w8a8"): 0.011, ("bitsandbytes", "w4a16"): 0.12, ("bitsandbytes", "w4a16-fp4"): 0.16,
    ("torchao", "w8a8"): 0.0105,
}  # fmt: skip
MODEL_ERROR = {
    ("quanto", "w8a8"): 0.0052, ("quanto", "w4a8"): 0.026, ("quanto", "w8a16"): 0.0021, ("quanto", "w4a16"): 0.026,
    ("bitsandbytes", "w8a8"): 0.0042, ("bitsandbytes", "w4a16"): 0.05, ("bitsandbytes", "w4a16-fp4"): 0.056,
    ("torchao", "w8a8"): 0.0046,
}  # fmt: skip
LOWER_PRECISION = {torch.float32: 0, torch.float16: 0.0005, torch.bfloat16: 0.0065}  # the float model errs by 0.0063


def package(backend):
    return pytest.mark.skipif(not installed(backend), reason=f"{BACKENDS[backend].package} is not installed")


def pairs(*wanted):
    return pytest.mark.parametrize(
        ("backend", "scheme"), [pytest.param(*pair, marks=package(pair[0])) for pair in wanted or PAIRS]
    )


every_pair = pairs()
every_backend = pytest.mark.parametrize("backend", [pytest.param(name, marks=package(name)) for name in FOREIGN])
quanto, bitsandbytes, torchao = (package(name) for name in FOREIGN)


def make_model():
    return make_denoiser(heads=4)


def recorded(model, run):
    """Statistics of the inputs of every linear layer while ``run`` calls the model."""
    inputs = {}

    def hook(name):
        return lambda _, arguments: inputs.setdefault(name, []).append(arguments[0].flatten(0, -2).abs().amax(0))

    linears = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears]
    run(model)
    for handle in handles:
        handle.remove()
    return {name: statistics_of(*rows) for name, rows in inputs.items()}


def statistics_of(*rows):
    rows = [row.reshape(-1, row.shape[-1]).abs().amax(0) for row in rows]
    return InputStatistics(largest=tuple(float(row.max()) for row in rows), channel_largest=torch.stack(rows).amax(0))


def model_config(backend, scheme):
    """Without the modulation of the output, ``proj_out_1``, whose error would drown the others'."""
    return CemqConfig(scheme, backend=backend, full_precision=[*FULL_PRECISION, "proj_out_1"])


def quantized_model(backend, scheme):
    model = make_model()
    quantize_in_place(model, model_config(backend, scheme), recorded(model, predict))
    return model


def quantized_layer(backend, scheme, linear, values):
    config = CemqConfig(scheme, backend=backend)
    return config.layer_class(SCHEMES[scheme]).from_linear(linear, SCHEMES[scheme], statistics_of(values))


def float_linear(inner, columns, bias=True):
    torch.manual_seed(inner)
    return nn.Linear(inner, columns, bias=bias)


# --- layers


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inner", "columns"), [(256, 64), (64, 40), (70, 33), (127, 5)])
def test_a_layer_stays_near_its_float_layer(backend, scheme, dtype, inner, columns):
    linear = float_linear(inner, columns)
    values = torch.randn(2, 20, inner)
    layer = quantized_layer(backend, scheme, linear, values).to(dtype)
    with torch.no_grad():
        expected, found = linear(values), layer(values.to(dtype))
        assert found.dtype == dtype
        assert relative(found, expected) < LAYER_ERROR[backend, scheme] + LOWER_PRECISION[dtype]
        alone = layer(values[:1, :1].to(dtype))  # as in a time embedding
    assert alone.shape == (1, 1, columns)
    assert (alone - found[:1, :1]).abs().max() < 0.02


@every_pair
def test_stored_tensors_are_plain_and_follow_the_layout(backend, scheme):
    for inner, columns in [(256, 64), (70, 33), (64, 1)]:
        layer = quantized_layer(backend, scheme, float_linear(inner, columns), torch.ones(4, inner))
        layout = layer.layout(inner, columns, SCHEMES[scheme])
        assert {name for name, _ in layer.named_parameters()} == {*layout, "bias"}
        assert not list(layer.buffers())
        stored = layer.state_dict()
        for name, (shape, dtype) in layout.items():
            assert isinstance(getattr(layer, name), nn.Parameter)
            assert type(getattr(layer, name).data) is torch.Tensor
            assert type(stored[name]) is torch.Tensor
            assert (tuple(stored[name].shape), stored[name].dtype) == (shape, dtype)
            assert stored[name].is_contiguous()


@every_pair
def test_the_weight_takes_its_bits_and_scales_little_more(backend, scheme):
    layer = quantized_layer(backend, scheme, float_linear(512, 256, bias=False), torch.ones(4, 512))
    bits = 8 * sum(parameter.nbytes for parameter in layer.parameters()) / (512 * 256)
    assert 8 * layer.weight.nbytes == SCHEMES[scheme].weight_bits * 512 * 256
    assert bits < SCHEMES[scheme].weight_bits + 0.51


@every_pair
def test_zero_and_constant_rows_survive(backend, scheme):
    linear = float_linear(64, 6, bias=False)
    with torch.no_grad():
        linear.weight[1], linear.weight[2] = 0, 0.25
    values = torch.randn(40, 64)
    values[3] = 0
    layer = quantized_layer(backend, scheme, linear, values)
    for dtype in (torch.float32, torch.bfloat16):
        found = layer.to(dtype)(values.to(dtype))
        assert (found[:, 1] == 0).all()
        assert (found[3] == 0).all()
        assert torch.allclose(found[:, 2].float(), 0.25 * values.sum(1), atol=0.1)


@every_pair
def test_gradient_modes_do_not_change_the_numbers(backend, scheme):
    for inner, dtype in [(256, torch.float32), (256, torch.bfloat16), (70, torch.bfloat16)]:
        values = torch.randn(40, inner)
        layer = quantized_layer(backend, scheme, float_linear(inner, 24), values).to(dtype)
        values = values.to(dtype)
        with torch.no_grad():
            expected = layer(values)
        with torch.inference_mode():
            assert torch.equal(layer(values), expected)
            inside = quantized_layer(backend, scheme, float_linear(inner, 24), values)
        assert torch.equal(layer(values), expected)
        assert torch.equal(layer(values.t().contiguous().t()), expected)
        assert inside(values.float()).shape == expected.shape  # made in inference mode, used outside


@every_pair
def test_a_forward_changes_nothing_that_is_stored(backend, scheme):
    # bitsandbytes.nn.Linear4bit does: https://github.com/bitsandbytes-foundation/bitsandbytes, `packing_format_for_cpu`
    values = torch.randn(40, 256)
    layer = quantized_layer(backend, scheme, float_linear(256, 64), values).eval()
    before = copy.deepcopy(layer)
    first = layer(values)
    assert identical(layer, before)
    assert torch.equal(layer(values), first)
    assert torch.equal(layer.to(torch.bfloat16)(values.bfloat16()), before.to(torch.bfloat16)(values.bfloat16()))


@every_pair
def test_quantizing_and_running_leave_the_random_state_alone(backend, scheme):
    linear, values = float_linear(64, 16), torch.randn(40, 64)
    before = torch.get_rng_state()
    quantized_layer(backend, scheme, linear, values)(values)
    assert torch.equal(torch.get_rng_state(), before)


@pairs(*[pair for pair in PAIRS if pair[1] == "w8a8"])
def test_one_input_feature_is_refused(backend, scheme):
    # torch leaves the result of an integer product over one column uninitialised
    with pytest.raises(SchemeError, match=f"{scheme} of {backend} needs two input features or more"):
        quantized_layer(backend, scheme, nn.Linear(1, 8), torch.ones(4, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_pair
@pytest.mark.parametrize("rows", [1, 17, 20, 64])
def test_cuda_agrees_with_the_cpu(backend, scheme, rows):
    values = torch.randn(rows, 256)
    layer = quantized_layer(backend, scheme, float_linear(256, 64), values)
    with torch.no_grad():
        expected = layer(values)
        for dtype, off in [(torch.float32, 0.003), (torch.bfloat16, 0.02)]:
            found = copy.deepcopy(layer).to("cuda", dtype)(values.to("cuda", dtype))
            assert found.dtype == dtype
            assert relative(found.cpu(), expected) < off


# --- models


@every_pair
def test_a_model_stays_near_its_float_model(backend, scheme):
    plain, model = make_model(), quantized_model(backend, scheme)
    expected, replaced = predict(plain), 0
    for (name, module), (_, before) in zip(model.named_modules(), plain.named_modules(), strict=True):
        if isinstance(module, QuantizedLinear):
            replaced += 1
            assert type(before) is nn.Linear
            assert type(module).__module__ == f"cemq.quantize.backends.{backend}"
        else:  # quanto replaces norms too, and then cannot save those without a weight
            assert type(module) is type(before), name
    assert replaced == 18
    assert 0 < relative(predict(model), expected) < MODEL_ERROR[backend, scheme]
    for dtype in (torch.float16, torch.bfloat16):
        cast = predict(nn.Module.to(quantized_model(backend, scheme), dtype))
        assert cast.dtype == dtype
        assert relative(cast, expected) < MODEL_ERROR[backend, scheme] + LOWER_PRECISION[dtype]


@pytest.mark.slow  # bundles of every backend are drawn in fresh processes by test_backend_bundles.py
@every_backend
def test_a_saved_model_reloads_bit_for_bit_here_and_in_another_process(tmp_path, backend):
    outputs = {}
    for scheme in BACKENDS[backend].layers:
        model = quantized_model(backend, scheme)
        before = predict(model)
        model.save_pretrained(tmp_path / scheme)  # after a forward
        loaded = DiTTransformer2DModel.from_pretrained(tmp_path / scheme)
        assert identical(model, loaded)
        assert torch.equal(predict(loaded), before)
        half = DiTTransformer2DModel.from_pretrained(tmp_path / scheme, torch_dtype=torch.bfloat16)
        kept = {name: t.dtype for name, t in loaded.named_parameters() if ".weight_" in name or "input_scale" in name}
        assert kept
        assert {name: half.get_parameter(name).dtype for name in kept} == kept
        # a mapped file: its tensors lie wherever they lie in it
        assert torch.equal(predict(half), predict(copy.deepcopy(half)))
        outputs[scheme] = [before, predict(half)]
    torch.save(outputs, tmp_path / "outputs.pt")
    code = """
import sys, cemq, torch
from diffusers import DiTTransformer2DModel
torch.set_num_threads(1)
folder, backend = sys.argv[1:]
sample = (torch.manual_seed(1), torch.randn(3, 4, 8, 8))[1]
for scheme, outputs in torch.load(f"{folder}/outputs.pt").items():
    for dtype, expected in zip((torch.float32, torch.bfloat16), outputs, strict=True):
        model = DiTTransformer2DModel.from_pretrained(f"{folder}/{scheme}", torch_dtype=dtype)
        keywords = dict(timestep=torch.tensor([5, 50, 500]), class_labels=torch.tensor([1, 2, 3]))
        with torch.inference_mode():
            found = model(sample.to(dtype), **keywords).sample
        assert type(model.transformer_blocks[0].attn1.to_q).__module__.endswith(backend)
        assert torch.equal(found, expected), (scheme, dtype)
print("same")
"""
    assert run_python(code, tmp_path, backend) == "same"


@every_pair
def test_casts_copies_and_moves_keep_the_stored_tensors(backend, scheme):
    model = quantized_model(backend, scheme)
    expected, before = predict(model), {name: t.clone() for name, t in model.state_dict().items()}
    twin = copy.deepcopy(model)
    assert torch.equal(predict(twin), expected)
    nn.Module.to(twin, torch.bfloat16)
    for name, layer in twin.named_modules():
        if isinstance(layer, QuantizedLinear):
            stored = layer.state_dict()
            for leaf in layer.layout(layer.in_features, layer.out_features, layer.scheme):
                assert torch.equal(stored[leaf], before[f"{name}.{leaf}"])
                assert stored[leaf].dtype == before[f"{name}.{leaf}"].dtype
    assert all(parameter.is_meta for parameter in nn.Module.to(twin, "meta").parameters())
    assert torch.equal(predict(model), expected)


@every_pair
def test_offloading_hooks_work(backend, scheme):
    model = quantized_model(backend, scheme)
    expected = predict(model)
    twin = copy.deepcopy(model)
    accelerate.cpu_offload(twin, execution_device=torch.device("cpu"))
    assert twin.transformer_blocks[0].attn1.to_q.weight.is_meta
    assert torch.equal(predict(twin), expected)
    cpu = torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(predict(model), expected)


@pairs(*[pair for pair in PAIRS if pair not in [("quanto", "w8a8"), ("quanto", "w4a8")]])
def test_quantizing_while_loading_equals_quantizing_in_place(tmp_path, backend, scheme):
    make_model().save_pretrained(tmp_path)
    config = model_config(backend, scheme)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=config)
    assert identical(loaded, quantized_model(backend, scheme))


@every_backend
def test_a_missing_tensor_is_named(tmp_path, backend):
    quantized_model(backend, "w8a8").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    layer = "transformer_blocks.0.attn1.to_q"
    name = sorted(name for name in tensors if name.startswith(layer) and not name.endswith(("bias", "weight")))[0]
    del tensors[name]
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(BundleError, match=rf"lacks 1 tensors \({name}\)"):
        DiTTransformer2DModel.from_pretrained(tmp_path)


# --- quanto


@pytest.fixture
def no_build(monkeypatch):
    """quanto's own layers unpack int4 in a C++ extension that they would compile here."""
    from optimum.quanto.tensor.packed import PackedTensor

    from cemq.quantize.backends.quanto import PackedHalves

    monkeypatch.setattr(PackedTensor, "unpack", PackedHalves.unpack)


@quanto
@pytest.mark.parametrize("scheme", BACKENDS["quanto"].layers)
@pytest.mark.parametrize(
    ("dtype", "off"), [(torch.float32, 0), (torch.bfloat16, {"w8a8": 0.014, "w8a16": 0.009, "w4": 0.05})]
)
@torch.no_grad()
def test_quanto_agrees_with_its_own_layer(no_build, scheme, dtype, off):
    from optimum.quanto import qint4, qint8
    from optimum.quanto.nn import QLinear

    off = off and off.get(scheme, off["w4"])  # quanto itself quantizes in bfloat16 then
    for inner, columns in [(64, 128), (320, 48), (256, 64)]:
        linear, values = float_linear(inner, columns), torch.randn(2, 20, inner).to(dtype)
        layer = quantized_layer("quanto", scheme, linear, values).to(dtype)
        activations = qint8 if scheme.endswith("a8") else None
        stock = QLinear.from_module(
            linear.to(dtype), weights=qint8 if scheme[1] == "8" else qint4, activations=activations
        )
        if activations is not None:
            stock.input_scale = layer.input_scale.squeeze().to(dtype)
            stock.disable_output_quantization()
        stock.freeze()
        assert relative(layer(values), stock(values)) <= off


@quanto
def test_group_sizes_are_those_of_quanto():
    from optimum.quanto import qint4
    from optimum.quanto.nn import QLinear

    from cemq.quantize.backends.quanto import group_size

    for inner in [1, 31, 32, 64, 127, 128, 129, 160, 192, 224, 256, 288, 300, 384, 1152, 4304]:
        stock = QLinear(inner, 2, weights=qint4, device="meta").weight_group_size
        assert group_size(inner) == (stock or inner)


@quanto
@torch.no_grad()
def test_the_input_scale_is_that_of_quantos_calibration():
    from optimum.quanto import Calibration, qint8
    from optimum.quanto.nn import QLinear

    linear = float_linear(64, 8)
    stock = QLinear.from_module(linear, weights=qint8, activations=qint8)
    batches = [torch.randn(4, 64) * size for size in (1, 5, 0.3, 2)]
    with Calibration():
        for batch in batches:
            stock(batch)
    scheme = SCHEMES["w8a8"]
    layer = CemqConfig("w8a8", backend="quanto").layer_class(scheme)
    found = layer.from_linear(linear, scheme, statistics_of(*batches)).input_scale
    assert found.shape == (1,)
    assert float(found) == pytest.approx(float(stock.input_scale), rel=1e-6)


@quanto
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_quanto_wants_statistics_for_its_fixed_activation_scales(tmp_path, scheme):
    config = CemqConfig(scheme, backend="quanto", eight_bit=())
    assert config.layer_class(SCHEMES[scheme]).needs_largest
    expected = rf"{scheme} of quanto multiplies with fixed activation scales.* or take {scheme[:2]}a16 or another"
    with pytest.raises(SchemeError, match=expected):
        quantize_in_place(make_model(), config)
    make_model().save_pretrained(tmp_path)
    with pytest.raises(SchemeError, match=expected):
        DiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=config)


@quanto
def test_inputs_beyond_the_calibrated_range_are_clipped_not_wrapped():
    linear = float_linear(64, 8, bias=False)
    layer = quantized_layer("quanto", "w8a8", linear, torch.ones(1, 64))
    assert torch.allclose(layer(torch.full((4, 64), 5.0)), layer(torch.ones(4, 64)), rtol=1e-6)
    assert torch.isfinite(quantized_layer("quanto", "w8a8", linear, torch.zeros(1, 64))(torch.randn(4, 64))).all()


@quanto
@pytest.mark.parametrize("offset", [0, 4, 8, 16])
@torch.no_grad()
def test_operands_that_are_not_aligned_do_no_harm(offset):
    # torch._weight_int8pack_mm ends the process with them, and with columns that do not divide into vectors
    for rows, inner in itertools.product((1, 2, 33), (64, 72, 12, 70)):
        values = torch.randn(rows, inner).bfloat16()
        layer = quantized_layer("quanto", "w8a16", float_linear(inner, 40), values.float()).to(torch.bfloat16)
        expected = layer(values)
        buffer = torch.empty(layer.weight.numel() + 128, dtype=torch.int8)
        start = -buffer.data_ptr() % 64 + offset
        moved = buffer[start : start + layer.weight.numel()].view_as(layer.weight).copy_(layer.weight)
        layer.weight = nn.Parameter(moved, requires_grad=False)
        assert layer.weight.data_ptr() % 64 == offset
        shifted = torch.empty(values.numel() + 1, dtype=torch.bfloat16)[1:].view_as(values).copy_(values)
        assert torch.equal(layer(values), expected)
        assert torch.equal(layer(shifted), expected)


@quanto
@pytest.mark.filterwarnings("ignore")  # Dynamo tells where the graph breaks, and steps on a deprecation of its own
def test_quanto_compiles_nothing():
    from optimum.quanto.library.extensions.extension import get_extension

    for scheme in BACKENDS["quanto"].layers:
        predict(quantized_model("quanto", scheme))
        values = torch.randn(40, 256)
        layer = quantized_layer("quanto", scheme, float_linear(256, 16), values)
        with torch.no_grad():
            assert torch.equal(torch.compile(layer, backend="aot_eager")(values), layer(values))
    assert get_extension("quanto_cpp")._lib is None


# --- bitsandbytes


@bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_int8_agrees_with_bitsandbytes_own_layer(dtype):
    import bitsandbytes as bnb

    linear, values = float_linear(256, 64).to(dtype), torch.randn(2, 20, 256).to(dtype)
    values[..., 7] *= 20  # a column of outliers
    stock = bnb.nn.Linear8bitLt(256, 64, has_fp16_weights=False, threshold=6.0)
    stock.weight = bnb.nn.Int8Params(linear.weight.clone(), requires_grad=False, has_fp16_weights=False)
    stock.bias = nn.Parameter(linear.bias.clone())
    layer = quantized_layer("bitsandbytes", "w8a8", linear, values)
    assert torch.equal(layer(values), stock.to("cpu").eval()(values))


@bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scheme", "kind"), [("w4a16", "nf4"), ("w4a16-fp4", "fp4")])
@torch.no_grad()
def test_four_bits_agree_with_bitsandbytes_own_layer(scheme, kind, dtype):
    import bitsandbytes as bnb

    linear, values = float_linear(256, 64).to(dtype), torch.randn(2, 20, 256).to(dtype)
    stock = bnb.nn.Linear4bit(256, 64, quant_type=kind, compress_statistics=False, compute_dtype=dtype)
    stock.weight = bnb.nn.Params4bit(
        linear.weight.clone(), requires_grad=False, quant_type=kind, compress_statistics=False, blocksize=64
    )
    stock.bias = nn.Parameter(linear.bias.clone())
    layer = quantized_layer("bitsandbytes", scheme, linear, values)
    stock.to("cpu").train()  # in eval it repacks its weight, at the first forward
    assert torch.equal(layer(values), stock(values))


@bitsandbytes
@torch.no_grad()
def test_outliers_are_multiplied_in_floats():
    linear, values = float_linear(256, 64), torch.randn(40, 256)
    values[:, 7] *= 1e3
    values[:, 9] *= 1e5  # beyond float16
    expected = linear(values)
    before = values.clone()
    layer = quantized_layer("bitsandbytes", "w8a8", linear, values)
    assert relative(layer(values), expected) < 0.01
    assert relative(layer.to(torch.bfloat16)(values.bfloat16()), expected) < 0.01
    assert torch.equal(values, before)
    with torch.inference_mode():
        half = values.clamp(-1000, 1000).half()
    assert relative(layer.half()(half), linear(half.float())) < 0.01  # blanked in a copy, this one cannot be written to


@bitsandbytes
def test_bitsandbytes_logs_nothing_while_the_model_runs(caplog):
    caplog.set_level(logging.DEBUG)
    for scheme in BACKENDS["bitsandbytes"].layers:
        predict(quantized_model("bitsandbytes", scheme))
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


# --- torchao


@torchao
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 0), (torch.bfloat16, 0.008)])
@torch.no_grad()
def test_torchao_agrees_with_its_own_layer(dtype, off):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    stock, values = float_linear(256, 64).to(dtype), torch.randn(2, 20, 256).to(dtype)
    layer = quantized_layer("torchao", "w8a8", stock, values)
    quantize_(stock, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    assert relative(layer(values), stock(values)) <= off  # torchao itself rounds the weight in bfloat16


@torchao
@torch.no_grad()
def test_large_float16_inputs_do_not_overflow():
    linear = float_linear(2048, 16, bias=False).half()
    linear.weight.abs_()
    values = torch.full((40, 2048), 40.0, dtype=torch.float16)
    found = quantized_layer("torchao", "w8a8", linear, values)(values)
    assert relative(found, values.float() @ linear.weight.float().t()) < 0.01
