"""What a build is said to take before it is run, and while it runs: bytes, arithmetic and time."""

from __future__ import annotations

import logging
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.families import FAMILIES
from support.pipelines import make_dit, save_dit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import cemq
from cemq.build import remaining
from cemq.build.arithmetic import Arithmetic, RunArithmetic, run_arithmetic
from cemq.build.estimate import Estimate, Stage, estimate
from cemq.build.pace import Pace, measure_pace, pace_of
from cemq.build.remaining import Remaining, telling_what_is_left
from cemq.build.settings import resolve
from cemq.build.sizes import sketch
from cemq.cli import app
from cemq.errors import ModelError
from cemq.memory.footprint import read_headers
from cemq.pipelines.batches import BUILD_LOG
from cemq.pipelines.opening import denoisers, locate, open_pipeline
from cemq.quantize import CemqConfig, quantize_pipeline
from cemq.quantize.layers import QuantizedLinear
from cemq.recipe import recipe_names

ROOT = Path(__file__).parents[1]
BUILTINS = {"dit-digits": {"class_labels": [3, 7]}, "sd3-digits": {"prompt": ["a bold seven", "a thin two"]}}


# --- bytes


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("dit-digits", {"scheme": "none"}, marks=pytest.mark.slow),
        ("dit-digits", {"scheme": "w8a8", "smoothed": True}),
        pytest.param("dit-digits", {"scheme": "w4a8"}, marks=pytest.mark.slow),
        ("dit-digits", {"scheme": "w4a8", "low_rank": 16}),
        pytest.param("dit-digits", {"scheme": "w4a8", "bits_budget": 5.5}, marks=pytest.mark.slow),
        pytest.param("dit-digits", {"scheme": "w8a8", "backend": "quanto"}, marks=pytest.mark.slow),
        pytest.param("dit-digits", {"scheme": "w4a16", "dtype": "bfloat16"}, marks=pytest.mark.slow),
        ("sd3-digits", {"scheme": "w8a8", "components": ["transformer", "text_encoder"]}),
        pytest.param("sd3-digits", {"scheme": "w4a8", "effort": "quick", "steps": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_bundle_takes_the_disk_that_was_estimated(tmp_path, name, settings):
    if settings.get("backend") == "quanto":
        pytest.importorskip("optimum.quanto")
    asked = {"effort": "instant", "steps": 6, "budget": 3, "rounding": "nearest"} | settings
    told = estimate(resolve(f"builtin:{name}", None, "cpu", asked))
    cemq.quantize_and_schedule(f"builtin:{name}", tmp_path / "bundle", device="cpu", **asked)
    found = sum(file.stat().st_size for file in (tmp_path / "bundle").rglob("*") if file.is_file())
    assert told.disk_bytes == pytest.approx(found, rel=0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipelines")


def saved(folder, name):
    pipe = FAMILIES[name].pipeline()
    if not (folder / name).exists():
        pipe.save_pretrained(folder / name)
    return pipe


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of libraries that build what they deprecate
@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_that_will_be_quantized_are_known_from_the_configs(folder, name):
    pipe = saved(folder, name)
    settings = resolve(str(folder / name), None, "cpu", {"rounding": "nearest", "call": FAMILIES[name].call})
    found = sketch(settings, read_headers(folder / name, call=FAMILIES[name].call))
    quantize_pipeline(pipe, settings.quantization, {})
    layers = {
        (component, each.removesuffix(".proj") if type(module).__name__ == "FusedGELU" else each): module
        for component, model in denoisers(pipe)
        for each, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    assert {(each.component, each.name) for each in found.layers} == set(layers)
    for each in found.layers:
        stored = {key: value for key, value in layers[each.component, each.name].state_dict().items() if key != "bias"}
        assert found.stored_bytes(each) == sum(value.numel() * value.element_size() for value in stored.values())
        assert found.tensors(each) == len(stored)


def test_a_component_that_cannot_be_built_from_its_config_is_named(folder):
    saved(folder, "dit")
    config = folder / "dit" / "transformer" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"norm_type": "ada_norm_zero"', '"norm_type": "another"'))
    try:
        with pytest.raises(ModelError, match=r"transformer' cannot be built as diffusers's DiTTransformer2DModel"):
            estimate(resolve(str(folder / "dit"), None, "cpu", {}))
    finally:
        config.write_text(text)


def test_host_memory_is_that_of_the_weights_of_what_runs_leave_and_of_gptq(tmp_path):
    make_dit().save_pretrained(tmp_path / "pipeline")

    def held(**settings):
        return estimate(resolve(str(tmp_path / "pipeline"), None, "cpu", {"steps": 20} | settings)).host_memory_bytes

    nearest, fitted = held(rounding="nearest", samples=1), held(samples=1)
    weights = sum(file.stat().st_size for file in (tmp_path / "pipeline").rglob("*.safetensors"))
    assert nearest > weights
    assert fitted - nearest > 4 * 128**2  # the widest layer's Hessian alone
    latents = 4 * 8 * 8
    assert held(rounding="nearest", samples=4001) - nearest == pytest.approx(2 * 4 * 20 * 4000 * latents, rel=1.1)


# --- arithmetic


@pytest.mark.parametrize("name", BUILTINS)
def test_the_arithmetic_of_a_run_is_what_torch_counts(name):
    source = locate(f"builtin:{name}")
    call = resolve(f"builtin:{name}", None, "cpu", {}).recipe.call
    work = run_arithmetic(read_headers(source.folder, call=call, samples=2))
    pipe = open_pipeline(source.folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    with FlopCounterMode(display=False) as whole, sdpa_kernel(SDPBackend.MATH):  # of others not all are counted
        pipe(**BUILTINS[name], **call, num_inference_steps=2, output_type="np")
    of_modules = {name: sum(each.values()) for name, each in whole.get_flop_counts().items()}
    denoiser = of_modules[type(pipe.transformer).__name__]
    assert 2 * 2 * work.step.operations == pytest.approx(denoiser, rel=0.02)  # two samples, two steps
    assert 2 * work.around.operations == pytest.approx(of_modules["Global"] - denoiser, rel=0.25)
    linear = sum(type(module) is torch.nn.Linear for module in pipe.transformer.modules())
    assert linear <= 2 * work.step.layers <= linear + 6  # embeddings, which look the same in a header


# --- pace


def test_a_pace_is_that_at_which_both_blocks_take_what_they_took():
    known = Pace(layer_seconds=2e-5, operations_per_second=5e10)
    works = Arithmetic(operations=3e9, layers=7), Arithmetic(operations=2e6, layers=7)
    found = pace_of(*((work, known.seconds(work)) for work in works))
    assert found.layer_seconds == pytest.approx(known.layer_seconds)
    assert found.operations_per_second == pytest.approx(known.operations_per_second)


def test_where_calling_layers_is_all_that_shows_it_is_all_that_counts():
    found = pace_of((Arithmetic(operations=3e6, layers=7), 7e-4), (Arithmetic(operations=2e6, layers=7), 7.1e-4))
    assert found == Pace(layer_seconds=1e-4, operations_per_second=math.inf)


@pytest.mark.parametrize("config", [None, CemqConfig(scheme="w8a8"), CemqConfig(scheme="w4a8")])
def test_a_pace_is_measured_in_full_precision_and_quantized(config):
    run = RunArithmetic(step=Arithmetic(), around=Arithmetic(), inputs=2, tokens=64, width=128, widest=512)
    full_precision, quantized = measure_pace(run, config, device="cpu", dtype="float32")
    assert (full_precision == quantized) == (config is None)
    for pace in (full_precision, quantized):
        assert 1e-7 < pace.layer_seconds < 1e-1
        assert pace.operations_per_second > 1e7


# --- time left


def told_of(*stages):
    return Estimate(stages=stages, memory_bytes=1, host_memory_bytes=1, disk_bytes=1)


@pytest.fixture
def build():
    """A build whose stages take time when they are told to, and what is said of it."""

    class Build:
        def __init__(self):
            self.now, self.said, self.progress = 0.0, [], []
            self.remaining = Remaining(
                told_of(
                    Stage(name="reference runs", full_precision=4, seconds=40),
                    Stage(name="full precision, 20 steps", full_precision=1, seconds=10),
                    Stage(name="quantization", seconds=20),
                    Stage(name="forced runs", quantized=4, seconds=20),
                    Stage(name="planning", quantized=6, seconds=30, at_most=True),
                    Stage(name="planning 20 steps", quantized=2, seconds=10, at_most=True),
                ),
                lambda *told: self.progress.append(told),
                say=lambda seconds: self.said.append(seconds),
                clock=lambda: self.now,
            )

        def run(self, stage, *, steps, each, first=0.0, share=1.0):
            self.remaining(stage, 0.0)
            for step in range(1, steps + 1):
                self.now += each + first * (step == 1)
                self.remaining(stage, share * step / steps)

    return Build()


def test_what_is_left_is_said_once_a_step_was_timed_and_as_stages_follow(build):
    build.run("reference runs", steps=20, each=4.0, first=9.0)  # twice as long as estimated, and something before it
    left = 2 * (40 + 10 + 20 + 20 + 30 + 10)
    assert build.said == [pytest.approx(left - 2 * 4)]  # after two steps of twenty
    build.said.clear()
    build.run("full precision, 20 steps", steps=20, each=1.0)
    assert build.said == [pytest.approx((80 + 9) / 40 * 90)]
    build.said.clear()
    build.run("quantization", steps=2, each=20.0)
    build.run("forced runs", steps=4, each=15.0)
    before, timed = build.said[1:]
    by_all = (89 + 20 + 40) / (40 + 10 + 20)  # nothing quantized has been timed yet
    assert before == pytest.approx(by_all * (20 + 30 + 10))
    assert timed == pytest.approx(3 * (10 + 30 + 10))  # two of four are done, of three times what was estimated
    build.said.clear()
    build.run("planning, 6 generations' worth", steps=3, each=30.0, share=0.5)  # all that it will use
    build.run("planning 20 steps, 2 generations' worth", steps=2, each=5.0)
    assert build.said == [pytest.approx(3 * 40), pytest.approx((60 + 90) / (20 + 15) * 10)]
    assert build.remaining.left() == 0


def test_a_build_that_goes_on_in_the_middle_counts_nothing_that_is_over(build):
    build.run("planning, 6 generations' worth", steps=6, each=10.0)
    assert build.said == [pytest.approx(2 * (20 + 10))]  # of the stages before it nothing
    build.remaining("building kernels", 1.0)
    assert build.progress[-1] == ("building kernels", 1.0)
    assert len(build.said) == 1


def test_steps_that_take_less_than_a_second_are_timed_together(build):
    build.run("reference runs", steps=400, each=0.1)
    (said,) = build.said
    assert said == pytest.approx(130 * 1.0, rel=0.05)


def test_a_build_says_what_is_left_in_its_log_when_that_is_a_minute_or_more(monkeypatch, caplog):
    stages = (
        Stage(name="reference runs", full_precision=4, seconds=600),
        Stage(name="forced runs", quantized=4, seconds=600),
    )
    monkeypatch.setattr(remaining, "estimate", lambda settings: told_of(*stages))
    now = [0.0]
    caplog.set_level(logging.INFO, BUILD_LOG)
    told = telling_what_is_left(None, lambda stage, share: None, clock=lambda: now[0])
    for name in ("reference runs", "forced runs"):
        for step in range(101):
            told(name, step / 100)
            now[0] += 3.0
    assert [record.message for record in caplog.records] == [
        "8 generations of one sample at most, 10 to 40 min by the sizes of the weights",
        "about 10 min left in all", "about 5 min left in all", "about 5 min left in all",
    ]  # fmt: skip


def test_a_build_that_cannot_be_estimated_says_so_and_goes_on(monkeypatch, caplog):
    def refuse(settings):
        raise ModelError("its config is odd")

    monkeypatch.setattr(remaining, "estimate", refuse)
    caplog.set_level(logging.INFO, BUILD_LOG)
    found = []
    telling_what_is_left(None, lambda *told: found.append(told))("reference runs", 0.5)
    assert found == [("reference runs", 0.5)]
    assert [record.message for record in caplog.records] == [
        "how long this will take cannot be told: its config is odd"
    ]
    assert telling_what_is_left(None, None) is None


# --- what is shown


def test_a_dry_run_tells_minutes_memory_and_disk():
    arguments = ["quantize-and-schedule", "builtin:dit-digits", "--dry-run", "--effort", "quick"]
    said = CliRunner().invoke(app, arguments).stdout.splitlines()
    told = estimate(resolve("builtin:dit-digits", None, "cpu", {"effort": "quick"})).to_dict()
    assert set(told) == {
        "generations", "stages", "minutes", "memory_bytes", "host_memory_bytes", "disk_bytes", "placement",
    }  # fmt: skip
    assert sum(stage["minutes"] for stage in told["stages"]) == pytest.approx(told["minutes"], rel=0.2)
    heads = [line.partition(":")[0] for line in said]
    assert heads[-4:] == ["time", "device memory", "host memory", "disk"]
    assert [line.split("  ")[0] for line in said[1:-5]] == [stage["name"] for stage in told["stages"]]


def test_a_build_keeps_nothing_of_what_was_estimated(tmp_path):
    """Bundles of one model are the same, however fast the machine was."""
    save_dit(tmp_path, labels=40)
    named = {"effort": "instant", "steps": 6, "budget": 3, "calib": str(tmp_path / "labels.txt"), "device": "cpu"}
    for number in range(2):
        progress = (lambda stage, share: None) if number else None
        cemq.quantize_and_schedule(str(tmp_path / "pipeline"), tmp_path / f"{number}", progress=progress, **named)
    one, other = (
        {file.relative_to(tmp_path / f"{n}"): file.read_bytes() for file in (tmp_path / f"{n}").rglob("*.*")}
        for n in range(2)
    )
    assert one == other


def costs(root):
    """docs/costs.py of a checkout, asked whether all says what builds take."""
    return subprocess.run([sys.executable, root / "docs" / "costs.py", "--check"], capture_output=True, text=True)


def test_what_builds_take_with_each_recipe_stands_where_it_is_looked_for():
    done = costs(ROOT)
    assert (done.returncode, done.stdout) == (0, "")
    for name in recipe_names():
        assert "# A build takes at most 2 (instant), " in (ROOT / "recipes" / f"{name}.yaml").read_text()
        for page in ("README.md", "docs/getting-started.md"):
            assert re.search(rf"^\| {re.escape(name)} \| \d+ \| 2 \| ", (ROOT / page).read_text(), flags=re.M)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "found", "said"),
    [("README.md", "| 2 |", "| 3 |"), ("recipes/flux-dev.yaml", "at most 2 (instant)", "at most 3 (instant)")],
)
def test_what_says_something_else_is_named(tmp_path, name, found, said):
    for kept in ("README.md", "docs/getting-started.md", "docs/costs.py", "recipes"):
        (tmp_path / kept).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / kept).is_dir() else shutil.copyfile
        copy(ROOT / kept, tmp_path / kept)
    text = (tmp_path / name).read_text()
    assert found in text
    (tmp_path / name).write_text(text.replace(found, said, 1))
    done = costs(tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"{name} does not say what builds take: run python docs/costs.py\n"


def test_measuring_draws_no_number_that_a_build_would():
    """The pace is that of random weights, and the generator everything else draws from is left as it was."""
    before = torch.get_rng_state()
    estimate(resolve("builtin:dit-digits", None, "cpu", {"effort": "instant"}))
    assert torch.equal(torch.get_rng_state(), before)
