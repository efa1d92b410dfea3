"""Memory under ``vram=`` of a bundle larger than the limit, as docs/benchmarks/placement.py builds and measures it."""

import importlib.util
import sys
from pathlib import Path

import pytest

import cemq

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark of memory is read from /proc")


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[1] / "docs" / "benchmarks" / "placement.py"
    spec = importlib.util.spec_from_file_location("placement_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(
    ("model", "scheme", "placement"),
    [("sd3", "none", "group offload to disk, block level"), ("dit", "w8a8", "sequential offload to disk")],
)
def test_loading_and_drawing_never_take_more_than_the_plan(benchmark, model, scheme, placement, tmp_path):
    bundle = tmp_path / "bundle"
    benchmark.build(bundle, model, scheme, steps=10)
    plan = cemq.plan_memory(bundle, "1000GiB", device="cpu")
    wanted = next(e for e in plan.estimates if e.name == placement)
    limit = wanted.device_bytes + plan.reserve_bytes
    assert sum(component.weight_bytes for component in plan.components) > 1.5 * limit
    # a process of its own; the first load, which writes the files that weights rest in
    found = benchmark.call("memory", bundle, limit, tmp_path / "offload")
    assert (found["placement"], found["planned"]) == (placement, limit)
    assert 0 < found["loading"] <= found["peak"] <= limit
