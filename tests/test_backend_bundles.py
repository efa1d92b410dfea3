"""A bundle of every backend and scheme: built by the command, loaded in fresh processes, the same pictures."""

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from support.pipelines import save_dit
from support.processes import run_python
from support.slow import others_slow
from typer.testing import CliRunner

from cemq.bundle.manifest import PRIOR, read_bundle
from cemq.cli import app
from cemq.pipelines.batches import Batch, run
from cemq.prior.error_prior import ErrorPrior
from cemq.quantize import BACKENDS
from cemq.quantize.schemes import installed
from cemq.runtime import attached
from cemq.schedule.plan import Plan
from cemq.schedule.rectify import make_correction

FAST = (
    "--steps", "4", "--budget", "2", "--samples", "2", "--planning-samples", "4", "--solver", "uniform", "--effort",
    "quick", "--rectify", "drift", "--device", "cpu",
)  # fmt: skip
SMALL = ("{small}/pipeline", "--calib", "{small}/labels.txt")
# bfloat16 is the hard one: left to itself, diffusers rounds stored scales to the model's dtype while it loads them
BUILDS = {
    f"{backend}-{scheme}-{dtype}": (*SMALL, "--backend", backend, "--scheme", scheme, "--dtype", dtype)
    for backend in BACKENDS
    for scheme in BACKENDS[backend].layers
    for dtype in ("float32", "bfloat16")
    if installed(backend)
} | {
    "sd3-with-text-encoder": ("builtin:sd3-digits", "--scheme", "w4a8", "--components", "transformer, text_encoder"),
}
QUICK = [name for name in BUILDS if name.endswith(("w4a8-bfloat16", "w4a16-bfloat16", "with-text-encoder"))]
DRAW = """
import sys
from pathlib import Path

import cemq
import numpy as np
from cemq.bundle.manifest import read_bundle
from cemq.pipelines.batches import Batch, run

file, *folders = map(Path, sys.argv[1:])
pictures = {}
for folder in folders:
    pipe, manifest = cemq.from_pretrained(folder, device="cpu"), read_bundle(folder)
    batch = Batch(conditions=manifest.held_out_conditions[:2], seeds=(11, 12))
    pictures[folder.name] = run(pipe, batch, steps=manifest.num_inference_steps, call=manifest.call)
np.savez(file, **pictures)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def drawn(request, folder, tmp_path_factory):
    """Builds the bundles; pictures of the very pipelines that were saved, none of them read back from a file."""
    original, saved, pictures = DiffusionPipeline.save_pretrained, [], {}

    def save(pipe, *arguments, **keywords):
        saved.append(pipe)
        return original(pipe, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionPipeline, "save_pretrained", save)
        small = save_dit(tmp_path_factory.mktemp("small"), labels=8, head_dim=64)  # quanto groups 128 columns
        for name in BUILDS if request.config.getoption("--slow") else QUICK:
            bundle, named = folder / name, (option.format(small=small) for option in BUILDS[name])
            done = CliRunner().invoke(app, ["quantize-and-schedule", *named, *FAST, "-o", str(bundle)])
            assert done.exit_code == 0, f"{name}: {done.output}"
            pipe, manifest = saved.pop(), read_bundle(bundle)
            batch = Batch(conditions=manifest.held_out_conditions[:2], seeds=(11, 12))
            fix = make_correction("drift", ErrorPrior.load(bundle / PRIOR), manifest.schedule)
            with attached(pipe, Plan(schedule=manifest.schedule, sampler=manifest.sampler, correction=fix)):
                pictures[name] = run(pipe, batch, steps=manifest.num_inference_steps, call=manifest.call)
    return pictures


@pytest.fixture(scope="module")
def redrawn(folder, drawn):
    """The bundles' pictures, drawn by two processes that know nothing but the folders."""
    files = [folder / "first.npz", folder / "second.npz"]
    for file in files:
        run_python(DRAW, file, *(folder / name for name in drawn))
    return [np.load(file) for file in files]


@pytest.mark.parametrize("name", others_slow(BUILDS, QUICK))
def test_fresh_processes_draw_the_pictures_of_the_pipeline_that_was_saved(name, drawn, redrawn):
    # exact for every backend; with another number of threads, torch's own float products differ in the last bits
    for pictures in redrawn:
        assert np.array_equal(pictures[name], drawn[name])


def test_every_bundle_draws_pictures_of_its_own(drawn):
    assert len({pictures.tobytes() for pictures in drawn.values()}) == len(drawn) >= len(QUICK)
