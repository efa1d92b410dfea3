"""Several processes do what one does, bit for bit, and end together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import cemq
from cemq import cli
from cemq.analysis import analyze
from cemq.processes import ALONE, Processes, launched
from cemq.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPE = """
model: builtin:dit-digits
calib: digits_labels.txt
scheme: w4a8
steps: 6
budget: 3
samples: 5
planning_samples: 3
batch_size: 2
effort: quick
call: {guidance_scale: 2.0}
"""


def start(command, **variables):
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | variables,
    )  # fmt: skip


def finish(process):
    try:
        output, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def together(code, *arguments, count=2):
    """What ``count`` processes did, that were told of each other as a launcher does; none ends the others."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    running = [
        start([sys.executable, "-c", code, *arguments], RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(count)
    ]
    try:
        return [finish(process) for process in running]
    finally:
        for process in running:
            process.kill()


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_process_alone_has_everything_and_sets_nothing_up(monkeypatch):
    assert ALONE.is_main
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.gather((1, 2)) == [1, 2]
    ALONE.agree("anything", object())
    ALONE.wait()
    monkeypatch.setenv("WORLD_SIZE", "8")  # as clusters set it for jobs of one process a node
    with launched() as processes:
        assert processes is ALONE
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_disjoint_and_whole_and_the_main_process_has_the_first(count):
    shares = [Processes(rank=rank, count=count).share(range(5)) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == [0, 1, 2, 3, 4]
    assert shares[0][0] == 0


MEET = """
import sys
import torch
from cemq.errors import ProcessError
from cemq.processes import launched

with launched() as processes:
    print("rank", processes.rank)
    for count in (7, 3, 1, 0):  # also fewer items than processes
        mine = processes.share([torch.full((2,), float(item)) for item in range(count)])
        assert [each[0].item() for each in processes.gather(mine)] == list(range(count))
    processes.agree("the answer", 42)
    try:
        processes.agree("rank", processes.rank)
        raise AssertionError
    except ProcessError as error:
        assert "differ in rank" in str(error)
with launched() as processes:  # once more in the same processes
    if processes.rank == 1:
        processes.gather([lambda: "cannot be pickled"])
    processes.gather(["others wait"])
"""


def test_results_come_in_order_and_what_fails_in_one_process_ends_all():
    done = together(MEET, count=3)
    assert [each.returncode for each in done] == [1, 1, 1], done
    assert [each.stdout for each in done] == ["rank 0\n", "", ""]  # the main process alone prints
    assert "ProcessError: process 1: " in done[0].stderr
    assert "pickle" in done[1].stderr  # an error that is not cemq's is shown where it came up, too
    assert done[2].stderr == ""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    file = tmp_path_factory.mktemp("processes") / "recipe.yaml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def bundle(recipe):
    """Made by one process, this one."""
    output = recipe.with_name("one")
    build = ["quantize-and-schedule", "--recipe", recipe, "--device", "cpu", "-o", output]
    done = CliRunner().invoke(cli.app, [str(part) for part in build])
    assert done.exit_code == 0, done.output
    assert not torch.distributed.is_initialized()
    return output


def test_two_launched_processes_write_the_bundle_of_one_bit_for_bit(recipe, bundle):
    output = recipe.with_name("two")
    # --cpu starts one process whatever --num_processes says; --multi_gpu starts as many, with a GPU or without
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", free_port(), "-m", "cemq", "quantize-and-schedule", "--recipe", recipe]
    done = finish(start([*launch, "--device", "cpu", "-o", output]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 of 6 steps in full") == 1  # one process prints
    one, two = content(bundle), content(output)
    assert {"cemq.json", "prior.safetensors", "evidence.json"} < one.keys()
    assert [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)] == []
    assert not list(output.parent.glob(".*"))


SETTINGS = {"samples": 3, "batch_size": 3, "scheme": "w8a8", "solver": "uniform", "correction": "none"}  # one batch
SHARED = """
import json
import sys
from pathlib import Path

import cemq
from cemq.analysis import analyze
from cemq.processes import launched

bundle, folder, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
with launched() as processes:
    same = {"device": "cpu", "processes": processes}
    picture = folder / "two.png"
    found = cemq.evaluate(bundle, samples=5, batch_size=2, picture=picture, **same).to_dict()
    few = cemq.evaluate(bundle, samples=2, **same).to_dict()  # one batch: the other process has nothing to do
    ranks = analyze(bundle, schedules=5, samples=9, predictors=["reuse"], **same)
    cemq.quantize_and_schedule(output=folder / "few-two", **settings, **same)
    print(json.dumps([found, few, ranks]))
"""


def untimed(evaluation):
    return {name: value for name, value in evaluation.items() if name != "wall_ratio"}


def test_evaluation_and_analysis_find_what_one_process_finds_also_with_fewer_batches_than_processes(bundle):
    folder = bundle.parent
    settings = load_recipe(str(folder / "recipe.yaml")).model_dump(exclude_unset=True) | SETTINGS
    done = together(SHARED, bundle, folder, json.dumps(settings))
    assert [each.returncode for each in done] == [0, 0], done
    evaluations = [
        cemq.evaluate(bundle, samples=5, batch_size=2, picture=folder / "one.png", device="cpu"),
        cemq.evaluate(bundle, samples=2, device="cpu"),
    ]
    found, few, ranks = json.loads(done[0].stdout)
    for one, two in zip(evaluations, (found, few), strict=True):
        assert untimed(two) == json.loads(json.dumps(untimed(one.to_dict())))
        assert two["wall_ratio"] > 0
    assert ranks == json.loads(json.dumps(analyze(bundle, schedules=5, samples=9, predictors=["reuse"], device="cpu")))
    assert (folder / "one.png").read_bytes() == (folder / "two.png").read_bytes()
    cemq.quantize_and_schedule(output=folder / "few-one", **settings, device="cpu")
    assert content(folder / "few-one") == content(folder / "few-two")


FAIL = """
import os
import signal
import sys

from cemq import cli, planning

kind, run_batch, runs = sys.argv.pop(1), planning.run_batch, []


def interrupted(*arguments, **keywords):
    runs.append(None)
    if len(runs) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return run_batch(*arguments, **keywords)


if os.environ["RANK"] == "1":
    if kind == "input":
        sys.argv += ["--calib", "nowhere.txt"]
    else:
        planning.run_batch = interrupted
cli.main()
"""


@pytest.mark.parametrize(
    ("kind", "codes", "line"),
    [
        ("input", [1, 1], "cemq: process 1: calibration file 'nowhere.txt' cannot be read"),
        ("Ctrl-C", [130, 1], "cemq: interrupted; nothing was written"),
    ],
)
def test_bad_input_and_ctrl_c_in_one_process_end_both_and_leave_nothing(recipe, tmp_path, kind, codes, line):
    build = ["quantize-and-schedule", "--recipe", recipe, "--device", "cpu", "-o", tmp_path / "bundle"]
    done = together(FAIL, kind, *build)  # nobody ends the one that waits for the other
    assert [each.returncode for each in done] == codes, done
    assert done[0].stderr.splitlines()[-1].startswith(line)
    assert "Traceback" not in done[0].stderr
    assert (done[1].stdout, done[1].stderr) == ("", "")
    assert list(tmp_path.iterdir()) == []
