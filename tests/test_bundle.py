import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from safetensors import safe_open
from support.bundles import resealed
from support.pipelines import BATCH, make_dit

import cemq
from cemq.bundle.manifest import EVIDENCE, FORMAT_VERSION, MANIFEST, PRIOR, read_bundle
from cemq.bundle.staging import staging
from cemq.errors import BundleError, InfeasibleBudgetError
from cemq.pipelines.batches import run
from cemq.prior.error_prior import ErrorPrior
from cemq.recipe import make_recipe
from cemq.runtime import attached, detach, schedule_hook
from cemq.schedule import plan_schedule
from cemq.schedule.plan import Plan
from cemq.schedule.rectify import make_correction

SETTINGS = {
    "steps": 8, "budget": 4, "samples": 4, "call": {"guidance_scale": 2.0}, "planning_samples": 2, "effort": "quick",
    "solver": "uniform",
}  # fmt: skip


@pytest.fixture(scope="module", params=["w8a8", "w4a8", "none"])
def bundle(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    make_dit().save_pretrained(root / "pipeline")
    index = root / "pipeline" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": {"1": "cat", "2": "dog, hound"}}))
    (root / "labels.txt").write_text("# labels\ncat\nhound\n")
    cemq.quantize_and_schedule(
        str(root / "pipeline"), root / "bundle", scheme=request.param, calib=str(root / "labels.txt"), **SETTINGS
    )
    return root / "bundle"


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def load(folder, **options):
    pipe = cemq.from_pretrained(folder, device="cpu", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe):
    return run(pipe, BATCH, steps=8, call=SETTINGS["call"])


def test_a_bundle_loads_as_its_native_class_and_runs_exactly_its_budget(bundle):
    pipe = load(bundle)
    assert type(pipe) is DiTPipeline
    assert pipe.labels == {"cat": 1, "dog": 2, "hound": 2}
    images(pipe)
    assert schedule_hook(pipe).full_evaluations == 4


def test_two_loads_give_the_same_images(bundle):
    assert np.array_equal(images(load(bundle)), images(load(bundle)))


def test_a_bundle_holds_tensors_text_and_the_picture_of_its_card_only(bundle):
    kinds = {path.suffix for path in bundle.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json", ".md", ".webp"}
    assert not list(bundle.parent.glob(".*partial*"))


def test_a_bundle_does_not_tell_where_it_was_made(bundle):
    for path in bundle.rglob("*.json"):
        if path.name != MANIFEST:
            assert str(bundle.parent) not in path.read_text()


def test_an_ordinary_from_pretrained_reloads_the_denoiser_bit_for_bit(bundle):
    stored = {}
    with safe_open(next((bundle / "transformer").glob("*.safetensors")), framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    loaded = DiTTransformer2DModel.from_pretrained(bundle / "transformer").state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) and stored[name].dtype == loaded[name].dtype for name in stored)


def test_another_budget_is_solved_from_the_prior(bundle):
    assert schedule_hook(load(bundle, budget=2)).schedule.budget == 2
    assert schedule_hook(load(bundle, budget="2x")).schedule.budget == 4
    with pytest.raises(InfeasibleBudgetError, match=r"choose 2\.\.8"):
        load(bundle, budget=9)


def test_full_budget_equals_the_plain_quantized_pipeline(bundle):
    plain = DiTPipeline.from_pretrained(bundle)
    plain.set_progress_bar_config(disable=True)
    scheduled = load(bundle, budget=8)
    detach(scheduled)  # the same weights
    assert np.allclose(images(scheduled), images(plain), atol=1e-5)
    prior, manifest = ErrorPrior.load(bundle / PRIOR), read_bundle(bundle)
    full = plan_schedule(prior, 8)
    with attached(scheduled, Plan(schedule=full, sampler=manifest.sampler, prior=prior)):  # without its correction
        assert np.allclose(images(scheduled), images(plain), atol=1e-5)


def test_a_bundle_applies_the_correction_it_was_planned_with(bundle):
    manifest, prior = read_bundle(bundle), ErrorPrior.load(bundle / PRIOR)
    pipe = load(bundle)
    expected = manifest.correction and make_correction(manifest.correction, prior, manifest.schedule)
    found = schedule_hook(pipe).plan.correction
    assert (found and found.method) == manifest.correction
    assert expected is None or np.array_equal(found.offset, expected.offset)


def test_the_evidence_is_part_of_the_bundle(bundle):
    manifest, evidence = read_bundle(bundle, verify=True), json.loads((bundle / EVIDENCE).read_text())
    assert evidence["winner"]["schedule"] == manifest.schedule.to_dict()
    assert evidence["winner"]["correction"] == manifest.correction
    assert set(evidence["seeds"]) <= set(manifest.profiled_seeds)
    assert EVIDENCE in json.loads((bundle / MANIFEST).read_text())["files"]


def test_another_step_count_runs_at_the_same_compute_ratio(bundle):
    pipe = load(bundle)
    run(pipe, BATCH, steps=12, call=SETTINGS["call"])
    assert (schedule_hook(pipe).full_evaluations, schedule_hook(pipe).skipped_evaluations) == (6, 6)


def test_another_dtype_leaves_the_scales_alone(bundle):
    wide, narrow = (
        load(bundle).transformer.state_dict(),
        load(bundle, torch_dtype=torch.bfloat16).transformer.state_dict(),
    )
    scales = [name for name in wide if name.endswith("weight_scale")]
    assert all(torch.equal(wide[name], narrow[name]) for name in scales)
    assert narrow["proj_out_2.weight"].dtype is torch.bfloat16


def test_the_manifest_says_how_the_bundle_was_made(bundle):
    manifest, prior = read_bundle(bundle, verify=True), ErrorPrior.load(bundle / PRIOR)
    assert manifest.schedule.num_steps == prior.num_steps == 8
    assert prior.metadata.sampler.matches(manifest.sampler)
    assert prior.metadata.scheme == manifest.scheme
    assert not set(range(1_000_000, 1_000_016)) & set(manifest.profiled_seeds)
    assert manifest.fidelity["psnr_db"] > 0


def test_a_truncated_file_is_named(copy):
    weights = next((copy / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"transformer/diffusion_pytorch_model.safetensors' has \d+ bytes instead of"):
        load(copy)


def test_an_edited_file_is_named(copy):
    prior = bytearray((copy / PRIOR).read_bytes())
    prior[-1] ^= 1
    (copy / PRIOR).write_bytes(bytes(prior))
    with pytest.raises(BundleError, match=r"'prior.safetensors' was edited"):
        load(copy)


def test_a_missing_file_is_named(copy):
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(BundleError, match=r"'vae/config.json' is missing"):
        load(copy)


def test_an_edited_manifest_is_refused(copy):
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace('"budget": 4', '"budget": 5').replace('"w', '"v'))
    with pytest.raises(BundleError, match=r"cemq.json was edited"):
        load(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 1}'])
def test_a_damaged_manifest_is_refused(copy, content):
    (copy / MANIFEST).write_text(content)
    with pytest.raises(BundleError, match=r"cemq.json is damaged"):
        load(copy)


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1])
def test_another_format_is_refused(copy, version):
    fields = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(fields | {"format_version": version}))
    with pytest.raises(BundleError, match=f"has format {version}, this cemq reads {FORMAT_VERSION}: write it again"):
        load(copy)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"holds no cemq.json"):
        load(tmp_path)
    with pytest.raises(BundleError, match="no such folder"):
        load(tmp_path / "nowhere")


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), staging(tmp_path / "out") as folder:
        (folder / "half").write_text("written")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_replaced_only_on_request_and_only_if_it_is_a_bundle(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(BundleError, match="not a cemq bundle"), staging(output, overwrite=overwrite):
            pass
    assert [path.name for path in output.iterdir()] == ["notes"]
    (output / MANIFEST).write_text("old")
    with pytest.raises(BundleError, match="exists already"), staging(output):
        pass
    with pytest.raises(ZeroDivisionError), staging(output, overwrite=True):
        raise ZeroDivisionError
    assert (output / MANIFEST).read_text() == "old"
    with staging(output, overwrite=True) as folder:
        (folder / MANIFEST).write_text("new")
    assert (output / MANIFEST).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_between_the_two_renames_keeps_the_old_bundle(tmp_path, monkeypatch):
    output, rename = tmp_path / "out", Path.rename
    output.mkdir()
    (output / MANIFEST).write_text("old")

    def interrupted(self, target):
        if "partial" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr("cemq.bundle.staging.exchange", lambda *_: False)  # as on most systems but Linux
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staging(output, overwrite=True):
        pass
    assert (output / MANIFEST).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_bundle_records_only_what_the_recipe_set(bundle):
    assert make_recipe(read_bundle(bundle).recipe).steps == 8


def put(place, value):
    """An edit of a manifest that leaves another value at a place."""

    def edit(content):
        *parents, last = place
        for key in parents:
            content = content[key]
        content[last] = value

    return edit


NESTED = [[]]
for _ in range(300):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (("model",), [None, 3, [], NESTED]),
        (("dtype",), ["x", None, [], 1.0]),
        (("cache",), ["x", None, {}]),
        (("fidelity",), [{}, [], {"psnr_db": "x"}]),
        (("held_out_conditions",), [None, 3, [None], {}]),
        (("schedule",), [None, [], {}, "x"]),
        (("schedule", "num_steps"), [None, -1, 2.5, "x", float("nan"), 1e308, 10**30]),
        (("schedule", "full_steps"), [None, [], ["x"], [0, 2.5], [0, 10**30], NESTED]),
        (("schedule", "predictor"), [None, "x", [], {}]),
        (("sampler",), [None, [], {}, "x"]),
        (("sampler", "timesteps"), [None, "x", [None], NESTED]),
        (("sampler", "config"), [None, "x", ["xyz"]]),
        (("other_runs",), [None, 3, [None], [{}]]),
        (("files",), [None, "x", [None], {"model_index.json": 3}]),
    ],
    ids=lambda each: ".".join(map(str, each)) if isinstance(each, tuple) else "",
)
def test_a_manifest_with_a_value_of_another_type_is_refused(copy, place, wrong):
    whole = (copy / MANIFEST).read_text()
    for value in wrong:
        (copy / MANIFEST).write_text(whole)
        resealed(copy, put(place, value))
        with pytest.raises(BundleError):
            read_bundle(copy)


def test_a_manifest_nested_too_deeply_is_damaged(copy):
    (copy / MANIFEST).write_text('{"checksum": ' + "[" * 100_000)
    with pytest.raises(BundleError, match=r"cemq.json is damaged"):
        load(copy)
