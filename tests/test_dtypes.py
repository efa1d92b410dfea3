"""What was measured is what is loaded: every tensor of a pipeline, its dtype and its bits, and what it draws."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.bundles import resealed
from support.checks import batch_of, draw
from support.families import FAMILIES, STEPS, small_hidream
from torch import nn

import cemq
import cemq.build.stages
from cemq.bundle.dtypes import as_loaded, tensor_dtypes
from cemq.bundle.manifest import ComponentDtypes, read_bundle, write_pipeline
from cemq.errors import BundleError
from cemq.pipelines.batches import run
from cemq.pipelines.opening import denoisers, open_pipeline
from cemq.pipelines.outputs import as_array
from cemq.quantize import BACKENDS, QuantizationSettings, quantize_pipeline
from cemq.quantize.in_diffusers import CemqQuantizer
from cemq.quantize.schemes import installed
from cemq.runtime import attached, schedule_hook

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",  # diffusers' own names, in Chroma and the ControlNets
    "ignore:In CPU autocast",  # Mochi asks for float32
)
QUICK = {
    "steps": STEPS, "budget": 3, "samples": 1, "planning_samples": 1, "batch_size": 1, "rounding": "nearest",
    "solver": "uniform", "effort": "quick", "rectify": "none", "predictor": "reuse", "corrector": "none",
}  # fmt: skip
# Kept in float32 (Wan), two denoisers (Wan 2.2), several text encoders, video, audio, UNets, a fused ControlNet.
TEN = (
    "wan22", "cogvideox", "stable_audio", "sdxl", "sd3", "flux_controlnet", "qwenimage", "z_image", "hunyuan_video",
    "dit",
)  # fmt: skip


def tensors(pipe):
    """Every parameter and buffer, stored in a file or not."""
    return {
        f"{name}.{tensor}": values
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module)
        for tensor, values in (*part.named_parameters(), *part.named_buffers())
    }


def assert_same(found, expected):
    found, expected = tensors(found), tensors(expected)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (name, found[name].dtype, found[name].stride()) == (name, values.dtype, values.stride())
        bits = [each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (found[name], values)]
        assert torch.equal(*bits), name


def built(family, folder, dtype, components=(), **quantization):
    """A quantized pipeline, and the same once it was written and opened again."""
    with small_hidream():
        family.pipeline().save_pretrained(folder / "pipeline")
        pipe = open_pipeline(folder / "pipeline", dtype=dtype, device="cpu")
        plan = QuantizationSettings(scheme="w8a8", gptq=False, components=components, **quantization)
        quantize_pipeline(pipe, plan, {})
        write_pipeline(pipe, folder / "again", folder / "pipeline")
        loaded = open_pipeline(folder / "again", dtype=dtype, device="cpu")
    for each in (pipe, loaded):
        each.set_progress_bar_config(disable=True)
    return pipe, loaded


@pytest.mark.parametrize(("name", "dtype"), [("wan22", "bfloat16"), ("wan", "float16"), ("sd3", "bfloat16")])
def test_a_quantized_pipeline_loads_as_it_was_saved_bit_for_bit(name, dtype, tmp_path):
    family = FAMILIES[name]
    pipe, loaded = built(family, tmp_path, dtype, components=_models(family))
    assert_same(loaded, pipe)
    assert np.array_equal(draw(loaded, family), draw(pipe, family))
    assert not any(module.training for part in _parts(pipe) for module in part.modules())


def _models(family):
    """Names of the denoisers and the text encoders."""
    pipe = family.pipeline()
    texts = [name for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]
    return (*(name for name, _ in denoisers(pipe)), *texts)


def _parts(pipe):
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def test_layers_of_modules_that_are_kept_in_float32_keep_their_bias_there(tmp_path):
    pipe, loaded = built(FAMILIES["wan"], tmp_path, "bfloat16", full_precision=())
    assert_same(loaded, pipe)
    layer = loaded.transformer.condition_embedder.time_embedder.linear_1
    assert (layer.integers.dtype, layer.weight.dtype, layer.bias.dtype) == (torch.int8, torch.float32, torch.float32)
    assert loaded.transformer.blocks[0].attn1.to_q.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizing_while_loading_keeps_what_diffusers_keeps(dtype, tmp_path):
    model = FAMILIES["wan"].pipeline().transformer
    model.save_pretrained(tmp_path)
    config = cemq.CemqConfig("w8a8")
    found, plain = (
        type(model).from_pretrained(tmp_path, torch_dtype=dtype, **more)
        for more in ({"quantization_config": config}, {})
    )
    expected = {name: tensor.dtype for name, tensor in (*plain.named_parameters(), *plain.named_buffers())}
    floats = {name: t.dtype for name, t in (*found.named_parameters(), *found.named_buffers()) if t.is_floating_point()}
    assert floats.items() - expected.items() == {
        (name, torch.float32) for name in floats if name.endswith("weight_scale")
    }


# --- bundles


def build(family, root, dtype, monkeypatch, **settings):
    """The bundle's folder, and the very pipeline that was measured and saved in it."""
    saved = []

    def write(pipe, *arguments):
        saved.append(pipe)
        write_pipeline(pipe, *arguments)

    monkeypatch.setattr(cemq.build.stages, "write_pipeline", write)
    family.pipeline().save_pretrained(root / "pipeline")
    (root / "conditions.txt").write_text("\n".join(map(str, family.conditions)), encoding="utf-8")
    with small_hidream():
        cemq.quantize_and_schedule(
            str(root / "pipeline"), root / "bundle", dtype=dtype, calib=str(root / "conditions.txt"), call=family.call,
            device="cpu", **QUICK | settings,
        )  # fmt: skip
    return root / "bundle", saved[0]


def load(folder, **options):
    with small_hidream():
        pipe = cemq.from_pretrained(folder, device="cpu", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, family):
    """Of one sample."""
    batch = batch_of(family)
    one = replace(batch, conditions=batch.conditions[:1], seeds=batch.seeds[:1])
    return as_array(run(pipe, one, steps=STEPS, call=family.call))


def drawn_as_measured(pipe, loaded, family):
    with attached(pipe, schedule_hook(loaded).plan):
        return picture(pipe, family)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A bundle in bfloat16 of a model that keeps parts in float32, and the pipeline that it was made from."""
    with pytest.MonkeyPatch.context() as patch:
        return build(FAMILIES["wan"], tmp_path_factory.mktemp("wan"), "bfloat16", patch)


def test_a_bundle_loads_what_was_measured_and_draws_the_same(wan):
    folder, pipe = wan
    loaded, family = load(folder), FAMILIES["wan"]
    assert_same(loaded, pipe)
    assert np.array_equal(picture(loaded, family), drawn_as_measured(pipe, loaded, family))


def test_the_manifest_names_the_tensors_that_have_a_dtype_of_their_own(wan):
    folder, _ = wan
    found = read_bundle(folder).dtypes
    assert {name: each.default for name, each in found.items()} == dict.fromkeys(found, "bfloat16")
    kept = found["transformer"].exceptions["float32"]
    assert {"scale_shift_table", "blocks.2.norm2.weight", "rope.freqs_cos"} < set(kept)
    assert "blocks.0.attn1.to_q.weight_scale" not in kept  # the scheme says so
    assert found["vae"].exceptions == {}


def test_a_tensor_that_loads_in_another_dtype_is_named_with_its_file(wan, monkeypatch):
    folder, _ = wan
    monkeypatch.setattr(CemqQuantizer, "use_keep_in_fp32_modules", False)
    with pytest.raises(
        BundleError,
        match=r"tensor 'scale_shift_table' of 'transformer/diffusion_pytorch_model.safetensors' is bfloat16, and what "
        r"was measured is float32: install diffusers [\d.]+, transformers [\d.]+, which it was made with, or write",
    ):
        load(folder)


def test_buffers_that_are_in_no_file_are_checked_too(wan, monkeypatch):
    folder, pipe = wan
    kind = type(pipe.transformer.rope)
    init = kind.__init__

    def wider(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        self.freqs_cos = self.freqs_cos.double()

    monkeypatch.setattr(kind, "__init__", wider)
    with pytest.raises(
        BundleError, match=r"tensor 'rope.freqs_cos' of 'transformer', computed when it is loaded, is float64, and what"
    ):
        load(folder)


@pytest.fixture
def copy(wan, tmp_path):
    return shutil.copytree(wan[0], tmp_path / "copy")


def test_bundles_of_before_say_nothing_of_dtypes_and_load(wan, copy):
    resealed(copy, lambda manifest: manifest.pop("dtypes"))
    assert read_bundle(copy).dtypes is None
    loaded = load(copy)
    assert_same(loaded, wan[1])
    loaded.save_pretrained(copy.parent / "again")
    assert read_bundle(copy.parent / "again").dtypes is None


def test_a_tensor_that_is_gone_is_named(copy):
    def add(manifest):
        manifest["dtypes"]["transformer"]["exceptions"]["float32"].append("blocks.9.norm2.bias")

    resealed(copy, add)
    with pytest.raises(BundleError, match=r"'blocks.9.norm2.bias' of .* is missing, and what was measured is float32"):
        load(copy)


def test_saved_again_it_is_the_same_bundle(wan, tmp_path):
    folder, pipe = wan
    load(folder).save_pretrained(tmp_path / "again")
    assert read_bundle(tmp_path / "again", verify=True) == read_bundle(folder)
    assert_same(load(tmp_path / "again"), pipe)


def test_what_was_cast_to_less_is_not_saved_as_what_was_measured(wan, tmp_path):
    loaded = load(wan[0])
    loaded.vae.to(torch.float32)  # as pipelines do that decode in it
    loaded.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), wan[1])
    loaded.vae.to(torch.float16)
    with pytest.raises(BundleError, match=r"this pipeline has '.*' of vae in float16 instead of bfloat16, and the fid"):
        loaded.save_pretrained(tmp_path / "other")


@pytest.mark.parametrize("dtype", ["float32", torch.float16])
def test_in_another_dtype_it_is_what_diffusers_makes_of_the_original(wan, dtype):
    folder, _ = wan
    plain = open_pipeline(folder.parent / "pipeline", dtype=str(dtype).removeprefix("torch."), device="cpu")
    loaded = load(folder, torch_dtype=dtype)
    expected = tensor_dtypes(plain)
    for name, kinds in tensor_dtypes(loaded).items():
        assert kinds.items() <= expected[name].items()
    assert np.isfinite(picture(loaded, FAMILIES["wan"])).all()


def test_every_placement_draws_the_same(wan, tmp_path):
    """Its text encoder has one tensor for two modules, which each find it on disk."""
    folder, pipe = wan
    family = FAMILIES["wan"]
    plan = cemq.plan_memory(folder, "1000GiB", device="cpu")
    limits = {e.name: e.device_bytes + plan.reserve_bytes for e in plan.estimates if not e.obstacle}
    for name in ("group offload to disk, block level", "group offload to disk, leaf level"):
        loaded = load(folder, vram=limits[name], offload_folder=tmp_path)
        assert loaded.cemq_memory_plan.chosen.name == name
        assert np.array_equal(picture(loaded, family), drawn_as_measured(pipe, loaded, family))


def test_a_file_that_would_be_loaded_in_place_of_the_bundles_is_refused(copy):
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    (copy / "vae" / "left-over.safetensors").write_bytes(weights.read_bytes())
    (copy / "vae" / ".hidden.json").write_text("{}")
    (copy / "notes.txt").write_text("not in a component's folder")
    with pytest.raises(BundleError, match=r"'vae/left-over.safetensors' is none of the bundle's.*: remove it"):
        load(copy)
    (copy / "vae" / "left-over.safetensors").unlink()
    load(copy)


def test_only_tensors_outside_quantized_layers_are_counted():
    opened = {
        "a": {"x.weight": "float32", "x.bias": "float32", "y": "bfloat16", "z": "bfloat16", "n": "int64"},
        "b": {},
    }
    quantized = {"a": {"x.bias": "float32", "y": "float32", "z": "bfloat16", "n": "int64"}, "b": {}}
    assert as_loaded(opened, quantized) == {
        "a": ComponentDtypes(default="bfloat16", exceptions={"float32": ("x.bias",), "int64": ("n",)})
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(each, "bfloat16") for each in TEN] + [(each, "float16") for each in ("wan22", "sd3", "cogvideox")],
)
def test_ten_families_load_what_was_measured(name, dtype, tmp_path, monkeypatch):
    family = FAMILIES[name]
    folder, pipe = build(family, tmp_path, dtype, monkeypatch, components=list(_models(family)))
    loaded = load(folder)
    assert_same(loaded, pipe)
    assert np.array_equal(picture(loaded, family), drawn_as_measured(pipe, loaded, family))
    loaded.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), pipe)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [each for each in BACKENDS if each != "native" and installed(each)])
def test_other_backends_load_what_was_measured(backend, tmp_path, monkeypatch):
    folder, pipe = build(FAMILIES["wan22"], tmp_path, "bfloat16", monkeypatch, backend=backend)
    loaded = load(folder)
    assert_same(loaded, pipe)
    assert np.array_equal(picture(loaded, FAMILIES["wan22"]), drawn_as_measured(pipe, loaded, FAMILIES["wan22"]))
