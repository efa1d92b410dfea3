"""LoRAs on quantized pipelines: beside the integers, as in the merged float model but for the quantization."""

import copy
import functools
import itertools
import warnings

import accelerate
import numpy as np
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from safetensors.torch import load_file
from support.comparing import identical, relative
from support.families import sd3 as make_sd3
from support.pipelines import FLUX_CALL, ONE, make_dit, make_flux, run_dit
from support.quantized import PAIRS
from support.slow import others_slow

pytest.importorskip("peft")

# isort: split
from peft import LoraConfig, inject_adapter_in_model
from support.loras import save_lora

import cemq
from cemq.errors import BundleError, ModelError
from cemq.pipelines.batches import run
from cemq.quantize import SCHEMES, CemqConfig, InputStatistics, quantize_in_place
from cemq.quantize.in_transformers import TextEncoderConfig, quantize_text_encoder
from cemq.quantize.lora import QuantizedLoraLinear, adaptable
from cemq.runtime import schedule_hook

STEPS, BUDGET = 4, 2
MADE = {"flux": (make_flux, FLUX_CALL), "sd3": (make_sd3, {"height": 16, "width": 16, "max_sequence_length": 16})}
LAYERS = ("to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_out")  # the last is left in full precision
QUERY = "transformer_blocks.0.attn.to_q"
MEASURED = "cemq: this pipeline has a LoRA, and the figures of its bundle were measured without; its schedule stays"

pytestmark = [  # what PEFT says of every model with two
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:Adapter grain was active which is now deleted"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines, LoRAs for them and bundles made of them, each made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("lora"), {}

    def get(family, what):
        folder = root / family
        if (family, what) not in made:
            make, call = MADE[family]
            if what == "pipeline":
                make().save_pretrained(folder / what)
            elif what in ("ink", "grain"):
                save_lora(make(), folder, seed=len(what), name=f"{what}.safetensors", targets=LAYERS)
            else:
                cemq.quantize_and_schedule(
                    str(get(family, "pipeline")), folder / what, scheme=what, steps=STEPS, budget=BUDGET, call=call,
                    effort="instant", solver="uniform", rounding="nearest", device="cpu",
                )  # fmt: skip
            made[family, what] = folder / (f"{what}.safetensors" if what in ("ink", "grain") else what)
        return made[family, what]

    return get


@pytest.fixture
def ink(folders):
    return str(folders("flux", "ink"))


@pytest.fixture
def grain(folders):
    return str(folders("flux", "grain"))


@pytest.fixture
def pipe(folders):
    return opened(folders("flux", "w8a8"))


def opened(folder, **options):
    pipe = cemq.from_pretrained(folder, device="cpu", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, family="flux", **more):
    """A picture; that a LoRA was not measured is said in `test_the_schedule_stays...`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=MEASURED)
        return run(pipe, ONE, steps=STEPS, call=MADE[family][1] | more)


def merged(folders, family, bundle, *loras):
    """The float pipeline with LoRAs fused into it, under the schedule of a bundle."""
    pipe = MADE[family][0]()
    pipe.set_progress_bar_config(disable=True)
    for name, scale in loras:
        pipe.load_lora_weights(str(folders(family, name)))
        pipe.transformer.fuse_lora(lora_scale=scale)
        pipe.transformer.unload_lora()
    cemq.apply_schedule(pipe, folders(family, bundle))
    return pipe


def weights_of(folders):
    return load_file(folders("flux", "ink"))


def error(found, expected):
    """Root mean square."""
    return float(np.sqrt(np.square(found.astype(np.float64) - expected).mean()))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
@pytest.mark.parametrize("family", MADE)
def test_the_picture_is_that_of_merged_float_weights_but_for_the_quantization(folders, family, scheme):
    pipe = opened(folders(family, scheme))
    plain = merged(folders, family, scheme)
    fused = merged(folders, family, scheme, ("ink", 1.0))
    without, expected = drawn(plain, family), drawn(fused, family)
    quantization = error(drawn(pipe, family), without)
    quantize_in_place(fused.transformer, CemqConfig(scheme))  # what a build with --lora would quantize
    quantization = max(quantization, error(drawn(fused, family), expected))
    pipe.load_lora_weights(str(folders(family, "ink")))
    found = drawn(pipe, family)
    assert error(found, expected) < 1.5 * quantization
    assert error(found, expected) < 0.2 * error(without, expected)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_a_model_without_a_loader_takes_what_peft_injects(scheme):
    config = LoraConfig(
        r=2, lora_alpha=2, target_modules=["to_q", "to_v", "net.0.proj", "proj_out_2"], init_lora_weights=False
    )

    def adapted(model):
        torch.manual_seed(1)
        return inject_adapter_in_model(config, model)

    pipe, reference = make_dit(), make_dit()
    without = run_dit(reference)
    adapted(reference.transformer)
    expected = run_dit(reference)
    quantize_in_place(pipe.transformer, CemqConfig(scheme))
    quantized = run_dit(pipe)
    with adaptable(pipe.transformer):
        adapted(pipe.transformer)
    layers = [each for each in pipe.transformer.modules() if isinstance(each, QuantizedLoraLinear)]
    assert len(layers) == 6
    assert error(run_dit(pipe), expected) < 2 * error(quantized, without)
    assert error(run_dit(pipe), expected) < 0.3 * error(without, expected)


def layer_of(backend, scheme):
    torch.manual_seed(0)
    known = InputStatistics(largest=(3.0,), channel_largest=torch.full((64,), 3.0))
    linear = torch.nn.Linear(64, 32)
    return CemqConfig(scheme, backend=backend).layer_class(SCHEMES[scheme]).from_linear(linear, SCHEMES[scheme], known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backend", "scheme"), PAIRS)
@torch.no_grad()
def test_a_layer_of_any_backend_gives_the_sum_of_both(backend, scheme, dtype):
    model = torch.nn.Sequential(layer_of(backend, scheme)).to(dtype)
    inputs = [torch.randn(rows, 64).to(dtype) for rows in (3, 40)]
    alone = [model(values) for values in inputs]
    with adaptable(model):
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False), model)
    down, up = model[0].lora_A["default"].weight, model[0].lora_B["default"].weight
    assert (down.dtype, up.dtype) == (dtype, dtype)
    for values, product in zip(inputs, alone, strict=True):
        expected = product.double() + 2 * values.double() @ down.double().T @ up.double().T
        assert model(values).dtype == dtype
        assert relative(model(values), expected) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_scale_zero_is_no_lora_bit_for_bit(pipe, ink):
    before = drawn(pipe)
    pipe.load_lora_weights(ink, adapter_name="ink")
    assert not np.array_equal(drawn(pipe), before)
    pipe.set_adapters("ink", 0.0)
    assert np.array_equal(drawn(pipe), before)
    pipe.set_adapters("ink")
    assert not np.array_equal(drawn(pipe), before)
    assert np.array_equal(drawn(pipe, joint_attention_kwargs={"scale": 0.0}), before)


def test_the_scale_can_change_from_run_to_run(folders, pipe, ink):
    quantization = error(drawn(pipe), drawn(merged(folders, "flux", "w8a8")))
    pipe.load_lora_weights(ink, adapter_name="ink")
    whole = drawn(pipe)
    expected = drawn(merged(folders, "flux", "w8a8", ("ink", 0.5)))
    asked = drawn(pipe, joint_attention_kwargs={"scale": 0.5})
    pipe.set_adapters("ink", 0.5)
    assert np.array_equal(drawn(pipe), asked)
    assert error(asked, expected) < 2 * quantization < error(whole, expected) / 4
    pipe.set_adapters("ink", 1.0)
    assert np.array_equal(drawn(pipe), whole)


def test_two_adapters_add_up_and_either_can_be_chosen(folders, pipe, ink, grain):
    quantization, alone = error(drawn(pipe), drawn(merged(folders, "flux", "w8a8"))), {}
    for name, file in (("ink", ink), ("grain", grain)):
        single = opened(folders("flux", "w8a8"))
        single.load_lora_weights(file)
        alone[name] = drawn(single)
    pipe.load_lora_weights(ink, adapter_name="ink")
    pipe.load_lora_weights(grain, adapter_name="grain")
    pipe.set_adapters(["ink", "grain"], [0.7, -0.4])
    expected = drawn(merged(folders, "flux", "w8a8", ("ink", 0.7), ("grain", -0.4)))
    assert error(drawn(pipe), expected) < 2 * quantization
    for name, picture in alone.items():
        pipe.set_adapters(name)
        assert pipe.get_active_adapters() == [name]
        assert np.array_equal(drawn(pipe), picture)


def test_disabled_enabled_deleted_and_unloaded_it_is_as_it_was(pipe, ink, grain):
    before, modules = drawn(pipe), dict(pipe.transformer.named_modules())
    pipe.load_lora_weights(ink, adapter_name="ink")
    with_ink = drawn(pipe)
    pipe.disable_lora()
    assert np.array_equal(drawn(pipe), before)
    pipe.enable_lora()
    assert np.array_equal(drawn(pipe), with_ink)
    pipe.load_lora_weights(grain, adapter_name="grain")
    pipe.delete_adapters("grain")
    pipe.set_adapters("ink")
    assert np.array_equal(drawn(pipe), with_ink)
    pipe.delete_adapters("ink")
    assert np.array_equal(drawn(pipe), before)
    pipe.unload_lora_weights()
    assert dict(pipe.transformer.named_modules()) == modules
    assert np.array_equal(drawn(pipe), before)
    pipe.load_lora_weights(ink)
    assert np.array_equal(drawn(pipe), with_ink)


@pytest.mark.parametrize(("scheme", "most"), [("w8a8", 0.1), ("w4a8", 0.5)])
def test_fused_on_request_it_says_what_that_costs_and_unfuses_exactly(folders, ink, scheme, most):
    pipe = opened(folders("flux", scheme))
    before, weights = drawn(pipe), copy.deepcopy(pipe.transformer.state_dict())
    pipe.load_lora_weights(ink)
    beside = drawn(pipe)
    with pytest.warns(UserWarning, match=r"fuse_lora\(\) rounded the weights of \d+ layers .* by \d+% of what"):
        pipe.fuse_lora()
    fused = drawn(pipe)
    assert 0 < error(fused, beside) < most * error(before, beside)
    pipe.unfuse_lora()
    for name, tensor in pipe.transformer.state_dict().items():
        if ".base_layer." in name and "proj_out" not in name:  # PEFT takes that off again by subtraction
            assert torch.equal(tensor, weights[name.replace(".base_layer", "")]), name
    with pytest.warns(UserWarning, match="rounded the weights"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert relative(torch.tensor(drawn(pipe)), torch.tensor(fused)) < 1e-5
    assert not identical(pipe.transformer, opened(folders("flux", scheme)).transformer)


def test_disabling_what_is_fused_takes_it_out(pipe, folders):
    before = drawn(pipe)
    pipe.load_lora_weights({name: t for name, t in weights_of(folders).items() if "proj_out" not in name})
    beside = drawn(pipe)
    with pytest.warns(UserWarning, match="rounded the weights"):
        pipe.fuse_lora()
    pipe.disable_lora()
    assert np.array_equal(drawn(pipe), before)
    pipe.enable_lora()
    assert np.array_equal(drawn(pipe), beside)


@pytest.mark.parametrize(
    "options", [{"scheme": "w8a8", "smoothed": True}, {"scheme": "w4a8", "low_rank": 4}, {"scheme": "w4a8"}]
)
@torch.no_grad()
def test_a_change_is_rounded_to_what_the_integers_can_say(options):
    torch.manual_seed(0)
    config, linear, inputs = CemqConfig(**options), torch.nn.Linear(100, 32), torch.randn(50, 100)
    scheme = config.scheme_for("x")
    hessian = inputs.T @ inputs
    known = InputStatistics(largest=(1.0,), channel_largest=inputs.abs().amax(0), hessian=hessian)
    layer = config.layer_class(scheme).from_linear(linear, scheme, known)
    before = {name: tensor.clone() for name, tensor in layer.stored().items()}
    assert layer.add_to_weight(torch.zeros(32, 100)).share == 0.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.stored().items())

    change = 0.2 * torch.randn(32, 100)
    change[3] = 0.0
    expected = layer(inputs) + inputs @ change.T
    cost = layer.add_to_weight(change)
    assert 0 < cost.share < 0.2
    assert relative(layer(inputs), expected) < (0.02 if scheme.weight_bits == 8 else 0.2)
    for name, tensor in layer.stored().items():
        if tensor.shape[0] == 32:
            assert torch.equal(tensor[3], before[name][3])
    layer.restore(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.stored().items())


# --- what is refused


def test_a_pipeline_with_a_lora_is_saved_only_without(pipe, ink, tmp_path):
    before = drawn(pipe)
    pipe.load_lora_weights(ink)
    beside = drawn(pipe)
    with pytest.raises(BundleError, match=r"^transformer holds LoRA layers[^\n]*unload_lora_weights\(\) to save it$"):
        pipe.save_pretrained(tmp_path / "saved")
    with pytest.raises(ModelError, match=r"^FluxTransformer2DModel holds LoRA layers[^\n]*unload_lora_weights\(\)"):
        pipe.transformer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "saved")
    again = opened(tmp_path / "saved")
    assert np.array_equal(drawn(again), before)
    again.load_lora_weights(ink)
    assert np.array_equal(drawn(again), beside)


def test_a_bundle_is_not_saved_with_a_lora_fused_into_it_but_its_model_is(pipe, ink, tmp_path):
    pipe.load_lora_weights(ink)
    with pytest.warns(UserWarning, match="rounded the weights"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    with pytest.raises(BundleError, match=r"^a LoRA is fused into this pipeline[^\n]*--lora$"):
        pipe.save_pretrained(tmp_path / "bundle")
    pipe.transformer.save_pretrained(tmp_path / "model")
    again = type(pipe.transformer).from_pretrained(tmp_path / "model")
    assert identical(again, pipe.transformer)


def test_a_lora_of_another_shape_is_the_librarys_error_and_leaves_nothing(pipe, folders, ink):
    before, modules = drawn(pipe), dict(pipe.transformer.named_modules())
    for rows, columns, kind in ((16, 32, RuntimeError), (32, 48, NotImplementedError)):
        wrong = weights_of(folders)
        wrong[f"transformer.{QUERY}.lora_B.weight"] = torch.ones(rows, 2)
        wrong[f"transformer.{QUERY}.lora_A.weight"] = torch.ones(2, columns)
        with pytest.raises(kind, match=r"size mismatch for .*to_q|incompatible shape"):
            pipe.load_lora_weights(wrong)
        assert dict(pipe.transformer.named_modules()) == modules
        assert np.array_equal(drawn(pipe), before)
    pipe.load_lora_weights(ink)
    assert not np.array_equal(drawn(pipe), before)


@pytest.mark.parametrize(
    ("message", "added"),
    [
        ("a DoRA, which scales the rows of float weights", f"transformer.{QUERY}.lora_magnitude_vector"),
        ("a LoKr, which is no product of two matrices", f"transformer.{QUERY}.lokr_w1"),
    ],
)
def test_what_is_no_plain_lora_is_refused_before_anything_is_changed(pipe, folders, message, added):
    before, modules = drawn(pipe), dict(pipe.transformer.named_modules())
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights_of(folders).items()}
    with pytest.raises(ModelError, match=rf"^this file is {message}[^\n]*FluxTransformer2DModel is quantized"):
        pipe.transformer.load_lora_adapter(weights | {added: torch.ones(32)}, prefix=None)
    assert dict(pipe.transformer.named_modules()) == modules
    assert np.array_equal(drawn(pipe), before)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_what_peft_makes_of_a_float_weight_is_refused(options):
    model = torch.nn.Sequential(layer_of("native", "w8a8"))
    layer = model[0]
    with pytest.raises(ModelError, match="needs the float weight of a layer that is quantized"), adaptable(model):
        inject_adapter_in_model(LoraConfig(target_modules=["0"], **options), model)
    assert model[0] is layer


def test_without_peft_the_line_says_how_to_install_it(pipe, monkeypatch):
    monkeypatch.setattr("cemq.quantize.adapters.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"peft, which is not installed: pip install 'cemq\[lora\]'"):
        pipe.transformer.load_lora_adapter({})


@pytest.mark.parametrize(("backend", "scheme"), [pair for pair in PAIRS if pair.values[0] != "native"])
def test_layers_of_other_backends_are_not_fused(backend, scheme):
    model = torch.nn.Sequential(layer_of(backend, scheme))
    with adaptable(model):
        inject_adapter_in_model(LoraConfig(target_modules=["0"], init_lora_weights=False), model)
    before = {name: tensor.clone() for name, tensor in model[0].base_layer.stored().items()}
    with pytest.raises(ModelError, match=r"^fuse_lora\(\) cannot round the weights of \w+ anew: leave the LoRA beside"):
        model[0].merge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model[0].base_layer.stored().items())


# --- text encoders


@torch.no_grad()
def test_a_quantized_text_encoder_takes_its_part(tmp_path):
    def fresh():
        pipe = make_flux()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    file = str(save_lora(make_flux(), tmp_path, "text_encoder"))
    pipe, reference = fresh(), fresh()
    quantize_text_encoder(pipe.text_encoder, TextEncoderConfig())
    plain = pipe.text_encoder(torch.arange(9)[None]).pooler_output
    for each in (pipe, reference):
        each.load_lora_weights(file)
    changed = reference.text_encoder(torch.arange(9)[None]).pooler_output
    found = pipe.text_encoder(torch.arange(9)[None]).pooler_output
    assert relative(found, changed) < 0.02 < 0.2 < relative(plain, changed)
    pipe.set_adapters(pipe.get_active_adapters(), 0.0)
    assert torch.equal(pipe.text_encoder(torch.arange(9)[None]).pooler_output, plain)
    pipe.set_adapters(pipe.get_active_adapters(), 1.0)
    with pytest.warns(UserWarning, match=r"^cemq: fuse_lora\(\) rounds the weights of quantized layers anew"):
        pipe.fuse_lora(components=["text_encoder"])
    assert relative(pipe.text_encoder(torch.arange(9)[None]).pooler_output, changed) < 0.05
    pipe.unfuse_lora(components=["text_encoder"])
    pipe.unload_lora_weights()
    assert torch.equal(pipe.text_encoder(torch.arange(9)[None]).pooler_output, plain)


# --- under a schedule, compiled, offloaded, copied


def test_the_schedule_stays_and_one_warning_says_that_it_was_measured_without(pipe, ink):
    call = MADE["flux"][1]
    pipe.load_lora_weights(ink, adapter_name="ink")
    with pytest.warns(UserWarning, match=f"^{MEASURED}$") as said:
        run(pipe, ONE, steps=STEPS, call=call)
        run(pipe, ONE, steps=STEPS, call=call)
    assert len(said) == 1
    hook = schedule_hook(pipe)
    assert hook.schedule.budget == BUDGET
    assert (hook.full_evaluations, hook.skipped_evaluations) == (2 * BUDGET, 2 * (STEPS - BUDGET))


def test_nothing_is_said_of_a_lora_that_is_off_or_of_a_schedule_without_figures(folders, pipe, ink):
    pipe.load_lora_weights(ink, adapter_name="ink")
    pipe.disable_lora()
    run(pipe, ONE, steps=STEPS, call=FLUX_CALL)  # warnings are errors
    other = make_flux()
    other.load_lora_weights(ink)
    cemq.apply_schedule(other, folders("flux", "w8a8"))
    run(other, ONE, steps=STEPS, call=FLUX_CALL)


def test_skipped_steps_run_nothing_of_the_lora(pipe, ink):
    pipe.load_lora_weights(ink)
    layer, calls = pipe.transformer.get_submodule(QUERY), []
    layer.lora_A["default_0"].register_forward_hook(lambda *_: calls.append(1))
    drawn(pipe)
    assert len(calls) == 2 * BUDGET


COMPILED = itertools.product(("eager", "inductor"), ("before", "after"))


@pytest.mark.parametrize(("backend", "order"), others_slow(COMPILED, [("eager", "after")]))
def test_compiled_it_is_the_same(folders, pipe, ink, backend, order):
    reference = opened(folders("flux", "w8a8"))
    before = drawn(reference)
    reference.load_lora_weights(ink, adapter_name="ink")
    expected = drawn(reference)
    torch._dynamo.reset()
    if order == "before":
        pipe.load_lora_weights(ink, adapter_name="ink")
    pipe.transformer.transformer_blocks[0].compile(backend=backend, fullgraph=True)
    if order == "after":
        assert np.allclose(drawn(pipe), before, atol=1e-4)
        pipe.load_lora_weights(ink, adapter_name="ink")
    assert np.allclose(drawn(pipe), expected, atol=1e-4)
    pipe.set_adapters("ink", 0.0)
    assert np.allclose(drawn(pipe), before, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("offload", ["model", "sequential", "group"])
def test_offloaded_it_is_the_same(folders, pipe, ink, order, offload):
    reference = opened(folders("flux", "w8a8"))
    before = drawn(reference)
    reference.load_lora_weights(ink)
    expected = drawn(reference)
    cpu = torch.device("cpu")

    def offloaded():
        if offload == "group":
            apply_group_offloading(pipe.transformer, cpu, cpu, "block_level", num_blocks_per_group=1)
        else:
            getattr(pipe, f"enable_{offload}_cpu_offload")()

    # what diffusers calls once it has loaded, without a device, which is then a GPU's
    pipe.enable_model_cpu_offload = functools.partial(pipe.enable_model_cpu_offload, device="cpu")
    pipe.enable_sequential_cpu_offload = functools.partial(accelerate.cpu_offload, pipe.transformer, cpu)
    if order == "after":
        offloaded()
        assert np.array_equal(drawn(pipe), before)
    pipe.load_lora_weights(ink)
    if order == "before":
        offloaded()
    assert np.array_equal(drawn(pipe), expected)
    pipe.unload_lora_weights()
    assert np.array_equal(drawn(pipe), before)


def test_within_a_limit_it_is_the_same_and_weights_on_disk_take_none(folders, ink, tmp_path):
    bundle = folders("flux", "w8a8")
    reference = opened(bundle)
    reference.load_lora_weights(ink)
    pipe = opened(bundle, vram="1GiB")
    pipe.load_lora_weights(ink)
    assert np.array_equal(drawn(pipe), drawn(reference))
    plan = cemq.plan_memory(bundle, "1GiB", device="cpu")
    sizes = {each.name: each.device_bytes + plan.reserve_bytes for each in plan.estimates}
    for name in ("group offload to disk, block level", "group offload to disk, leaf level"):
        pipe = opened(bundle, vram=sizes[name], offload_folder=tmp_path)
        assert pipe.cemq_memory_plan.chosen.name == name
        before = drawn(pipe)
        with pytest.raises(ModelError, match=r"^load_lora_adapter\(\): the weights of transformer rest on disk"):
            pipe.load_lora_weights(ink)
        assert np.array_equal(drawn(pipe), before)


def test_a_model_that_is_offloaded_takes_a_lora_only_through_its_pipeline(pipe, folders):
    weights = weights_of(folders)
    accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match=r"^weights of FluxTransformer2DModel are offloaded: load the LoRA before"):
        pipe.transformer.load_lora_adapter(weights)


def test_a_copy_has_a_lora_of_its_own(folders, ink):
    transformer = opened(folders("flux", "w8a8"))
    cemq.detach(transformer)
    model = copy.deepcopy(transformer.transformer)
    model.load_lora_adapter(weights_of(folders))
    assert isinstance(model.get_submodule(QUERY), QuantizedLoraLinear)
    assert not isinstance(transformer.transformer.get_submodule(QUERY), QuantizedLoraLinear)


def test_a_request_beside_has_the_lora_too(pipe, ink):
    pipe.load_lora_weights(ink)
    expected = drawn(pipe)
    assert np.array_equal(drawn(cemq.for_request(pipe)), expected)


def test_in_bfloat16_the_lora_is_too(folders, ink):
    pipe = opened(folders("flux", "w8a8"), torch_dtype=torch.bfloat16)
    before = drawn(pipe)
    pipe.load_lora_weights(ink)
    layer = pipe.transformer.get_submodule(QUERY)
    assert {tensor.dtype for tensor in layer.lora_A.parameters()} == {torch.bfloat16}
    assert error(before, drawn(pipe)) > 0.005
    pipe.unload_lora_weights()
    assert np.array_equal(drawn(pipe), before)
