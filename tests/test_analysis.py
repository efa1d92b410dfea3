import tempfile
from functools import partial

import numpy as np
import pytest
import yaml
from PIL import Image
from support.pipelines import make_dit
from support.placing import needed_to_draw
from support.priors import prior_of, trajectories
from typer.testing import CliRunner

import cemq
from cemq import build
from cemq.build import bundle_of
from cemq.cli import app
from cemq.errors import CemqError, InputError, ModelError, PlacementError
from cemq.evaluation import analysis
from cemq.evaluation.analysis import (
    analyze,
    cem_cost,
    check_analysis,
    costs_of,
    errors_found,
    rank_correlation,
    unweighted,
)
from cemq.prior.error_prior import VIEWS
from cemq.schedule import CacheSchedule, cem_costs, plan_schedule, solve_cem
from cemq.search.trials import Trial


def test_rank_correlation_sees_the_order_alone():
    assert rank_correlation([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [9, 4, 1, 0]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3], [5, 5, 5]) == 0


def test_rank_correlation_agrees_with_scipy_where_values_are_tied():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    for _ in range(5):
        one, other = random.integers(0, 6, 20), random.integers(0, 6, 20)
        assert rank_correlation(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)


def test_what_one_sample_makes_of_a_schedule_is_left_out_of_its_error():
    usual, schedule = np.array([40.0, 42, 44, 46, 48, 50]), CacheSchedule(num_steps=4, full_steps=(0, 2))
    rows = [usual + 1, usual - 1, usual + np.array([0, 0, -30.0, 0, 0, 0]), usual + np.array([0, 0, 30.0, 0, 0, 0])]
    measured = {"schedule": schedule, "full_steps": 2.0, "correction": None, "sample_relative_l2": np.ones(6)}
    trials = [Trial(**measured, sample_psnr_db=row) for row in rows]
    assert -20 * np.log10(errors_found(trials)) == pytest.approx([46, 44, 45, 45])


def fitted_prior(steps):
    q, v, _ = trajectories(steps)
    return prior_of(q, v, sensitivity=np.random.default_rng(1).uniform(0.1, 2, steps), coherence=4.0)


@pytest.mark.parametrize("view", VIEWS)
def test_the_cost_of_a_schedule_of_the_cem_rule_is_what_its_solver_says(view):
    prior = fitted_prior(20)
    _, total = solve_cem(cem_costs(prior.cosine_distances(view)), 8)
    assert cem_cost(prior, plan_schedule(prior, 8, solver="cem", view=view), view) == pytest.approx(total)


def test_every_cost_is_named_and_unweighted_ones_know_nothing_of_the_fit():
    prior, schedule = fitted_prior(10), CacheSchedule(num_steps=10, full_steps=(0, 3, 7))
    costs = costs_of(prior)
    assert set(costs) == {f"{kind}, {view}" for kind in ("cem", "unweighted", "fitted") for view in VIEWS}
    for view in VIEWS:
        assert costs[f"fitted, {view}"](schedule) == prior.final_error(schedule.served, view=view)
        plain = costs[f"unweighted, {view}"](schedule)
        assert (
            plain
            == unweighted(prior).final_error(schedule.served, view=view)
            != prior.final_error(schedule.served, view=view)
        )


@pytest.mark.parametrize(("steps", "budget", "count"), [(50, 15, 40), (8, 3, 21), (6, 2, 5)])
def test_schedules_to_test_with_differ_and_have_the_budget(steps, budget, count):
    found = analysis.test_schedules(steps, count, "reuse", budget, "none")
    assert len({schedule.full_steps for schedule in found}) == len(found) == count
    assert {(schedule.budget, schedule.predictor) for schedule in found} == {(budget, "reuse")}


SETTINGS = {
    "steps": 6, "budget": 3, "samples": 2, "planning_samples": 2, "effort": "quick", "solver": "uniform",
    "rectify": "none", "call": {"guidance_scale": 2.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("analysis")
    make_dit().save_pretrained(root / "pipeline")
    (root / "labels.txt").write_text("1\n2\n3\n")
    settings = SETTINGS | {"calib": str(root / "labels.txt")}
    cemq.quantize_and_schedule(str(root / "pipeline"), root / "bundle", scheme="w4a8", **settings)
    return root / "bundle"


def test_a_bundle_is_analyzed_on_schedules_that_were_run(bundle):
    found = analyze(bundle, schedules=6, predictors=("reuse",), samples=2, budget=3, device="cpu")
    points, spearman = found["points"]["reuse"], found["spearman"]["reuse"]
    assert (found["scheme"], found["samples"], len(points)) == ("w4a8", 2, 6)
    errors = [point["error"] for point in points]
    assert min(errors) > 0
    for cost, value in spearman.items():
        assert value == pytest.approx(rank_correlation([point[cost] for point in points], errors))


def test_a_bundle_is_analyzed_within_a_limit(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = {"schedules": 5, "predictors": ["reuse", "taylor2"], "samples": 2, "budget": 3, "device": "cpu"}
    cached = 12 << 10  # of three steps, by taylor2
    within, found = analyze(bundle, vram=needed_to_draw(bundle, beside=cached), **asked), analyze(bundle, **asked)
    for name in asked["predictors"]:
        pairs = list(zip(within["points"][name], found["points"][name], strict=True))
        assert [one["full_steps"] for one, _ in pairs] == [other["full_steps"] for _, other in pairs]
        for one, other in pairs:
            assert one["psnr_db"] == pytest.approx(other["psnr_db"], abs=0.05)
    assert list((tmp_path / "cache").rglob("*.dat"))  # the bundle's weights rest there
    assert not list((tmp_path / "cache").rglob("original-*"))


def test_what_does_not_fit_is_not_analyzed(bundle, monkeypatch):
    monkeypatch.setattr(cemq.Runner, "run_one", lambda *_: pytest.fail("something was run"))
    with pytest.raises(PlacementError, match="vram=1000 B: nothing fits"):
        analyze(bundle, schedules=5, budget=3, vram=1000, device="cpu")
    with pytest.raises(PlacementError, match=r"the cache may hold 12\.0 KiB, and with that sequential offload to disk"):
        analyze(bundle, schedules=5, budget=3, predictors=["taylor2"], vram=needed_to_draw(bundle), device="cpu")


def test_an_analysis_of_too_few_or_impossibly_many_schedules_is_refused(bundle):
    with pytest.raises(InputError, match="schedules=4: a rank correlation needs at least 5"):
        analyze(bundle, schedules=4, device="cpu")
    with pytest.raises(InputError, match="schedules=60: 2 of 6 steps can be chosen in 5 ways only"):
        analyze(bundle, schedules=60, device="cpu")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"budget": 60}, r"budget=60 is out of range for 50 steps: choose 2\.\.50"),
        ({"budget": 49}, "schedules=60: 49 of 50 steps can be chosen in 49 ways only"),
        ({"corrector": "cubic"}, "unknown corrector 'cubic'"),
    ],
)
def test_what_cannot_be_analyzed_is_refused_before_a_model_is_quantized(asked, message, monkeypatch):
    monkeypatch.setattr(build, "building", lambda *_, **__: pytest.fail("began long work"))
    usual = {"schedules": 60, "predictors": ["reuse"], "budget": None, "corrector": None}
    check = partial(check_analysis, **usual | asked)
    with pytest.raises(CemqError, match=message), bundle_of("builtin:dit-digits", check=check):
        pass


def test_a_model_is_analyzed_through_a_bundle_that_is_not_kept(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(SETTINGS | {"calib": str(bundle.parent / "labels.txt")}))
    same = {"schedules": 5, "predictors": ("reuse",), "samples": 1, "budget": 3, "device": "cpu"}
    asked, checked = {"recipe": str(recipe), "scheme": "w4a8", "device": "cpu"}, []
    with bundle_of(bundle.parent / "pipeline", check=checked.append, **asked) as folder:
        found = analyze(folder, **same)
    assert checked == [SETTINGS["steps"]]
    assert found["points"] == analyze(bundle, **same)["points"]
    assert list(tmp_path.iterdir()) == [recipe]


def test_a_bundle_is_not_quantized_again_to_be_analyzed(bundle):
    with pytest.raises(InputError, match="is a bundle already: leave scheme and recipe out"):
        bundle_of(bundle, check=print, scheme="w8a8").__enter__()
    with pytest.raises(ModelError, match="no such model 'nowhere'"):
        bundle_of("nowhere", check=lambda steps: None).__enter__()


def test_an_analysis_from_the_command_line_is_printed_and_drawn(bundle, tmp_path):
    arguments = ["analyze", str(bundle), "--schedules", "5", "--samples", "1", "--predictors", "reuse"]
    done = CliRunner().invoke(app, [*arguments, "--plot", str(tmp_path / "a.png"), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "reuse: Spearman of predicted cost and measured error over 5 schedules" in done.stdout
    assert all(cost in done.stdout for cost in ("cem, combined", "unweighted, cache", "fitted, self"))
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
