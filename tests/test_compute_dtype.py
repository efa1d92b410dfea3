"""Whoever asks a quantized module for its dtype gets the one that is computed in, never that of stored integers."""

import copy
import importlib
import inspect
import pickle
import pkgutil
import re

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers import AnyFlowTransformer3DModel, CosmosTransformer3DModel, WanTransformer3DModel
from diffusers.models.modeling_utils import ModelMixin, get_parameter_dtype
from support.checks import draw
from support.comparing import identical, relative
from support.families import FAMILIES
from support.pipelines import make_denoiser
from support.quantized import PAIRS
from support.slow import others_slow
from torch import nn

from cemq.errors import ModelError
from cemq.pipelines.opening import denoisers
from cemq.quantize import SCHEMES, CemqConfig, InputStatistics, NativeLinear, QuantizedLinear, quantize_in_place
from cemq.quantize.in_diffusers import quantizable


def asked_dtypes(module):
    """What models ask their parts for before they cast to it, by how they ask."""
    first = next(module.parameters(), None)
    if first is not None:
        yield "next(parameters()).dtype", first.dtype
        yield "get_parameter_dtype()", get_parameter_dtype(module)
    if isinstance(getattr(module, "weight", None), torch.Tensor):
        yield "weight.dtype", module.weight.dtype
    if isinstance(module, (ModelMixin, QuantizedLinear)):
        yield "dtype", module.dtype


def assert_answers(model, dtype):
    layers = 0
    for name, module in model.named_modules():
        for question, answer in asked_dtypes(module):
            assert answer == dtype, f"{name or 'the model'}: {question} is {answer}"
        layers += isinstance(module, QuantizedLinear)
    assert layers


def quantized(model, scheme="w8a8", **options):
    """With no layer left in full precision: the first and last ones are asked as well."""
    quantize_in_place(model, CemqConfig(scheme, full_precision=(), **options))
    return model


def cast_to_answers(module, arguments):
    """A hook that hands a module its inputs in the dtypes that it is asked for, one after the other."""
    for _, answer in asked_dtypes(module):
        arguments = tuple(
            value.to(answer) if torch.is_tensor(value) and value.is_floating_point() else value for value in arguments
        )
    return arguments


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own names
@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_of_every_family_answers_with_the_dtype_it_computes_in(name):
    for _, model in denoisers(FAMILIES[name].pipeline()):
        quantized(model)
        assert_answers(model, torch.float32)
        nn.Module.to(model, torch.bfloat16)
        assert_answers(model, torch.bfloat16)
        assert all(type(tensor) is torch.Tensor for tensor in model.state_dict().values())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:In CPU autocast:UserWarning")  # diffusers' own
@pytest.mark.parametrize("name", others_slow(FAMILIES, ("wan",)))
def test_a_picture_is_the_same_where_every_part_has_its_inputs_cast_to_what_it_answers(name):
    pipe = FAMILIES[name].pipeline()
    for _, model in denoisers(pipe):  # torch's own attention, in Hunyuan-DiT's pooler, multiplies with weights itself
        quantize_in_place(model, CemqConfig("w4a8", full_precision=["*pooler*"]))
    expected = draw(pipe, FAMILIES[name])
    for _, model in denoisers(pipe):
        for module in model.modules():
            module.register_forward_pre_hook(cast_to_answers)
    assert np.array_equal(draw(pipe, FAMILIES[name]), expected)


def transformers():
    """Every transformer of diffusers, by name."""
    for module in pkgutil.iter_modules(diffusers.models.transformers.__path__, "diffusers.models.transformers."):
        for name, found in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(found) and issubclass(found, ModelMixin) and found.__module__ == module.name:
                yield name, found


TRANSFORMERS = dict(transformers())

# what their constructors cannot do without
SIZES = {
    "DreamLiteTransformer2DModel": {"in_channels": 32},
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {
        "in_channels": 16, "patch_size": 2, "axes_dims_rope": (64, 32, 32), "caption_channels": [64, 64],
        "text_emb_dim": 64, "max_resolution": (128, 128), "llama_layers": [0, 1],
    },
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2},
    "LatteTransformer3DModel": {
        "in_channels": 4, "patch_size": 2, "sample_size": 16, "cross_attention_dim": 1152, "caption_channels": 64,
    },
    "LuminaNextDiT2DModel": {
        "multiple_of": 256, "ffn_dim_multiplier": 1.0, "cross_attention_dim": 2048, "num_kv_heads": 8,
    },
    "OmniGenTransformer2DModel": {"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},
    "Transformer2DModel": {"in_channels": 32},
    "TransformerTemporalModel": {"in_channels": 32},
    "WanVACETransformer3DModel": {"vace_layers": [0]},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_part_of_every_transformer_answers_as_before_it_was_quantized(name):
    kind = TRANSFORMERS[name]
    depths = {
        option: 1
        for option, found in inspect.signature(kind.__init__).parameters.items()
        if re.search("layers|depth|blocks", option) and type(found.default) is int and found.default > 1
    }
    with torch.device("meta"):
        model = kind(**depths | SIZES.get(name, {})).to(torch.bfloat16)
    before = {part: dict(asked_dtypes(module)) for part, module in model.named_modules()}
    config, layers = CemqConfig("w8a8", full_precision=()), 0
    for part, linear, scheme in quantizable(model, config):
        sizes = linear.in_features, linear.out_features
        layer = NativeLinear(*sizes, scheme=scheme, bias=linear.bias is not None, dtype=torch.bfloat16, device="meta")
        model.set_submodule(part, layer.to_empty(device="cpu"))  # its memory is never touched
        layers += 1
    assert layers
    for part, module in model.named_modules():
        found = dict(asked_dtypes(module))
        assert {question: found[question] for question in before[part]} == before[part], part


TINY_VIDEO = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 32, "ffn_dim": 32, "num_layers": 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", [WanTransformer3DModel, AnyFlowTransformer3DModel, CosmosTransformer3DModel])
def test_a_time_embedding_is_not_cut_down_to_whole_numbers(kind):
    torch.manual_seed(0)
    inputs = {"hidden_states": torch.randn(1, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 16)}
    if kind is CosmosTransformer3DModel:  # its embedder has no biases
        model = kind(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 8, 8), rope_scale=(1.0, 1.0, 1.0),
            concat_padding_mask=False, extra_pos_embed_type=None,
        )  # fmt: skip
        inputs["fps"] = 8
    else:
        model = kind(**TINY_VIDEO)
    if kind is AnyFlowTransformer3DModel:
        inputs["hidden_states"] = inputs["hidden_states"].transpose(1, 2)
        inputs |= {"timestep": torch.full((1, 2), 0.7), "r_timestep": torch.full((1, 2), 0.3)}
    else:
        inputs["timestep"] = torch.tensor([0.7])
    model.eval()
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
        found = quantized(model)(**inputs, return_dict=False)[0]
    assert relative(found, expected) < 0.05


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize(("backend", "scheme"), PAIRS)
def test_a_layer_refuses_what_is_no_float(backend, scheme, kind):
    known = InputStatistics(largest=(1.0,), channel_largest=torch.ones(64))
    config = CemqConfig(scheme, backend=backend)
    layer = config.layer_class(SCHEMES[scheme]).from_linear(nn.Linear(64, 32), SCHEMES[scheme], known)
    for rows in (3, 40):
        with pytest.raises(ModelError, match=r"^a quantized layer is fed [^\n]*full_precision in a recipe$"):
            layer(torch.ones(rows, 64, dtype=kind))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("backend", "scheme"), PAIRS)
@torch.no_grad()
def test_a_layer_answers_however_it_was_made_cast_copied_or_filled(backend, scheme, bias):
    known = InputStatistics(largest=(1.0,), channel_largest=torch.ones(64))
    kind = CemqConfig(scheme, backend=backend).layer_class(SCHEMES[scheme])
    layer = kind.from_linear(nn.Linear(64, 32, bias=bias).bfloat16(), SCHEMES[scheme], known)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    values = torch.randn(40, 64, dtype=torch.bfloat16)
    expected = layer(values)
    again = kind(64, 32, scheme=SCHEMES[scheme], bias=bias, dtype=torch.bfloat16, device="meta").to_empty(device="cpu")
    again.load_state_dict(stored)
    filled = kind(64, 32, scheme=SCHEMES[scheme], bias=bias, dtype=torch.bfloat16, device="meta")
    filled.load_state_dict(stored, assign=True)
    wide_and_back = copy.deepcopy(layer).to(torch.float32)
    assert_answers(wide_and_back, torch.float32)
    others = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), again, filled, wide_and_back.bfloat16()
    for other in (layer, *others):
        assert_answers(other, torch.bfloat16)
        assert other.state_dict().keys() == stored.keys()
        for name, tensor in other.state_dict().items():
            assert tensor.dtype == stored[name].dtype
        assert torch.equal(other(values), expected)


class Embedder(nn.Module):
    """Two layers, and both ways in which models ask for what to cast to."""

    def __init__(self, kind, scheme, bias):
        super().__init__()
        known = InputStatistics(largest=(4.0,), channel_largest=torch.ones(64))
        for name in ("first", "second"):
            linear = nn.Linear(64, 64, bias=bias).bfloat16()
            self.add_module(name, kind.from_linear(linear, SCHEMES[scheme], known))

    def forward(self, values):
        values = self.first(values.to(self.first.weight.dtype))
        return self.second(values.float().to(next(self.second.parameters()).dtype))


@pytest.mark.filterwarnings("ignore")  # Dynamo tells where other libraries break the graph
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("backend", "scheme"),
    [
        pytest.param(*p.values, marks=[*p.marks, *([pytest.mark.slow] if "native" not in p.values else [])])
        for p in PAIRS
    ],
)
@torch.no_grad()
def test_a_compiled_model_is_answered_and_multiplies_with_the_integers(backend, scheme, bias, fresh_compiler):
    torch.manual_seed(0)
    model = Embedder(CemqConfig(scheme, backend=backend).layer_class(SCHEMES[scheme]), scheme, bias)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=backend == "native")
    values = torch.randn(40, 64)
    assert compiled(values).dtype == torch.bfloat16
    assert relative(compiled(values), model(values)) < 0.01
    before = model(values)
    for layer in (model.first, model.second):  # as offloaders put other memory in
        layer.weight.data = layer.weight.data.flip(0)
    assert relative(model(values), before) > 0.1
    assert relative(compiled(values), model(values)) < 0.01


def test_a_move_keeps_the_parameter_and_taking_offloading_off_keeps_its_answer():
    layer = CemqConfig("w8a8").layer_class(SCHEMES["w8a8"]).from_linear(nn.Linear(64, 32, bias=False), SCHEMES["w8a8"])
    layer.bfloat16()
    weight, values = layer.weight, torch.randn(3, 64)
    assert layer.to("cpu").weight is weight
    expected = layer(values)
    accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    assert layer.weight.is_meta
    assert torch.equal(layer(values), expected)
    accelerate.hooks.remove_hook_from_module(layer)
    assert_answers(layer, torch.bfloat16)
    assert torch.equal(layer(values), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize_first", [True, False])
def test_a_loaded_model_answers(dtype, quantize_first, tmp_path):
    model, options = make_denoiser(), {}
    if quantize_first:
        quantized(model, "w4a8")
    else:
        options["quantization_config"] = CemqConfig("w4a8", full_precision=())
    model.save_pretrained(tmp_path)
    assert_answers(type(model).from_pretrained(tmp_path, torch_dtype=dtype, **options), dtype)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
@pytest.mark.parametrize("strict", [True, False])
@torch.no_grad()
def test_float_weights_are_not_loaded_into_integers(scheme, strict):
    floats = make_denoiser()
    model = quantized(make_denoiser(), scheme)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"^tensor '[a-z0-9_.]+\.weight' is float32, [^\n]* quantize that$"):
        model.load_state_dict(floats.state_dict(), strict=strict)
    model.load_state_dict(before)
    assert identical(model, quantized(make_denoiser(), scheme))


@pytest.mark.parametrize("bias", [True, False])
def test_under_sequential_offload_a_layer_is_fed_floats_or_refuses(bias):
    """At rest its tensors are on meta, and accelerate asks them what to bring: only a bias can answer for the layer."""

    class OneLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64, bias=bias)

        def forward(self, values):
            return self.layer(values.to(next(self.layer.parameters()).dtype))

    torch.manual_seed(0)
    model, values = OneLayer(), torch.rand(3, 64)
    model.layer = CemqConfig("w8a8").layer_class(SCHEMES["w8a8"]).from_linear(model.layer, SCHEMES["w8a8"])
    expected = model(values)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if not bias:
        with pytest.raises(ModelError, match="a quantized layer is fed int8"):
            model(values)
        assert not model.layer.integers.is_meta  # accelerate leaves it where the forward broke off
    for _ in range(2):
        assert torch.equal(model.layer(values), expected)
    if bias:
        assert torch.equal(model(values), expected)
