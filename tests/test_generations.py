"""What a build takes, counted where it is spent: in the denoiser's blocks, which skipped steps do not reach."""

from __future__ import annotations

import json

import pytest
from support.counting import counted
from support.pipelines import save_dit
from typer.testing import CliRunner

import cemq
from cemq.build.estimate import estimate
from cemq.build.settings import resolve
from cemq.bundle.manifest import EVIDENCE
from cemq.cli import app
from cemq.errors import InputError
from cemq.search.settings import EFFORTS

STEPS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_dit(tmp_path_factory.mktemp("generations"), labels=40)


def settings_of(folder):
    return {"steps": STEPS, "budget": 10, "calib": str(folder / "labels.txt"), "call": {"guidance_scale": 2.0}}


def build(folder, output, **settings):
    return cemq.quantize_and_schedule(str(folder / "pipeline"), output, device="cpu", **settings_of(folder) | settings)


@pytest.mark.parametrize(
    ("effort", "budget"),
    [
        ("instant", 10),
        ("instant", "auto"),
        pytest.param("quick", 27, marks=pytest.mark.slow),
        pytest.param("quick", "auto", marks=pytest.mark.slow),
        ("normal", 10),
        pytest.param("normal", "auto", marks=pytest.mark.slow),
    ],
)
def test_a_build_takes_what_its_effort_says_and_says_what_it_took(folder, tmp_path, effort, budget):
    if (effort, budget) == ("instant", "auto"):
        said = "budget=auto is found by running schedules, and effort=instant runs none"
        with counted(STEPS) as spent, pytest.raises(InputError, match=said):
            build(folder, tmp_path / "bundle", effort=effort, budget=budget)
        assert spent() == 0
        return
    with counted(STEPS) as spent:
        manifest = build(folder, tmp_path / "bundle", effort=effort, budget=budget)
    assert spent() <= EFFORTS[effort].most
    asked = resolve(str(folder / "pipeline"), None, "cpu", settings_of(folder) | {"effort": effort, "budget": budget})
    told = estimate(asked).generations
    assert told["full_precision"] == manifest.generations["full_precision"]
    assert manifest.generations["quantized"] <= told["quantized"]
    assert manifest.generations["quantized"] > (0.5 if effort != "instant" else 0.99) * told["quantized"]
    assert told["total"] <= EFFORTS[effort].most
    assert manifest.generations["replayed"] == 0
    assert manifest.generations["total"] == pytest.approx(spent(), abs=0.02)
    assert manifest.generations["full_precision"] + manifest.generations["quantized"] == pytest.approx(
        manifest.generations["total"], abs=0.02
    )
    evidence = json.loads((tmp_path / "bundle" / EVIDENCE).read_text())
    assert evidence["generations"] == manifest.generations
    assert len(manifest.other_runs) == (effort == "normal")
    assert (manifest.fidelity is None) == (effort == "instant")
    if effort == "instant":
        assert spent() == 2


def test_counts_that_are_asked_for_take_the_place_of_the_efforts(folder, tmp_path):
    manifest = build(
        folder, tmp_path / "bundle", effort="quick", samples=3, planning_samples=5, check_samples=2, solver="uniform",
        rounding="nearest", also_steps=[],
    )  # fmt: skip
    evidence = json.loads((tmp_path / "bundle" / EVIDENCE).read_text())
    assert (evidence["samples"], manifest.fidelity["samples"]) == (5, 2)
    assert len(manifest.profiled_seeds) == 7  # what was profiled was planned on too
    assert manifest.generations["full_precision"] == 3 + 2 + 2
    assert manifest.generations["quantized"] == pytest.approx(3 + (5 + 2) * 10 / STEPS, abs=0.01)
    named = {"effort": "quick", "samples": 3, "planning_samples": 5, "check_samples": 2, "solver": "uniform"}
    told = estimate(resolve(str(folder / "pipeline"), None, "cpu", settings_of(folder) | named | {"also_steps": []}))
    assert told.generations == {kind: manifest.generations[kind] for kind in ("full_precision", "quantized", "total")}


def test_a_dry_run_says_what_a_build_would_take_and_does_nothing(folder, tmp_path):
    arguments = [
        "quantize-and-schedule", str(folder / "pipeline"), "--effort", "normal", "--calib", str(folder / "labels.txt"),
        "-o", str(tmp_path / "bundle"), "--dry-run",
    ]  # fmt: skip
    with counted(STEPS) as spent:
        said, told = CliRunner().invoke(app, arguments), CliRunner().invoke(app, [*arguments, "--json"])
    assert (said.exit_code, told.exit_code, spent()) == (0, 0, 0)
    assert not list(tmp_path.iterdir())
    found = json.loads(told.stdout)
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert stages["forced runs"].pop("minutes") > 0
    assert stages["forced runs"] == {"name": "forced runs", "full_precision": 0, "quantized": 12, "at_most": False}
    assert stages["planning"]["at_most"]
    assert stages["planning 20 steps"]["quantized"] == 4 * 20 / 50  # DiTPipeline makes 50 steps unless told otherwise
    for name in stages:
        assert name in said.stdout
    weights = sum(file.stat().st_size for file in (folder / "pipeline").rglob("*.safetensors"))
    assert 0.9 * weights < found["memory_bytes"] < 20 * weights
    refused = CliRunner().invoke(app, [*arguments, "--budget", "99"])
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (1, 1)


def test_a_bundle_that_nothing_was_run_for_says_so_and_draws(folder, tmp_path):
    build(folder, tmp_path / "bundle", effort="instant", rounding="nearest")
    assert "not measured" in (tmp_path / "bundle" / "README.md").read_text()
    evidence = json.loads((tmp_path / "bundle" / EVIDENCE).read_text())
    assert (evidence["samples"], evidence["search_generations"], "trials" in evidence) == (0, 0, False)
    pipe = cemq.from_pretrained(tmp_path / "bundle", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(class_labels=[1], num_inference_steps=STEPS, output_type="np").images) == 1
    assert cemq.evaluate(tmp_path / "bundle", samples=1).psnr_db > 5
