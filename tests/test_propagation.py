import dataclasses

import numpy as np
import pytest

from cemq.evaluation.analysis import rank_correlation, unweighted
from cemq.prior.error_prior import ErrorPrior
from cemq.search.propagation import fit_propagation, sample_schedules

STEPS = 24


def synthetic_prior(seed=0):
    """Predictions that wander smoothly, and a little quantization noise."""
    random = np.random.default_rng(seed)
    places = np.linspace(0, 1, STEPS)[:, None]
    v = np.sin(places * random.uniform(1, 6, 30) + random.uniform(0, 6, 30))
    q = v + 0.02 * random.normal(size=v.shape)
    return ErrorPrior(qq=q @ q.T / 30, qv=q @ v.T / 30, vv=v @ v.T / 30, step_sizes=random.uniform(0.5, 1.5, STEPS))


def true_prior(prior, coherence):
    """The same where errors of early steps are nearly forgotten and those of late ones are not, and less of those of
    steps that reuse an output."""
    places = np.linspace(-1, 1, STEPS)
    sensitivity = 0.05 * np.exp([2.5 * places - places**2, 1.5 * places - places**2 - 0.5])
    return dataclasses.replace(prior, sensitivity=sensitivity, coherence=coherence)


def samples(seed, count):
    return sample_schedules(STEPS, count, ("taylor1", "reuse"), seed=seed)


@pytest.mark.parametrize("coherence", [2.0, 30.0])
def test_a_fit_recovers_how_errors_reach_the_final_sample(coherence):
    prior = synthetic_prior()
    truth = true_prior(prior, coherence)
    fit = fit_propagation(prior, samples(0, 40), [truth.final_error(s.served) for s in samples(0, 40)])
    held_out = samples(1, 40)
    measured, predicted, plain = (
        [each.final_error(s.served) for s in held_out] for each in (truth, fit.prior, unweighted(prior))
    )
    assert fit.rms_log_error < 0.05
    assert rank_correlation(predicted, measured) > 0.95
    assert rank_correlation(plain, measured) < rank_correlation(predicted, measured)
    assert np.log(predicted) == pytest.approx(np.log(measured), abs=0.4)  # the scale is right too, not the order alone
    felt = truth.sensitivity > 0.2 * truth.sensitivity.max()  # of the others no run says anything
    felt[:, 0] = False  # always computed, nearly exact
    assert felt.sum(1).min() > 4
    assert fit.prior.sensitivity[felt] == pytest.approx(truth.sensitivity[felt], rel=0.35)


def test_the_fit_tells_errors_that_keep_their_direction_from_those_that_do_not():
    prior = synthetic_prior()
    found = []
    for coherence in (1.0, 60.0):
        truth = true_prior(prior, coherence)
        errors = [truth.final_error(s.served) for s in samples(0, 40)]
        found.append(fit_propagation(prior, samples(0, 40), errors).prior.coherence)
    assert found[0] < 3 < 20 < found[1]


def test_errors_on_other_samples_may_be_greater_by_a_factor():
    prior = synthetic_prior()
    truth, groups = true_prior(prior, 5.0), np.arange(40) % 3
    errors = np.array([truth.final_error(s.served) for s in samples(0, 40)])
    alone = fit_propagation(prior, samples(0, 40), errors, groups=np.full(40, 7))
    fit = fit_propagation(prior, samples(0, 40), errors * np.array([0.25, 1.0, 4.0])[groups], groups=groups)
    held_out = samples(1, 40)
    found, known = ([each.prior.final_error(s.served) for s in held_out] for each in (fit, alone))
    assert np.log(found) == pytest.approx(np.log(known), abs=0.1)  # the mean of the factors' logarithms is 0
    assert fit.rms_log_error < 0.05
    mixed = fit_propagation(prior, samples(0, 40), errors * np.array([0.25, 1.0, 4.0])[groups])
    assert mixed.rms_log_error > 0.3


def test_a_fit_to_few_runs_is_smooth():
    prior = synthetic_prior()
    truth = true_prior(prior, 5.0)
    fit = fit_propagation(prior, samples(0, 3), [truth.final_error(s.served) for s in samples(0, 3)])
    assert np.isfinite(fit.prior.sensitivity).all()
    assert np.abs(np.diff(np.log(fit.prior.sensitivity))).max() < 2


@pytest.mark.parametrize("response", [(0.0, 4.0), (2.0, 1.0), (-1.5, 1.0)])
def test_a_fit_to_corrected_runs_recovers_what_steps_answer_to_a_strayed_sample(response):
    prior = synthetic_prior()
    truth = dataclasses.replace(true_prior(prior, 5.0), response=np.array(response))

    def corrected(seed):
        return sample_schedules(STEPS, 40, ("taylor1", "reuse"), seed=seed, corrector="quadratic")

    def predicted(by, seed):
        return np.array([by.final_error(s.served, s.integrated) for s in corrected(seed)])

    fit = fit_propagation(prior, corrected(0), predicted(truth, 0))
    assert np.linalg.norm(fit.prior.response.mean(1)) == pytest.approx(np.linalg.norm(response), rel=0.5)
    assert np.sign(np.round(fit.prior.response[0].mean())) == np.sign(response[0])
    deaf = dataclasses.replace(fit.prior, response=np.zeros(2))
    misses = [np.std(np.log(predicted(each, 1) / predicted(truth, 1))) for each in (fit.prior, deaf)]
    assert misses[0] < 0.1 < 0.5 * misses[1]


def test_what_runs_without_a_corrector_do_not_tell_stays_as_it_was():
    prior = synthetic_prior()
    fit = fit_propagation(prior, samples(0, 40), [true_prior(prior, 5.0).final_error(s.served) for s in samples(0, 40)])
    assert np.array_equal(fit.prior.response, prior.response)


def test_a_fit_changes_nothing_but_sensitivity_coherence_and_response():
    prior = synthetic_prior()
    fitted = fit_propagation(prior, samples(0, 8), np.linspace(0.1, 0.4, 8)).prior
    assert fitted.qq is prior.qq
    assert fitted.step_sizes is prior.step_sizes


def test_a_fit_tells_steps_that_reuse_from_those_that_extrapolate():
    prior = synthetic_prior()
    truth = dataclasses.replace(prior, sensitivity=np.array([[1.0], [0.25]]) * np.ones(STEPS), coherence=5.0)
    fit = fit_propagation(prior, samples(0, 40), [truth.final_error(s.served) for s in samples(0, 40)])
    ratio = fit.prior.sensitivity[1] / fit.prior.sensitivity[0]
    assert np.median(ratio) == pytest.approx(0.25, rel=0.2)
    alone = sample_schedules(STEPS, 20, ("taylor1",), seed=0)
    fit = fit_propagation(prior, alone, [prior.final_error(s.served) for s in alone])
    assert np.abs(np.log(fit.prior.sensitivity[1] / fit.prior.sensitivity[0])).max() < 0.5  # nothing says they differ


@pytest.mark.parametrize("steps", [2, 6, 50])
def test_sampled_schedules_have_budgets_from_a_sixth_to_a_half(steps):
    found = sample_schedules(steps, 20, ("taylor1", "reuse"), seed=0)
    assert len(found) == 20
    assert all(max(2, steps // 6) <= schedule.budget <= max(2, steps / 2) for schedule in found)
    assert {schedule.solver for schedule in found} == {"sample"}
    assert {schedule.predictor for schedule in found} == {"taylor1", "reuse"}


@pytest.mark.parametrize(("steps", "budget"), [(6, 2), (6, 6), (50, 15), (50, 49)])
def test_sampled_schedules_have_the_budget_asked_for(steps, budget):
    found = sample_schedules(steps, 20, ("taylor1", "reuse"), seed=0, budget=budget)
    assert {schedule.budget for schedule in found} == {budget}


def test_the_same_seed_samples_the_same_schedules():
    assert sample_schedules(50, 6, ("reuse",), seed=3) == sample_schedules(50, 6, ("reuse",), seed=3)
    assert sample_schedules(50, 6, ("reuse",), seed=3) != sample_schedules(50, 6, ("reuse",), seed=4)
