import copy
import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from support.comparing import identical
from support.processes import run_python
from support.quantized import saved_and_edited, schemes_of
from support.slow import others_slow
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from cemq.errors import BundleError, SchemeError
from cemq.quantize import CemqConfig, QuantizedLinear, quantize_in_place
from cemq.quantize.in_transformers import TextEncoderConfig, quantize_text_encoder

FILE = "model.safetensors"
WO = "encoder.block.0.layer.1.DenseReluDense.wo"
T5 = {"vocab_size": 60, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
CLIP = {
    "vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16, "projection_dim": 48, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
DECODER = {
    "vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
MODELS = {
    "t5": lambda: T5EncoderModel(T5Config(**T5, feed_forward_proj="gated-gelu")),
    "umt5": lambda: UMT5EncoderModel(UMT5Config(**T5)),
    "clip": lambda: CLIPTextModel(CLIPTextConfig(**CLIP)),
    "clip-projection": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)),
    "gemma2": lambda: Gemma2Model(Gemma2Config(**DECODER, head_dim=16)),
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER, tie_word_embeddings=True)),
    "qwen2.5-vl": lambda: Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=DECODER | {"rope_parameters": ROPE}, vision_config=VISION)
    ),
}
every_model = pytest.mark.parametrize("kind", MODELS)
both_schemes = pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])


def make(kind):
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def quantized(kind, scheme="w8a16", **patterns):
    model = make(kind)
    quantize_text_encoder(model, TextEncoderConfig(scheme, **patterns))
    return model


@torch.no_grad()
def encode(model):
    """What pipelines take from a text encoder, in float32."""
    tokens = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(1))
    answer = model(input_ids=tokens, output_hidden_states=True)
    return answer.get("text_embeds", answer.hidden_states[-1]).float()


def off(values, expected):
    return float((values - expected).norm() / expected.norm())


def linears_of(model):
    return {name for name, module in model.named_modules() if type(module) is nn.Linear}


def saved(folder, edit, kind="t5", scheme="w8a16"):
    """A quantized model on disk whose tensors went through ``edit``."""
    return saved_and_edited(quantized(kind, scheme), folder, edit)


# --- saving and loading


@every_model
@both_schemes
def test_a_saved_model_reloads_bit_for_bit(tmp_path, kind, scheme):
    model = quantized(kind, scheme)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert identical(model, loaded)
    assert schemes_of(model) == schemes_of(loaded)
    assert torch.equal(encode(model), encode(loaded))
    assert not any(p.requires_grad for m in loaded.modules() if isinstance(m, QuantizedLinear) for p in m.parameters())


def test_a_fresh_process_reloads_bit_for_bit(tmp_path):
    code = """
import cemq, json, sys, torch, transformers
from safetensors.torch import load_file
torch.set_num_threads(1)
for name in sys.argv[1:]:
    expected = load_file(name + "/expected.safetensors")
    kind = json.load(open(name + "/config.json"))["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(name)
    with torch.no_grad():
        answer = model(input_ids=expected["tokens"], output_hidden_states=True)
    assert torch.equal(answer.get("text_embeds", answer.hidden_states[-1]), expected["states"]), name
print("equal")
"""
    tokens = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(1))
    for kind in MODELS:
        model = quantized(kind)
        model.save_pretrained(tmp_path / kind)
        save_file({"tokens": tokens, "states": encode(model)}, tmp_path / kind / "expected.safetensors")
    assert run_python(code, *(tmp_path / kind for kind in MODELS)) == "equal"


@pytest.mark.slow  # one of test_backend_bundles.py's has them
def test_a_pipeline_with_quantized_text_encoders_reloads_in_a_fresh_process(tmp_path, flux):
    code = """
import cemq, sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
embeds, pooled, _ = pipe.encode_prompt("thick", None, max_sequence_length=16)
latents = pipe("thick", height=16, width=16, max_sequence_length=16, num_inference_steps=2, output_type="latent",
               generator=torch.manual_seed(3)).images
save_file({"embeds": embeds, "pooled": pooled, "latents": latents}, sys.argv[2])
print("saved")
"""
    quantize_in_place(flux.transformer, CemqConfig("w8a8"))
    quantize_text_encoder(flux.text_encoder, TextEncoderConfig("w8a16"))
    quantize_text_encoder(flux.text_encoder_2, TextEncoderConfig("w4a16"))
    flux.save_pretrained(tmp_path / "pipe")
    assert run_python(code, tmp_path / "pipe", tmp_path / "answers") == "saved"
    answers = load_file(tmp_path / "answers")
    embeds, pooled, _ = flux.encode_prompt("thick", None, max_sequence_length=16)
    assert torch.equal(answers["embeds"], embeds)
    assert torch.equal(answers["pooled"], pooled)
    call = {"height": 16, "width": 16, "max_sequence_length": 16, "num_inference_steps": 2, "output_type": "latent"}
    latents = flux("thick", generator=torch.manual_seed(3), **call).images
    assert torch.allclose(answers["latents"], latents, atol=1e-5)  # the transformer's memory is aligned otherwise
    assert identical(DiffusionPipeline.from_pretrained(tmp_path / "pipe").text_encoder_2, flux.text_encoder_2)


@both_schemes
def test_a_reloaded_model_saves_the_same_files_again(tmp_path, scheme):
    model = quantized("t5", scheme)
    model.save_pretrained(tmp_path / "first")
    T5EncoderModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("config.json", FILE):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert json.loads((tmp_path / "first" / "config.json").read_text())["quantization_config"]["scheme"] == scheme


def test_a_model_in_several_files_reloads(tmp_path):
    model = quantized("t5")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert identical(T5EncoderModel.from_pretrained(tmp_path), model)


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reloading_in_half_precision_keeps_integers_and_scales_bit_for_bit(tmp_path, kind, dtype):
    model = quantized(kind, "w4a16")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    stored, compared = model.state_dict(), 0
    for name, tensor in loaded.state_dict().items():
        if name.endswith(("weight_scale", "weight_sum", "group_scale")) or tensor.dtype in (torch.int8, torch.uint8):
            assert tensor.dtype == stored[name].dtype
            assert torch.equal(tensor, stored[name])
            compared += 1
        else:
            assert tensor.dtype == dtype
    assert compared >= 3 * len(schemes_of(model))
    assert off(encode(loaded), encode(model)) < 0.02


@both_schemes
def test_quantizing_while_loading_equals_quantizing_in_place(tmp_path, scheme):
    make("t5").save_pretrained(tmp_path / "float")
    loaded = T5EncoderModel.from_pretrained(tmp_path / "float", quantization_config=TextEncoderConfig(scheme))
    assert identical(loaded, quantized("t5", scheme))
    loaded.save_pretrained(tmp_path / "quantized")
    assert identical(T5EncoderModel.from_pretrained(tmp_path / "quantized"), loaded)


@pytest.mark.slow
def test_transformers_without_cemq_refuses_the_folder(tmp_path):
    quantized("t5").save_pretrained(tmp_path)
    code = """
import sys
from transformers import T5EncoderModel
try:
    T5EncoderModel.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print("refused" if "mismatched" in str(error) and "cemq" not in sys.modules else error)
"""
    assert run_python(code, tmp_path) == "refused"


@pytest.mark.parametrize(
    "imports",
    others_slow(
        ["import transformers.modeling_utils, cemq", "import cemq.quantize.in_transformers"],
        ["import transformers.modeling_utils, cemq"],
    ),
)
def test_transformers_knows_cemq_whichever_is_imported_first(imports):
    code = f"{imports}\nfrom transformers.quantizers import auto\nprint('cemq' in auto.AUTO_QUANTIZER_MAPPING)"
    assert run_python(code) == "True"


def test_importing_cemq_loads_neither_torch_nor_transformers():
    assert run_python("import sys, cemq; print([m for m in ('torch', 'transformers') if m in sys.modules])") == "[]"


# --- what a damaged folder says


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("t5", f"{WO}.weight"),
        ("t5", f"{WO}.weight_scale"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.q.weight_sum"),
        ("t5", "encoder.final_layer_norm.weight"),
        ("t5", "shared.weight"),
        ("clip", "encoder.layers.0.mlp.fc1.weight"),
        ("clip", "encoder.layers.0.mlp.fc1.bias"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, kind, name, dtype):
    folder, model = saved(tmp_path, lambda tensors: tensors.pop(name), kind), type(make(kind))
    with pytest.raises(BundleError, match=rf"{model.__name__} lacks 1 tensors \({name}\): write the bundle again"):
        model.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("name", [f"{WO}.weight", f"{WO}.weight_scale", "encoder.final_layer_norm.weight"])
def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path, name):
    def widen(tensors):
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    with pytest.raises(BundleError, match=rf"T5EncoderModel: tensor '{name}' is .*expected .*not written under this"):
        T5EncoderModel.from_pretrained(saved(tmp_path, widen))


@pytest.mark.parametrize("loaded_as", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("leaf", "dtype"), [("weight", torch.float32), ("weight_scale", torch.bfloat16), ("weight_sum", torch.int64)]
)
def test_a_tensor_of_another_dtype_is_refused_by_name(tmp_path, leaf, dtype, loaded_as):
    def convert(tensors):
        tensors[f"{WO}.{leaf}"] = tensors[f"{WO}.{leaf}"].to(dtype)

    with pytest.raises(BundleError, match=rf"tensor '{WO}.{leaf}' is .*{dtype}, expected"):
        T5EncoderModel.from_pretrained(saved(tmp_path, convert), dtype=loaded_as)


def test_a_device_map_that_offloads_is_refused(tmp_path):
    parts = {"shared": "cpu", "encoder.embed_tokens": "cpu", "encoder.block": "disk", "encoder.final_layer_norm": "cpu"}
    folder = saved(tmp_path, lambda tensors: None)
    with pytest.raises(BundleError, match="T5EncoderModel is quantized and cannot be offloaded by a device_map"):
        T5EncoderModel.from_pretrained(folder, device_map=parts, offload_folder=tmp_path / "offload")


# --- which layers, and how well


@every_model
@pytest.mark.parametrize(("scheme", "worst", "share"), [("w8a16", 0.02, 0.75), ("w4a16", 0.3, 0.7)])
def test_quantized_models_stay_near_and_shrink(tmp_path, kind, scheme, worst, share):
    model = make(kind)
    model.save_pretrained(tmp_path / "float")
    quantized(kind, scheme).save_pretrained(tmp_path / scheme)
    assert off(encode(quantized(kind, scheme)), encode(model)) < worst
    assert (tmp_path / scheme / FILE).stat().st_size < share * (tmp_path / "float" / FILE).stat().st_size


def test_heads_projections_and_vision_towers_stay_in_full_precision():
    assert linears_of(quantized("clip-projection")) == {"text_projection"}
    assert linears_of(quantized("qwen2-tied")) == {"lm_head"}
    left = linears_of(quantized("qwen2.5-vl"))
    assert left == {name for name in linears_of(make("qwen2.5-vl")) if ".visual." in name} | {"lm_head"}


def test_a_head_tied_to_the_embedding_is_never_quantized():
    model = quantized("qwen2-tied", full_precision=[])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_that_is_not_tied_can_be_quantized(tmp_path):
    model = quantized("clip-projection", full_precision=["*.fc1"])
    assert linears_of(model) == {f"text_model.encoder.layers.{block}.mlp.fc1" for block in (0, 1)}
    model.save_pretrained(tmp_path)
    assert identical(CLIPTextModelWithProjection.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("kind", ["t5", "umt5"])
def test_the_sensitive_layer_of_t5_takes_eight_bits_in_a_four_bit_scheme(kind):
    schemes = schemes_of(quantized(kind, "w4a16"))
    assert all((scheme.name == "w8a16") == name.endswith(".wo") for name, scheme in schemes.items())


def test_the_sensitive_layer_of_t5_stays_in_full_precision_where_it_cannot_take_eight_bits(tmp_path):
    model = quantized("t5", "w4a16", eight_bit=[])  # on meta, a packed weight would have T5 cast its input to uint8
    assert linears_of(model) == {name for name in linears_of(make("t5")) if name.endswith(".wo")}
    model.save_pretrained(tmp_path)
    assert identical(T5EncoderModel.from_pretrained(tmp_path), model)


def test_t5_does_not_overflow_in_float16(tmp_path):
    model = make("t5")
    with torch.no_grad():
        for block in model.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(3e6)
    expected = encode(model)
    quantize_text_encoder(model, TextEncoderConfig())
    model.save_pretrained(tmp_path)
    loaded = T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float16)
    found = encode(loaded)
    assert off(found, expected) < 0.03
    assert torch.equal(encode(copy.deepcopy(loaded)), found)
    bare = copy.deepcopy(loaded)
    for module in bare.modules():
        module._forward_pre_hooks.clear()
    assert torch.equal(encode(bare), found)  # T5 itself casts to the float32 that its layer answers with
    for model in (loaded, bare):
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.half()
    assert off(encode(loaded), expected) < 0.03  # and where it answers with float16 there is the hook
    assert not encode(bare).isfinite().all()  # the test has teeth


def test_a_cast_leaves_the_scales_bit_for_bit():
    model, stored = quantized("t5").to(torch.bfloat16), quantized("t5").state_dict()
    scales = [name for name in stored if name.endswith("weight_scale")]
    assert len(scales) == 14
    assert all(torch.equal(model.state_dict()[name], stored[name]) for name in scales)
    assert encode(model).isfinite().all()


def test_nothing_left_to_quantize_is_refused():
    model = make("t5")
    with pytest.raises(SchemeError, match="T5EncoderModel has no linear layer outside the full-precision"):
        quantize_text_encoder(model, TextEncoderConfig(full_precision=["*"]))
    assert identical(model, make("t5"))


def test_an_unknown_key_in_a_saved_config_is_refused(tmp_path):
    folder = saved(tmp_path, lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["colour"] = "red"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SchemeError, match="unknown keys: colour"):
        T5EncoderModel.from_pretrained(folder)
