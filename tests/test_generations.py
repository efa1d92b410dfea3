"""What a build takes, counted where it is spent: in the denoiser's blocks, which skipped steps do not reach."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from support.pipelines import make_dit

import cemq
from cemq.bundle.manifest import EVIDENCE
from cemq.errors import InputError
from cemq.search.settings import EFFORTS

STEPS, BLOCKS, BRANCHES = 30, 2, 2  # both branches of guidance are rows of one call


@contextmanager
def counted():
    """Full generations of one sample, by the rows that every block of every transformer is called with."""
    rows = []

    def note(module, args):
        if isinstance(module, BasicTransformerBlock):
            rows.append(len(args[0]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield lambda: sum(rows) / (BLOCKS * BRANCHES * STEPS)
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("generations")
    make_dit().save_pretrained(root / "pipeline")
    (root / "labels.txt").write_text("".join(f"{label}\n" for label in range(40)))
    return root


def build(folder, output, **settings):
    asked = {"steps": STEPS, "budget": 10, "calib": str(folder / "labels.txt"), "call": {"guidance_scale": 2.0}}
    return cemq.quantize_and_schedule(str(folder / "pipeline"), output, device="cpu", **asked | settings)


@pytest.mark.parametrize(
    ("effort", "budget"),
    [("instant", 10), ("instant", "auto"), ("quick", 27), ("quick", "auto"), ("normal", 10), ("normal", "auto")],
)
def test_a_build_takes_what_its_effort_says_and_says_what_it_took(folder, tmp_path, effort, budget):
    if (effort, budget) == ("instant", "auto"):
        said = "budget=auto is found by running schedules, and effort=instant runs none"
        with counted() as spent, pytest.raises(InputError, match=said):
            build(folder, tmp_path / "bundle", effort=effort, budget=budget)
        assert spent() == 0
        return
    with counted() as spent:
        manifest = build(folder, tmp_path / "bundle", effort=effort, budget=budget, rounding="nearest")
    assert spent() <= EFFORTS[effort].most
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


def test_what_is_replayed_to_quantize_counts_too(folder, tmp_path):
    with counted() as spent:
        manifest = build(folder, tmp_path / "bundle", effort="instant")
    assert 0.5 < manifest.generations["replayed"] < 1.5
    assert manifest.generations["total"] == pytest.approx(spent(), abs=0.02)


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


def test_a_bundle_that_nothing_was_run_for_says_so_and_draws(folder, tmp_path):
    build(folder, tmp_path / "bundle", effort="instant", rounding="nearest")
    assert "not measured" in (tmp_path / "bundle" / "README.md").read_text()
    evidence = json.loads((tmp_path / "bundle" / EVIDENCE).read_text())
    assert (evidence["samples"], evidence["search_generations"], "trials" in evidence) == (0, 0, False)
    pipe = cemq.from_pretrained(tmp_path / "bundle", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(class_labels=[1], num_inference_steps=STEPS, output_type="np").images) == 1
    assert cemq.evaluate(tmp_path / "bundle", samples=1).psnr_db > 5
