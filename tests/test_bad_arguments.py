"""Forty wrong ways to call every command: one clear line, exit code 1 or 2, and nothing written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.pipelines import make_dit
from typer.testing import CliRunner

import cemq
from cemq import cli

CEMQ = str(Path(sys.executable).with_name("cemq"))
HUGE = str(1 << 64)
# What is no whole number, and no number of anything.
NUMBERS = ("", "-1", "nan", "inf", "1e999", "1.5", "²", "abc", "0x10", "--")


def cases(option, *values, before=(), after=()):
    """A list of arguments for each value of an option."""
    return [[*before, f"{option}={value}", *after] for value in values]


def bundles(*after, but=()):
    """What is no bundle where one is wanted; the names in capitals stand for files of the fixture below."""
    names = (
        "nowhere", "", ".", "..", "/", "~", "~nobody-of-that-name", "FILE", "FILE/x", "EMPTY", "PIPELINE", "TORN",
        "NULL", "LIST", "DEEP", "WRONG", "LACKING", "LOOP", "n" * 300, "with space", "quo'te\"", "🐈", "new\nline",
        "owner/name", "http://example.org", "builtin:dit-digits", "a\u2028b",
    )  # fmt: skip
    return [[name, *after] for name in names if name not in but]


def commands(wrong):
    """Of any command: what is no option or one argument too many."""
    return [[*each, more] for each in wrong for more in ("--nope", "-Z", "--json=1", "one too many")]


OUT = ("-o", "out")
COMPARED = ("PIPELINE", "--calib", "LABELS")
PAGE = ("-o", "a.html")
LABEL = ("--label", "1", "-o", "a.png")
BUILD = ("PIPELINE", *OUT, "--calib", "LABELS")
FILES = ("/", ".", "..", "~", "none/a.png", "FILE/a.png", "EMPTY", "n" * 300 + ".png", "LOOP/a.png")
DEVICES = ("nope", "cuda:99", "meta", "cpu:x", "-1", " ", "")
CALLS = (
    "guidance_scale", "=1", "1=1", "guidance_scale=abc", "guidance_scale=", "guidance_scale=nan", "guidance_scale=[1]",
    "guidance_scale={a: b}", "guidance_scale=1e999", "guidance_scale=2001-13-45", "guidance_scale=" + "[" * 400,
    "guidance_scal=1", "generator=1", "class_labels=3", "output_type=pil", "self=1", "height=64", "a b=1", "",
)  # fmt: skip
BUDGETS = (*NUMBERS, "0", "1", "99", HUGE, "0x", "0.5x", "nanx", "infx", "1e999x", "x", "3y")

BAD = {
    "quantize-and-schedule": [
        *commands([BUILD]),
        *[[name, *OUT] for name in ("", "nowhere", "/", ".", "~", "FILE", "EMPTY", "builtin:", "builtin:x", "BUNDLE")],
        [*OUT],
        *[["PIPELINE", "--calib", "LABELS", "-o", name] for name in ("/", "..", "FILE", "FILE/x", "LOOP", "PIPELINE")],
        ["PIPELINE", "-o", "FILE", "--overwrite"],
        ["PIPELINE", "-o", "/", "--overwrite"],
        *cases("--recipe", "", "nope", "/", "none.yaml", "FILE", *(f"{name}.yaml" for name in
               ("TABS", "LISTED", "KEYS", "TYPES", "CIRCLE", "DATE", "NESTED", "BINARY", "VOID")), before=BUILD),
        *cases("--scheme", "", "w8a9", "W8A8", before=BUILD),
        *cases("--backend", "", "gpu", before=BUILD),
        *cases("--rounding", "", "floor", before=BUILD),
        *cases("--low-rank", *NUMBERS, before=BUILD),
        *cases("--bits-budget", "", "nan", "inf", "abc", before=(*BUILD, "--scheme", "w4a8")),
        *cases("--components", "", "vae", "transformer,none", before=BUILD),
        *cases("--steps", *NUMBERS, "0", "1", "1001", HUGE, before=BUILD),
        *cases("--also-steps", "²", "-3", "1", "a,b", "4;5", "none,4", "1001", HUGE, before=(*BUILD, "--steps", "4")),
        *cases("--budget", *BUDGETS, before=(*BUILD, "--steps", "4")),
        *cases("--tolerance", "", "-1", "nan", "inf", "abc", before=(*BUILD, "--budget", "auto")),
        [*BUILD, "--tolerance", "0.5"],
        *cases("--target-psnr", "", "nan", "inf", "abc", "30", before=BUILD),
        *cases("--solver", "", "serch", before=BUILD),
        *cases("--predictor", "", "taylor9", before=BUILD),
        *cases("--corrector", "", "cubic", before=BUILD),
        *cases("--rectify", "", "drif", before=BUILD),
        *cases("--effort", "", "hard", before=BUILD),
        *cases("--view", "", "joint", before=BUILD),
        *cases("--cache", "", "blocks", before=BUILD),
        *cases("--calib", "", "none.txt", "/", "EMPTY", "NOTHING", "BINARY.yaml", "TORN", before=("PIPELINE", *OUT)),
        *cases("--samples", *NUMBERS, "0", HUGE, before=BUILD),
        *cases("--planning-samples", *NUMBERS, "0", HUGE, before=BUILD),
        *cases("--seed", *NUMBERS, HUGE, str(1 << 63), before=BUILD),
        *cases("--call", *CALLS, before=BUILD),
        *cases("--device", *DEVICES, before=BUILD),
        *cases("--dtype", "", "float64", "int8", before=BUILD),
        *cases("--lora", "", ":", "none.safetensors", "FILE", "EMPTY", "LOOP", "PIPELINE:x", "FILE:nan", "owner/name",
               "/", "~", "BINARY.yaml:0.5", before=BUILD),
    ],
    "replan": [
        *commands([["BUNDLE", *OUT]]),
        *bundles(*OUT),
        [*OUT],
        ["BUNDLE"],
        *[["BUNDLE", "-o", name] for name in ("/", "..", "FILE", "FILE/x", "LOOP", "PIPELINE", "BUNDLE")],
        ["BUNDLE", "-o", "FILE", "--overwrite"],
        *cases("--model", "", "nowhere", "/", "FILE", "EMPTY", "BUNDLE", "builtin:x", before=["BUNDLE", *OUT]),
        ["BUNDLE", *OUT, "--model", "OTHER"],
        *[["BUNDLE", *OUT, f"--{name}"] for name in ("scheme=w8a8", "lora=FILE", "dtype=float32", "smoothed")],
        *cases("--steps", *NUMBERS, "0", "1", "1001", HUGE, before=["BUNDLE", *OUT]),
        *cases("--budget", *BUDGETS, before=["BUNDLE", *OUT]),
        *cases("--calib", "", "none.txt", "/", "EMPTY", "NOTHING", "BINARY.yaml", "TORN", before=["BUNDLE", *OUT]),
        *cases("--samples", *NUMBERS, "0", HUGE, before=["BUNDLE", *OUT]),
        *cases("--seed", *NUMBERS, HUGE, str(1 << 63), before=["BUNDLE", *OUT]),
        *cases("--call", *CALLS, before=["BUNDLE", *OUT]),
        *cases("--device", *DEVICES, before=["BUNDLE", *OUT]),
        ["BUNDLE", *OUT, "--effort", "hard"],
        ["BUNDLE", *OUT, "--policy", "teacach"],
    ],
    "generate": [
        *commands([["BUNDLE", *LABEL]]),
        *bundles(*LABEL),
        ["BUNDLE"],
        ["BUNDLE", "-o", "a.png"],
        ["BUNDLE", "--prompt", "x", *LABEL],
        *cases("--label", "", " ", "²", "-1", "99999", "1e3", "seventeen", before=["BUNDLE", "-o", "a.png"]),
        *cases("--output", *FILES, before=["BUNDLE", "--label", "1"]),
        *[["BUNDLE", "--label", "1", "-o", name] for name in ("a", "a.txt", ".png", "a.wav", "", "🐈")],
        *cases("--steps", *NUMBERS, "0", "1001", HUGE, before=["BUNDLE", *LABEL]),
        *cases("--budget", *BUDGETS, before=["BUNDLE", *LABEL]),
        *cases("--seed", *NUMBERS, HUGE, str(1 << 63), before=["BUNDLE", *LABEL]),
        *cases("--call", *CALLS, before=["BUNDLE", *LABEL]),
        *cases("--device", *DEVICES, before=["BUNDLE", *LABEL]),
        *cases("--vram", *NUMBERS, "0", "1B", "8 apples", before=["BUNDLE", *LABEL]),
        ["BUNDLE", *LABEL, "--vram", "DISK", "--offload-folder", "FILE"],
        *cases("--verify", "", "True", "twice", before=["BUNDLE", *LABEL]),
    ],
    "evaluate": [
        *commands([["BUNDLE"]]),
        *bundles(),
        *cases("--reference", "", "nowhere", "/", "FILE", "EMPTY", "BUNDLE", "builtin:x", before=["BUNDLE"]),
        ["BUNDLE", "--samples", "1", "--reference", "OTHER"],
        *cases("--samples", *NUMBERS, "0", HUGE, before=["BUNDLE"]),
        *cases("--seed", *NUMBERS, HUGE, before=["BUNDLE"]),
        *cases("--steps", *NUMBERS, "0", "1", "1001", HUGE, before=["BUNDLE", "--samples", "1"]),
        *cases("--budget", *BUDGETS, before=["BUNDLE"]),
        *cases("--picture", *FILES, "a.txt", "a.jpg", "", before=["BUNDLE"]),
        *cases("--device", *DEVICES, before=["BUNDLE"]),
        *cases("--vram", *NUMBERS, "0", "1B", "8 apples", before=["BUNDLE"]),
        *cases("--verify", "", "True", "twice", before=["BUNDLE"]),
    ],
    "compare": [
        *commands([COMPARED]),
        *bundles(*COMPARED[1:], but=("PIPELINE", "builtin:dit-digits")),
        ["PIPELINE"],
        *cases("--budgets", "", ",", "1x", "0", "-1", "nan", "inf", "x", "2x;3x", "0.5x", "1e999", before=COMPARED),
        *cases("--methods", "", ",", "unifrom", "cem;uniform", before=COMPARED),
        *cases("--schemes", "", ",", "w3a3", "nobody:w8a8", "native:", before=COMPARED),
        ["BUNDLE", "--schemes", "w8a8"],
        *cases("--calib", "", "nowhere", "/", "EMPTY", "NOTHING", "BINARY", before=["PIPELINE"]),
        *cases("--call", *CALLS, before=COMPARED),
        *cases("--samples", *NUMBERS, "0", HUGE, before=COMPARED),
        *cases("--seed", *NUMBERS, HUGE, before=COMPARED),
        *cases("--steps", *NUMBERS, "0", "1", "1001", before=COMPARED),
        *cases("--batch-size", *NUMBERS, "0", before=COMPARED),
        *cases("--plot", *FILES, "a.txt", "a.jpg", "", before=COMPARED),
        *cases("--device", *DEVICES, before=COMPARED),
        *cases("--vram", *NUMBERS, "0", "1B", "8 apples", before=COMPARED),
        *cases("--vram", *NUMBERS, "0", "1B", "8 apples", before=["BUNDLE"]),
        [*COMPARED, "--vram", "8GiB", "--schemes", "w8a8"],
        [*COMPARED, "--vram", "8GiB", "--batch-size", "2"],
        *cases("--dtype", "", "float8", "int8", before=COMPARED),
    ],
    "play": [
        *commands([["BUNDLE"]]),
        *bundles(),
        [],
        ["BUNDLE", "BUNDLE"],
        *cases("--port", *NUMBERS, "65536", HUGE, "http", "7900.5", before=["BUNDLE"]),
        *cases("--reference", "", "nowhere", "/", "FILE", "EMPTY", "BUNDLE", "builtin:x", "OTHER", before=["BUNDLE"]),
        *cases("--device", *DEVICES, before=["BUNDLE"]),
        *cases("--vram", *NUMBERS, "0", "1B", "8 apples", before=["BUNDLE"]),
        ["BUNDLE", "--vram", "DISK", "--offload-folder", "FILE"],
        *cases("--verify", "", "True", "twice", before=["BUNDLE"]),
    ],
    "report": [
        *commands([["BUNDLE", *PAGE]]),
        *bundles(*PAGE),
        ["BUNDLE"],
        *cases("--output", *FILES, "a.htm", "none/a.html", "FILE/a.html", "LOOP/a.html", "", before=["BUNDLE"]),
        *cases("--reference", "", "nowhere", "/", "FILE", "EMPTY", "BUNDLE", "builtin:x", before=["BUNDLE", *PAGE]),
        ["BUNDLE", *PAGE, "--samples", "1", "--reference", "OTHER"],
        *cases("--samples", *NUMBERS, "0", HUGE, before=["BUNDLE", *PAGE]),
        *cases("--compare", "", "nowhere", "/", "FILE", "FILE/x", "EMPTY", "LOOP", "BINARY.yaml", "NULL/cemq.json",
               "LIST/cemq.json", "DEEP/cemq.json", "BUNDLE/cemq.json", before=["BUNDLE", *PAGE]),
        *cases("--device", *DEVICES, before=["BUNDLE", *PAGE]),
        *cases("--vram", *NUMBERS, "0", "1B", "8 apples", before=["BUNDLE", *PAGE]),
    ],
    "verify": [
        *commands([["BUNDLE"], ["BUNDLE", "--json"]]),
        *bundles(),
        *bundles("--json", but=("LACKING",)),  # of which it lists what is lacking
        [],
        ["BUNDLE", "BUNDLE"],
    ],
    "inspect": [
        *commands([["BUNDLE"], ["BUNDLE", "--json"]]),
        *bundles(),
        *bundles("--json"),
        [],
        ["BUNDLE", "BUNDLE"],
    ],
    "analyze": [
        *commands([["BUNDLE"]]),
        *bundles(but=("PIPELINE", "builtin:dit-digits")),  # of which it makes a bundle
        *cases("--scheme", "", "w8a8", before=["BUNDLE"]),
        *cases("--recipe", "", "dit-digits", before=["BUNDLE"]),
        *cases("--scheme", "w8a9", before=["PIPELINE"]),
        *cases("--recipe", "nope", "KEYS.yaml", before=["PIPELINE"]),
        *cases("--schedules", *NUMBERS, "0", "4", "1000", HUGE, before=["BUNDLE"]),
        *cases("--predictors", "", ",", "taylor9", "reuse,none", before=["BUNDLE", "--schedules", "5"]),
        *cases("--samples", *NUMBERS, "0", HUGE, before=["BUNDLE", "--schedules", "5"]),
        *cases("--seed", *NUMBERS, HUGE, before=["BUNDLE", "--schedules", "5"]),
        *cases("--budget", *NUMBERS, "0", "1", "99", HUGE, before=["BUNDLE", "--schedules", "5"]),
        *cases("--corrector", "", "auto", "cubic", before=["BUNDLE"]),
        *cases("--plot", *FILES, "a.txt", "", before=["BUNDLE"]),
        *cases("--device", *DEVICES, before=["BUNDLE", "--schedules", "5"]),
        *cases("--vram", *NUMBERS, "0", "1B", "8 apples", before=["BUNDLE", "--schedules", "5"]),
        *cases("--vram", "", "0", "1B", "8 apples", before=["PIPELINE"]),
        *cases("--verify", "", "True", "twice", before=["BUNDLE"]),
        *cases("--verify", "twice", before=["PIPELINE"]),
    ],
    "bench": [
        *commands([["BUNDLE"], []]),
        *bundles(),
        *cases("--arch", "", "dit", "DiT-small"),
        *cases("--arch", "dit-small", before=["BUNDLE"]),
        *cases("--schemes", "w8a9", "native:", ":", "gpu:w8a8", "w8a8,none,x"),
        ["--schemes=", "--no-full-precision"],
        ["BUNDLE", "--schemes", "w8a8"],
        ["BUNDLE", "--compile"],
        *cases("--dtype", "", "float64", "int8"),
        *cases("--dtype", "int8", before=["BUNDLE"]),
        *cases("--verify", "", "True", "twice", before=["BUNDLE"]),
        *cases("--verify", "always"),
        *cases("--batch", *NUMBERS, "0", HUGE),
        *cases("--batch", "0", HUGE, before=["BUNDLE"]),
        *cases("--rounds", *NUMBERS, "0"),
        *cases("--device", *DEVICES),
        *cases("--output", *FILES),
        *cases("--output", *FILES, before=["BUNDLE"]),
    ],
    "doctor": [
        *commands([[], ["--quick"], ["--json"], ["--quick", "--json"]]),
        *[[name] for name in ("BUNDLE", "", " ", "nowhere", "quick", "json", "-1", "0", "🐈", "new\nline")],
        *cases("--quick", "", "1", "0", "true", "false", "yes"),
        *cases("--json", "", "1", "0", "true", "false"),
        *[[name] for name in ("-q", "-j", "-v", "-o", "---", "--no-quick", "--quic=1", "--device", "--all", "-quick")],
    ],
    "plan-memory": [
        *commands([["BUNDLE", "--vram", "8GiB"]]),
        *bundles("--vram", "8GiB"),
        ["BUNDLE"],
        *cases("--vram", *NUMBERS, "0", "1B", "8 apples", "GiB", before=["BUNDLE"]),
        *cases("--device", "", "nope", "0", " ", before=["BUNDLE", "--vram", "8GiB"]),
        *cases("--budget", *BUDGETS, before=["BUNDLE", "--vram", "8GiB"]),
        *cases("--samples", *NUMBERS, "0", HUGE, before=["BUNDLE", "--vram", "8GiB"]),
        *cases("--host-memory", "", "-1", "nan", "1e999", "abc", "0", "8 apples", before=["BUNDLE", "--vram", "8GiB"]),
        *cases("--call", *(call for call in CALLS if call.partition("=")[0] not in ("generator", "class_labels",
               "output_type", "self")), before=["BUNDLE", "--vram", "8GiB"]),
    ],
    "export": [
        *commands([["BUNDLE"], ["BUNDLE", "-o", "a.json"]]),
        *bundles(),
        *bundles("-o", "a.json"),
        *cases("--format", "", "yaml", "JSON", "cache_dit", before=["BUNDLE"]),
        *cases("--output", *FILES, before=["BUNDLE"]),
        [],
    ],
    "push": [
        *commands([["BUNDLE", "owner/name"]]),
        *bundles("owner/name"),
        ["BUNDLE"],
        *[["BUNDLE", name] for name in ("", " ", "name", "a/b/c", "../x", "/x", "x/", "-a/b", "a/-b", "a b/c", "🐈/x",
          "owner/na..me", "owner/name.git", "https://huggingface.co/owner/name", "owner/new\nline", "owner/name")],
        *cases("--revision", "", "main", before=["BUNDLE", "owner/name"]),
        ["BUNDLE", "owner/name", "--message="],
        ["BUNDLE", "owner/name", "--create-pr=1"],
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the names in capitals stand for, and a folder that nothing may be written to."""
    root = tmp_path_factory.mktemp("bad")
    make_dit().save_pretrained(root / "pipeline")
    (root / "labels.txt").write_text("1\n2\n3\n")
    cemq.quantize_and_schedule(
        str(root / "pipeline"), root / "bundle", calib=str(root / "labels.txt"), steps=6, budget=3, samples=1,
        planning_samples=1, effort="quick", solver="uniform", rectify="none", rounding="nearest", device="cpu",
    )  # fmt: skip
    texts = {
        "file": "text",
        "nothing": "# only this\n",
        "torn/cemq.json": '{"format_version": 5, "checksum": "',
        "null/cemq.json": "null",
        "list/cemq.json": "[1, 2]",
        "deep/cemq.json": "[" * 100_000,
        "wrong/cemq.json": '{"format_version": NaN, "checksum": 1, "files": [1]}',
        "lacking/cemq.json": (root / "bundle" / "cemq.json").read_text(),
        "tabs.yaml": "call:\n\tguidance_scale: 2",
        "listed.yaml": "- scheme\n- w8a8",
        "keys.yaml": "shceme: w8a8",
        "types.yaml": "steps: many",
        "circle.yaml": "call: &a\n  latents: [*a]",
        "date.yaml": "call: {guidance_scale: 2001-13-45}",
        "nested.yaml": "[" * 2_000,
        "void.yaml": "",
        "empty/.keep": "",
    }
    found = {
        "PIPELINE": root / "pipeline", "LABELS": root / "labels.txt", "BUNDLE": root / "bundle", "LOOP": root / "loop",
        "BINARY": root / "binary", "OTHER": "builtin:sd3-digits", "DISK": "48.3MiB",
    }  # fmt: skip
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        whole = path.parent if path.parent != root else path.with_suffix("") if path.suffix == ".yaml" else path
        found[whole.name.upper()] = whole
    (root / "empty" / ".keep").unlink()
    (root / "binary.yaml").write_bytes(bytes(range(256)))
    (root / "loop").symlink_to(root / "loop")
    return found


def spelled(arguments, files):
    """The arguments with the files in them that names in capitals stand for."""
    return [re.sub(r"\b[A-Z]{4,}\b", lambda match: str(files.get(match[0], match[0])), each) for each in arguments]


def test_every_command_has_forty_bad_lists_of_arguments():
    named = {command.name or command.callback.__name__.replace("_", "-") for command in cli.app.registered_commands}
    assert named == set(BAD)
    for name, lists in BAD.items():
        assert len({tuple(each) for each in lists}) >= 40, name


def check(code, output, errors):
    assert code in (1, 2), (code, output, errors)
    assert output == ""
    lines = errors.strip().splitlines()
    assert "Traceback" not in errors, errors
    if code == 1:  # after notes and progress, if any; they are not errors
        said = re.fullmatch(r"cemq: (.+)", lines[-1], re.DOTALL)
        assert said, errors
        assert " " in said[1], errors  # more than the name of an exception
        assert sum(line.startswith("cemq: ") for line in lines) == 1, errors
    else:
        assert any(line.startswith("Error: ") for line in lines), errors


@pytest.mark.parametrize("command", sorted(BAD))
def test_bad_arguments_are_one_clear_line_and_write_nothing(command, files, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in files["PIPELINE"].parent.rglob("*"))
    runner, failed = CliRunner(), []
    for arguments in BAD[command][:: 1 if request.config.getoption("--slow") else 3]:
        result = runner.invoke(cli.app, [command, *spelled(arguments, files)])
        try:
            assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
            check(result.exit_code, result.stdout, result.stderr)
            assert not list(tmp_path.iterdir()), list(tmp_path.iterdir())
        except AssertionError as error:
            failed.append(f"{[each[:60] for each in arguments]}: {str(error)[:300]}")
    assert not failed, "\n".join(failed)
    assert sorted(path for path in files["PIPELINE"].parent.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(
            ["generate", "BUNDLE", "--label", "1", "-o", "a.png", "--call", "guidance_scale=abc"],
            marks=pytest.mark.slow,
        ),
        ["export", "BUNDLE", "-o", "LOOP/a.json"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_installed_command_says_the_same(arguments, files, tmp_path):
    done = subprocess.run(
        [CEMQ, *spelled(arguments, files)], capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(cemq.__file__).parents[1])},
    )  # fmt: skip
    check(done.returncode, done.stdout, done.stderr)
    assert not list(tmp_path.iterdir())


def test_where_an_error_comes_from_is_shown_on_request(files, monkeypatch):
    monkeypatch.setenv("CEMQ_TRACEBACK", "1")
    shown = CliRunner().invoke(cli.app, ["inspect", "nowhere"])
    assert "Traceback" in shown.stderr
    assert "in read_bundle" in shown.stderr
    assert shown.stderr.strip().splitlines()[-1] == "cemq: 'nowhere' is not a cemq bundle: no such folder"


def test_what_the_system_refuses_is_one_line_and_a_bug_of_ours_is_not(monkeypatch):
    def failed(error):
        def examine(**_):
            raise error

        monkeypatch.setattr("cemq.bench.examine", examine)
        return CliRunner().invoke(cli.app, ["doctor"])

    refused = failed(PermissionError(13, "Permission denied", "weights"))
    assert refused.exit_code == 1
    assert refused.stderr.strip() == "cemq: Permission denied: 'weights'"
    for error in (ZeroDivisionError(), KeyError("name"), AssertionError()):
        assert failed(error).exception is error


RUNS = {  # of a model's forward
    "quantize-and-schedule": [*BUILD, "--steps", "4"],
    "replan": ["BUNDLE", *OUT],
    "generate": ["BUNDLE", *LABEL],
    "evaluate": ["BUNDLE", "--picture", "a.png"],
    "compare": [*COMPARED, "--methods", "uniform", "--plot", "a.png"],
    "report": ["BUNDLE", *PAGE],
    "analyze": ["BUNDLE", "--schedules", "5", "--budget", "3", "--plot", "a.png"],
    "bench": ["BUNDLE", "-o", "a.json"],
}
READS = {  # a bundle
    "verify": ["BUNDLE"],
    "inspect": ["BUNDLE"],
    "play": ["BUNDLE", "--port", "0"],
    "plan-memory": ["BUNDLE", "--vram", "8GiB"],
    "export": ["BUNDLE", "-o", "a.json"],
    "push": ["BUNDLE", "owner/name"],
}


@pytest.mark.parametrize("command", [*RUNS, *READS, "doctor"])
def test_ctrl_c_in_the_middle_is_one_line_and_leaves_nothing(command, files, tmp_path, monkeypatch):
    arguments = spelled((RUNS | READS).get(command, []), files)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    where = "diffusers.DiTTransformer2DModel.forward" if command in RUNS else "hashlib.sha256"
    monkeypatch.setattr("cemq.bench.examine" if command == "doctor" else where, interrupted)
    result = CliRunner().invoke(cli.app, [command, *arguments])
    assert result.exit_code == 130, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.strip().splitlines()[-1] == "cemq: interrupted; nothing was written"
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_weights_that_are_there_as_a_variant_only_are_found(tmp_path):
    make_dit().save_pretrained(tmp_path / "fp16", variant="fp16")
    (tmp_path / "labels.txt").write_text("1\n2\n")
    assert not (tmp_path / "fp16" / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    settings = {
        "steps": 4, "samples": 1, "planning_samples": 1, "effort": "quick", "solver": "uniform", "rounding": "nearest",
        "rectify": "none", "calib": str(tmp_path / "labels.txt"), "device": "cpu", "budget": 2,
    }  # fmt: skip
    cemq.quantize_and_schedule(str(tmp_path / "fp16"), tmp_path / "bundle", variant="fp16", **settings)
    assert cemq.evaluate(tmp_path / "bundle", samples=1, device="cpu").full_steps == 2
    assert (tmp_path / "bundle" / "transformer" / "diffusion_pytorch_model.safetensors").exists()


def test_several_variants_are_for_the_user_to_choose_from(tmp_path):
    for variant in ("fp16", "bf16"):
        make_dit().save_pretrained(tmp_path / "both", variant=variant)
    done = CliRunner().invoke(cli.app, ["quantize-and-schedule", str(tmp_path / "both"), "-o", str(tmp_path / "b")])
    assert done.exit_code == 1
    assert "holds weights as bf16 and fp16: give --variant with one of them" in done.stderr
    assert not (tmp_path / "b").exists()
