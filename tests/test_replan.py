"""A bundle planned again: the same weights, and everything else as a build of these settings makes it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
from support.bundles import resealed
from support.counting import counted
from support.pipelines import FLUX_CALL, make_dit, make_flux, save_dit
from typer.testing import CliRunner

import cemq
from cemq.bundle.manifest import EVIDENCE, MANIFEST, PICTURE, PRIOR, read_bundle
from cemq.cli import app
from cemq.errors import BundleError, CemqError, InputError, ModelError
from cemq.pipelines.lora import FusedLora
from cemq.pipelines.opening import locate

STEPS = 12
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def settings_of(root):
    return {
        "steps": STEPS, "budget": 5, "effort": "quick", "samples": 2, "planning_samples": 2, "check_samples": 2,
        "also_steps": [8], "scheme": "w4a8", "calib": str(root / "labels.txt"), "call": {"guidance_scale": 2.0},
        "device": "cpu",
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a pipeline and a bundle of it, fitted by GPTQ; no test changes them."""
    root = save_dit(tmp_path_factory.mktemp("replan"), labels=12)
    cemq.quantize_and_schedule(str(root / "pipeline"), root / "bundle", **settings_of(root))
    return root


def again(made, output, **settings):
    return cemq.replan(made / "bundle", output, device="cpu", **settings)


def evidence_of(folder):
    return {name: value for name, value in json.loads((folder / EVIDENCE).read_text()).items() if name != "generations"}


def same_but_for_costs(one, other):
    """Two bundles, but for the generations that they took."""
    for name in (PICTURE, PRIOR, WEIGHTS):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert evidence_of(one) == evidence_of(other)
    manifests = [read_bundle(folder, verify="always") for folder in (one, other)]
    assert replace(manifests[0], generations=None) == replace(manifests[1], generations=None)


def test_with_nothing_changed_the_bundle_is_the_same(made, tmp_path):
    with counted(STEPS) as spent:
        manifest = again(made, tmp_path / "new")
    same_but_for_costs(made / "bundle", tmp_path / "new")
    assert len(manifest.other_runs) == 1
    assert manifest.generations["total"] == pytest.approx(spent(), abs=0.02)
    assert manifest.generations == read_bundle(made / "bundle").generations


def test_weights_are_the_same_file_and_text_is_not(made, tmp_path):
    again(made, tmp_path / "new", effort="instant", also_steps=[], solver="uniform")
    files = [path.relative_to(made / "bundle") for path in (made / "bundle").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "new") for path in (tmp_path / "new").rglob("*") if path.is_file()} == {*files}
    for name in files:
        shared = (made / "bundle" / name).samefile(tmp_path / "new" / name)
        assert shared == (name.suffix == ".safetensors" and name != Path(PRIOR)), name
    read_bundle(made / "bundle", verify="always")
    cemq.from_pretrained(tmp_path / "new", device="cpu")


def test_the_new_recipe_builds_the_same_bundle_from_nothing(tmp_path):
    (tmp_path / "labels.txt").write_text("1\n2\n3\n4\n")
    make_dit().save_pretrained(tmp_path / "pipeline")
    settings = settings_of(tmp_path) | {"rounding": "nearest"}  # which other samples change nothing of
    cemq.quantize_and_schedule(str(tmp_path / "pipeline"), tmp_path / "bundle", **settings)
    changed = {
        "steps": 8, "budget": "2x", "also_steps": [], "samples": 1, "seed": 7, "call": {"guidance_scale": 3.0},
        "predictor": "reuse",
    }  # fmt: skip
    manifest = again(tmp_path, tmp_path / "new", **changed)
    assert (manifest.num_inference_steps, manifest.schedule.budget, manifest.other_runs) == (8, 4, ())
    recipe = dict(manifest.recipe)
    assert recipe == read_bundle(tmp_path / "bundle").recipe | changed
    model = recipe.pop("model")
    cemq.quantize_and_schedule(model, tmp_path / "built", device="cpu", **recipe)
    same_but_for_costs(tmp_path / "built", tmp_path / "new")


def test_a_bundle_can_be_planned_again_in_its_own_place(made, tmp_path):
    shutil.copytree(made / "bundle", tmp_path / "bundle")
    again(tmp_path, tmp_path / "bundle", overwrite=True, budget=4, also_steps=[], solver="uniform")
    assert read_bundle(tmp_path / "bundle", verify="always").schedule.budget == 4
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_the_command_prints_what_a_build_prints(made, tmp_path):
    options = ["--effort", "instant", "--steps", "6", "--budget", "3", "--also-steps", "none", "--solver", "uniform"]
    arguments = ["replan", str(made / "bundle"), "-o", str(tmp_path / "new"), "--device", "cpu", *options]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    assert "w4a8, 3 of 6 steps in full" in done.stdout
    assert done.stdout.endswith(" quantized\n")
    assert "forced runs" in done.stderr
    done = CliRunner().invoke(app, [*arguments, "--overwrite", "--json", "--quiet"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout)["bundle"] == str(tmp_path / "new")


def test_a_policy_and_a_plan_take_each_others_place(made, tmp_path):
    shutil.copytree(made / "bundle", tmp_path / "bundle")
    again(tmp_path, tmp_path / "policy", policy="teacache:threshold=0.2,coefficients=1;0")
    assert read_bundle(tmp_path / "policy").policy["name"] == "teacache"
    with pytest.raises(InputError, match="nothing is planned then, so leave budget out"):
        cemq.replan(tmp_path / "policy", tmp_path / "plan", device="cpu", budget=4)
    cemq.replan(tmp_path / "policy", tmp_path / "plan", device="cpu", policy="none", budget=4, also_steps=[])
    manifest = read_bundle(tmp_path / "plan")
    assert (manifest.policy, manifest.schedule.budget, "policy" in manifest.recipe) == (None, 4, False)


def test_a_model_that_moved_is_named(made, tmp_path):
    shutil.copytree(made / "bundle", tmp_path / "bundle")
    resealed(tmp_path / "bundle", lambda content: content.update(model=str(tmp_path / "gone")))
    with pytest.raises(ModelError, match=r"^no such model '.*gone'.*; --model says where the model that the bundle"):
        again(tmp_path, tmp_path / "new")
    shutil.copytree(made / "pipeline", tmp_path / "moved")
    again(tmp_path, tmp_path / "new", model=str(tmp_path / "moved"))
    manifest = read_bundle(tmp_path / "new")
    assert (manifest.model, manifest.recipe["model"]) == (str(tmp_path / "moved"), str(tmp_path / "moved"))
    assert (tmp_path / "new" / PRIOR).read_bytes() == (made / "bundle" / PRIOR).read_bytes()


# --- what is refused, before anything is run


def refused(error, message, made, output, **settings):
    with counted(STEPS) as spent, pytest.raises(error, match=message):
        again(made, output, **settings)
    assert spent() == 0
    assert not output.exists()


def test_another_model_than_that_of_the_bundle_is_refused(made, tmp_path):
    trained = make_dit()
    trained.transformer.get_parameter("transformer_blocks.1.ff.net.2.bias").data += 0.5
    trained.save_pretrained(tmp_path / "trained")
    refused(
        ModelError, r"trained' is not the model that the bundle '.*' was made from: '.*ff.net.2.bias' of its trans",
        made, tmp_path / "new", model=str(tmp_path / "trained"),
    )  # fmt: skip
    make_flux().save_pretrained(tmp_path / "flux")
    said = "is a FluxPipeline, the bundle was made from a DiTPipeline: give the model that it was made from"
    refused(ModelError, said, made, tmp_path / "new", model=str(tmp_path / "flux"))
    said = "is a cemq bundle: give the full-precision model"
    refused(ModelError, said, made, tmp_path / "new", model=str(made / "bundle"))


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("scheme: a bundle that is planned again keeps its weights: build another for that", {"scheme": "w8a8"}),
        ("lora: a bundle that is planned again keeps its weights", {"lora": ["ink.safetensors"]}),
        ("unknown setting 'budgets': .*did you mean 'budget'", {"budgets": 5}),
        ("budget=13 is out of range for 12 steps", {"budget": 13}),
        ("unknown solver 'serch'", {"solver": "serch"}),
        ("tolerance: only budget=auto looks at it", {"tolerance": 0.1}),
        ("effort=instant runs none", {"effort": "instant", "budget": "auto", "planning_samples": None}),
        ("calibration file|nowhere.txt", {"calib": "nowhere.txt"}),
        ("unknown argument of DiTPipeline 'guidance'", {"call": {"guidance": 1.0}}),
        ("also_steps: other step counts are searched for", {"solver": "uniform"}),
    ],
)
def test_what_cannot_be_planned_is_refused(made, tmp_path, message, settings):
    if settings.get("effort") == "instant":  # whose counts a recipe that names its own overrides
        shutil.copytree(made / "bundle", tmp_path / "bundle")
        resealed(tmp_path / "bundle", lambda content: content["recipe"].pop("planning_samples"))
        made = tmp_path
    refused(CemqError, message, made, tmp_path / "new", **settings)


def test_an_output_that_is_there_is_refused(made, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    with counted(STEPS) as spent, pytest.raises(BundleError, match="exists already and is not a cemq bundle"):
        again(made, tmp_path / "new")
    assert spent() == 0


def test_a_bundle_without_a_recipe_says_so(made, tmp_path):
    shutil.copytree(made / "bundle", tmp_path / "bundle")
    resealed(tmp_path / "bundle", lambda content: content.update(recipe=None))
    refused(BundleError, "does not say its recipe, so it cannot be planned again", tmp_path, tmp_path / "new")


def test_a_recipe_of_before_is_read_by_its_old_names(made, tmp_path):
    shutil.copytree(made / "bundle", tmp_path / "bundle")

    def age(content):
        content["recipe"] |= {"correction": "none", "prior": "cache"}
        for key in ("generations", "lora"):
            del content[key]

    resealed(tmp_path / "bundle", age)
    manifest = again(tmp_path, tmp_path / "new", also_steps=[])
    assert (manifest.view, manifest.recipe["rectify"], manifest.recipe["view"]) == ("cache", "none", "cache")


def test_a_damaged_bundle_is_refused(made, tmp_path):
    shutil.copytree(made / "bundle", tmp_path / "bundle")
    weights = bytearray((tmp_path / "bundle" / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (tmp_path / "bundle" / WEIGHTS).write_bytes(weights)
    refused(BundleError, "was edited or damaged", tmp_path, tmp_path / "new")


def test_a_bundle_that_does_not_load_as_it_was_measured_is_refused(made, tmp_path):
    shutil.copytree(made / "bundle", tmp_path / "bundle")
    resealed(tmp_path / "bundle", lambda content: content["dtypes"]["transformer"].update(default="bfloat16"))
    refused(BundleError, "is float32, and what was measured is bfloat16", tmp_path, tmp_path / "new")


# --- models and LoRAs of the Hub, and of then


def test_the_model_is_fetched_at_the_revision_that_the_bundle_was_made_from(made, tmp_path, monkeypatch):
    root, asked = tmp_path / "snapshots", []
    shutil.copytree(made / "pipeline", root / "c0ffee")
    shutil.copytree(made / "bundle", tmp_path / "bundle")
    resealed(tmp_path / "bundle", lambda content: content.update(model="owner/name", revision="c0ffee"))

    def download(name, variant=None, revision=None):
        asked.append((name, revision))
        return root / "c0ffee"

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    manifest = again(tmp_path, tmp_path / "new", also_steps=[], solver="uniform")
    assert asked == [("owner/name", "c0ffee")]
    assert (manifest.model, manifest.revision) == ("owner/name", "c0ffee")
    resealed(tmp_path / "bundle", lambda content: content.update(revision="decaf"))
    said = "'owner/name' is at revision c0ffee, the bundle was made from decaf"
    refused(ModelError, said, tmp_path, tmp_path / "none", model="owner/name")
    assert locate("owner/name").revision == "c0ffee"


def test_loras_are_fused_again(tmp_path):
    pytest.importorskip("peft")
    from support.loras import save_lora

    pipe = make_flux()
    pipe.save_pretrained(tmp_path / "pipeline")
    file = save_lora(pipe, tmp_path / "ink", "transformer", "text_encoder")
    cemq.quantize_and_schedule(
        str(tmp_path / "pipeline"), tmp_path / "bundle", lora=[f"{file}:0.5"], steps=6, budget=3, samples=2,
        also_steps=[], effort="quick", call=FLUX_CALL, device="cpu",
    )  # fmt: skip
    manifest = again(tmp_path, tmp_path / "new")
    same_but_for_costs(tmp_path / "bundle", tmp_path / "new")
    assert [type(each) for each in manifest.lora] == [FusedLora]
    assert json.loads((tmp_path / "new" / MANIFEST).read_text())["lora"][0]["scale"] == 0.5
    save_lora(pipe, tmp_path / "ink", "transformer", "text_encoder", seed=1)
    with pytest.raises(ModelError, match=r"is another file than the bundle was made with.*build another bundle$"):
        again(tmp_path, tmp_path / "none")
