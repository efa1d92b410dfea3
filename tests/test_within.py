"""Building within a limit of memory: quantized piece by piece, and run from where the weights lie."""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.comparing import identical
from support.models import Toy, toy_calls
from support.pipelines import make_denoiser, make_dit, make_flux
from support.placing import needed_to_draw
from transformers import T5Config, T5EncoderModel

import cemq
from cemq.build.estimate import estimate
from cemq.build.settings import resolve
from cemq.build.within import PieceByPiece, open_within, plan_build
from cemq.bundle.manifest import PRIOR, read_bundle, write_pipeline
from cemq.bundle.original import find_original
from cemq.errors import InputError, PlacementError, SchemeError
from cemq.evaluation.within import Room
from cemq.memory.footprint import cached_bytes, read_headers
from cemq.memory.placement import MAPPED, ON_DEVICE
from cemq.pipelines.opening import open_pipeline
from cemq.quantize import (
    CemqConfig,
    Observer,
    QuantizationSettings,
    ShardWriter,
    quantize_in_place,
    quantize_pipeline,
    quantized_layers,
)

NEAREST = QuantizationSettings(scheme="w8a8", gptq=False)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# --- writing layers as they come


@pytest.mark.parametrize("shard_bytes", [1, 30_000, 1 << 30])
def test_a_model_written_layer_by_layer_is_the_one_quantized_in_memory(tmp_path, shard_bytes):
    model, twin, config = make_denoiser(), make_denoiser(), CemqConfig("w4a8")
    writer = ShardWriter(tmp_path / "waiting", shard_bytes)
    for name, layer in quantized_layers(model, config):
        writer.add(name, layer)
    writer.finish(model, config, tmp_path / "model")
    quantize_in_place(twin, config)
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert identical(loaded, twin)
    assert ("diffusion_pytorch_model.safetensors" in files(tmp_path / "model")) == (shard_bytes == 1 << 30)
    twin.save_pretrained(tmp_path / "twin")
    assert (tmp_path / "model" / "config.json").read_bytes() == (tmp_path / "twin" / "config.json").read_bytes()


def test_no_file_holds_more_than_a_shard(tmp_path):
    model, config = make_denoiser(), CemqConfig("w8a8")
    writer = ShardWriter(tmp_path / "waiting", 20_000)
    for name, layer in quantized_layers(model, config):
        writer.add(name, layer)
    writer.finish(model, config, tmp_path / "model")
    shards = [load_file(path) for path in (tmp_path / "model").glob("*.safetensors")]
    sizes = [[tensor.numel() * tensor.element_size() for tensor in shard.values()] for shard in shards]
    assert len(sizes) > 2
    assert all(sum(each) <= 20_000 or len(each) == 1 for each in sizes)
    index = json.loads((tmp_path / "model" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert set(index["weight_map"]) == {name for shard in shards for name in shard}


@pytest.mark.parametrize("at", [0, 3, 7])
@pytest.mark.parametrize("ended", ["before the rest", "while the rest was written", "when all was written"])
def test_a_writer_goes_on_where_another_ended(tmp_path, monkeypatch, at, ended):
    model, config = make_denoiser(), CemqConfig("w8a8")
    layers = list(quantized_layers(model, config))
    first = ShardWriter(tmp_path / "waiting", 20_000)
    for name, layer in layers[:at]:
        first.add(name, layer)
    state = first.state()
    for name, layer in layers[at:]:  # which nobody will know of
        first.add(name, layer)
    if ended != "before the rest":
        with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
            if ended == "while the rest was written":
                patched.setattr(type(model), "save_config", interrupted)
            first.finish(make_denoiser(), config, tmp_path / "lost")
    second = ShardWriter(tmp_path / "waiting", 20_000, json.loads(json.dumps(state)))
    for name, layer in layers[at:]:
        second.add(name, layer)
    second.finish(model, config, tmp_path / "model")
    twin = make_denoiser()
    quantize_in_place(twin, config)
    assert identical(type(model).from_pretrained(tmp_path / "model"), twin)
    assert "diffusion_pytorch_model.0.safetensors" not in files(tmp_path / "model")


def interrupted(*_):
    raise KeyboardInterrupt


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
    (tmp_path / "pieces").mkdir()
    pieces = PieceByPiece(asked(flux, 200_000), tmp_path / "waiting")
    pieces.finish(tmp_path / "pieces", settings, {})
    whole = open_pipeline(flux, dtype="float32", device="cpu")
    quantize_pipeline(whole, settings, {})
    write_pipeline(whole, tmp_path / "whole", flux)
    same_pipelines(tmp_path / "pieces", tmp_path / "whole")


def test_a_denoiser_that_is_observed_is_written_piece_by_piece(tmp_path):
    calls = toy_calls(4)
    model, twin, elsewhere = Toy(), Toy(), Toy()
    config = CemqConfig("w4a8", full_precision=(), eight_bit=())
    writer = ShardWriter(tmp_path / "waiting", 1)
    observer = Observer(model, config, weights=elsewhere, put=writer.add)
    with observer.watch(0):
        for call in calls:
            model(*call.arguments)
    writer.finish(elsewhere, observer.finish(), tmp_path / "toy")
    whole = Observer(twin, config)
    with whole.watch(0):
        for call in calls:
            twin(*call.arguments)
    whole.install(twin)
    assert identical(Toy.from_pretrained(tmp_path / "toy"), twin)
    assert type(model.left) is torch.nn.Linear


def test_nothing_to_quantize_is_refused(tmp_path):
    make_dit().save_pretrained(tmp_path / "dit")
    pieces = PieceByPiece(asked(tmp_path / "dit", "1MiB", call={}), tmp_path / "waiting")
    with pytest.raises(SchemeError, match="nothing to quantize"):
        pieces.finish(tmp_path / "pieces", replace(NEAREST, full_precision=("*",)), {})


# --- where weights lie

RUN = {"steps": 4, "budget": 2, "effort": "instant", "call": {"height": 32, "width": 32}, "dtype": "float32"}


def asked(folder, vram, **others):
    return resolve(str(folder), None, "cpu", RUN | {"rounding": "nearest", "vram": vram} | others)


def needed(folder, placement, **others):
    """The least that a build needs with the weights there, bytes; what quantizing takes grows with what is given."""
    least = 20 << 20
    while least < 1 << 30:
        with suppress(PlacementError):
            if plan_build(asked(folder, least, **others)).chosen.placement is placement:
                return least
        least += 200_000
    raise AssertionError(f"no limit gives '{placement.name}'")


def test_weights_stay_in_their_files_where_memory_does_not_suffice(flux, tmp_path):
    large = plan_build(asked(flux, "1GiB"))
    assert large.chosen.placement is ON_DEVICE
    settings = asked(flux, needed(flux, MAPPED))
    assert plan_build(settings).summary().startswith("in the model's files: ")
    pipe = open_within(settings, tmp_path / "none")
    whole = open_pipeline(flux, dtype="float32", device="cpu")
    pictures = [
        each(
            "a cat", height=32, width=32, num_inference_steps=2, output_type="pt", generator=torch.manual_seed(0)
        ).images
        for each in (pipe, whole)
    ]
    assert torch.allclose(*pictures, atol=1e-5)
    assert not (tmp_path / "none").exists()


def test_arguments_of_the_call_may_be_text_as_the_command_line_gives_them(flux):
    settings = asked(flux, "1GiB", call={"height": "64", "width": "64"})
    assert (
        plan_build(settings).components[-1].activation_bytes
        > plan_build(asked(flux, "1GiB")).components[-1].activation_bytes
    )
    assert estimate(settings).placement == plan_build(settings)


def test_fitting_weights_takes_more_memory_than_rounding_them(flux):
    rounded, fitted = (plan_build(asked(flux, "1GiB", rounding=each)).reserve_bytes for each in ("nearest", "gptq"))
    nothing = plan_build(asked(flux, "1GiB", rounding="nearest", scheme="none")).reserve_bytes
    assert nothing < rounded < fitted


def test_a_limit_that_is_too_small_is_refused_with_what_is_needed(flux):
    with pytest.raises(PlacementError, match=r"vram=1000 B: nothing fits. The least is in the model's files, "):
        plan_build(asked(flux, 1000))


def test_weights_that_would_be_converted_in_memory_are_refused_with_the_dtype_to_take(flux):
    vram = needed(flux, ON_DEVICE, dtype="bfloat16") - 200_000
    with pytest.raises(PlacementError, match="they are float32, and dtype=bfloat16 converts all of them in memory"):
        plan_build(asked(flux, vram, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vram": "much"}, "memory 'much': write a size such as 8GiB"),
        ({"host_memory": "8GiB"}, "host_memory=8GiB: only with vram does a build limit memory: give both"),
        ({"vram": "8GiB", "lora": ["some/lora"]}, "vram: fused LoRAs are in memory as a whole"),
    ],
)
def test_what_cannot_be_built_within_a_limit_is_refused(flux, settings, message):
    with pytest.raises(InputError, match=message):
        resolve(str(flux), None, "cpu", RUN | settings)


# --- whole builds


def same_weights(one, other):
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        left, right = (
            {name: tensor for path in (folder / part).glob("*.safetensors") for name, tensor in load_file(path).items()}
            for folder in (one, other)
        )
        assert left.keys() == right.keys()
        assert all(torch.equal(tensor, right[name]) for name, tensor in left.items()), part


@pytest.mark.parametrize(
    "settings", [{"rounding": "nearest"}, {"scheme": "w4a8", "rounding": "gptq"}], ids=["rounded", "fitted"]
)
def test_a_build_within_a_limit_gives_the_bundle_of_one_without(flux, tmp_path, caplog, settings):
    """On a CPU weights are mapped, and lie where the file has them: the last bits of what is computed may differ."""
    vram = needed(flux, MAPPED, **settings)
    with caplog.at_level("INFO", "cemq.build"):
        cemq.quantize_and_schedule(str(flux), tmp_path / "within", device="cpu", vram=vram, **RUN | settings)
    said = [message.split(": ")[:2] for message in caplog.messages if " pipeline: " in message]
    assert [name for name, _ in said] == ["full-precision pipeline", "quantized pipeline"]
    assert said[0][1] == "in the model's files"
    cemq.quantize_and_schedule(str(flux), tmp_path / "whole", device="cpu", **RUN | settings)
    within, whole = (read_bundle(tmp_path / name, verify="always") for name in ("within", "whole"))
    assert within.generations == whole.generations
    assert (within.model_bytes, within.reference_bytes) == (whole.model_bytes, whole.reference_bytes)
    assert within.dtypes == whole.dtypes
    if settings == {"rounding": "nearest"}:
        same_weights(tmp_path / "within", tmp_path / "whole")
    pictures = [
        cemq.from_pretrained(tmp_path / name, device="cpu")(
            "a cat", height=32, width=32, num_inference_steps=4, generator=torch.manual_seed(0), output_type="pt"
        ).images
        for name in ("within", "whole")
    ]
    assert (pictures[0] - pictures[1]).abs().mean() < 0.02
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole", "within"]


def test_an_interrupted_build_within_a_limit_goes_on(flux, tmp_path):
    settings = RUN | {"scheme": "w4a8", "samples": 3}
    vram = needed(flux, MAPPED, scheme="w4a8", rounding="gptq")
    cemq.quantize_and_schedule(str(flux), tmp_path / "at once", device="cpu", vram=vram, **settings)
    for limit in itertools.count(2, 4):
        told = itertools.count()

        def stop(stage, share, limit=limit, told=told):
            if next(told) > limit:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            cemq.quantize_and_schedule(
                str(flux), tmp_path / "in parts", device="cpu", vram=vram, progress=stop, **settings
            )
            break
    assert limit > 10
    same_weights(tmp_path / "at once", tmp_path / "in parts")
    assert (tmp_path / "at once" / PRIOR).read_bytes() == (tmp_path / "in parts" / PRIOR).read_bytes()


# --- bundles that are planned again and compared


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """A FLUX most of whose weights are embeddings of words: 25 MB of them, which hardly anything is computed with."""
    pipe = make_flux()
    config = {name: getattr(pipe.text_encoder_2.config, name) for name in ("d_model", "d_kv", "d_ff", "num_heads")}
    pipe.text_encoder_2 = T5EncoderModel(T5Config(vocab_size=200_000, num_layers=1, **config)).eval()
    pipe.save_pretrained(folder := tmp_path_factory.mktemp("wordy"))
    return folder


@pytest.fixture(scope="module")
def made(wordy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "bundle"
    cemq.quantize_and_schedule(str(wordy), folder, device="cpu", rounding="nearest", **RUN)
    return folder


def test_a_bundle_is_planned_again_within_a_limit(wordy, made, tmp_path, caplog):
    vram = needed(wordy, MAPPED)
    with caplog.at_level("INFO", "cemq.build"):
        within = cemq.replan(made, tmp_path / "within", device="cpu", vram=vram, budget=3)
    said = [message.split(": ")[:2] for message in caplog.messages if " pipeline: " in message]
    assert said[0] == ["full-precision pipeline", "in the model's files"]
    assert said[1][0] == "quantized pipeline"
    whole = cemq.replan(made, tmp_path / "whole", device="cpu", budget=3)
    assert within.schedule == whole.schedule
    assert within.dtypes == whole.dtypes
    assert within.generations == whole.generations
    found, expected = (
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        for folder in (tmp_path / "within", tmp_path / "whole")
    )
    assert found == expected


def test_a_bundle_is_compared_within_a_limit(made, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    original = find_original(read_bundle(made))
    with caplog.at_level("INFO", "cemq"):
        within = cemq.evaluate(made, samples=2, device="cpu", vram=needed_to_draw(made))
    said = [message for message in caplog.messages if str(original.source.folder) in message]
    assert "in the model's files" in said[0]
    found = cemq.evaluate(made, samples=2, batch_size=1, device="cpu")
    assert within.psnr_db == pytest.approx(found.psnr_db, abs=0.5)
    assert (within.full_steps, within.seeds) == (found.full_steps, found.seeds)
    assert (within.model_bytes, within.reference_bytes) == (found.model_bytes, found.reference_bytes)
    assert not list((tmp_path / "cache").rglob("original-*"))


OWN, OTHERS = ("uniform", "fora", "teacache"), ("cache-dit-mask", "diffusers-taylorseer")
compares = pytest.mark.filterwarnings("ignore")  # of the libraries


def same_rows(within, found, *, but=()):
    """But for seconds, and rows of methods that cannot do within a limit."""
    assert len(within.rows) == len(found.rows)
    for row, other in zip(within.rows, found.rows, strict=True):
        assert (row.method, row.target, row.scheme, other.status) == (other.method, other.target, other.scheme, "ok")
        if row.method not in but:
            assert (row.status, row.setting) == ("ok", pytest.approx(other.setting))
            assert row.compute_ratio == pytest.approx(other.compute_ratio)
            assert row.psnr_db == pytest.approx(other.psnr_db, abs=0.05)
            assert row.wall_ratio > 0


@compares
def test_methods_are_compared_on_a_bundle_within_a_limit(made, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = {"ratios": ["2x"], "methods": [*OTHERS, *OWN], "samples": 2, "device": "cpu"}
    with caplog.at_level("INFO", "cemq"):
        within = cemq.compare(made, vram=needed_to_draw(made), **asked)
    placed = [message for message in caplog.messages if " on cpu" in message]
    assert [" in the model's files: " in placed[0], " to disk, block level" in placed[1]] == [True, True]
    same_rows(within, cemq.compare(made, batch_size=1, **asked), but=["cache-dit-mask"])
    (refused,) = (row.status for row in within.rows if row.method == "cache-dit-mask")
    assert refused.startswith("PlacementError: cache-dit runs past group offload to disk, block level, which loads")
    assert not list((tmp_path / "cache").rglob("original-*"))


@compares
def test_methods_are_compared_on_full_precision_within_a_limit(wordy, made, tmp_path):
    (tmp_path / "prompts.txt").write_text("a bold seven\na thin two\n")
    asked = {"ratios": ["2x"], "samples": 1, "methods": ["uniform", "cache-dit-mask"], "device": "cpu", "steps": 4}
    asked |= {"calib": str(tmp_path / "prompts.txt"), "dtype": "float32", "call": RUN["call"]}
    within = cemq.compare(wordy, vram=needed_to_draw(made), **asked)
    same_rows(within, cemq.compare(wordy, batch_size=1, **asked))


def test_a_cache_that_does_not_fit_beside_the_weights_is_refused(made):
    manifest = read_bundle(made)
    headers, plan = read_headers(made, call=manifest.call), cemq.plan_memory(made, needed_to_draw(made), device="cpu")
    room = Room(plan=plan, folder=made, dtype="float32", call=manifest.call)
    room.check("output", 1)
    kept = cached_bytes(headers, dtype="float32", cache="modules", kept_steps=1)
    needed = [plan.with_cached(headers.first_denoiser, steps * kept) for steps in (100, 101)]
    assert needed[1].device_bytes - needed[0].device_bytes == kept > 0
    with pytest.raises(PlacementError, match=r"the cache may hold .*, and with that group offload to disk, block lev"):
        room.check("modules", 100)


@compares
def test_a_method_whose_cache_has_no_room_is_a_row_that_says_so(made, monkeypatch):
    monkeypatch.setattr(Room, "check", lambda room, cache, kept: refuse(cache, kept) if cache == "modules" else None)
    found = cemq.compare(made, ratios=["2x"], methods=["fora", "uniform"], samples=1, device="cpu", vram="1GiB")
    assert [(row.method, row.status) for row in found.rows[1:]] == [
        ("fora", "PlacementError: 1 of modules"), ("uniform", "ok"),
    ]  # fmt: skip


def refuse(cache, kept):
    raise PlacementError(f"{kept} of {cache}")


def test_a_report_is_drawn_within_a_limit(made, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    within = cemq.report(made, tmp_path / "a.html", samples=1, device="cpu", vram=needed_to_draw(made))
    assert (tmp_path / "a.html").is_file()
    assert within.psnr_db == pytest.approx(cemq.evaluate(made, samples=1, device="cpu").psnr_db, abs=0.5)


def test_what_cannot_be_compared_within_a_limit_is_refused(wordy, made, tmp_path, monkeypatch):
    monkeypatch.setattr(cemq.Runner, "run_one", lambda *_: pytest.fail("something was run"))
    (tmp_path / "prompts.txt").write_text("a bold seven\n")
    asked = {"methods": ["uniform"], "device": "cpu"}
    whole = asked | {"calib": str(tmp_path / "prompts.txt"), "steps": 4, "dtype": "float32"}
    for run in (partial(cemq.compare, made, **asked), partial(cemq.compare, wordy, **whole)):
        with pytest.raises(PlacementError, match=r"vram=1000 B: nothing fits"):
            run(vram=1000)
        with pytest.raises(InputError, match=r"batch_size=2: with vram=8GiB samples are drawn one at a time"):
            run(batch_size=2, vram="8GiB")
        with pytest.raises(InputError, match=r"memory 'much': write a size such as 8GiB"):
            run(vram="much")
    with pytest.raises(InputError, match=r"w4a8 in memory as a whole: build a bundle with cemq quantize-and-schedule"):
        cemq.compare(wordy, vram="8GiB", schemes=["none", "w4a8"], **whole)
    with pytest.raises(PlacementError, match=r"vram=1000 B: nothing fits"):
        cemq.evaluate(made, samples=1, device="cpu", vram=1000)
    with pytest.raises(InputError, match=r"batch_size=2: with vram=8GiB samples are drawn one at a time"):
        cemq.evaluate(made, samples=2, batch_size=2, device="cpu", vram="8GiB")
    with pytest.raises(InputError, match="only with vram does a build limit memory"):
        cemq.replan(made, made.with_name("again"), device="cpu", host_memory="8GiB")
    assert not made.with_name("again").exists()


# --- memory that the kernel grants

BUILDING = Path(__file__).parents[1] / "docs" / "benchmarks" / "building.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory control groups are Linux's")
def test_a_kernel_that_grants_just_the_limit_kills_only_the_build_without_one(tmp_path):
    """A pipeline of 640 MiB in a control group of 400, as docs/benchmarks/building.py builds it."""
    done = subprocess.run(
        [sys.executable, BUILDING, "--folder", tmp_path, "--quick"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not rows[0]["enforced"]:
        pytest.skip("no memory control group can be made here: that takes root and a cgroup file system to write to")
    assert [(row["stage"], row["ended"]) for row in rows] == [
        ("build", "finished"), ("build, no --vram", "killed"), ("draw", "finished"),
    ]  # fmt: skip
    assert rows[0]["original_bytes"] > 1.5 * rows[0]["vram"]
