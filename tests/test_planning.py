"""Plans that were run, on a tiny pipeline whose runs take a tenth of a second."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from support.pipelines import STEPS
from support.planning import BUDGET, prepared, quickly

from cemq.errors import InfeasibleBudgetError, InputError
from cemq.prior.error_prior import ErrorPrior
from cemq.prior.profile import expected_sensitivity
from cemq.runtime import attached
from cemq.schedule import CacheSchedule, full_compute, plan_schedule
from cemq.schedule.plan import Plan
from cemq.schedule.rectify import METHODS
from cemq.search.choose import plan, predicted
from cemq.search.explore import Search, Wanted
from cemq.search.explore import planned as planned_by
from cemq.search.propagation import Fit, sample_schedules
from cemq.search.settings import PlanSettings, SearchSettings
from cemq.search.trials import ClosedLoop, Trial


@pytest.fixture(scope="module")
def quantized():
    return prepared()


@pytest.fixture(scope="module")
def searched(quantized):
    return planned(quantized, BUDGET)


def planned(quantized, budget, **settings):
    loop = ClosedLoop(**quantized)
    return loop, quickly(loop, budget, **settings)


def plain(loop, budget):
    """Trials of no more than this budget, uncorrected, that a plan may be."""
    return [trial for trial in loop.plain() if trial.schedule.budget <= budget]


def test_the_winner_is_never_worse_than_what_was_published(searched):
    loop, found = searched
    winner = found.evidence["winner"]
    published = [trial for trial in plain(loop, BUDGET) if trial.schedule.solver in ("uniform", "cem")]
    assert published
    assert all(winner["psnr_db"] >= trial.psnr_db for trial in published)
    uniform = CacheSchedule(num_steps=STEPS, full_steps=(0, 2, 4), solver="uniform")
    assert uniform.full_steps in {trial.schedule.full_steps for trial in plain(loop, BUDGET)}
    assert winner["psnr_db"] >= loop.run(uniform).psnr_db


def test_the_winner_is_the_best_that_was_run_within_the_budget(searched):
    loop, found = searched
    assert found.schedule.budget <= BUDGET
    best = max(plain(loop, BUDGET), key=lambda trial: trial.psnr_db)
    assert found.schedule == best.schedule


def test_the_search_keeps_within_what_it_may_take(searched):
    loop, found = searched
    assert found.evidence["search_generations"] <= 9 * loop.samples
    assert found.evidence["search_generations"] == pytest.approx(loop.spent, abs=0.01)
    spent = sum(trial.samples * trial.schedule.budget / STEPS for trial in loop.trials)
    assert spent <= loop.spent + 1e-9  # a sample that was drawn twice counts twice


def test_what_is_fitted_to_has_the_budget_that_is_planned_for(searched):
    loop, found = searched
    taught = [trial.schedule for trial in loop.trials if trial.schedule.solver == "sample"]
    assert found.evidence["fit"]["runs"] == len(taught) + 1 > 5
    assert {schedule.budget for schedule in taught} == {BUDGET, 2}  # and what is nearest to half of it
    assert sum(schedule.budget == BUDGET for schedule in taught) >= len(taught) / 2


def test_nothing_is_run_twice(searched):
    loop, _ = searched
    served = [(trial.schedule.served.tobytes(), trial.correction, trial.part_from) for trial in loop.trials]
    assert len(set(served)) == len(served) > 6
    count = len(loop.trials)
    known = loop.plain()[2]
    assert loop.run(known.schedule) is known
    assert len(loop.trials) == count


def test_the_search_goes_on_where_all_neighbours_of_the_best_were_run(quantized):
    loop = ClosedLoop(**quantized)
    loop.run(CacheSchedule(num_steps=STEPS, full_steps=range(STEPS)))
    settings = PlanSettings(budget=BUDGET, predictor="taylor1")
    search = Search(loop=loop, settings=settings, corrector="none")
    search.explore(BUDGET, math.inf)
    found = {trial.schedule.full_steps for trial in loop.trials if trial.schedule.budget == BUDGET}
    assert found == {(0, *rest) for rest in itertools.combinations(range(1, STEPS), BUDGET - 1)}


def test_a_trial_is_what_a_run_gives(quantized, searched):
    loop, _ = searched
    trial = next(trial for trial in loop.trials if trial.schedule.budget < STEPS)
    with attached(loop.runner.pipe, Plan(schedule=trial.schedule, sampler=loop.prior.metadata.sampler)):
        again = loop.runner.run_one(loop.batches[0])
    moved = (again.latents - loop.references[0].latents).double()
    shares = moved.flatten(1).norm(dim=1) / loop.references[0].latents.double().flatten(1).norm(dim=1)
    assert trial.relative_l2 == pytest.approx(shares.mean().item(), rel=1e-6)
    mean_squares = np.square(again.images - loop.references[0].images, dtype=np.float64).mean((1, 2, 3))
    assert trial.psnr_db == pytest.approx(np.mean(-10 * np.log10(mean_squares)), rel=1e-4)
    assert trial.error == pytest.approx(np.exp(np.log(mean_squares).mean() / 2), rel=1e-4)


def test_the_evidence_says_what_was_run_and_what_is_predicted(searched):
    loop, found = searched
    evidence = json.loads(json.dumps(found.evidence))  # as it is written
    assert (evidence["solver"], evidence["effort"], evidence["samples"], evidence["seeds"]) == (
        "search", "thorough", 2, [5, 6],
    )  # fmt: skip
    assert evidence["full_compute"]["schedule"]["full_steps"] == list(range(STEPS))
    assert len(evidence["trials"]) == len(loop.trials)
    assert evidence["winner"] in evidence["trials"]
    assert CacheSchedule.from_dict(evidence["winner"]["schedule"]) == found.schedule
    assert (evidence["tolerance"], evidence["target_psnr"]) == (None, None)
    assert evidence["fit"]["runs"] > 5
    assert evidence["fit"]["coherence_steps"] == found.prior.coherence
    assert [point["budget"] for point in evidence["curve"]] == list(range(2, STEPS + 1))
    full = evidence["curve"][-1]
    assert full["measured_psnr_db"] == evidence["full_compute"]["psnr_db"]
    assert full["predicted_error"] == pytest.approx(found.prior.final_error(np.eye(STEPS)))
    best = evidence["curve"][found.schedule.budget - 2]
    assert best["measured_psnr_db"] is not None


def test_the_prior_of_a_plan_has_learned_from_the_runs(searched, quantized):
    _, found = searched
    assert isinstance(found.prior, ErrorPrior)
    assert np.allclose(quantized["prior"].sensitivity, expected_sensitivity(quantized["prior"].step_sizes))
    assert not np.allclose(found.prior.sensitivity, quantized["prior"].sensitivity)
    assert found.prior.qq is quantized["prior"].qq


def test_auto_keeps_a_correction_only_where_it_helps(quantized):
    loop = ClosedLoop(**quantized)
    found = plan(loop, PlanSettings(budget=BUDGET, effort="thorough", allowed=15.0))
    uncorrected = next(t for t in loop.trials if t.schedule == found.schedule and t.correction is None)
    tried = {t.correction: t for t in loop.trials if t.schedule == found.schedule and t.correction}
    assert set(tried) == set(METHODS) - {"erta"}  # this sampler's steps cannot be scaled
    gains = {method: trial.sample_psnr_db - uncorrected.sample_psnr_db for method, trial in tried.items()}
    certain = {m: g.mean() for m, g in gains.items() if g.mean() > 6.31 * g.std(ddof=1) / len(g) ** 0.5}  # of two
    assert (found.correction and found.correction.method) == max(certain, key=certain.get, default=None)


def trial_of(schedule, samples):
    return Trial(
        schedule=schedule,
        correction=None,
        sample_relative_l2=np.full(len(samples), 0.1),
        sample_psnr_db=np.array(samples),
        full_steps=schedule.full_count,
    )


@pytest.mark.parametrize(("lucky", "wins"), [([59.0, 59.0, 62.1], "steady"), ([60.1, 60.1, 60.1], "lucky")])
def test_luck_on_few_samples_does_not_win(quantized, lucky, wins):
    """What measures better because of one sample alone loses to what is predicted to be better; a steady gain wins."""
    prior = quantized["prior"]
    good, bad = sorted(
        (plan_schedule(prior, BUDGET), CacheSchedule(num_steps=STEPS, full_steps=range(BUDGET), predictor="taylor1")),
        key=lambda schedule: prior.final_error(schedule.served),
    )
    trials = {"steady": trial_of(good, [60.0, 60.0, 60.0]), "lucky": trial_of(bad, lucky)}
    loop = SimpleNamespace(num_steps=STEPS, fit=lambda view: Fit(prior=prior, rms_log_error=0.1))
    search = Search(loop=loop, settings=PlanSettings(budget=BUDGET), corrector="none")
    assert search.ranked(list(trials.values()))[0] is trials[wins]


@pytest.mark.parametrize(("errors", "met"), [([1.1, 1.1], True), ([1.0, 1.29], False), ([1.2, 1.2], False)])
def test_a_tolerance_is_kept_with_a_standard_error_to_spare(errors, met):
    schedule = CacheSchedule(num_steps=STEPS, full_steps=range(STEPS))

    def trial(found):
        return Trial(
            schedule=schedule,
            correction=None,
            sample_relative_l2=np.array(found),
            sample_psnr_db=np.zeros(len(found)),
            full_steps=schedule.full_count,
        )

    wanted = Wanted(full=trial([1.0, 1.0, 5.0]), tolerance=0.15, psnr_db=None)  # the third sample was not searched
    assert wanted.met_by(trial(errors)) == met


@pytest.mark.parametrize("method", ["none", "drift"])
def test_a_correction_that_is_asked_for_is_taken(quantized, method):
    loop, found = planned(quantized, BUDGET, solver="uniform", rectify=method)
    assert (found.correction and found.correction.method) == (None if method == "none" else method)
    assert found.evidence["winner"]["correction"] == (None if method == "none" else method)
    assert sum(trial.correction is not None for trial in loop.trials) == (method != "none")


@pytest.mark.parametrize("solver", ["uniform", "cem", "segment", "cem-relaxed", "threshold"])
def test_another_solver_has_its_schedule_taken_as_it_is(quantized, solver):
    _, found = planned(quantized, BUDGET, solver=solver, predictor="reuse", rectify="none")
    assert found.schedule.budget <= BUDGET
    assert set(found.schedule.predictors) == {"reuse"}
    if solver == "uniform":
        assert found.schedule.full_steps == (0, 2, 4)


def test_a_predictor_that_is_asked_for_serves_every_segment(quantized):
    _, found = planned(quantized, BUDGET, predictor="goc", rectify="none")
    assert set(found.schedule.predictors) == {"goc"}


def test_all_steps_are_full_compute(quantized):
    _, found = planned(quantized, STEPS, rectify="none")
    assert found.schedule.full_steps == tuple(range(STEPS))
    assert found.evidence["winner"] == found.evidence["full_compute"]


@pytest.mark.parametrize("tolerance", [0.05, 2.0])
def test_auto_finds_a_budget_within_the_tolerance(quantized, tolerance):
    loop, found = planned(quantized, "auto", tolerance=tolerance, rectify="none")
    limit = (1 + tolerance) * loop.trials[0].relative_l2
    assert found.evidence["winner"]["relative_l2"] <= limit
    assert found.evidence["tolerance"] == tolerance
    if tolerance > 1:
        assert found.schedule.budget < STEPS


def test_auto_goes_on_to_larger_budgets_where_all_samples_do_not_keep_what_some_promised():
    class FewestFirst(Search):
        """Pictures may be best with few steps although latents are not, and so budgets that do not do rank first."""

        def ranked(self, trials):
            return sorted(trials, key=lambda trial: trial.schedule.budget)

    loop = ClosedLoop(**prepared(batch_size=1))
    full = loop.run(full_compute(STEPS))
    for schedule in sample_schedules(STEPS, 6, ("taylor1",), 0):
        loop.calibrate(schedule, 0)

    def met_by(trial):
        return trial.schedule.budget >= (3 if trial.samples < loop.samples else 5)

    wanted = SimpleNamespace(full=full, psnr_db=None, error=full.error, met_by=met_by, check=lambda: None)
    settings = PlanSettings(budget="auto", effort="thorough", search=SearchSettings(searched=1))
    search = FewestFirst(loop=loop, settings=settings, corrector="none")
    found = search.fewest(wanted)
    assert (found.schedule.budget, found.samples) == (5, loop.samples)


def test_auto_reaches_a_target_psnr(quantized, searched):
    target = searched[1].evidence["winner"]["psnr_db"] - 1
    _, found = planned(quantized, "auto", target_psnr=target, rectify="none")
    assert found.evidence["winner"]["psnr_db"] >= target
    assert found.schedule.budget < STEPS
    assert (found.evidence["target_psnr"], found.evidence["tolerance"]) == (target, None)


def test_a_target_out_of_reach_is_refused_in_one_line(quantized):
    with pytest.raises(InfeasibleBudgetError, match=r"target_psnr=99: full compute reaches \d+\.\d dB") as caught:
        planned(quantized, "auto", target_psnr=99)
    assert len(str(caught.value).splitlines()) == 1


def test_without_quantization_auto_needs_a_target():
    loop = ClosedLoop(**prepared("none"))
    with pytest.raises(InputError, match="full compute has no error without quantization, so give a target PSNR"):
        quickly(loop, "auto")
    found = quickly(loop, "auto", target_psnr=10.0, rectify="none")
    assert found.evidence["winner"]["psnr_db"] >= 10


VALID = {
    "solver": "search", "predictor": "auto", "corrector": "auto", "rectify": "auto", "effort": "normal", "budget": "3x",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"solver": "serch"}, InputError, "unknown solver 'serch'.*did you mean 'search'"),
        ({"predictor": "taylor3"}, InputError, "unknown predictor 'taylor3'"),
        ({"rectify": "drifts"}, InputError, "unknown rectify 'drifts'.*did you mean 'drift'"),
        ({"effort": "much"}, InputError, "unknown effort 'much': choose from instant, quick, normal, thorough"),
        ({"budget": "auto", "solver": "cem"}, InputError, "budget=auto is found by running schedules"),
        ({"budget": 51}, InfeasibleBudgetError, r"choose 2\.\.50"),
        ({"budget": 7, "solver": "cem"}, InfeasibleBudgetError, "the CEM rule cannot spend budget=7"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_anything_is_run(changes, error, message):
    with pytest.raises(error, match=message):
        PlanSettings(**VALID | changes).check(50)


@pytest.mark.parametrize(
    ("changes", "steps"), [({}, 50), ({"budget": "auto"}, 50), ({"budget": 400}, None), ({"budget": 7}, 50)]
)
def test_what_can_be_planned_passes(changes, steps):
    PlanSettings(**VALID | changes).check(steps)


def test_the_search_takes_some_of_the_samples_and_the_finalists_all():
    loop, small = ClosedLoop(**prepared(batch_size=1)), SearchSettings(searched=2, calibrated=1 / 3)
    found = plan(loop, PlanSettings(budget=BUDGET, effort="thorough", rectify="none", search=small))
    searched = [trial for trial in loop.trials if trial.samples < loop.samples and trial.part_from is None]
    assert {trial.samples for trial in searched} <= {1, 2}  # of which some were no better on the first
    drawn = [trial for trial in loop.trials if trial.part_from is not None]
    assert {(trial.part_from, trial.samples) for trial in drawn} == {(0, 1), (1, 1), (2, 1)}
    assert any(trial.schedule.solver not in ("sample", "uniform", "cem") for trial in searched)
    finalists = [trial for trial in loop.trials[1:] if trial.samples == loop.samples]  # the first is full compute
    assert {"uniform", "cem"} <= {trial.schedule.solver for trial in finalists}
    assert found.evidence["winner"]["samples"] == loop.samples
    assert all(
        found.evidence["winner"]["psnr_db"] >= trial.psnr_db
        for trial in finalists
        if trial.schedule.solver in ("uniform", "cem")
    )
    spent = sum(trial.samples * trial.schedule.budget / STEPS for trial in loop.trials)
    assert found.evidence["search_generations"] == pytest.approx(spent, abs=0.01)


class Patient(ClosedLoop):
    """Asked what it has learnt a hundred times at most, so that a search without an end has one."""

    asked = 0

    def fit(self, *args, **options):
        self.asked += 1
        assert self.asked < 100
        return super().fit(*args, **options)


@pytest.fixture(scope="module")
def eight():
    return prepared(batch_size=1, samples=8)


@pytest.mark.parametrize("left", [0.0, 0.3, 0.6, 0.9, 1.2])
def test_the_search_ends_where_what_is_left_suffices_for_some_of_the_first_samples(eight, left):
    """A schedule is run on a quarter of the samples first, here two, which cost one generation together."""
    loop = Patient(**eight)
    search = Search(loop=loop, settings=PlanSettings(budget=BUDGET, predictor="taylor1"), corrector="none")
    search.explore(BUDGET, 0.0)
    begun = loop.spent
    search.explore(BUDGET, begun + left)
    assert begun <= loop.spent <= begun + left + 1e-9
    assert (loop.spent > begun) == (left >= 2 * BUDGET / STEPS)


@pytest.fixture(scope="module")
def singly():
    return prepared(batch_size=1)


@pytest.mark.parametrize("allowed", [0.5, 1.5, 20.0])
def test_a_small_effort_runs_a_few_schedules_within_it_and_learns_nothing(singly, allowed):
    loop = ClosedLoop(**singly)
    found = plan(loop, PlanSettings(budget=BUDGET, effort="normal", allowed=allowed))
    assert loop.spent <= 3 * allowed
    assert found.evidence["search_generations"] == pytest.approx(loop.spent)
    first = next(planned_by(loop.prior, BUDGET, predictor="auto", corrector=found.schedule.corrector, view="combined"))
    assert loop.trials[0].schedule == first
    assert {trial.samples for trial in loop.trials} == {loop.samples}
    assert found.evidence["full_compute"] is None
    assert np.array_equal(found.prior.sensitivity, loop.prior.sensitivity)
    assert (found.evidence["fit"]["rms_log_error"], found.evidence["fit"]["coherence_steps"]) == (None, None)
    assert len(loop.trials) == 1 if allowed < 1 else len(loop.trials) > 2
    if allowed > 10:
        assert {"uniform", "cem"} <= {trial.schedule.solver for trial in loop.trials}


def test_a_small_effort_leaves_what_the_prior_says_only_for_what_is_better_beyond_luck(singly):
    class Told(ClosedLoop):
        """Of each schedule that is run, the gains to the first."""

        def run(self, schedule, *args, **keywords):
            trial = super().run(schedule, *args, **keywords)
            first = self.trials[0].sample_psnr_db
            gains = {1: (9.0, 0.0, 0.0), 2: (2.0, 1.9, 2.1)}.get(self.trials.index(trial), (0.0, 0.0, 0.0))
            return dataclasses.replace(trial, sample_psnr_db=first + gains)

    loop = Told(**singly)
    found = Search(loop=loop, settings=PlanSettings(budget=BUDGET, allowed=20.0), corrector="none").picked(BUDGET)
    assert found.schedule == loop.trials[2].schedule  # the mean of the one before is greater, and one sample's


class Promising(ClosedLoop):
    """The second schedule that is run has these gains over the first, all others lose."""

    gains = ()

    def run(self, schedule, *args, **keywords):
        trial = super().run(schedule, *args, **keywords)
        rank = [each.schedule for each in self.trials].index(trial.schedule)
        gains = np.array({0: (0.0,) * 8, 1: self.gains}.get(rank, (-1.0,) * 8))
        return dataclasses.replace(trial, sample_psnr_db=50 + gains[: trial.samples])


@pytest.mark.parametrize(
    ("gains", "allowed", "samples"),
    [
        ((9.0, 3.0, 9.0, 3.0, 9.0, 3.0, 9.0, 3.0), 20.0, 4),  # enough to be certain of
        ((9.0, 3.0, 9.0, 3.0, 9.0, 3.0, 9.0, 3.0), 1.5, 2),  # the effort has not even half of what four samples cost
        ((9.0, 1.0, -19.0, 0.0, 0.0, 0.0, 0.0, 0.0), 20.0, 4),  # it only looked better on the first two
        ((9.0, 1.0, -9.0, 1.0, 9.0, 1.0, -9.0, 1.0), 20.0, 8),  # never certain
        ((-9.0, 1.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0), 20.0, 2),  # it did not look better
        ((9.0, 8.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), 20.0, 2),  # certain at once
    ],
)
def test_what_looks_better_and_may_be_luck_is_run_on_more_of_the_samples_that_were_drawn(
    eight, gains, allowed, samples
):
    loop = Promising(**eight, planned=2)
    loop.gains = gains
    settings = PlanSettings(budget=BUDGET, allowed=allowed, predictor="taylor1")
    found = Search(loop=loop, settings=settings, corrector="none").picked(BUDGET)
    first, second, *others = loop.trials
    assert (loop.samples, loop.most_samples) == (2, 8)
    assert (first.samples, second.samples) == (samples, samples)
    assert {trial.samples for trial in others} <= {2}
    assert loop.spent <= allowed * loop.samples + 1e-9
    is_better = sum(gains[:samples]) > 0 and samples < 8 and allowed > 2
    assert found.schedule == (second if is_better else first).schedule
    assert found.samples == samples


@pytest.mark.parametrize("tolerance", [0.3, 2.0])
def test_a_small_effort_first_tries_the_budget_that_the_prior_expects_to_do(singly, tolerance):
    loop, prior = ClosedLoop(**singly), singly["prior"]
    asked = PlanSettings(budget="auto", tolerance=tolerance, effort="normal", corrector="none", allowed=2.0)
    plan(loop, asked)
    base = prior.final_error(np.eye(STEPS))
    expected = [
        schedule
        for budget in range(2, STEPS)
        for schedule in [plan_schedule(prior, budget, predictor="taylor1")]
        if prior.final_error(schedule.served) <= (1 + tolerance) * base
    ]
    halfway = plan_schedule(prior, (2 + STEPS) // 2, predictor="taylor1")  # tried where it expects none to do
    assert [trial.schedule for trial in loop.trials][:2] == [full_compute(STEPS), *expected, halfway][:2]


def test_an_effort_that_is_nearly_spent_tries_a_budget_on_fewer_samples(singly):
    loop = ClosedLoop(**singly)
    asked = PlanSettings(budget="auto", tolerance=0.0, effort="normal", rectify="none", corrector="none", allowed=1.6)
    found = plan(loop, asked)
    assert loop.spent <= 1.6 * loop.samples
    assert [trial.samples for trial in loop.trials] == [loop.samples, 2]
    assert found.schedule == full_compute(STEPS)  # nothing is as good


def test_a_small_effort_finds_a_budget(singly):
    loop = ClosedLoop(**singly)
    found = plan(loop, PlanSettings(budget="auto", tolerance=2.0, effort="normal", rectify="none", allowed=4.0))
    assert found.schedule.budget < STEPS
    assert loop.spent <= 12
    assert found.evidence["winner"]["relative_l2"] <= 3 * found.evidence["full_compute"]["relative_l2"]
    tight = plan(ClosedLoop(**singly), PlanSettings(budget="auto", tolerance=0.0, effort="normal", allowed=4.0))
    assert tight.schedule.budget >= found.schedule.budget


def test_the_least_effort_runs_nothing(singly):
    prior, pipe = singly["prior"], singly["runner"].pipe
    around = {"cache": "output", "scheduler": pipe.scheduler, "steps": STEPS}
    found = predicted(prior, PlanSettings(budget=BUDGET, effort="instant"), **around)
    assert (found.schedule.budget, found.evidence["samples"], found.correction) == (BUDGET, 0, None)
    uniform = predicted(prior, PlanSettings(budget=BUDGET, effort="instant", solver="uniform"), **around)
    assert uniform.schedule.full_steps == (0, 2, 4)
    with pytest.raises(InputError, match="budget=auto is found by running schedules, and effort=instant runs none"):
        predicted(prior, PlanSettings(budget="auto", effort="instant"), **around)


def test_schedules_run_on_the_planning_samples_unless_more_are_asked_for(eight):
    loop = ClosedLoop(**eight, planned=3)
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 3))
    assert (loop.run(schedule).samples, loop.full().samples, loop.cost(2)) == (3, 3, 3 * 2 / STEPS)
    assert (loop.run(schedule, samples=5).samples, loop.run(schedule, samples=99).samples) == (5, 8)
    assert loop.run(schedule).samples == 8  # nothing that was run is forgotten
    parts = {loop.calibrate(schedule, number, share=1 / 3).part_from for number in range(6)}
    assert parts == {0, 1, 2}


def test_a_trial_is_extended_by_the_samples_it_lacks():
    loop = ClosedLoop(**prepared(batch_size=1))
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 3))
    some = loop.run(schedule, samples=2)
    assert (some.samples, loop.spent) == (2, pytest.approx(loop.cost(2, 2)))
    every = loop.run(schedule)
    assert (every.samples, loop.trials) == (3, [every])
    assert np.array_equal(every.sample_psnr_db[:2], some.sample_psnr_db)
    assert loop.spent == pytest.approx(loop.cost(2)) == pytest.approx(3 * 2 / STEPS)
    assert loop.run(schedule, samples=2) is every
    at_once = ClosedLoop(**prepared(batch_size=1)).run(schedule)
    assert np.array_equal(at_once.sample_psnr_db, every.sample_psnr_db)
