"""Whoever asks a quantized module for its dtype gets the one that is computed in, never that of stored integers."""

import copy
import pickle

import accelerate
import pytest
import torch
from conftest import identical, make_denoiser, relative
from diffusers import AnyFlowTransformer3DModel, CosmosTransformer3DModel, WanTransformer3DModel
from diffusers.models.modeling_utils import ModelMixin, get_parameter_dtype
from test_defaults import PAIRS
from tiny_pipelines import FAMILIES
from torch import nn

from cemq.errors import ModelError
from cemq.models import denoisers
from cemq.quantize import SCHEMES, CemqConfig, InputStatistics, QuantizedLinear, quantize_in_place


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


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own names
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_every_part_of_every_family_answers_with_the_dtype_it_computes_in(name, scheme):
    for _, model in denoisers(FAMILIES[name].pipeline()):
        quantized(model, scheme)
        assert_answers(model, torch.float32)
        nn.Module.to(model, torch.bfloat16)
        assert_answers(model, torch.bfloat16)
        assert all(type(tensor) is torch.Tensor for tensor in model.state_dict().values())


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

    class Embedder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64, bias=bias)

        def forward(self, values):
            return self.layer(values.to(next(self.layer.parameters()).dtype))

    torch.manual_seed(0)
    model, values = Embedder(), torch.rand(3, 64)
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
