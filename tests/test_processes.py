"""Several processes do what one does, bit for bit, and end together."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pipelines import STEPS, make_dit
from support.processes import SHARED_SCHEDULE, draw_shared, quantized_flux
from typer.testing import CliRunner

import cemq
from cemq import cli
from cemq.evaluation.analysis import analyze
from cemq.parallel import ALONE, Processes, launched
from cemq.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPE = """
scheme: w4a8
steps: 6
also_steps: [4]
budget: 3
samples: 5
planning_samples: 3
batch_size: 2
effort: quick
call: {guidance_scale: 2.0}
"""


def start(command, **variables):
    variables = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **variables}
    return subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | variables,
    )  # fmt: skip


def finish(process):
    try:
        output, errors = process.communicate(timeout=600)
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
    """All files but for what is counted in them: several processes replay calls, one has no need to."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    manifest, evidence = (json.loads(found.pop(name)) for name in ("cemq.json", "evidence.json"))
    for told in (manifest, evidence):
        del told["generations"]
    del manifest["checksum"], manifest["files"]["evidence.json"]
    return found | {"cemq.json": manifest, "evidence.json": evidence}


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
from cemq.parallel import launched

with launched() as processes:
    print("rank", processes.rank)
    for count in (7, 3, 1, 0):  # also fewer items than processes
        mine = processes.share([torch.full((2,), float(item)) for item in range(count)])
        assert [each[0].item() for each in processes.gather(mine)] == list(range(count))
        dealt = list(processes.deal(count))  # whoever is free takes the next, and none is done twice
        assert dealt == sorted(dealt)
        assert sorted(number for each in processes.gather([dealt]) for number in each) == list(range(count))
    with processes.apart():
        assert not torch.distributed.is_initialized()
    assert torch.distributed.is_initialized()
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
    folder = tmp_path_factory.mktemp("processes")
    make_dit().save_pretrained(folder / "model")
    (folder / "labels.txt").write_text("\n".join(map(str, range(20))))
    file = folder / "recipe.yaml"
    file.write_text(f"model: {folder / 'model'}\ncalib: {folder / 'labels.txt'}{RECIPE}")
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
    took = [
        json.loads((folder / "evidence.json").read_text())["generations"]["replayed"] for folder in (bundle, output)
    ]
    assert took[0] == 0 < took[1]
    assert not list(output.parent.glob(".*"))


SETTINGS = {
    "samples": 3, "planning_samples": 6, "batch_size": 3, "scheme": "w8a8", "solver": "uniform", "also_steps": [],
    "rectify": "none",
}  # fmt: skip
# cache-dit decides by the mean over all processes that it knows of
COMPARED = {"methods": ["cemq", "uniform", "cache-dit-dbcache", "cem"], "ratios": ["2x", "3x"], "samples": 2}
PAIR = """
import json
import os
import signal
import sys
from pathlib import Path

import cemq
from cemq import cli
from cemq.evaluation.analysis import analyze
from cemq.parallel import launched
from cemq.runtime.runner import Runner

bundle, folder, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
with launched() as processes:
    same = {"device": "cpu", "processes": processes}
    picture = folder / "two.png"
    found = cemq.evaluate(bundle, samples=5, batch_size=2, picture=picture, **same).to_dict()
    few = cemq.evaluate(bundle, samples=2, **same).to_dict()  # one batch: the other process has nothing to do
    ranks = analyze(bundle, schedules=5, samples=9, predictors=["reuse"], **same)
    cemq.quantize_and_schedule(output=folder / "few-two", **settings, **same)
    cemq.replan(bundle, folder / "again-two", steps=5, budget=2, **same)
    compared = cemq.compare(bundle, **json.loads(sys.argv[4]), **same).to_dict()

# The same two processes now draw one picture together, each half of its tokens. torch.distributed is still set up.
import torch
from diffusers import ContextParallelConfig
from diffusers.hooks.context_parallel import ContextParallelSplitHook
from support.processes import SHARED_SCHEDULE, draw_shared, quantized_flux

torch.accelerator.device_count = lambda: 1  # without an accelerator diffusers 0.42 divides by it, and it is 0
splits, split = [], ContextParallelSplitHook.pre_forward
ContextParallelSplitHook.pre_forward = lambda *all, **named: (splits.append(None), split(*all, **named))[1]


def enable(pipe):
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


parallel = {}
for order in ("schedule on top", "schedule below"):
    pipe = quantized_flux()
    if order == "schedule on top":
        enable(pipe)
    with cemq.attached(pipe, SHARED_SCHEDULE) as hook:
        if order == "schedule below":
            enable(pipe)
        drawn = draw_shared(pipe)
        counts = [hook.full_evaluations, hook.skipped_evaluations, len(splits)]
    splits.clear()
    full = draw_shared(pipe)
    parallel[order] = {"scheduled": drawn.tolist(), "counts": counts, "full": full.tolist(), "splits": len(splits)}
    splits.clear()
if processes.is_main:
    print(json.dumps([found, few, ranks, parallel, compared]), flush=True)

# One of them fails, as a command would; there is no launcher here that would end the other. Then both go on.
runs, run_one = [], Runner.run_one


def interrupted(*arguments, **keywords):
    runs.append(None)
    if len(runs) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return run_one(*arguments, **keywords)


build = ["cemq", "quantize-and-schedule", "--recipe", str(folder / "recipe.yaml"), "--device", "cpu"]
for bad, run in ((["--calib", "nowhere.txt"], run_one), ([], interrupted), ([], run_one)):
    sys.argv = [*build, "-o", str(folder / "failed")]
    if processes.rank == 1:
        sys.argv += bad
        Runner.run_one = run
    try:
        cli.main()
    except SystemExit as end:
        print(end.code)
"""


@pytest.fixture(scope="module")
def pair(bundle):
    """Two processes at work; both live through all of it."""
    settings = load_recipe(str(bundle.with_name("recipe.yaml"))).model_dump(exclude_unset=True) | SETTINGS
    done = together(PAIR, bundle, bundle.parent, json.dumps(settings), json.dumps(COMPARED))
    assert [each.returncode for each in done] == [0, 0], "\n\n".join(each.stderr[-4000:] for each in done)
    cemq.quantize_and_schedule(output=bundle.with_name("few-one"), **settings, device="cpu")
    return done


@pytest.fixture(scope="module")
def shared(pair):
    """What they found together: two evaluations, an analysis, pictures, and a comparison."""
    return json.loads(pair[0].stdout.splitlines()[0])


def same_but_for_time(found, expected):
    expected = json.loads(json.dumps(expected.to_dict()))
    assert found.pop("wall_ratio") > 0
    assert found == {name: value for name, value in expected.items() if name != "wall_ratio"}


@pytest.mark.slow
def test_evaluation_and_analysis_find_what_one_process_finds(bundle, shared):
    picture = bundle.with_name("one.png")
    same_but_for_time(shared[0], cemq.evaluate(bundle, samples=5, batch_size=2, picture=picture, device="cpu"))
    assert picture.read_bytes() == bundle.with_name("two.png").read_bytes()
    alone = analyze(bundle, schedules=5, samples=9, predictors=["reuse"], device="cpu")
    assert shared[2] == json.loads(json.dumps(alone))


@pytest.mark.slow
def test_more_processes_than_batches_find_the_same(bundle, shared):
    same_but_for_time(shared[1], cemq.evaluate(bundle, samples=2, device="cpu"))
    assert content(bundle.with_name("few-one")) == content(bundle.with_name("few-two"))


@pytest.mark.slow
@pytest.mark.usefixtures("pair")
def test_two_processes_plan_again_what_one_does(bundle):
    cemq.replan(bundle, bundle.with_name("again-one"), steps=5, budget=2, device="cpu")
    assert content(bundle.with_name("again-one")) == content(bundle.with_name("again-two"))


def test_methods_are_dealt_out_and_their_rows_are_those_of_one_process(bundle, shared):
    alone = json.loads(json.dumps(cemq.compare(bundle, **COMPARED, device="cpu").to_dict()))
    for row in (*alone["rows"], *shared[4]["rows"]):
        assert row.pop("wall_ratio") > 0, row["status"]
    assert shared[4] == alone
    assert len(alone["rows"]) == 1 + 4 * 2


@pytest.mark.parametrize("order", ["schedule on top", "schedule below"])
def test_a_schedule_goes_with_context_parallelism_and_skipped_steps_exchange_nothing(shared, order):
    parallel, pipe = shared[3][order], quantized_flux()
    assert parallel["counts"] == [6, 6, 6]  # true guidance calls twice a step; inputs are split for full ones alone
    np.testing.assert_allclose(parallel["full"], draw_shared(pipe), atol=1e-5)
    assert parallel["splits"] == 2 * STEPS  # detached: as without a schedule
    with cemq.attached(pipe, SHARED_SCHEDULE):
        np.testing.assert_allclose(parallel["scheduled"], draw_shared(pipe), atol=1e-5)


def test_bad_input_and_ctrl_c_in_one_process_end_both_and_the_same_command_goes_on(pair, bundle):
    codes = [[line for line in each.stdout.splitlines() if line in ("0", "1", "130")] for each in pair]
    assert codes == [["1", "130", "0"], ["1", "1", "0"]]
    main, other = ([line for line in each.stderr.splitlines() if line.startswith("cemq: ")] for each in pair)
    assert main[0].startswith("cemq: process 1: calibration file 'nowhere.txt' cannot be read")
    assert main[1:] == ["cemq: interrupted; what is finished is kept, and the same command goes on from there"]
    assert other == []
    assert "Traceback" not in pair[0].stderr + pair[1].stderr
    assert re.search(r"^resuming: [1-9] of [0-9]+ reference runs", pair[0].stderr, flags=re.M)
    assert [file.name for file in bundle.parent.iterdir() if "failed" in file.name] == ["failed"]
    assert content(bundle.with_name("failed")) == content(bundle)
