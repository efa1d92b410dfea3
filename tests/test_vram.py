"""Memory under ``vram=`` of a bundle larger than the limit, as docs/benchmarks/placement.py builds and measures it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cemq

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark of memory is read from /proc")
BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks"


def run(script, *arguments):
    """A script of docs/benchmarks, in a process of its own."""
    command = [sys.executable, BENCHMARKS / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def stage(*arguments):
    """What a stage of placement.py prints."""
    done = run("placement.py", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("sd3", "none", "group offload to disk, block level"), id="sd3", marks=pytest.mark.slow),
        pytest.param(("dit", "w8a8", "sequential offload to disk"), id="dit"),
    ],
)
def larger(request, tmp_path_factory):
    """A bundle larger than what a placement needs of memory; that placement, and what it needs."""
    model, scheme, placement = request.param
    bundle = tmp_path_factory.mktemp("larger") / "bundle"
    stage("build", bundle, model, scheme, 10)
    plan = cemq.plan_memory(bundle, "1000GiB", device="cpu")
    wanted = next(e for e in plan.estimates if e.name == placement)
    limit = wanted.device_bytes + plan.reserve_bytes
    assert sum(component.weight_bytes for component in plan.components) > 1.5 * limit
    yield bundle, placement, limit
    shutil.rmtree(bundle)


@pytest.mark.slow  # the next test has a kernel hold the plan to its word
def test_loading_and_drawing_never_take_more_than_the_plan(larger, tmp_path):
    bundle, placement, limit = larger
    found = stage("memory", bundle, limit, tmp_path / "offload")  # the first load, which writes what weights rest in
    assert (found["placement"], found["planned"]) == (placement, limit)
    assert 0 < found["loading"] <= found["peak"] <= limit
    assert found["heap"] < 20e6  # a load that took the models from it left a hole that weights filled, if it stayed


def test_a_kernel_that_grants_what_is_planned_kills_only_who_loads_without_vram(larger, tmp_path):
    bundle, _, limit = larger
    ends = {vram: stage("enforced", limit, bundle, vram, tmp_path / "offload") for vram in (limit, 0)}
    if None in ends.values():
        pytest.skip("no memory control group can be made here: that takes root and a cgroup file system to write to")
    assert ends == {limit: "finished", 0: "killed"}
