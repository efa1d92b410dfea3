"""Methods side by side: what is counted, how settings are found, and that every method runs or says why not."""

import json
import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.hooks import MagCacheConfig, apply_mag_cache
from hypothesis import given
from hypothesis import strategies as st
from support.pipelines import BATCH, CALL, make_dit, make_flux, run_dit, run_flux, save_dit
from torch import nn
from typer.testing import CliRunner

import cemq
import cemq.evaluation.rivals.comparison  # which knows all methods
from cemq.bundle.manifest import read_bundle
from cemq.cli import app
from cemq.errors import CemqError, InfeasibleBudgetError, InputError
from cemq.evaluation.rivals import libraries
from cemq.evaluation.rivals.contest import FULL
from cemq.evaluation.rivals.methods import METHODS, Interval, Steps, Threshold, add_method
from cemq.evaluation.rivals.saved import read_comparison
from cemq.evaluation.rivals.sweep import CLOSE, settle
from cemq.evaluation.rivals.work import counted_work
from cemq.quantize import CemqConfig, quantize_in_place
from cemq.runtime import attached
from cemq.runtime.magcache import MagCache
from cemq.schedule import CacheSchedule
from cemq.search.choose import plan

STEPS = 8
# One of each kind: a plan, a published rule, a policy, and each library
QUICK = ("cemq", "fora", "dpcache", "teacache", "diffusers-magcache", "cache-dit-mask")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_dit(tmp_path_factory.mktemp("compare"), labels=40, layers=3)


def compared(folder, names, **settings):
    return cemq.compare(
        folder / "pipeline", calib=str(folder / "labels.txt"), steps=STEPS, call=CALL, samples=2, device="cpu",
        methods=names, **settings,
    )  # fmt: skip


@pytest.fixture
def another():
    """Registers a method of its own for the length of a test."""
    before = dict(METHODS)
    yield lambda name, **options: add_method(name, "nobody", Steps(), **options)
    METHODS.clear()
    METHODS.update(before)


# --- work


def work_of(pipe):
    with counted_work(pipe) as work:
        run_dit(pipe, steps=STEPS)
    return work.operations


def test_every_product_of_the_layers_is_counted():
    pipe, by_hand = make_dit(), []

    def note(layer, args, output):
        (given,) = args
        if isinstance(layer, nn.Linear):
            by_hand.append(given.numel() * layer.out_features)
        else:
            by_hand.append(output[:, 0].numel() * layer.weight.numel())

    layers = [each for each in pipe.transformer.modules() if isinstance(each, (nn.Linear, nn.Conv2d))]
    for layer in layers:
        layer.register_forward_hook(note)
    assert work_of(pipe) == sum(by_hand) > 0


def test_skipped_steps_are_not_counted_and_quantized_layers_are():
    pipe = make_dit()
    full = work_of(pipe)
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 3), predictor="reuse")
    with attached(pipe, schedule):
        assert work_of(pipe) == full / 4
    with attached(pipe, schedule, cache="modules"):
        assert full / 4 < work_of(pipe) < full
    quantize_in_place(pipe.transformer, CemqConfig("w8a8"))
    assert work_of(pipe) == full


# --- settings


@given(st.floats(1.1, 8), st.floats(0.3, 4), st.floats(1, 9))
def test_a_threshold_is_found_where_one_gives_the_ratio(target, power, most):
    def measured(threshold):
        return 1 + (most - 1) * threshold**power / (1 + threshold**power)

    found = measured(settle(Threshold(low=1e-4, high=1e4), target, measured, 50))
    within = min(max(target, measured(1e-4)), measured(1e4))
    assert abs(math.log(found / within)) <= 2 * CLOSE


@given(st.lists(st.floats(1.1, 8), min_size=2, max_size=4), st.floats(0.5, 4))
def test_what_was_tried_for_one_ratio_serves_the_next(targets, power):
    tried, known, knob = [], {}, Threshold(low=1e-4, high=1e4)

    def measured(threshold):
        tried.append(threshold)
        return 1 + 9 * threshold**power / (1 + threshold**power)

    for target in targets:
        assert abs(math.log(measured(settle(knob, target, measured, 50, known)) / target)) <= 2 * CLOSE
        tried.pop()  # that of this test itself
    assert len(tried) == len(set(tried)) == len(known)


def test_a_ratio_that_is_out_of_reach_is_not_sought_anew():
    known, knob = {}, Threshold(low=1e-4, high=1e4)
    for target in (3.0, 5.0):
        settle(knob, target, lambda threshold: min(1 + threshold, 2.5), 50, known)
    assert len(known) <= 14


@given(st.integers(8, 100), st.floats(1.2, 9), st.floats(0, 0.4))
def test_steps_are_the_nearest_whatever_skipped_steps_cost(num_steps, target, cost):
    def measured(steps):
        return num_steps / (steps + cost * (num_steps - steps))

    def off(steps):
        return abs(math.log(measured(steps) / target))

    assert off(settle(Steps(), target, measured, num_steps)) <= min(map(off, range(2, num_steps + 1))) + CLOSE


def test_an_interval_stops_where_longer_ones_skip_no_more():
    tried = []

    def measured(interval):
        tried.append(interval)
        return min(interval, 3.0)

    assert settle(Interval(low=1, high=50), 5.0, measured, 50) == 5
    assert len(tried) < 4


def test_a_hole_of_a_published_rule_ends_the_search():
    def measured(steps):
        if steps < 7:
            raise InfeasibleBudgetError("none")
        return 60 / (steps + 5)

    assert settle(Steps(), 6.0, measured, 50) == 7  # 8 would give 4.6, 7 gives 5, and 5 would be nearest
    with pytest.raises(InfeasibleBudgetError):
        settle(Steps(), 25.0, measured, 50)


def test_the_plan_of_every_ratio_has_an_effort_of_its_own(folder, monkeypatch):
    spent = []

    def noted(loop, settings):
        spent.append((settings.budget, loop.spent))
        return plan(loop, settings)

    monkeypatch.setattr("cemq.evaluation.rivals.planned.plan", noted)
    compared(folder, ["cemq"], ratios=["2x", "4x"])
    assert spent == [(4, 0.0), (2, 0.0)]


# --- methods


def rows_of(found, name):
    return [row for row in found.rows if row.method == name]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in METHODS]
)
def test_every_method_runs_and_leaves_nothing_behind(folder, name):
    (row,) = rows_of(compared(folder, [name], ratios=["2x"]), name)
    assert row.status == "ok", row.status
    assert 1 < row.compute_ratio < 8.1
    assert row.worst_db <= row.p5_db <= row.psnr_db < 100
    assert row.wall_ratio > 0


def test_what_is_compared_is_the_scheme_against_full_precision(folder):
    found = compared(folder, ["uniform"], ratios=[2, "4x"], schemes=["none", "w4a8"])
    full = {row.scheme: row for row in rows_of(found, FULL)}
    assert full["none"].psnr_db == 100
    assert 20 < full["w4a8"].psnr_db < 60
    ratios = [(row.scheme, round(row.compute_ratio, 6)) for row in rows_of(found, "uniform")]
    assert ratios == [("none", 2.0), ("none", 4.0), ("w4a8", 2.0), ("w4a8", 4.0)]


def test_what_computes_more_than_was_asked_for_is_told_apart(folder):
    """Modules are cached, and the rest of the denoiser is computed on every step: 8x cannot be had."""
    found = compared(folder, ["uniform", "fora"], ratios=["4x"])
    assert [(row.method, row.is_near) for row in found.rows] == [(FULL, True), ("uniform", True), ("fora", False)]


def test_a_method_that_fails_or_is_not_there_is_a_row_that_says_so(folder, another):
    @another("broken")
    def _(bench, knob):
        raise RuntimeError("no such block\nand more")

    @another("absent", package="no_such_package")
    def _(bench, knob):
        raise AssertionError("never called")

    found = compared(folder, ["broken", "absent", "uniform"], ratios=["2x"])
    assert [(row.method, row.status, row.psnr_db is None) for row in found.rows[1:]] == [
        ("broken", "RuntimeError: no such block", True),
        ("absent", "no_such_package is not installed", True),
        ("uniform", "ok", False),
    ]


def test_each_setting_is_judged_and_timed_once(folder, another):
    put_on = []

    @another("fixed")
    @contextmanager
    def _(bench, knob):
        put_on.append(knob)
        with attached(bench.runner.pipe, CacheSchedule(num_steps=STEPS, full_steps=(0, 4), predictor="reuse")):
            yield

    rows = rows_of(compared(folder, ["fixed"], ratios=[4, 4.05]), "fixed")
    assert [(row.target, row.setting, row.compute_ratio, row.status) for row in rows] == [
        (4, 2, 4.0, "ok"),
        (4.05, 2, 4.0, "ok"),
    ]
    assert rows[0].wall_ratio == rows[1].wall_ratio > 1
    assert put_on == [2, 2, 2, 2]  # once to settle, once to judge, twice to be timed


def test_a_method_that_leaves_something_behind_ends_the_comparison(folder, another):
    @another("sticky")
    @contextmanager
    def _(bench, knob):
        yield
        with torch.no_grad():
            bench.runner.pipe.transformer.transformer_blocks[0].ff.net[0].proj.weight.mul_(1.5)

    with pytest.raises(CemqError, match="method sticky left the pipeline other than it was"):
        compared(folder, ["sticky"], ratios=["2x"])


def test_a_name_is_taken_once(another):
    with pytest.raises(InputError, match="method 'uniform'"):
        another("uniform")(lambda bench, knob: None)


def test_magcache_of_ours_is_that_of_diffusers():
    """The same table, threshold and limits: the same steps are skipped, and the same picture is drawn."""
    pipe, table = make_dit(), [1.0, 1.02, 0.98, 1.05, 0.9, 1.0, 0.97, 0.93]
    limits = {"threshold": 0.12, "retention": 0.2, "most_skipped": 3}
    computed, calls = [], []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(len(calls)))
    pipe.transformer.transformer_blocks[1].ff.net[0].register_forward_hook(lambda *_: computed.append(calls[-1]))
    with attached(pipe, MagCache(magnitudes=tuple(table), **limits)):
        ours = run_dit(pipe, steps=STEPS)
    config = MagCacheConfig(
        threshold=0.12, retention_ratio=0.2, max_skip_steps=3, num_inference_steps=STEPS, mag_ratios=table
    )
    bench = SimpleNamespace(runner=SimpleNamespace(pipe=pipe), timestep=0.0)
    with libraries.hooked(bench, lambda model: apply_mag_cache(model, config)):
        for _ in range(2):  # nothing is left of the run before
            theirs = run_dit(pipe, steps=STEPS)
            np.testing.assert_allclose(theirs, ours, atol=1e-5)
    assert computed == [step + STEPS * number for number in range(3) for step in (0, 1, 4, 7)]


def test_nothing_of_cache_dit_stays_in_a_denoiser():
    """It has patched forwards, and put a list of blocks after another that comes later."""
    pipe = make_flux()
    names = [name for name, _ in pipe.transformer.named_modules()]
    bench = SimpleNamespace(runner=SimpleNamespace(pipe=pipe), num_steps=6, timestep=0.0)
    expected = run_flux(pipe)
    with METHODS["cache-dit-mask"].apply(bench, 2):
        assert "forward" in vars(pipe.transformer)
        run_flux(pipe)
    assert [name for name, _ in pipe.transformer.named_modules()] == names
    assert not any(vars(module).keys() & {"forward", "_is_patched"} for module in pipe.transformer.modules())
    assert np.array_equal(run_flux(pipe), expected)


def test_fastercache_of_diffusers_leaves_out_the_branch_without_a_label(folder):
    """Class labels come first in a batch, the empty one last; the hook takes the first half for the empty one."""
    pipe, seen = make_dit(), []
    bench = SimpleNamespace(
        runner=SimpleNamespace(pipe=pipe, run_one=lambda _: run_dit(pipe, steps=1)), timestep=0.0,
        batches=[BATCH], fitted=lambda name, fit: True,
    )  # fmt: skip
    embedder = pipe.transformer.transformer_blocks[0].norm1.emb
    with METHODS["diffusers-fastercache"].apply(bench, 2):
        handle = embedder.register_forward_pre_hook(lambda _, given: seen.append(given[1].tolist()))
        run_dit(pipe, steps=STEPS)
        handle.remove()
    labels, twice = list(BATCH.conditions), 2  # by the first block and by the final layer
    assert seen[:twice] == [[1000, 1000, *labels]] * twice
    skipped = [each for each in seen if len(each) == len(labels)]
    assert skipped == [labels] * len(skipped)
    assert 0 < len(skipped) < len(seen) == STEPS * twice


# --- the command


def test_the_command_prints_tables_or_json_and_draws(folder, tmp_path):
    asked = [
        "compare", folder / "pipeline", "--calib", folder / "labels.txt", "--steps", STEPS, "--samples", 2, "--methods",
        "uniform,cem", "--budgets", "2x,4x", "--device", "cpu", "--quiet",
    ]  # fmt: skip
    shown = CliRunner().invoke(app, [*map(str, asked), "--plot", str(tmp_path / "a.png")])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("uniform") == 2
    assert "* computes more" not in shown.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(CliRunner().invoke(app, [*map(str, asked), "--json"]).stdout)
    assert [(row["method"], row["target"]) for row in found["rows"]] == [
        (FULL, 1.0), ("uniform", 2.0), ("uniform", 4.0), ("cem", 2.0), ("cem", 4.0),
    ]  # fmt: skip
    wanted = {"method", "scheme", "compute_ratio", "wall_ratio", "psnr_db", "p5_db", "worst_db", "status"}
    assert all(wanted <= row.keys() for row in found["rows"])


def test_a_bundle_is_compared_as_it_is(folder, tmp_path):
    cemq.quantize_and_schedule(
        str(folder / "pipeline"), tmp_path / "bundle", calib=str(folder / "labels.txt"), scheme="w8a8", steps=STEPS,
        budget=3, effort="instant", rounding="nearest", device="cpu",
    )  # fmt: skip
    found = cemq.compare(tmp_path / "bundle", ratios=["2x"], methods=["uniform"], samples=2, device="cpu")
    assert [row.scheme for row in found.rows] == ["w8a8", "w8a8"]
    assert found.num_steps == STEPS
    assert found.rows[0].psnr_db < 100
    (tmp_path / "compare.json").write_text(json.dumps(found.to_dict()))
    assert read_comparison(tmp_path / "compare.json", read_bundle(tmp_path / "bundle")) == found
    with pytest.raises(InputError, match="is a bundle, which has its own: w8a8"):
        cemq.compare(tmp_path / "bundle", schemes=["w4a8"], methods=["uniform"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ratios": ["1x"]}, "compute ratio '1x': give one above 1"),
        ({"ratios": ["fast"]}, "compute ratio 'fast'"),
        ({"names": ["unifrom"]}, "method 'unifrom'"),
        ({"schemes": ["w3a3"]}, "w3a3"),
        ({"schemes": ["nobody:w8a8"]}, "nobody"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_loaded(folder, settings, said, monkeypatch):
    monkeypatch.setattr(cemq.Runner, "run", lambda *_: pytest.fail("something was run"))
    names = settings.pop("names", ["uniform"])
    with pytest.raises(CemqError, match=said):
        compared(folder, names, **settings)
