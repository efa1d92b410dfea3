import dataclasses
import json
import weakref

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from diffusers.hooks import group_offloading
from safetensors.torch import load_file
from support.pipelines import FLUX_CALL, make_dit, make_flux
from support.slow import others_slow
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import cemq
from cemq import cli
from cemq.bench.architectures import ARCHITECTURES
from cemq.bench.random_models import empty_model
from cemq.errors import BundleError, InputError, ModelError, PlacementError
from cemq.memory.footprint import read_footprint, read_headers
from cemq.memory.offload import place
from cemq.memory.placement import (
    ComponentMemory,
    estimate,
    parse_bytes,
    plan_placement,
    transformer_activation_bytes,
    vae_activation_bytes,
)
from cemq.pipelines.batches import Batch, check_conditions, run
from cemq.pipelines.opening import locate, open_pipeline
from cemq.recipe import load_recipe
from cemq.runtime import attached, schedule_hook
from cemq.schedule import CacheSchedule

CPU = torch.device("cpu")
TEXT = ComponentMemory(name="text_encoder", role="other", weight_bytes=500, activation_bytes=10, largest_leaves=(90, 5))
MODEL = ComponentMemory(
    name="transformer", role="denoiser", weight_bytes=1000, activation_bytes=100, calls=10,
    blocks=(300, 300, 200, 100), largest_leaves=(80, 60),
)  # fmt: skip
VAE = ComponentMemory(
    name="vae",
    role="vae",
    weight_bytes=50,
    activation_bytes=400,
    largest_leaves=(20, 10),
    vae_activation_bytes=(200, 70),
)
PIPELINE = (TEXT, MODEL, VAE)


# --- the arithmetic


@pytest.mark.parametrize(
    ("name", "device_bytes", "host_bytes", "moved_bytes"),
    [
        ("on device", 1550 + 400, 0, 0),
        ("model offload", 1000 + 100, 1550, 1550),
        ("group offload, block level, streams", 100 + 600 + 100, 1550, 500 + 10 * 1000 + 50),
        ("group offload, block level", 100 + 300 + 100, 1550, 10550),
        ("group offload, leaf level, streams", 20 + 400, 1550, 10550),
        ("group offload, leaf level", 20 + 400, 1550, 10550),
        ("sequential offload", 20 + 400, 1550, 10550),
        ("group offload to disk, block level", 500, 0, 10550),
    ],
)
def test_what_a_placement_needs(name, device_bytes, host_bytes, moved_bytes):
    plan = plan_placement(PIPELINE, 10**6, device="cuda")
    found = next(e for e in plan.estimates if e.name == name)
    assert (found.device_bytes, found.host_bytes, found.moved_bytes) == (device_bytes, host_bytes, moved_bytes)


@pytest.mark.parametrize(
    ("limit", "samples", "chosen"),
    [
        (1950, 1, "on device"),
        (1949, 1, "on device, VAE tiled"),  # tiles rather than weights that move
        (1949, 2, "on device, VAE sliced"),  # and sample by sample rather than in tiles
        (1649, 1, "model offload"),
        (1099, 1, "group offload, block level, streams"),
        (799, 1, "group offload, block level"),
        (499, 1, "group offload, leaf level, streams"),
        (419, 1, "group offload, leaf level, streams, VAE tiled"),
        (239, 1, "group offload, leaf level, VAE tiled"),
    ],
)
def test_the_cheapest_placement_that_fits_is_chosen(limit, samples, chosen):
    plan = plan_placement(PIPELINE, limit, device="cuda", samples=samples)
    assert plan.chosen.name == chosen
    assert plan.fits(plan.chosen)
    assert not any(plan.fits(e) for e in plan.estimates[: plan.estimates.index(plan.chosen)])


def test_nothing_fits_is_said_with_numbers():
    expected = (
        r"vram=150 B: nothing fits. The least is group offload, leaf level, VAE tiled, 180 B \(transformer: 80 B of "
        r"weights, 100 B of activations\): allow that much, or draw smaller or fewer pictures"
    )
    with pytest.raises(PlacementError, match=expected):
        plan_placement(PIPELINE, 150, device="cuda")
    with pytest.raises(PlacementError, match=r"2\.0 KiB for the device's libraries"):
        plan_placement(PIPELINE, 2000, device="cuda", reserve_bytes=2048)


def test_only_full_compute_steps_move_weights():
    few, many = (
        estimate(
            [dataclasses.replace(MODEL, calls=calls)],
            plan_placement(PIPELINE, 799, device="cuda").chosen.placement,
            "whole",
            device="cuda",
            host_limit=None,
        ).moved_bytes
        for calls in (10, 50)
    )
    assert (few, many) == (10 * 1000, 50 * 1000)


def obstacles(components, **options):
    plan = plan_placement(components, 10**6, **({"device": "cuda"} | options))
    return {e.name: e.obstacle for e in plan.estimates if e.vae == "whole"}


def test_what_cannot_be_had_says_why():
    assert not any(obstacles(PIPELINE).values())
    on_cpu = obstacles(PIPELINE, device="cpu")
    assert [name for name, why in on_cpu.items() if not why] == [
        "on device", "group offload to disk, block level", "group offload to disk, leaf level",
        "sequential offload to disk",
    ]  # fmt: skip
    excluded = obstacles([dataclasses.replace(MODEL, groups=False)])
    assert excluded["group offload, leaf level"].startswith("diffusers excludes the denoiser's class")
    assert not excluded["sequential offload"]
    assert obstacles([dataclasses.replace(MODEL, blocks=())])["group offload, block level"]
    assert obstacles([dataclasses.replace(MODEL, in_sequence=False)])["model offload"]
    cramped = obstacles(PIPELINE, host_limit=1000)
    assert cramped["model offload"] == "1.5 KiB of weights do not fit in 1000 B of free host memory"
    assert not cramped["group offload to disk, block level"]


def test_an_excluded_vae_stays_on_the_device():
    vae = dataclasses.replace(VAE, groups=False)
    plan = plan_placement((TEXT, MODEL, vae), 10**6, device="cuda")
    found = next(e for e in plan.estimates if e.name == "group offload, block level")
    assert (found.device_bytes, found.host_bytes) == (50 + 500, 1500)


@pytest.mark.parametrize("text", ["lots", "8 GiBs", "", "-1GiB", "0", "0.0MB", "8GiB vram", None])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="write a size such as 8GiB"):
        parse_bytes(text)


# --- activations: live bytes, counted on the meta device


class LiveBytes(TorchDispatchMode):
    """The most that tensors made inside hold at a time; views and what was there before count nothing."""

    def __init__(self, before):
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in before}
        self.before = [tensor.untyped_storage() for tensor in before]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return output

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size


def peak_of(model, function, *args, **kwargs):
    before = [
        t for t in tree_leaves((list(model.parameters()), list(model.buffers()), args, kwargs)) if torch.is_tensor(t)
    ]
    with torch.no_grad(), LiveBytes(before) as live:
        function(*args, **kwargs)
    return live.peak


@pytest.fixture
def no_scores(monkeypatch):
    """Attention as devices compute it: without a matrix of scores."""
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda query, key, value, *_, **__: torch.empty_like(query)
    )


ROWS = {  # tokens of one input
    "dit-small": 256, "dit-xl-2": 256, "pixart-sigma": 4096, "sd3-medium": 4096 + 333, "sd3.5-medium": 4096 + 333,
    "flux-dev": 4096 + 512, "wan-1.3b": 5 * 30 * 52, "wan-14b": 5 * 30 * 52, "qwen-image": 4096 + 256,
}  # fmt: skip
# FLUX's single blocks: attention and feed-forward side by side
WIDEST = {"flux-dev": 5 * 3072, "wan-1.3b": 8960, "wan-14b": 13824}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", others_slow(ARCHITECTURES, ("dit-xl-2", "pixart-sigma", "flux-dev", "wan-1.3b")))
def test_activations_of_transformers_are_never_underestimated(name, no_scores):
    architecture = ARCHITECTURES[name]
    model = empty_model(architecture).to("meta").bfloat16()
    inputs = architecture.inputs(architecture.batch, dtype=torch.bfloat16, device="cpu")
    inputs = {key: value.to("meta") if torch.is_tensor(value) else value for key, value in inputs.items()}
    hidden = architecture.config["num_attention_heads"] * architecture.config["attention_head_dim"]
    estimated = transformer_activation_bytes(
        rows=architecture.batch * ROWS[name], hidden=hidden, widest=WIDEST.get(name, 4 * hidden), itemsize=2
    )
    assert 1 <= estimated / peak_of(model, model, **inputs, return_dict=False) <= 1.34


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("channels", "size", "tile"), [((128, 256, 512, 512), 512, 256), ((32, 64), 256, 128), ((16,), 64, 32)]
)
def test_activations_of_a_decoder_are_never_underestimated(channels, size, tile):
    with init_empty_weights():
        vae = AutoencoderKL(
            block_out_channels=channels, norm_num_groups=8, latent_channels=4, sample_size=tile,
            down_block_types=["DownEncoderBlock2D"] * len(channels),
            up_block_types=["UpDecoderBlock2D"] * len(channels),
            layers_per_block=2, mid_block_add_attention=False,
        )  # fmt: skip
    vae.to("meta").eval()
    latents = torch.empty(2, 4, size // 2 ** (len(channels) - 1), size // 2 ** (len(channels) - 1), device="meta")
    whole = vae_activation_bytes(samples=2, height=size, width=size, channels=channels, itemsize=4)
    assert 1 <= whole / peak_of(vae, vae.decode, latents) <= 1.35
    vae.enable_slicing()
    vae.enable_tiling()
    part = vae_activation_bytes(samples=1, height=tile, width=tile, channels=channels, itemsize=4)
    assert part + 2 * 6 * 2 * size * size * 4 >= peak_of(vae, vae.decode, latents)


# --- from a bundle's files

PROMPT = Batch(conditions=("a bold seven",), seeds=(3,))


def build(folder, model, scheme, **settings):
    cemq.quantize_and_schedule(
        f"builtin:{model}", folder, scheme=scheme, rounding="nearest", steps=6, budget=3, samples=1,
        planning_samples=4, solver="segment", overwrite=True, **settings,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module", params=others_slow(["w4a8", "none"], ["w4a8"]))
def bundle(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp("placement") / "sd3", "sd3-digits", request.param)


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    return run(pipe, PROMPT, steps=6, call={"height": 32, "width": 32})


def load(bundle, **options):
    return cemq.from_pretrained(bundle, device="cpu", **options)


def size_of(model):
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_read_off_the_files_to_the_byte(bundle, dtype):
    components = read_footprint(read_headers(bundle, call={}), dtype=dtype, stored_dtype="float32", full_steps=3)
    pipe = load(bundle, torch_dtype=dtype)
    assert {c.name for c in components} == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    for component in components:
        model = getattr(pipe, component.name)
        state = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        assert component.weight_bytes == pytest.approx(state, rel=0.03 if dtype == "bfloat16" else 0)
        assert component.largest_leaves[0] <= component.weight_bytes
    transformer = next(c for c in components if c.role == "denoiser")
    blocks = tuple(size_of(block) for block in pipe.transformer.transformer_blocks)
    assert transformer.blocks == pytest.approx(blocks, rel=0.03)
    assert transformer.calls == 3


def test_weights_that_lie_there_twice_are_counted_once(tmp_path):
    pipe = make_dit()
    pipe.save_pretrained(tmp_path)
    plain = read_headers(tmp_path, call={})
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) == 2
    assert read_headers(tmp_path, call={}).tensors == plain.tensors
    half = read_headers(tmp_path, call={}, variant="fp16")
    assert {name: len(found) for name, found in half.tensors.items()} == {
        name: len(found) for name, found in plain.tensors.items()
    }
    assert {tensor.dtype for tensor in half.tensors["transformer"]} == {"F16"}
    (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()  # it is then loaded from the plain ones
    assert read_headers(tmp_path, call={}, variant="fp16").tensors["vae"] == plain.tensors["vae"]


def test_a_larger_picture_needs_more(bundle):
    def activations(**options):
        found = read_footprint(read_headers(bundle, **({"call": {}} | options)), dtype="float32", full_steps=3)
        return {c.role: c.activation_bytes for c in found if c.name != "text_encoder_2"}

    small, large, two = activations(), activations(call={"height": 64, "width": 64}), activations(samples=2)
    assert large["vae"] == 4 * small["vae"]
    assert two == {role: 2 * size for role, size in small.items()} or all(two[r] > small[r] for r in small)
    assert large["denoiser"] > small["denoiser"]
    assert large["other"] == small["other"]
    assert activations(call={"guidance_scale": 1.0})["denoiser"] < small["denoiser"]


@pytest.mark.parametrize("cache", ["residual", "modules"])
@pytest.mark.parametrize("name", ["dit-digits", "sd3-digits"])
def test_what_is_cached_is_estimated_from_the_files(name, cache):
    folder, call = locate(f"builtin:{name}").folder, load_recipe(name).call
    pipe, found = open_pipeline(folder, dtype="float32", device="cpu"), []
    pipe.set_progress_bar_config(disable=True)
    schedule = CacheSchedule(num_steps=4, full_steps=(0, 1), predictor="taylor1")
    batch = Batch(conditions=check_conditions(pipe, ["seven", "one"]), seeds=(0, 1))
    with attached(pipe, schedule, cache=cache) as hook:
        run(pipe, batch, steps=4, call=call, on_step=lambda: found.append(hook.cached_bytes))
    estimated = [
        sum(c.cached_bytes for c in read_footprint(
            read_headers(folder, call=call, samples=2), dtype="float32", full_steps=2, cache=each,
            kept_steps=schedule.most_kept,
        ))
        for each in ("output", cache)
    ]  # fmt: skip
    assert 0 < estimated[0] < estimated[1]
    assert max(found) <= estimated[1] <= (1 if name == "dit-digits" else 1.6) * max(found)


def test_a_cache_is_on_the_device_while_the_denoiser_runs():
    cached = dataclasses.replace(MODEL, cached_bytes=1000)
    with_cache, without = (
        plan_placement((TEXT, model, VAE), 10_000, device="cuda").chosen.device_bytes for model in (cached, MODEL)
    )
    assert with_cache - (TEXT.weight_bytes + MODEL.weight_bytes + VAE.weight_bytes) == 100 + 1000
    assert without == 1550 + VAE.activation_bytes


def test_folders_that_hold_no_pipeline_are_refused(tmp_path, bundle):
    with pytest.raises(BundleError, match="is not a cemq bundle"):
        cemq.plan_memory(tmp_path, "8GiB")
    with pytest.raises(ModelError, match="cannot be read"):
        read_headers(tmp_path, call={})
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline", "vae": ["diffusers", "AutoencoderKL"]}')
    with pytest.raises(ModelError, match="holds no transformer"):
        read_headers(tmp_path, call={})
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "a.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(BundleError, match="is not a whole safetensors file"):
        read_headers(tmp_path, call={})


@pytest.mark.parametrize("cache", ["output", "residual"])
def test_what_is_kept_of_earlier_steps_is_planned_for(cache, tmp_path):
    bundle = build(tmp_path / "sd3", "sd3-digits", "none", cache=cache, predictor="taylor2")
    pipe, found = load(bundle), []
    pipe.set_progress_bar_config(disable=True)

    def watch():
        histories = schedule_hook(pipe).run.histories.values()
        leaves = [t for h in histories for kept in h.kept.values() for t in kept if torch.is_tensor(t)]
        found.append(sum(t.numel() * t.element_size() for t in leaves))

    run(pipe, PROMPT, steps=6, call={"height": 32, "width": 32}, on_step=watch)
    planned = {
        budget: sum(c.cached_bytes for c in cemq.plan_memory(bundle, "8GiB", budget=budget).components)
        for budget in (2, 3, 6)
    }
    assert 0 < max(found) <= planned[3] <= 1.5 * max(found)  # tokens of text are counted, and may have no part in it
    assert planned[2] * 3 == planned[3] * 2  # taylor2 looks back to three steps, if there are as many
    assert planned[6] == 0


def limits(bundle):
    """A limit for each placement that a CPU can have: just what it needs."""
    plan = cemq.plan_memory(bundle, "8GiB", device="cpu")
    return {e.name: e.device_bytes + plan.reserve_bytes for e in plan.estimates if not e.obstacle}


def test_every_limit_gives_the_same_picture(bundle, tmp_path):
    expected = images(load(bundle))
    found = limits(bundle)
    assert list(found) == [
        "on device", "group offload to disk, block level", "group offload to disk, leaf level",
        "sequential offload to disk",
    ]  # fmt: skip
    for name in list(found)[:3]:  # the last needs what the third does
        for _ in range(2):  # the second finds the first one's files
            pipe = load(bundle, vram=found[name], offload_folder=tmp_path)
            assert pipe.cemq_memory_plan.chosen.name == name
            assert np.array_equal(images(pipe), expected)
            hook = schedule_hook(pipe)
            assert (hook.full_evaluations, hook.skipped_evaluations) == (3, 3)
    with pytest.raises(PlacementError, match="nothing fits"):
        load(bundle, vram=min(found.values()) - 1, offload_folder=tmp_path)


def test_one_picture_within_a_limit(bundle, tmp_path):
    call, options = {"height": 32, "width": 32}, {"device": "cpu", "offload_folder": tmp_path / "offload"}
    expected = np.asarray(cemq.generate(bundle, "a bold seven", call=call, device="cpu"), dtype=float)
    least = min(limits(bundle).values())
    found = cemq.generate(bundle, "a bold seven", call=call, vram=least, **options)
    assert np.array_equal(np.asarray(found, dtype=float), expected)
    assert any(path.suffix == ".safetensors" for path in (tmp_path / "offload").rglob("*"))
    with pytest.raises(PlacementError, match="nothing fits") as alone:
        cemq.generate(bundle, "a bold seven", call=call, vram=least - 1, **options)
    with pytest.raises(PlacementError) as loaded:
        load(bundle, vram=least - 1)
    assert str(alone.value) == str(loaded.value)
    with pytest.raises(PlacementError, match="nothing fits"):  # planned for what will be drawn
        cemq.generate(bundle, "a bold seven", call={"height": 4096, "width": 4096}, vram=least, **options)
    with pytest.raises(InputError, match="height='tall': StableDiffusion3Pipeline takes a number there"):
        cemq.plan_memory(bundle, "8GiB", call={"height": "tall"})


def test_generate_takes_a_limit_on_the_command_line(bundle, tmp_path):
    def generate(vram):
        arguments = [
            "generate", str(bundle), "--prompt", "a bold seven", "-o", str(tmp_path / "a.png"), "--device", "cpu",
            "--vram", vram, "--offload-folder", str(tmp_path / "offload"),
        ]  # fmt: skip
        return CliRunner().invoke(cli.app, arguments)

    assert generate(str(min(limits(bundle).values()))).exit_code == 0
    assert (tmp_path / "a.png").is_file()
    assert (tmp_path / "offload").is_dir()
    for vram, message in (("lots", "write a size such as 8GiB"), ("1MiB", "vram=1.0 MiB: nothing fits. The least is")):
        refused = generate(vram)
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert len(refused.stderr.strip().splitlines()) == 1
        assert message in refused.stderr


def test_weights_that_would_be_converted_in_memory_do_not_go_to_disk(bundle, tmp_path):
    limit = limits(bundle)["group offload to disk, leaf level"]
    with pytest.raises(PlacementError, match=r"torch_dtype=bfloat16 converts all of them in memory first.*own float32"):
        load(bundle, vram=limit, torch_dtype="bfloat16", offload_folder=tmp_path)
    assert load(bundle, vram="1GiB", torch_dtype="bfloat16").transformer.dtype == torch.bfloat16


def test_a_class_without_group_offloading_goes_to_disk_layer_by_layer(tmp_path):
    bundle = build(tmp_path / "dit", "dit-digits", "w8a8")
    batch = Batch(conditions=(1,), seeds=(3,))

    def picture(pipe):
        pipe.set_progress_bar_config(disable=True)
        return run(pipe, batch, steps=6, call={})

    found = limits(bundle)
    assert list(found) == ["on device", "sequential offload to disk"]
    pipe = load(bundle, vram=found["sequential offload to disk"], offload_folder=tmp_path / "offload")
    assert all(parameter.is_meta for parameter in pipe.transformer.parameters())
    assert np.array_equal(picture(pipe), picture(load(bundle)))


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_files_on_disk_belong_to_one_bundle_and_are_written_once(bundle, tmp_path):
    limit = limits(bundle)["group offload to disk, block level"]
    expected = images(load(bundle, vram=limit, offload_folder=tmp_path))
    written = files(tmp_path)
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert {path.parent.name for path in written} == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    load(bundle, vram=limit, offload_folder=tmp_path)
    assert files(tmp_path) == written
    other = build(tmp_path / "other", "sd3-digits", "w8a8", seed=7)
    load(other, vram=limit * 2 // 2, offload_folder=tmp_path / "offload-other")
    assert files(tmp_path / "offload-other").keys().isdisjoint(written)
    assert {path.name for path in (tmp_path / "offload-other").iterdir()}.isdisjoint({folder.name})

    (folder / "complete.json").unlink()  # as if the writer had been killed
    victim = max(written, key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-7])
    assert np.array_equal(images(load(bundle, vram=limit, offload_folder=tmp_path)), expected)
    victim.write_bytes(victim.read_bytes()[:-7])  # or a full disk had cut it
    assert np.array_equal(images(load(bundle, vram=limit, offload_folder=tmp_path)), expected)


def test_an_offload_folder_that_cannot_be_written_is_named(bundle, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PlacementError, match=r"offload folder '.*file' cannot be written"):
        load(bundle, vram=limits(bundle)["group offload to disk, block level"], offload_folder=tmp_path / "file")


# what an accelerator would get, with the CPU in its place: that the hooks go on and the pictures stay, not that memory
# is saved; streams need a device that has them
@pytest.mark.parametrize(
    "name", ["on device", "model offload", "group offload, block level", "group offload, leaf level"]
)
def test_placements_for_an_accelerator_give_the_same_picture(bundle, name):
    expected = images(load(bundle))
    plan = cemq.plan_memory(bundle, "8GiB", device="cuda")
    chosen = next(e for e in plan.estimates if e.name == name)
    pipe = load(bundle)
    place(pipe, dataclasses.replace(plan, chosen=chosen), device=CPU)
    grouped = group_offloading._is_group_offload_enabled(pipe.transformer)
    assert grouped == name.startswith("group")
    for _ in range(2):
        assert np.array_equal(images(pipe), expected)
        assert schedule_hook(pipe).skipped_evaluations == 3


@pytest.fixture(scope="module")
def flux_bundle(tmp_path_factory):
    """Of a FLUX, whose T5 has one weight in two places: the embedding of tokens, and that of its encoder."""
    folder = tmp_path_factory.mktemp("flux")
    make_flux().save_pretrained(folder / "source")
    cemq.quantize_and_schedule(
        str(folder / "source"), folder / "bundle", scheme="w4a8", rounding="nearest", steps=3, budget=2, samples=1,
        planning_samples=1, effort="quick", solver="uniform", call=FLUX_CALL,
    )  # fmt: skip
    return folder / "bundle"


@pytest.mark.parametrize("dtype", others_slow(["float32", "bfloat16", "float16"], ["bfloat16"]))
def test_a_placement_gives_the_picture_of_the_weights_on_the_device_bit_for_bit(flux_bundle, dtype, tmp_path):
    def picture(pipe):
        pipe.set_progress_bar_config(disable=True)
        return run(pipe, PROMPT, steps=3, call=FLUX_CALL)

    expected, names = picture(load(flux_bundle, torch_dtype=dtype)), []
    assert np.isfinite(expected).all()
    for device in ("cpu", "cuda"):  # the CPU takes an accelerator's place
        plan = cemq.plan_memory(flux_bundle, "8GiB", device=device, dtype=dtype)
        for chosen in plan.estimates:
            placement = chosen.placement
            needs_gpu = placement.streams or placement.name == "sequential offload"
            if chosen.obstacle or chosen.vae != "whole" or needs_gpu or placement.disk == (device == "cuda"):
                continue
            pipe = load(flux_bundle, torch_dtype=dtype)
            place(pipe, dataclasses.replace(plan, chosen=chosen), device=CPU, offload_folder=tmp_path / placement.name)
            names.append(placement.name)
            assert np.array_equal(picture(pipe), expected), placement.name
    assert names == [
        "group offload to disk, block level", "group offload to disk, leaf level", "sequential offload to disk",
        "on device", "model offload", "group offload, block level", "group offload, leaf level",
    ]  # fmt: skip


def test_weights_on_disk_lie_where_those_in_memory_do(flux_bundle, tmp_path):
    """At multiples of 64 bytes, as torch allocates; elsewhere a layer runs other kernels and gives other last bits."""
    limit = limits(flux_bundle)["group offload to disk, block level"]
    load(flux_bundle, vram=limit, offload_folder=tmp_path)
    (transformer,) = tmp_path.glob("*/transformer")
    values = open_pipeline(flux_bundle, dtype="float32", device="cpu").transformer.state_dict().values()
    expected = sorted((str(value.dtype), tuple(value.shape), float(value.double().sum())) for value in values)
    found = []
    for file in transformer.glob("*.safetensors"):
        for name, value in load_file(file).items():
            if not name.startswith("after"):  # the zeros between
                assert value.data_ptr() % 64 == 0
                found.append((str(value.dtype), tuple(value.shape), float(value.double().sum())))
    assert sorted(found) == expected


def test_a_tiled_plan_tiles_the_vae(bundle):
    plan = cemq.plan_memory(bundle, "8GiB", device="cuda", samples=2, call={"height": 256, "width": 256})
    modes = [e.vae for e in plan.estimates[:3]]
    assert modes == ["whole", "sliced", "tiled"]
    pipe = load(bundle)
    place(pipe, dataclasses.replace(plan, chosen=plan.estimates[2]), device=CPU)
    assert pipe.vae.use_tiling
    assert pipe.vae.use_slicing
    assert images(pipe).shape == (1, 32, 32, 3)


def test_attention_that_bypasses_its_layers_is_not_offloaded_by_layers(bundle):
    plan = cemq.plan_memory(bundle, "8GiB", device="cuda")
    chosen = next(e for e in plan.estimates if e.name == "group offload, leaf level")
    pipe = load(bundle)
    pipe.text_encoder.extra = nn.MultiheadAttention(8, 2)
    with pytest.raises(PlacementError, match="text_encoder: its attention uses weights of a layer without running it"):
        place(pipe, dataclasses.replace(plan, chosen=chosen), device=CPU)


# --- the command


def test_plan_memory_shows_every_placement(bundle):
    shown = CliRunner().invoke(cli.app, ["plan-memory", str(bundle), "--vram", "1GiB", "--budget", "2x"])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("on device: ")
    for word in ("transformer", "group offload, leaf level, streams", "sequential offload to disk", "chosen", "fits"):
        assert word in shown.stdout
    plain = json.loads(CliRunner().invoke(cli.app, ["plan-memory", str(bundle), "--vram", "1GiB", "--json"]).stdout)
    assert plain["chosen"] == "on device"
    assert plain["reserve_bytes"] == 1 << 29
    assert [row["fits"] for row in plain["placements"]] == [True] * len(plain["placements"])
    assert {c["name"] for c in plain["components"]} == {"text_encoder", "text_encoder_2", "transformer", "vae"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vram", "lots"], "memory 'lots': write a size such as 8GiB"),
        (["--vram", "1MiB"], "vram=1.0 MiB: nothing fits. The least is group offload, leaf level"),
        (["--vram", "1GiB", "--budget", "99"], "budget=99 is out of range for 6 steps"),
        (["--vram", "1GiB", "--device", "tpu"], "unknown device 'tpu'"),
        (["--vram", "1GiB", "--call", "height"], "--call 'height': write KEY=VALUE"),
    ],
)
def test_a_wrong_request_is_one_line(bundle, arguments, message):
    result = CliRunner().invoke(cli.app, ["plan-memory", str(bundle), *arguments])
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.strip().splitlines()) == 1
    assert message in result.stderr
