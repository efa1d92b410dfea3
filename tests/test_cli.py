"""The installed command, end to end; in-process where only a message is checked."""

import inspect as python_inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import cemq
from cemq import cli
from cemq.bench import bench_architecture
from cemq.bundle.generate import generate_sample
from cemq.evaluation.analysis import analyze

CEMQ = str(Path(sys.executable).with_name("cemq"))
FAST = [
    "--steps", "10", "--budget", "4", "--samples", "2", "--planning-samples", "4", "--solver", "uniform", "--effort",
    "quick",
]  # fmt: skip


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def run(*arguments):
    return subprocess.run([CEMQ, *map(str, arguments)], capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "digits"
    done = run("quantize-and-schedule", "builtin:dit-digits", "--scheme", "w8a8", *FAST, "-o", output, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["scheme"] == "w8a8"
    assert len(made["schedule"]["full_steps"]) == 4
    return output


def test_evaluate_prints_every_promised_key(bundle):
    done = run("evaluate", bundle, "--samples", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    promised = {
        "psnr_db", "ssim", "relative_l2", "num_steps", "full_steps", "compute_ratio", "wall_ratio", "model_bytes",
        "reference_bytes", "samples",
    }  # fmt: skip
    assert promised <= set(found)
    assert (found["num_steps"], found["full_steps"], found["compute_ratio"], found["samples"]) == (10, 4, 2.5, 2)
    assert 15 < found["psnr_db"] < 100
    assert 0 < found["ssim"] <= 1
    assert found["model_bytes"] < found["reference_bytes"]


def test_more_budget_is_closer_to_full_precision(bundle, tmp_path):
    few, all_steps = (
        cemq.evaluate(bundle, samples=2, budget=budget, device="cpu", picture=tmp_path / f"{budget}.png")
        for budget in (3, 10)
    )
    assert all_steps.psnr_db > few.psnr_db + 3
    with Image.open(tmp_path / "3.png") as picture:
        # two samples twelve times as large, a gap of 6, margins of 16; the bundle's below, and lines of text
        assert picture.size == (2 * 384 + 6 + 2 * 16, 2 * (384 + 34) + 2 * 34 + 16)


def test_generate_writes_the_same_picture_twice(bundle, tmp_path):
    for name in ("a.png", "b.png"):
        done = run("generate", bundle, "--label", "seven", "--seed", "3", "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(tmp_path / name)
    first, second = (Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    assert first.size == (32, 32)
    assert first.tobytes() == second.tobytes()


def test_inspect_draws_the_schedule(bundle):
    shown = invoke("inspect", bundle)
    assert shown.exit_code == 0
    assert "w8a8" in shown.stdout
    assert shown.stdout.count("█") == 2 * 4  # once in the strip, once in the table
    assert re.search(r"^2 [▁▂▃▄▅▆▇]{9} 10 +\d+\.\d to \d+\.\d dB$", shown.stdout, re.MULTILINE)  # every budget
    described = json.loads(invoke("inspect", bundle, "--json").stdout)
    assert len(described["prior"]["quantization_floor"]) == 10
    assert described["fidelity"]["samples"] == 1
    assert described["planning"]["effort"] == "quick"
    assert described["planning"]["winner"]["schedule"]["full_steps"] == described["schedule"]["full_steps"]


@pytest.mark.slow  # two processes; within one, tests/test_other_runs.py has it
def test_another_step_count_draws_with_a_schedule_of_its_own_and_says_nothing(bundle, tmp_path):
    done = run("generate", bundle, "--label", "7", "--steps", "5", "-o", tmp_path / "a.png")
    assert done.returncode == 0
    assert "cemq:" not in done.stderr


def test_a_quick_search_from_the_command_line(dit_folder, tmp_path):
    (tmp_path / "calib.txt").write_text("1\n2\n3\n")
    done = invoke(
        "quantize-and-schedule", dit_folder, "--steps", "6", "--budget", "auto", "--tolerance", "0.5", "--effort",
        "quick", "--samples", "2", "--planning-samples", "16", "--calib", tmp_path / "calib.txt",
        "--call", "guidance_scale=2.0", "--also-steps", "4", "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "of 6 steps in full" in done.stdout
    evidence = json.loads((tmp_path / "out" / "evidence.json").read_text())
    assert (evidence["solver"], evidence["effort"], evidence["tolerance"]) == ("search", "quick", 0.5)
    assert evidence["winner"]["relative_l2"] <= 1.5 * evidence["full_compute"]["relative_l2"]
    manifest = json.loads((tmp_path / "out" / "cemq.json").read_text())
    assert manifest["schedule"] == evidence["winner"]["schedule"]
    assert manifest["correction"] == evidence["winner"]["correction"]
    assert evidence["seeds"] == list(range(16))  # those that were profiled, and others
    assert set(evidence["seeds"]) < set(manifest["profiled_seeds"])
    drawn = invoke("inspect", tmp_path / "out")
    assert drawn.exit_code == 0, drawn.output
    (other,) = manifest["other_runs"]
    assert other["schedule"]["num_steps"] == other["num_inference_steps"] == 4
    full_steps = 2 * len(manifest["schedule"]["full_steps"]) + len(other["schedule"]["full_steps"])
    assert drawn.stdout.count("█") == full_steps
    refused = invoke(
        "quantize-and-schedule", dit_folder, "--steps", "6", "--budget", "auto", "--target-psnr", "200", "--effort",
        "quick", "--samples", "2", "--planning-samples", "4", "--calib", tmp_path / "calib.txt",
        "-o", tmp_path / "none",
    )  # fmt: skip
    assert refused.exit_code == 1
    last = refused.stderr.strip().splitlines()[-1]  # after the progress bars: only a run can tell
    assert last.startswith("cemq: target_psnr=200.0: full compute reaches ")
    assert not (tmp_path / "none").exists()


def fails(message, *arguments, code=1):
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("cemq: ")
    assert message in lines[0]


BUILD = ("quantize-and-schedule", "builtin:dit-digits")


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("unknown scheme 'w8a9': choose from w8a8, w4a8, w8a16, ", [*BUILD, "--scheme", "w8a9"]),
        ("unknown backend 'bnb'", [*BUILD, "--backend", "bnb"]),
        ("rounding='floor' is wrong: input should be 'gptq' or 'nearest'", [*BUILD, "--rounding", "floor"]),
        ("low rank: only 4-bit schemes of the native backend take it, not native w8a8", [*BUILD, "--low-rank", "8"]),
        ("bits budget: only 4-bit schemes of the native backend", [*BUILD, "--bits-budget", "5"]),
        ("component 'vae' stays in full precision", [*BUILD, "--components", "vae"]),
        ("unknown component of DiTPipeline 'text_encoder'", [*BUILD, "--components", "transformer, text_encoder"]),
        ("components to quantize are named", [*BUILD, "--scheme", "none", "--components", "transformer"]),
        ("--also-steps '20;28': write whole numbers", [*BUILD, "--also-steps", "20;28"]),
        ("also_steps=1 is wrong", [*BUILD, "--also-steps", "20,1"]),
        ("also_steps: other step counts are searched for", [*BUILD, "--also-steps", "20", "--solver", "cem"]),
        ("budget=51 is out of range for 50 steps: choose 2..50", [*BUILD, "--budget", "51"]),
        ("budget=1 is out of range", [*BUILD, "--budget", "1"]),
        ("budget 'lots' is neither", [*BUILD, "--budget", "lots"]),
        ("the CEM rule cannot spend budget=7 on 50 steps", [*BUILD, "--solver", "cem", "--budget", "7"]),
        ("unknown solver 'segmnt'", [*BUILD, "--solver", "segmnt"]),
        ("unknown predictor 'taylor9'", [*BUILD, "--predictor", "taylor9"]),
        ("unknown corrector 'cubic': choose from auto, none, linear, quadratic", [*BUILD, "--corrector", "cubic"]),
        ("corrector=linear: needs cache=output", [*BUILD, "--corrector", "linear", "--cache", "residual"]),
        ("unknown rectify 'drif'", [*BUILD, "--rectify", "drif"]),
        ("unknown effort 'hard': choose from instant, quick, normal, thorough", [*BUILD, "--effort", "hard"]),
        ("leave --solver cem out", [*BUILD, "--budget", "auto", "--solver", "cem"]),
        ("unknown view 'joint'", [*BUILD, "--view", "joint"]),
        ("calibration file 'none.txt' cannot be read (No such file", [*BUILD, "--calib", "none.txt"]),
        ("device 'tpu' cannot be used here", [*BUILD, "--device", "tpu"]),
        ("unknown dtype 'int3'", [*BUILD, "--dtype", "int3"]),
        ("--call 'guidance': write KEY=VALUE", [*BUILD, "--call", "guidance"]),
        ("unknown argument of DiTPipeline 'guidance_scal'", [*BUILD, "--call", "guidance_scal=2"]),
        ("cemq sets this argument itself", [*BUILD, "--call", "generator=2"]),
        ("unknown built-in model 'dit-digit'", ["quantize-and-schedule", "builtin:dit-digit"]),
        ("no such model 'nowhere'", ["quantize-and-schedule", "nowhere"]),
        ("is no folder here and cannot be fetched from the Hub", ["quantize-and-schedule", "someone/something"]),
        ("no model: name builtin:NAME", ["quantize-and-schedule"]),
        ("unknown recipe 'flux'", [*BUILD, "--recipe", "flux"]),
    ],
)
def test_a_wrong_request_is_one_line_and_writes_nothing(message, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(message, *arguments, "-o", "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", [[], ["--scheme", "w4a8"]])
def test_another_backend_takes_no_low_rank_correction(scheme, tmp_path, monkeypatch):
    monkeypatch.setattr("cemq.quantize.schemes.installed", lambda backend: True)
    fails(
        "low rank: only 4-bit schemes of the native backend", *BUILD, *scheme, "--backend", "quanto", "--low-rank", "8",
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    fails("not a diffusers pipeline folder", "quantize-and-schedule", tmp_path / "photos", "-o", tmp_path / "out")


def test_a_bundle_is_not_quantized_again(bundle, tmp_path):
    fails("is a cemq bundle already", "quantize-and-schedule", bundle, "-o", tmp_path / "out")


def test_a_pipeline_folder_without_its_weights_is_refused(dit_folder, tmp_path):
    next((dit_folder / "transformer").glob("*.safetensors")).unlink()
    fails("cannot be loaded as a diffusers pipeline", "quantize-and-schedule", dit_folder, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"), [("", "holds no prompt or label"), ("# only this\n\n", "holds no prompt")]
)
def test_an_empty_calibration_file_is_refused(tmp_path, text, message):
    (tmp_path / "calib.txt").write_text(text)
    fails(message, *BUILD, "--calib", tmp_path / "calib.txt", "-o", tmp_path / "out")


def test_an_unknown_label_is_refused(tmp_path, bundle):
    (tmp_path / "calib.txt").write_text("seven\neleven\n")
    fails("label 'eleven' is not known", *BUILD, "--calib", tmp_path / "calib.txt", "-o", tmp_path / "out")
    fails("label '11' is not known", "generate", bundle, "--label", "11", "-o", tmp_path / "a.png")


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    fails("cannot be written", *BUILD, "-o", tmp_path / "file" / "out")
    fails("exists already", *BUILD, "-o", tmp_path)


def test_generate_wants_one_condition_and_a_picture_file(bundle, tmp_path):
    fails("either --prompt or --label", "generate", bundle, "-o", tmp_path / "a.png")
    fails("written to a file that ends in .png", "generate", bundle, "--label", "1", "-o", tmp_path / "a.txt")
    fails("an image is written to a file that ends in", "generate", bundle, "--label", "1", "-o", tmp_path / "a.wav")
    fails("does not exist", "generate", bundle, "--label", "1", "-o", tmp_path / "none" / "a.png")


@pytest.fixture(scope="module")
def prompted_bundle(tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "sd3"
    done = invoke(
        "quantize-and-schedule", "builtin:sd3-digits", "--steps", "4", "--budget", "2", "--samples", "1",
        "--planning-samples", "2", "--solver", "uniform", "--effort", "quick", "--rectify", "none",
        "--scheme", "w4a8", "--rounding", "nearest", "--low-rank", "4", "--components", "transformer, text_encoder",
        "-o", output,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return output


def test_options_of_quantization_reach_the_bundle(prompted_bundle):
    recipe = json.loads((prompted_bundle / "cemq.json").read_text())["recipe"]
    assert recipe.items() >= {"scheme": "w4a8", "rounding": "nearest", "low_rank": 4}.items()
    assert recipe["components"] == ["transformer", "text_encoder"]
    configs = {path.parent.name: json.loads(path.read_text()) for path in prompted_bundle.glob("*/config.json")}
    quantized = {
        name: fields["quantization_config"] for name, fields in configs.items() if "quantization_config" in fields
    }
    assert {name: fields["scheme"] for name, fields in quantized.items()} == {
        "transformer": "w4a8", "text_encoder": "w4a16",
    }  # fmt: skip
    assert quantized["transformer"]["low_rank"] == 4


def test_an_empty_prompt_is_refused(prompted_bundle, tmp_path):
    fails("the prompt is empty", "generate", prompted_bundle, "--prompt", " ", "-o", tmp_path / "a.png")
    assert invoke("generate", prompted_bundle, "--prompt", "a bold seven", "-o", tmp_path / "a.png").exit_code == 0
    (tmp_path / "empty.txt").write_text("\n")
    fails(
        "holds no prompt", "quantize-and-schedule", "builtin:sd3-digits", "--calib", tmp_path / "empty.txt",
        "-o", tmp_path / "out",
    )  # fmt: skip


def test_a_profiled_seed_is_refused_for_evaluation(tmp_path):
    output = tmp_path / "late"
    assert invoke(*BUILD, *FAST, "--seed", "1000000", "-o", output).exit_code == 0
    fails("was used to profile this bundle", "evaluate", output, "--samples", "2")


def test_bundles_that_are_none_are_refused(tmp_path):
    for command in (["evaluate"], ["inspect"], ["generate", "--label", "1", "-o", tmp_path / "a.png"]):
        fails("is not a cemq bundle", command[0], tmp_path, *command[1:])


def test_ctrl_c_keeps_what_is_finished_and_says_so(tmp_path):
    process = subprocess.Popen(
        [CEMQ, *BUILD, "--samples", "64", "-o", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells have their background jobs ignore it
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.building/*/run-*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == (
        "cemq: interrupted; what is finished is kept, and the same command goes on from there"
    )
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == [".out.building"]


def test_help_loads_no_torch_and_names_every_command():
    code = (
        "import sys, cemq.cli as c\ntry: c.app(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("quantize-and-schedule", "generate", "evaluate", "inspect", "analyze"):
        assert name in done.stdout


@pytest.mark.parametrize("name", ["quantize-and-schedule", "generate", "evaluate", "inspect"])
def test_every_command_is_documented_with_an_example(name):
    shown = invoke(name, "--help")
    assert shown.exit_code == 0
    assert f"Example: cemq {name}" in " ".join(shown.output.split())
    assert name in (Path(__file__).parents[1] / "README.md").read_text()


def taken_by(function):
    """The names of its parameters, and of the keywords that it takes with ``**``."""
    names = set()
    for each in python_inspect.signature(function, eval_str=True).parameters.values():
        if each.kind is each.VAR_KEYWORD:
            (keywords,) = typing.get_args(each.annotation)
            names |= keywords.__optional_keys__
        else:
            names.add(each.name)
    return names


@pytest.mark.parametrize(
    ("command", "function"),
    [
        (cli.evaluate, cemq.evaluate),
        (cli.generate, generate_sample),
        (cli.analyze, analyze),
        (cli.bench, bench_architecture),
        (cli.plan_memory, cemq.plan_memory),
    ],
)
def test_the_functions_take_what_the_commands_take(command, function):
    spelled = {
        "prompt": "condition",
        "label": "condition",
        "no_full_precision": "full_precision",
        "arch": "architecture",
    }
    elsewhere = {"as_json", "quiet", "plot", "scheme", "recipe"}
    elsewhere |= {"bundle", "output", "verify"} if command is cli.bench else set()
    options = set(python_inspect.signature(command).parameters) - elsewhere
    assert {spelled.get(name, name) for name in options} <= taken_by(function)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (cemq.evaluate, ("nowhere",)),
        (analyze, ("nowhere",)),
        (cemq.from_pretrained, ("nowhere",)),
        (cemq.generate, ("nowhere", 1)),
        (cemq.plan_schedule, (None, 3)),
        (bench_architecture, ()),
    ],
)
def test_a_keyword_that_a_function_does_not_take_is_refused_as_python_does(function, arguments):
    message = rf"^{function.__name__}\(\) got an unexpected keyword argument 'vrma'$"
    with pytest.raises(TypeError, match=message):
        function(*arguments, vrma=1)
