import json
import re
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DiTPipeline
from hypothesis import given
from hypothesis import strategies as st
from support.bundles import resealed
from support.pipelines import BATCH, FLUX_CALL, make_dit, make_flux
from torch import nn
from typer.testing import CliRunner

import cemq
from cemq import cli
from cemq.bundle.engines import ENGINES, bins
from cemq.bundle.manifest import MANIFEST, PICTURE, read_bundle
from cemq.bundle.schedule_file import read_schedule
from cemq.errors import BundleError, HubError, InputError, ModelError
from cemq.pipelines.batches import Batch, run
from cemq.runtime import schedule_hook
from cemq.schedule import CacheSchedule

SETTINGS = {"steps": 8, "budget": 4, "samples": 2, "planning_samples": 2, "solver": "uniform", "rectify": "none"}
SETTINGS["call"] = {"guidance_scale": 2.0}


def build(root: Path, scheme: str) -> Path:
    make_dit().save_pretrained(root / "pipeline")
    (root / "labels.txt").write_text("1\n2\n")
    cemq.quantize_and_schedule(
        str(root / "pipeline"), root / "bundle", scheme=scheme, calib=str(root / "labels.txt"), **SETTINGS
    )
    return root / "bundle"


@pytest.fixture(scope="module", params=["w8a8", "none"])
def bundle(request, tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    return run(pipe, BATCH, steps=8, call=SETTINGS["call"])


def load(folder, **options):
    return cemq.from_pretrained(folder, device="cpu", **options)


def full_steps(bundle):
    return list(read_bundle(bundle).schedule.full_steps)


# --- export


def test_json_holds_what_apply_schedule_needs(bundle, tmp_path):
    file = tmp_path / "schedule.json"
    file.write_text(cemq.export(bundle))
    manifest = read_bundle(bundle)
    assert read_schedule(file) == (manifest.schedule, manifest.sampler, "output")
    assert read_schedule(bundle) == (manifest.schedule, manifest.sampler, "output")
    assert json.loads(file.read_text())["made_for"]["scheme"] == manifest.scheme


def test_the_cache_dit_mask_is_the_schedule(bundle):
    text = cemq.export(bundle, "cache-dit")
    (section,) = yaml.safe_load(text).values()
    assert [step for step, mark in enumerate(section["steps_computation_mask"]) if mark] == full_steps(bundle)
    assert section["steps_computation_policy"] == "static"
    assert section["num_inference_steps"] == len(section["steps_computation_mask"]) == 8
    assert section["taylorseer_order"] == 1
    assert all(len(line) < 400 for line in text.splitlines())


def test_what_a_cache_dit_file_cannot_say_stands_in_its_head(copy):
    schedule = CacheSchedule(
        num_steps=8, full_steps=(0, 2, 4), predictor=("reuse", "taylor1", "reuse"), branch_steps=(4,)
    )
    text = cemq.export(resealed(copy, lambda manifest: manifest.update(schedule=schedule.to_dict())), "cache-dit")
    assert "no counterpart of the predictor reuse, taylor1, reuse" in text
    assert "# cemq skips one branch of guidance on 1 of these steps" in text
    assert yaml.safe_load(text)["cache_config"]["steps_computation_mask"] == [1, 0, 1, 0, 1, 0, 0, 0]


def settings_of(text, prefix="SGLANG_CACHE_DIT_"):
    """Of lines NAME=VALUE, read as strictly as can be: comments before all of them, each once, no quotes or spaces."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert text.endswith("\n".join(["", *lines, ""]))
    pairs = [re.fullmatch(rf"{prefix}([A-Z_]+)=([\w,.-]+)", line).groups() for line in lines]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_sglang_reads_the_schedule_from_bins(bundle):
    cache_dit = pytest.importorskip("cache_dit")
    found = settings_of(cemq.export(bundle, "sglang"))
    computed, cached = ([int(n) for n in found[f"SCM_{kind}_BINS"].split(",")] for kind in ("COMPUTE", "CACHE"))
    mask = cache_dit.steps_mask(compute_bins=computed, cache_bins=cached, total_steps=8)  # as SGLang calls it
    assert [step for step, mark in enumerate(mask) if mark] == full_steps(bundle)
    assert (found["ENABLED"], found["SCM_POLICY"], found["WARMUP"], found["MC"]) == ("true", "static", "1", "-1")
    assert (found["TAYLORSEER"], found["TS_ORDER"]) == ("true", "1")


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_bins_say_any_schedule(marks):
    cache_dit = pytest.importorskip("cache_dit")
    mask = [1, *map(int, marks)]
    computed, cached = bins(mask)
    assert cache_dit.steps_mask(compute_bins=computed, cache_bins=cached, total_steps=len(mask)) == mask


def test_sglang_takes_no_mask_of_few_steps(copy):
    short = CacheSchedule(num_steps=7, full_steps=(0, 3)).to_dict()
    with pytest.raises(InputError, match="the schedule has 7 steps, and SGLang takes masks from 8 on"):
        cemq.export(resealed(copy, lambda manifest: manifest.update(schedule=short)), "sglang")


def test_stable_diffusion_cpp_is_given_flags(bundle):
    flags = [line for line in cemq.export(bundle, "sd.cpp").splitlines() if not line.startswith("#")]
    (words,) = (line.split() for line in flags)
    found = dict(zip(words[::2], words[1::2], strict=True))
    assert (found["--cache-mode"], found["--scm-policy"]) == ("cache-dit", "static")
    assert [step for step, mark in enumerate(found["--scm-mask"].split(",")) if mark == "1"] == full_steps(bundle)
    assert dict(pair.split("=") for pair in found["--cache-option"].split(",")) == {"Fn": "1", "Bn": "0", "warmup": "1"}


@pytest.mark.parametrize("format", ENGINES)
def test_every_engine_is_told_what_is_not_promised_and_nothing_can_leave_the_comments(copy, format):
    text = cemq.export(resealed(copy, lambda manifest: manifest.update(model="a\nrm -rf x")), format)
    assert "a rm -rf x" in text.splitlines()[0]
    assert "Fidelity measured with cemq does not carry over" in text


# --- SGLang's DPCache


@pytest.fixture(scope="module")
def in_a_line(tmp_path_factory):
    """A bundle that DPCache could follow: no guidance with two branches, bfloat16, the first two steps in full."""
    root = tmp_path_factory.mktemp("line")
    make_flux().save_pretrained(root / "pipeline")
    (root / "prompts.txt").write_text("a bold seven\na thin two\n")
    call = {name: FLUX_CALL[name] for name in ("height", "width", "max_sequence_length")}
    cemq.quantize_and_schedule(
        str(root / "pipeline"), root / "bundle", scheme="none", calib=str(root / "prompts.txt"), dtype="bfloat16",
        device="cpu", **SETTINGS | {"call": call},
    )  # fmt: skip
    return planned(root / "bundle", full_steps=(0, 1, 2, 5), predictor="taylor1")


def planned(folder, **schedule):
    """A bundle with another schedule of 8 steps."""
    other = CacheSchedule(num_steps=8, **schedule).to_dict()
    return resealed(folder, lambda manifest: manifest.update(schedule=other))


def changed(source, target, **keys):
    """A copy of a bundle, of which the manifest says something else."""
    return resealed(Path(shutil.copytree(source, target)), lambda manifest: manifest.update(keys))


def read_dpcache(text):
    """As strictly as the schema is documented: these keys and types, and what must hold between them."""
    found = json.loads(text)
    assert set(found) == {
        *("schema", "schedule_method", "predictor", "objective", "source_commit", "request", "mandatory_full_steps"),
        *("force_last_full", "max_gap", "num_full_steps", "full_steps", "calibrated_cost", "calibration"),
    }
    assert found["schema"] == "sglang-dpcache-schedule-v2"
    assert found["predictor"] == {
        "name": "final-feature-linear-extrapolation", "order": 1, "arithmetic": "feature-dtype-elementwise-v1",
    }  # fmt: skip
    assert found["objective"] == "pact-mean-abs-final-feature-predicted-steps-only-v1"
    assert found["source_commit"]
    assert re.fullmatch("[0-9a-f]{64}", found["calibration"]["manifest_sha256"])
    assert type(found["calibration"]["num_samples"]) is int
    assert found["calibrated_cost"] >= 0
    request, full, steps = found["request"], found["full_steps"], found["request"]["num_inference_steps"]
    types = {
        "pipeline": str, "checkpoint": str, "num_inference_steps": int, "height": int, "width": int,
        "guidance_scale": float, "do_classifier_free_guidance": bool, "quality": str,
        "attention_backend": (str, type(None)), "dtype": str, "scheduler": str, "scheduler_config_sha256": str,
        "timesteps": list, "sigmas": list,
    }  # fmt: skip
    assert set(request) == set(types)
    assert all(isinstance(request[name], kind) for name, kind in types.items())
    assert request["dtype"] == "bfloat16"
    assert request["do_classifier_free_guidance"] is False
    assert (len(request["timesteps"]), len(request["sigmas"])) == (steps, steps + 1)
    assert all(isinstance(each, float) for each in (*request["timesteps"], *request["sigmas"]))
    leading = found["mandatory_full_steps"]
    assert leading == list(range(len(leading)))
    assert len(leading) >= 2
    assert full == sorted(set(full))
    assert full[: len(leading)] == leading
    assert found["num_full_steps"] == len(full)
    assert 0 <= full[0] <= full[-1] < steps
    assert found["force_last_full"] is (full[-1] == steps - 1)
    assert max(np.diff([*full, steps])) <= found["max_gap"]
    return found


def test_dpcache_of_sglang_is_told_the_steps_and_what_they_are_for(in_a_line):
    found = read_dpcache(cemq.export(in_a_line, "sglang-dpcache"))
    manifest = read_bundle(in_a_line)
    assert found["full_steps"] == [0, 1, 2, 5]
    assert (found["mandatory_full_steps"], found["max_gap"], found["force_last_full"]) == ([0, 1, 2], 3, False)
    request = found["request"]
    assert (request["height"], request["width"], request["pipeline"]) == (16, 16, "FluxPipelineConfig")
    assert request["guidance_scale"] == 3.5
    assert request["timesteps"] == pytest.approx(manifest.sampler.timesteps)
    assert request["sigmas"] == pytest.approx([*(t / 1000 for t in manifest.sampler.timesteps), 0])
    assert found["calibration"]["num_samples"] == len(manifest.profiled_seeds)
    assert any("Fidelity measured with cemq does not carry over" in note for note in found["calibration"]["notes"])


def test_a_calibrated_schedule_says_what_the_server_is_asked_for(in_a_line, tmp_path):
    theirs = read_dpcache(cemq.export(in_a_line, "sglang-dpcache"))
    theirs["request"] |= {"attention_backend": "fa", "quality": "default", "pipeline": "FluxConfig"}
    file, output = tmp_path / "K5.json", tmp_path / "K4.json"
    file.write_text(json.dumps(theirs | {"full_steps": [0, 1, 2, 4, 6], "num_full_steps": 5}))
    asked = ["export", in_a_line, "--format", "sglang-dpcache", "--request", file, "-o", output]
    shown = CliRunner().invoke(cli.app, [*map(str, asked)])
    assert shown.exit_code == 0, shown.output
    found = read_dpcache(output.read_text())
    assert found["request"] == theirs["request"]
    assert found["full_steps"] == [0, 1, 2, 5]
    for damage, message in (
        ({"dtype": "float16"}, "the request is for float16"),
        ({"do_classifier_free_guidance": True}, "DPCache refuses guidance with two branches"),
        ({"timesteps": [900.0] * 8}, "is for 8 steps at other timesteps than the 8 that this plan"),
        ({"more": 1}, "is no schedule of SGLang's dpcache_calibrate"),
    ):
        file.write_text(json.dumps(theirs | {"request": theirs["request"] | damage}))
        with pytest.raises(InputError, match=message):
            cemq.export(in_a_line, "sglang-dpcache", request=file)
    with pytest.raises(InputError, match="cannot be read"):
        cemq.export(in_a_line, "sglang-dpcache", request=tmp_path / "none.json")
    with pytest.raises(InputError, match="only the format sglang-dpcache has one, found json"):
        cemq.export(in_a_line, request=file)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"full_steps": (0, 1, 4), "predictor": "reuse"},
            "this plan predicts with reuse: plan with --predictor taylor1",
        ),
        ({"full_steps": (0, 2, 4), "predictor": "taylor1"}, "and this plan skips the second step"),
        ({"full_steps": (0, 1, 4), "branch_steps": (4,)}, "has no guidance, of which this plan skips a branch"),
        ({"dtype": "float32"}, "this bundle is of float32: build with --dtype bfloat16"),
        ({"lora": [{"name": "a", "scale": 1.0, "sha256": "0" * 64, "revision": None}]}, "DPCache refuses LoRAs"),
        ({"denoisers": ["transformer", "transformer_2"]}, "follows one transformer, this pipeline has 2"),
        ({"call": {"image": "a.png"}}, "DPCache takes no pictures, this bundle was planned with image"),
        ({"call": {}}, "this bundle was planned without: build with --call"),
        ({"call": {"height": 16, "width": 16, "true_cfg_scale": 2.0}}, "DPCache refuses guidance with two branches"),
    ],
)
def test_what_dpcache_cannot_follow_is_refused(in_a_line, tmp_path, keys, message):
    if "full_steps" in keys:
        bundle = planned(Path(shutil.copytree(in_a_line, tmp_path / "other")), **keys)
    else:
        bundle = changed(in_a_line, tmp_path / "other", **keys)
    with pytest.raises(InputError, match=f"export format sglang-dpcache: .*{message}"):
        cemq.export(bundle, "sglang-dpcache")


@pytest.fixture
def cached_by_cache_dit(bundle, tmp_path):
    """A pipeline that cache-dit runs with a bundle's schedule."""
    cache_dit = pytest.importorskip("cache_dit")
    (tmp_path / "cache.yaml").write_text(cemq.export(bundle, "cache-dit"))
    pipe = make_dit()
    cache_dit.enable_cache(pipe, **cache_dit.load_configs(str(tmp_path / "cache.yaml")))
    yield pipe
    cache_dit.disable_cache(pipe)  # or it would stay in the pipeline's class


def test_cache_dit_itself_computes_these_steps(bundle, cached_by_cache_dit):
    steps, computed = [], []
    last = cached_by_cache_dit.transformer.transformer_blocks[-1]
    last.register_forward_pre_hook(lambda *_: computed.append(len(steps)))
    run(cached_by_cache_dit, BATCH, steps=8, call=SETTINGS["call"], on_step=lambda: steps.append(1))
    assert computed == full_steps(bundle)


def test_what_cache_dit_runs_takes_no_schedule_but_its_neighbours_do(bundle, cached_by_cache_dit):
    with pytest.raises(ModelError, match=r"cache-dit is active.*disable_cache"):
        cemq.apply_schedule(cached_by_cache_dit, bundle)
    beside = make_dit()
    hook = cemq.apply_schedule(beside, bundle)
    found = images(beside)
    assert hook.skipped_evaluations == 4
    sys.modules["cache_dit"].disable_cache(cached_by_cache_dit)
    assert np.array_equal(images(beside), found)
    cemq.apply_schedule(cached_by_cache_dit, bundle)
    assert np.array_equal(images(cached_by_cache_dit), found)


def test_the_command_writes_a_file_or_prints(bundle, tmp_path):
    invoke = CliRunner().invoke
    shown = invoke(cli.app, ["export", str(bundle)])
    assert shown.stdout == cemq.export(bundle)
    file = tmp_path / "a.yaml"
    assert invoke(cli.app, ["export", str(bundle), "--format", "cache-dit", "-o", str(file)]).exit_code == 0
    assert file.read_text() == cemq.export(bundle, "cache-dit")
    wrong = invoke(cli.app, ["export", str(bundle), "--format", "cachedit"])
    assert (wrong.exit_code, wrong.stderr.strip()) == (
        1,
        "cemq: unknown export format 'cachedit': choose from json, cache-dit, sglang, sd.cpp, "
        "sglang-dpcache; did you mean 'cache-dit'?",
    )
    nowhere = invoke(cli.app, ["export", str(bundle), "-o", str(tmp_path / "none" / "a.json")])
    assert "does not exist" in nowhere.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "is not one: write it with cemq export"),
        ('{"kind": "cemq-schedule", "version": 9}', "has version 9, this cemq reads 1"),
        ('{"kind": "cemq-schedule", "version": 1, "more": 1}', "expected the keys"),
    ],
)
def test_a_file_that_is_no_schedule_is_refused(tmp_path, text, message):
    file = tmp_path / "a.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=message):
        cemq.apply_schedule(make_dit(), file)


def test_a_damaged_schedule_is_refused(bundle, tmp_path):
    content = json.loads(cemq.export(bundle))
    del content["sampler"]["timesteps"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="is damaged"):
        read_schedule(tmp_path / "a.json")


# --- apply_schedule


def torchao_int8(model):
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantization.quantize_(model, config)


def quanto_int8(model):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


def bitsandbytes_int8(model):
    bnb = pytest.importorskip("bitsandbytes")
    for name, layer in [(name, part) for name, part in model.named_modules() if type(part) is nn.Linear]:
        replaced = bnb.nn.Linear8bitLt(
            layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False
        )
        replaced.load_state_dict(layer.state_dict())
        model.set_submodule(name, replaced)
    model.to("cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantize", [lambda model: None, torchao_int8, quanto_int8, bitsandbytes_int8])
def test_a_schedule_runs_on_what_other_libraries_quantized(quantize):
    pipe, schedule = make_flux(), CacheSchedule(num_steps=6, full_steps=(0, 2, 4))
    quantize(pipe.transformer)
    batch = Batch(conditions=("a bold seven",), seeds=(3,))
    full = run(pipe, batch, steps=6, call=FLUX_CALL)
    calls = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    hook = cemq.apply_schedule(pipe, schedule)
    found = run(pipe, batch, steps=6, call=FLUX_CALL)
    assert len(calls) == hook.full_evaluations == 2 * schedule.budget
    assert np.isfinite(found).all()
    assert not np.array_equal(found, full)
    cemq.detach(pipe)
    assert np.array_equal(run(pipe, batch, steps=6, call=FLUX_CALL), full)


def test_an_exported_schedule_gives_the_bundles_own_pictures(bundle, tmp_path):
    file = tmp_path / "schedule.json"
    file.write_text(cemq.export(bundle))
    plain = DiTPipeline.from_pretrained(bundle)
    cemq.apply_schedule(plain, file)
    assert np.allclose(images(plain), images(load(bundle)), atol=1e-5)
    assert schedule_hook(plain).full_evaluations == 4


def test_another_sampler_computes_in_full_unless_any_will_do(bundle):
    pipe = make_dit(DDIMScheduler(beta_end=0.03))
    hook = cemq.apply_schedule(pipe, bundle)
    with pytest.warns(UserWarning, match="settings or timesteps are not those"):
        images(pipe)
    assert hook.skipped_evaluations == 0
    cemq.detach(pipe)
    hook = cemq.apply_schedule(pipe, bundle, any_sampler=True)
    images(pipe)
    assert (hook.full_evaluations, hook.skipped_evaluations) == (4, 4)
    with pytest.warns(UserWarning, match="this run has 5 steps, the schedule was planned for 8"):
        run(pipe, BATCH, steps=5, call=SETTINGS["call"])
    assert hook.skipped_evaluations == 0
    images(pipe)
    assert hook.skipped_evaluations == 4


# --- save_pretrained


def test_saving_a_loaded_bundle_gives_a_bundle_again(bundle, tmp_path):
    pipe = load(bundle)
    expected = images(pipe)
    pipe.save_pretrained(tmp_path / "again")
    assert read_bundle(tmp_path / "again", verify=True) == read_bundle(bundle)
    assert np.array_equal(images(load(tmp_path / "again")), expected)
    (tmp_path / "empty").mkdir()
    pipe.save_pretrained(str(tmp_path / "empty"), safe_serialization=True)
    pipe.save_pretrained(tmp_path / "empty")  # over the bundle of before
    assert read_bundle(tmp_path / "empty", verify=True) == read_bundle(bundle)


def test_only_this_object_saves_bundles(bundle, tmp_path):
    pipe = load(bundle)
    plain = make_dit()
    plain.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / MANIFEST).exists()
    assert "save_pretrained" not in vars(DiTPipeline)
    type(pipe).save_pretrained(pipe, tmp_path / "pipeline")
    assert not (tmp_path / "pipeline" / MANIFEST).exists()


def test_saving_what_the_fidelity_was_not_measured_on_is_refused(bundle, tmp_path):
    with pytest.raises(BundleError, match="follows 2 full-compute steps instead of 4"):
        load(bundle, budget=2).save_pretrained(tmp_path / "again")
    plan = cemq.plan_memory(bundle, "1GiB", device="cpu")
    least = min(e.device_bytes for e in plan.estimates if not e.obstacle) + plan.reserve_bytes
    with pytest.raises(BundleError, match="was loaded in bfloat16 instead of float32"):
        load(bundle, torch_dtype=torch.bfloat16).save_pretrained(tmp_path / "again")
    with pytest.raises(BundleError, match=r"weights of transformer are offloaded: load the bundle without vram="):
        load(bundle, vram=least, offload_folder=tmp_path / "offload").save_pretrained(tmp_path / "again")
    with pytest.raises(BundleError, match=r"safe_serialization=False\): a bundle is written in one way"):
        load(bundle).save_pretrained(tmp_path / "again", safe_serialization=False)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    with pytest.raises(BundleError, match="exists already and is not a cemq bundle: choose another name"):
        load(bundle).save_pretrained(tmp_path / "photos")
    assert not (tmp_path / "again").exists()


def test_saving_after_the_bundle_is_gone_is_refused(copy, tmp_path):
    pipe = load(copy)
    shutil.rmtree(copy)
    with pytest.raises(BundleError, match="that this pipeline came from is gone"):
        pipe.save_pretrained(tmp_path / "again")


# --- the Hub


class FakeApi:
    """Takes what huggingface_hub's does, and keeps it."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    calls: ClassVar[list[dict]] = []

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        self.calls.append({"created": repo_id, "private": private, "exist_ok": exist_ok})
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, *, commit_message, revision=None, create_pr=None):
        assert repo_id != "someone/forbidden", "403 Forbidden: not yours"
        self.calls.append({"message": commit_message, "revision": revision, "create_pr": create_pr})
        files = self.repositories.setdefault(repo_id, {})
        for operation in operations:
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(FakeApi, "repositories", {})
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    downloads = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
        downloads.append((repo_id, revision, allow_patterns))
        folder = tmp_path / "cache" / repo_id.replace("/", "--")
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in FakeApi.repositories[repo_id].items():
            if allow_patterns is None or name in allow_patterns:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return downloads


def test_a_pushed_bundle_loads_from_the_hub(bundle, hub):
    assert cemq.push_to_hub(bundle, "someone/digits", private=True) == "https://huggingface.co/someone/digits"
    created, committed = FakeApi.calls
    assert created == {"created": "someone/digits", "private": True, "exist_ok": True}
    scheme = read_bundle(bundle).scheme
    assert committed["message"] == f"cemq bundle: {scheme}, 4 of 8 steps in full"
    card = FakeApi.repositories["someone/digits"]["README.md"].decode()
    assert 'cemq.from_pretrained("someone/digits")' in card
    assert f"]({PICTURE})" in card
    assert FakeApi.repositories["someone/digits"][PICTURE] == (bundle / PICTURE).read_bytes()
    assert "base_model" not in card  # a folder on this machine, which the Hub does not know
    pipe = load("someone/digits", revision="v1")
    assert hub == [("someone/digits", "v1", [MANIFEST]), ("someone/digits", "v1", None)]
    assert np.array_equal(images(pipe), images(load(bundle)))


@pytest.mark.parametrize(("model", "kept"), [("owner/base", True), ("builtin:dit-digits", False)])
def test_the_card_keeps_a_base_model_that_the_hub_knows(copy, hub, model, kept):
    base = f'base_model: "{model}"\n'
    (copy / "README.md").write_text(f'---\n{base}tags: [cemq]\n---\ncemq.from_pretrained("this-folder")\n')
    cemq.push_to_hub(resealed(copy, lambda manifest: manifest.update(model=model)), "a/b")
    card = FakeApi.repositories["a/b"]["README.md"].decode()
    assert card == f'---\n{base if kept else ""}tags: [cemq]\n---\ncemq.from_pretrained("a/b")\n'


def test_an_edited_card_leaves_the_bundle_whole(copy):
    (copy / "README.md").write_text("Edited on the Hub.\n")
    assert read_bundle(copy, verify=True)
    (copy / "README.md").unlink()
    assert read_bundle(copy, verify=True)


def test_what_is_on_the_hub_but_no_bundle_is_not_downloaded(hub):
    FakeApi.repositories["someone/model"] = {"model_index.json": b"{}", "huge.safetensors": b"0"}
    with pytest.raises(HubError, match=r"no cemq bundle: make one with cemq quantize-and-schedule someone/model"):
        load("someone/model")
    assert hub == [("someone/model", None, [MANIFEST])]


def test_without_a_network_the_failure_is_one_line():
    with pytest.raises(HubError, match=r"'someone/digits' is no folder here and cannot be fetched from the Hub: .+"):
        load("someone/digits")


def test_what_is_neither_folder_nor_hub_id_is_named(tmp_path):
    with pytest.raises(BundleError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="no such folder"):
        load("nowhere")


def test_a_refusal_of_the_hub_is_one_line(bundle, copy, hub):
    run_cli = CliRunner().invoke
    refused = run_cli(cli.app, ["push", str(bundle), "someone/forbidden"])
    assert (refused.exit_code, refused.stderr) == (
        1, "cemq: 'someone/forbidden' cannot be written on the Hub: 403 Forbidden: not yours\n",
    )  # fmt: skip
    done = run_cli(cli.app, ["push", str(bundle), "someone/digits", "--public", "--create-pr", "-m", "First"])
    assert done.stdout == "https://huggingface.co/someone/digits\n"
    assert FakeApi.calls[-1] == {"message": "First", "revision": None, "create_pr": True}
    with pytest.raises(InputError, match="write owner/name"):
        cemq.push_to_hub(bundle, "digits")
    weights = next((copy / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"has \d+ bytes instead of"):
        cemq.push_to_hub(copy, "someone/damaged")
    assert "someone/damaged" not in FakeApi.repositories


def test_diffusers_own_push_of_a_loaded_bundle_uploads_a_bundle(bundle, monkeypatch, tmp_path):
    uploaded = {}

    def upload_folder(self, folder, repo_id, **options):
        shutil.copytree(folder, tmp_path / "hub")
        uploaded[repo_id] = read_bundle(tmp_path / "hub", verify=True)

    class Repository:
        repo_id = "someone/digits"

    class Card:
        def save(self, path):
            Path(path).write_text("a card of diffusers\n")

    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", lambda *_, **__: Repository)
    monkeypatch.setattr("diffusers.utils.hub_utils.load_or_create_model_card", lambda *_, **__: Card())
    monkeypatch.setattr("diffusers.utils.hub_utils.populate_model_card", lambda card: card)
    monkeypatch.setattr(DiTPipeline, "_upload_folder", upload_folder)
    load(bundle).push_to_hub("digits")
    assert uploaded == {"someone/digits": read_bundle(bundle)}
