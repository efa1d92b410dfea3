"""docs/benchmarks/gpu.py at the size of a toy, on whatever device is here: that every part measures, that what fails
costs no more than its own case, and what the page makes of a record."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks"
PARTS = ("machine", "correctness", "steps", "linears", "skipping", "vram", "rounding", "building")
# kernels of others, which are not everywhere; all that a toy may lack
OPTIONAL = ("comfy-kitchen", "gemlite", "humming", "torchao")


def start(script, *arguments):
    paths = os.pathsep.join([str(BENCHMARKS.parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip


def measure(output, *arguments, script=BENCHMARKS / "gpu.py"):
    """The record and the page of a run."""
    process = start(script, "--tiny", "--output", output, *arguments)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert said.splitlines()[-1] == str(output)
    return json.loads(output.read_text()), output.with_suffix(".md").read_text()


def check(rows):
    assert rows
    for row in rows:
        assert row.get("right", True), row
        assert row.get("finite", True), row
        assert "failed" not in row or str(row.get("kernel")).startswith(OPTIONAL), row


@pytest.mark.parametrize("part", ["machine", "rounding"])
def test_a_quick_part_runs_at_the_size_of_a_toy(part, tmp_path, monkeypatch):
    # the script as a module: a process of its own takes ten seconds to import what is imported here already
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu
    from gpu_parts import Setting

    events, device = [], "cuda" if torch.cuda.is_available() else "cpu"
    setting = Setting(device=torch.device(device), tiny=True, scratch=tmp_path)
    with torch.no_grad():
        gpu.run_cases(part, setting, 0, lambda **event: events.append(event))
    rows = json.loads(json.dumps([event["row"] for event in events if "row" in event], default=str))
    check(rows)
    assert events[-1] == {"done": True}
    assert [e["case"] for e in events if "case" in e] == [e["finished"] for e in events if "finished" in e]
    page = gpu.draw({"tiny": True, "parts": {part: {"date": "2026-12-01T10:00:00", "rows": rows}}})
    assert f"## {part.capitalize()}" in page
    assert "the figures mean nothing" in page


@pytest.mark.slow
def test_every_part_runs_at_the_size_of_a_toy(tmp_path):
    record, page = measure(tmp_path / "record.json")
    assert set(record["parts"]) == set(PARTS)
    for part in record["parts"].values():
        assert "failed" not in part, part["failed"]
        assert "stopped" not in part, part["stopped"]
        check(part["rows"])
    assert [line[3:].lower() for line in page.splitlines() if line.startswith("## ")] == list(PARTS)
    rows = {name: part["rows"] for name, part in record["parts"].items()}
    placed = [row for row in rows["correctness"] if row["what"] == "placements"]
    assert len(placed) >= 4
    assert {row["moved_on_skipped_steps"] for row in placed} == {0}
    assert {row["full_steps"] for row in rows["skipping"] if "full_steps" in row} == {28, 10}
    pictures = {row["picture"] for row in rows["vram"] if "picture" in row}
    assert len(pictures) == 1
    errors = {row["scheme"]: row["relative_l2"] for row in rows["steps"] if row["what"] == "step"}
    assert errors["bfloat16"] == 0 < errors["w8a8"] < errors["w8a8-fp8"] < errors["w4a8"] < 0.3
    assert {row["chosen"] for row in rows["linears"] if "chosen" in row} <= {"cpu", "triton", "int-mm"}
    assert {row["how"] for row in rows["rounding"]} == {"nearest", "gptq"}


# --- what fails

CASES = """
import os, subprocess, time
from gpu_parts import Case

def fails():
    yield {"seen": 1}
    raise ValueError("first line\\nsecond line")

def crashes():
    os.abort()
    yield

def hangs():
    yield {"started": subprocess.Popen(["sleep", "600"]).pid}
    time.sleep(600)

def sleeps():
    time.sleep(600)
    yield

def works():
    yield {"right": True}

def cases(setting):
    return [Case(labels={"what": f.__name__}, measure=f) for f in [fails, crashes, hangs, works]]
"""
QUIET = "class logging:\n    set_verbosity_error = staticmethod(lambda: None)\n"
TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)

class device:
    def __init__(self, kind):
        self.type = kind

def set_grad_enabled(enabled):
    pass
"""


@pytest.fixture
def script(tmp_path):
    """A copy in which a part's cases go wrong, and libraries that take seconds to import are next to nothing."""
    folder = tmp_path / "script"
    shutil.copytree(BENCHMARKS / "gpu_parts", folder / "gpu_parts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("gpu.py", "gpu_page.py"):
        shutil.copy(BENCHMARKS / name, folder / name)
    for name, content in {"diffusers": QUIET, "transformers": QUIET, "torch": TORCH}.items():
        (folder / f"{name}.py").write_text(content)
    (folder / "gpu_parts" / "correctness.py").write_text(CASES)
    return folder / "gpu.py"


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_a_case_that_fails_crashes_or_hangs_is_a_row_and_the_next_one_goes_on(script, tmp_path):
    output = tmp_path / "record.json"
    output.write_text(json.dumps({"parts": {"linears": {"date": "2026-01-02T03:04", "rows": []}}}))
    record, _ = measure(output, "--parts", "correctness", "--silence", "5", script=script)
    rows = record["parts"]["correctness"]["rows"]
    hung = next(row["started"] for row in rows if "started" in row)
    assert [row for row in rows if "started" not in row] == [
        {"what": "fails", "seen": 1},
        {"what": "fails", "failed": "ValueError: first line"},
        {"what": "crashes", "failed": rows[2]["failed"]},
        {"what": "hangs", "failed": "stopped after 5 s in which it said nothing"},
        {"what": "works", "right": True},
    ]
    assert rows[2]["failed"].startswith("the process ended with -6: ")
    assert not runs(hung)
    assert "linears" in record["parts"]  # of an earlier run


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_a_part_whose_time_is_over_says_where_it_was_and_the_next_part_runs(script, tmp_path):
    parts = script.parent / "gpu_parts"
    (parts / "rounding.py").write_text(CASES.replace("[fails, crashes, hangs,", "[sleeps,"))
    (parts / "machine.py").write_text(CASES.replace("[fails, crashes, hangs,", "["))
    (parts / "linears.py").write_text("raise ImportError('no such library')")
    record, page = measure(
        tmp_path / "record.json", "--parts", "rounding,linears,machine", "--stretch", "0.3", script=script
    )
    assert record["parts"]["rounding"]["stopped"] == {"after_seconds": 6, "at": {"what": "sleeps"}}
    assert record["parts"]["linears"]["failed"] == "exit code 1: ImportError: no such library"
    assert record["parts"]["machine"]["rows"] == [{"what": "works", "right": True}]
    assert "**Stopped after its 6 s, at what sleeps.**" in page
    assert "**Failed: exit code 1: ImportError: no such library**" in page


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_what_runs_ends_with_a_script_that_is_terminated(script, tmp_path):
    (script.parent / "gpu_parts" / "correctness.py").write_text(CASES.replace("[fails, crashes, hangs,", "[hangs,"))
    output = tmp_path / "record.json"
    process = start(script, "--tiny", "--output", output, "--parts", "correctness")
    while not output.exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    process.communicate()
    assert process.returncode == 143
    (row,) = json.loads(output.read_text())["parts"]["correctness"]["rows"]
    assert not runs(row["started"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "no CUDA device here: --tiny runs every part at the size of a toy on a CPU"),
        (["--tiny", "--parts", "machine,speed"], "no part is called speed: choose from machine, correctness, steps"),
    ],
)
def test_a_wrong_request_is_one_line(script, arguments, message):
    process = start(script, *arguments)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert f" error: {message}" in errors.splitlines()[-1]


# --- the page

STEP = {"model": "flux-dev", "what": "step", "min_ms": 1.0, "finite": True, "sm_mhz": 1980.0}
FLOPS = {"linear_flops": 80e12, "attention_flops": 9.89e12}  # 10 ms of bfloat16 attention by the data sheet
LAYER = {"layer": "FLUX projection", "rows": 1000, "in": 2000, "out": 1000}
RECORDED = {
    "machine": [
        {"what": "machine", "machine": {
            "date": "2026-12-01T10:00:00+00:00", "line": "a CPU, 16 threads; NVIDIA H100 80GB HBM3; torch 2.13.0",
            "cuda": [{"name": "NVIDIA H100 80GB HBM3"}], "libraries": {"triton": "3.7.0"},
        }},
        {"what": "bfloat16 product", "ms": 1.6, "tera_per_second": 791.2, "sm_mhz": 1755.0},
        {"what": "copy on the device", "ms": 1.0, "bytes_per_second": 2.68e12},
    ],
    "correctness": [
        {"what": "tests", "test": "begun"},
        {"what": "large layers", "scheme": "w8a8", "worst": 0.4, "right": True},
        {"what": "large layers", "scheme": "w4a8", "worst": 3.5, "right": False},
        {"what": "tests", "test": "a::b", "seconds": 1.0, "right": False, "why": "assert 1 | 2"},
        {"what": "tests", "test": "c::d", "seconds": 1.0, "skipped": "no Triton"},
        {"what": "tests", "test": "all", "tests": 3, "ending": "exit code 1: 1 failed"},
    ],
    "steps": [
        STEP | FLOPS | {"scheme": "bfloat16", "compiled": False, "ms": 200.0, "relative_l2": 0.0},
        {"model": "flux-dev", "scheme": "bfloat16", "compiled": True, "what": "first step", "seconds": 31.0},
        STEP | FLOPS | {"scheme": "bfloat16", "compiled": True, "ms": 100.0, "relative_l2": 0.0},
        STEP | {"scheme": "w8a8", "compiled": True, "ms": 60.0, "relative_l2": 0.0123},
        {"model": "wan-14b", "scheme": "w8a8", "compiled": True, "failed": "OutOfMemoryError: CUDA out of memory"},
    ],
    "linears": [
        LAYER | {"kernel": "bfloat16", "ms": 0.5, "relative_l2": 0.002, "first_seconds": 0.1},
        LAYER | {"kernel": "bfloat16", "graph_ms": 0.4},
        LAYER | {"kernel": "cemq w8a8", "ms": 0.3, "relative_l2": 0.0125, "first_seconds": 9.0},
        LAYER | {"kernel": "cemq w8a8", "graph_ms": 0.1},
    ],
    "skipping": [
        {"what": "bundle", "seconds": 40.0, "bytes": 18 << 30},
        {"what": "runs", "steps": 28, "full_steps": 28, "loop_seconds": 5.4, "full_step_seconds": 0.2},
        {"what": "runs", "steps": 28, "full_steps": 10, "loop_seconds": 2.0, "full_step_seconds": 0.2,
         "skipped_step_seconds": 0.001, "skipped_step_host_microseconds": 750.0},
    ],
    "vram": [
        {"limit": 8 << 30, "placement": "group offload, block level", "planned_bytes": 7 << 30, "loading_seconds": 9.0},
        {"limit": 8 << 30, "peak_bytes": 6 << 30, "full_step_seconds": 0.5, "skipped_step_seconds": 0.001,
         "moved_bytes": 64 << 30, "moved_on_skipped_bytes": 0, "picture": "0badcafe"},
        {"limit": 12 << 30, "placement": "model offload", "planned_bytes": 11 << 30, "loading_seconds": 9.0},
        {"limit": 12 << 30, "failed": "the process ended with -9: nothing was said"},
    ],
    "rounding": [
        {"scheme": "w4a8", "how": "gptq", "block": "FluxTransformerBlock", "layers": 14, "parameters": 226e6,
         "seconds": 3.25, "hessian_seconds": 0.5},
    ],
    "building": [
        {"device": "cuda", "what": "build", "seconds": 22.0, "steps": 50, "full_steps": list(range(15))},
        {"device": "cuda", "what": "evaluation", "psnr_db": 59.5, "samples": 16},
    ],
}  # fmt: skip


def test_the_page_of_a_record(script, tmp_path):
    parts = {name: {"date": "2026-12-01T10:00:00+00:00", "seconds": 9.0, "rows": RECORDED[name]} for name in PARTS}
    parts["vram"]["stopped"] = {"after_seconds": 90, "at": {"limit": 8}}
    (tmp_path / "record.json").write_text(json.dumps({"tiny": False, "parts": parts}))
    process = start(script.with_name("gpu_page.py"), tmp_path / "record.json")
    assert process.communicate() == ("", "")
    page = (tmp_path / "record.md").read_text()
    lines = page.splitlines()
    assert "`python docs/benchmarks/gpu.py`. 2026-12-01, a CPU, 16 threads; NVIDIA H100 80GB HBM3" in page
    for line in (
        "| bfloat16 product | 791.2 | 989 | 0.8 | 1755 |",
        "| copy on the device | 2.68 | 3.35 | 0.8 |  |",
        "| large layers | 2 | 1 | 3.5 |",
        "| what tests, test a::b, seconds 1.0 | assert 1 / 2 |",
        "pytest: exit code 1: 1 failed. 1 tests were skipped.",
        # to compiled bfloat16; 80e12 in int8 (1979e12 a second) and 10 ms of attention are 50.42 of 60 ms
        "| flux-dev | w8a8 | compiled | 60 | 0.6 | 0.8404 | 0.0123 |  |  | 1980 |",
        "| flux-dev | bfloat16 | compiled | 100 | 1 | 0.9089 | 0 |  | 31 | 1980 |",
        "| model wan-14b, scheme w8a8, compiled True | OutOfMemoryError: CUDA out of memory |",
        # 4e9 at 1979e12 a second are 2.021 us of 100; 8e6 bytes at 3.35e12 a second 2.388
        "| FLUX projection, 1000 x 2000 x 1000 | cemq w8a8 | 0.3 | 0.1 | 0.25 | 0.02021 | 0.02388 | 0.0125 |",
        "| 10 of 28 | 2 | 0.3704 | 0.3333 | 0.9 | 0.2 | 0.001 | 750 |",  # 9 of 27 steps after the first
        "| 8.00 | group offload, block level | 7.00 | 6.00 |  | 9 | 0.5 | 0.001 | 64.00 | 0 | 0badcafe |",
        "| limit 12884901888 | the process ended with -9: nothing was said |",
        "| FluxTransformerBlock | w4a8 | gptq | 14 | 226 | 3.25 | 0.5 |",
        "| cuda | 22 | 15 of 50 | 59.5 |",
    ):
        assert line in lines, page
    assert "**Stopped after its 90 s, at limit 8.**" in page
