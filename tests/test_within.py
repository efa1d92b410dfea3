"""Building within a limit of memory: quantized piece by piece, and run from where the weights lie."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.comparing import identical
from support.models import Toy, toy_calls
from support.pipelines import make_denoiser, make_dit, make_flux

from cemq.build.within import Limit, PieceByPiece, open_within, plan_build
from cemq.errors import PlacementError, SchemeError
from cemq.memory.placement import MAPPED, ON_DEVICE
from cemq.pipelines.opening import open_pipeline
from cemq.quantize import CemqConfig, Observer, QuantizationSettings, ShardWriter, quantize_in_place, quantized_layers

W4A8 = QuantizationSettings(scheme="w4a8")
NEAREST = QuantizationSettings(scheme="w8a8", gptq=False)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# --- writing layers as they come


@pytest.mark.parametrize("shard_bytes", [1, 30_000, 1 << 30])
def test_a_model_written_layer_by_layer_is_the_one_quantized_in_memory(tmp_path, shard_bytes):
    model, twin, config = make_denoiser(), make_denoiser(), CemqConfig("w4a8")
    writer = ShardWriter(tmp_path / "model", shard_bytes)
    for name, layer in quantized_layers(model, config):
        writer.add(name, layer)
    writer.finish(model, config)
    quantize_in_place(twin, config)
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert identical(loaded, twin)
    assert ("diffusion_pytorch_model.safetensors" in files(tmp_path / "model")) == (shard_bytes == 1 << 30)
    twin.save_pretrained(tmp_path / "twin")
    assert (tmp_path / "model" / "config.json").read_bytes() == (tmp_path / "twin" / "config.json").read_bytes()


def test_no_file_holds_more_than_a_shard(tmp_path):
    model, config = make_denoiser(), CemqConfig("w8a8")
    writer = ShardWriter(tmp_path / "model", 20_000)
    for name, layer in quantized_layers(model, config):
        writer.add(name, layer)
    writer.finish(model, config)
    shards = [load_file(path) for path in (tmp_path / "model").glob("*.safetensors")]
    sizes = [[tensor.numel() * tensor.element_size() for tensor in shard.values()] for shard in shards]
    assert len(sizes) > 2
    assert all(sum(each) <= 20_000 or len(each) == 1 for each in sizes)
    index = json.loads((tmp_path / "model" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert set(index["weight_map"]) == {name for shard in shards for name in shard}


# --- a pipeline


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    make_flux().save_pretrained(folder)
    return folder


def same_pipelines(one, other):
    index = [json.loads((folder / "model_index.json").read_text()) for folder in (one, other)]
    assert index[0] == index[1]
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    left, right = (open_pipeline(folder, dtype="float32", device="cpu") for folder in (one, other))
    for name, part in left.components.items():
        if isinstance(part, torch.nn.Module):
            assert identical(part, getattr(right, name)), name


@pytest.mark.parametrize(
    "settings",
    [
        NEAREST,
        replace(NEAREST, scheme="none"),
        replace(NEAREST, components=("text_encoder_2",)),
        replace(NEAREST, scheme="w4a8", components=("transformer", "text_encoder_2")),
    ],
    ids=["denoiser", "nothing", "text encoder", "both"],
)
def test_a_pipeline_written_piece_by_piece_is_the_one_quantized_in_memory(flux, tmp_path, settings):
    from cemq.bundle.manifest import write_pipeline
    from cemq.quantize import quantize_pipeline

    pieces = PieceByPiece(flux, tmp_path / "pieces", Limit(vram=200_000), dtype="float32", device="cpu")
    pieces.finish(settings, {})
    whole = open_pipeline(flux, dtype="float32", device="cpu")
    quantize_pipeline(whole, settings, {})
    write_pipeline(whole, tmp_path / "whole", flux)
    same_pipelines(tmp_path / "pieces", tmp_path / "whole")


def test_a_denoiser_that_is_observed_is_written_piece_by_piece(tmp_path):
    calls = toy_calls(4)
    model, twin, elsewhere = Toy(), Toy(), Toy()
    config = CemqConfig("w4a8", full_precision=(), eight_bit=())
    writer = ShardWriter(tmp_path / "toy", 1)
    observer = Observer(model, config, weights=elsewhere, put=writer.add)
    with observer.watch(0):
        for call in calls:
            model(*call.arguments)
    writer.finish(elsewhere, observer.finish())
    whole = Observer(twin, config)
    with whole.watch(0):
        for call in calls:
            twin(*call.arguments)
    whole.install(twin)
    assert identical(Toy.from_pretrained(tmp_path / "toy"), twin)
    assert type(model.left) is torch.nn.Linear


def test_nothing_to_quantize_is_refused(tmp_path):
    make_dit().save_pretrained(tmp_path / "dit")
    pieces = PieceByPiece(tmp_path / "dit", tmp_path / "pieces", Limit(vram=1 << 20), dtype="float32", device="cpu")
    with pytest.raises(SchemeError, match="nothing to quantize"):
        pieces.finish(replace(NEAREST, full_precision=("*",)), {})


# --- where weights lie


def run_of(folder):
    return {"call": {"height": 32, "width": 32}, "full_steps": 4, "samples": 1, "cache": "output"}


def plan(folder, vram, **others):
    return plan_build(
        folder, Limit(vram=vram), **{"device": "cpu", "dtype": "float32", "original": True, "quantization": NEAREST}
        | run_of(folder) | others,
    )  # fmt: skip


def test_weights_stay_in_their_files_where_memory_does_not_suffice(flux, tmp_path):
    large = plan(flux, 1 << 30)
    assert large.chosen.placement is ON_DEVICE
    needed = large.chosen.device_bytes + large.reserve_bytes
    mapped = plan(flux, needed - 100_000)
    assert mapped.chosen.placement is MAPPED
    assert mapped.summary().startswith("in the model's files: ")
    pipe = open_within(flux, mapped, dtype="float32", device="cpu", offload_folder=tmp_path / "none")
    whole = open_pipeline(flux, dtype="float32", device="cpu")
    pictures = [
        each(
            "a cat", height=32, width=32, num_inference_steps=2, output_type="pt", generator=torch.manual_seed(0)
        ).images
        for each in (pipe, whole)
    ]
    assert torch.allclose(*pictures, atol=1e-5)
    assert not (tmp_path / "none").exists()


def test_a_limit_that_is_too_small_is_refused_with_what_is_needed(flux):
    with pytest.raises(PlacementError, match=r"vram=1000 B: nothing fits. The least is in the model's files, "):
        plan(flux, 1000)


def test_weights_that_would_be_converted_in_memory_are_refused_with_the_dtype_to_take(flux):
    large = plan(flux, 1 << 30, dtype="bfloat16")
    with pytest.raises(PlacementError, match="they are float32, and dtype=bfloat16 converts all of them in memory"):
        plan(flux, large.chosen.device_bytes + large.reserve_bytes - 100_000, dtype="bfloat16")
