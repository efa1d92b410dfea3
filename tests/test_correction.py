import dataclasses

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from cemq.errors import InputError
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.pipelines.noise_scheduler import landing_lengths, retimed
from cemq.pipelines.outputs import channel_axis
from cemq.prior.error_prior import ErrorPrior, PriorMetadata
from cemq.schedule import CacheSchedule
from cemq.schedule.rectify import METHODS, Correction, make_correction, step_factors

STEPS, PLACES, CHANNELS = 6, 40, 3
SCHEDULE = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 4), predictor="taylor1")


def predictions(seed=0):
    """Quantized and full-precision ones, (steps, places, channels), with a bias and a gain of their own."""
    random = np.random.default_rng(seed)
    v = random.normal(size=(1, CHANNELS)) + np.cumsum(random.normal(size=(STEPS, PLACES, CHANNELS)), axis=0)
    return 0.9 * v + 0.2 + 0.1 * random.normal(size=v.shape), v


def metadata(scheduler="FlowMatchEulerDiscreteScheduler"):
    sampler = SamplerFingerprint(scheduler=scheduler, config={}, timesteps=tuple(range(STEPS, 0, -1)))
    return PriorMetadata(
        sampler=sampler, scheme="none", dtype="float32", call={}, samples=1, seeds=(0,), conditions=(0,)
    )


def prior_of(q, v, **fields):
    qq, qv, vv = (np.einsum("ipc,jpc->ij", a, b) / a[0].size for a, b in ((q, q), (q, v), (v, v)))
    grams = np.stack([np.einsum("ipc,jpc->cij", q, x) / PLACES for x in (q, v)])
    known = {"channel_means": np.stack([q.mean(1), v.mean(1)]), "channel_grams": grams, "metadata": metadata()} | fields
    return ErrorPrior(qq=qq, qv=qv, vv=vv, step_sizes=np.ones(STEPS), **known)


def served(q):
    return np.einsum("st,tpc->spc", SCHEDULE.served, q)


def test_drift_takes_the_mean_error_away_exactly():
    q, v = predictions()
    fix = make_correction("drift", prior_of(q, v), SCHEDULE)
    corrected = served(q) * fix.gain[:, None] + fix.offset[:, None]
    assert (fix.gain == 1).all()
    assert np.abs((served(q) - v).mean(1)).max() > 0.1
    assert corrected.mean(1) == pytest.approx(v.mean(1), abs=1e-12)


def test_affine_is_the_least_squares_line_of_every_channel_and_step():
    q, v = predictions()
    fix = make_correction("affine", prior_of(q, v), SCHEDULE)
    for step in range(STEPS):
        for channel in range(CHANNELS):
            columns = np.stack([served(q)[step, :, channel], np.ones(PLACES)], axis=1)
            line = np.linalg.lstsq(columns, v[step, :, channel], rcond=None)[0]
            assert (fix.gain[step, channel], fix.offset[step, channel]) == pytest.approx(tuple(line), rel=1e-6)


def test_affine_leaves_a_channel_without_variance_its_gain():
    q, v = predictions()
    q[..., 1] = 2.0
    fix = make_correction("affine", prior_of(q, v), SCHEDULE)
    assert fix.gain[:, 1] == pytest.approx(1.0)
    assert fix.offset[:, 1] == pytest.approx(v[..., 1].mean(1) - 2.0)


def test_eoc_compounds_since_the_latest_full_step():
    v = np.zeros((2, STEPS, 1))
    v[1, :, 0] = [0, 10, 20, 40, 50, 45]
    fix = make_correction("eoc", prior_of(*predictions(), channel_means=v), SCHEDULE)
    # 1 percent of the change of the mean: 10 and 20 after step 1, -5 after step 4
    assert fix.gain[:, 0] == pytest.approx([1, 1, 1.1, 1.1 * 1.2, 1, 0.95])
    assert not fix.offset.any()


def test_step_factors_by_hand():
    # a prediction that rises by 1, 1, 4, 4 and 4 a step; served from 0 and 1, then again from 4
    v = np.array([0.0, 1, 2, 6, 10, 14])[:, None, None] * np.ones((STEPS, PLACES, CHANNELS))
    prior = prior_of(v, v)
    factors = step_factors(prior, SCHEDULE)  # 2 at step 2, which is right; 3 at step 3; 13 at step 5
    assert factors == pytest.approx([1, 1, 1, 1 - 3 / 4, 1, 1 - 1 / 4])
    reuse = CacheSchedule(num_steps=STEPS, full_steps=(0, 3), predictor="reuse")
    assert step_factors(prior, reuse) == pytest.approx([1, 0, 0, 1, 0, 0])  # off by as much as the step changed
    fix = make_correction("erta", prior, SCHEDULE)
    affine = make_correction("affine", prior, SCHEDULE)
    assert np.array_equal(fix.step_factors, factors)
    assert np.array_equal(fix.gain, affine.gain)
    assert np.array_equal(fix.offset, affine.offset)
    assert affine.step_factors is None


def test_step_factors_of_a_sampler_whose_steps_have_no_length_to_set_are_refused():
    prior = prior_of(*predictions(), metadata=metadata("DDIMScheduler"))
    with pytest.raises(InputError, match="correction 'erta': the lengths of DDIMScheduler steps cannot be set"):
        make_correction("erta", prior, SCHEDULE)


def test_landing_lengths_by_hand():
    # half of the first; the 3.5 that are left are shared by three; none of the third, so the last goes 7 / 3
    found = landing_lengths(np.ones(4), np.array([0.5, 1, 0, 0.1]))
    assert found == pytest.approx([0.5, 3.5 / 3, 0, 7 / 3])


@given(
    lengths=st.lists(st.floats(1e-3, 10), min_size=1, max_size=40),
    factors=st.lists(st.floats(0, 1), min_size=40, max_size=40),
    sign=st.sampled_from([-1, 1]),
)
@settings(max_examples=100, deadline=None)
def test_scaled_steps_land_where_the_plain_ones_do_and_never_turn_back(lengths, factors, sign):
    lengths, factors = sign * np.array(lengths), np.array(factors[: len(lengths)])
    landed = landing_lengths(lengths, factors)
    assert landed.sum() == pytest.approx(lengths.sum())
    assert (landed * sign >= -1e-12).all()
    assert landing_lengths(lengths, np.ones(len(lengths))) == pytest.approx(lengths)
    behind = np.cumsum(lengths - landed) * sign
    assert (behind >= -1e-9).all()  # what is left out is made up for later, never before


@pytest.mark.parametrize("invert", [False, True])
def test_a_retimed_sampler_begins_and_ends_where_it_did(invert):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=invert)
    scheduler.set_timesteps(5)
    plain, plain_timesteps = scheduler.sigmas.clone(), scheduler.timesteps.clone()
    assert retimed(scheduler, np.ones(5)) == pytest.approx(plain_timesteps.tolist())
    assert torch.equal(scheduler.sigmas, plain)
    assert torch.equal(scheduler.timesteps, plain_timesteps)
    timesteps = retimed(scheduler, np.array([0.5, 1.0, 1.0]))  # of the last three steps only
    assert torch.equal(scheduler.sigmas[[0, 1, 2, 5]], plain[[0, 1, 2, 5]])
    assert float(scheduler.sigmas[3]) == pytest.approx(float(plain[2] + plain[3]) / 2)
    assert timesteps == pytest.approx((1000 * scheduler.sigmas[2:5]).tolist())
    assert scheduler.timesteps.tolist() == pytest.approx((1000 * scheduler.sigmas[:5]).tolist())


def test_timesteps_that_do_not_follow_from_the_sigmas_are_left_alone():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.2], timesteps=[900.0, 500.0, 100.0])
    before = scheduler.sigmas.clone()
    assert retimed(scheduler, np.zeros(3)) == (900.0, 500.0, 100.0)
    assert torch.equal(scheduler.sigmas, before)


def numbered():
    gain = np.array([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    return Correction(method="affine", gain=gain, offset=np.array([[0.0, 0.0, 0.5], [0.0, -1.0, 0.0]]))


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 3, 4, 4), 1), ((2, 3, 2, 4, 4), 1), ((2, 7, 3), 2)], ids=["image", "video", "packed"]
)
def test_channels_are_found_in_every_kind_of_latent(shape, axis):
    assert channel_axis(len(shape)) == axis
    fix, ones = numbered(), torch.ones(shape)
    for step, expected in enumerate([(1.0, 2.0, 3.5), (1.0, 0.0, 1.0)]):
        found = fix.apply(ones, step).movedim(axis, -1)
        assert torch.equal(found, torch.tensor(expected).expand(found.shape))


def test_a_correction_keeps_the_dtype():
    found = numbered().apply(torch.ones(1, 3, 2, 2, dtype=torch.bfloat16), 0)
    assert found.dtype is torch.bfloat16


def test_a_prediction_of_other_channels_is_left_alone():
    prediction = torch.ones(2, 8, 4, 4)
    assert numbered().apply(prediction, 0) is prediction


def test_a_correction_carries_over_by_its_method():
    q, v = predictions()
    prior, other = prior_of(q, v), CacheSchedule(num_steps=STEPS, full_steps=(0, 3), predictor="reuse")
    for method in METHODS:
        carried, native = (
            make_correction(method, prior, SCHEDULE).carried_over(prior, other),
            make_correction(method, prior, other),
        )
        assert carried.method == method
        assert np.array_equal(carried.gain, native.gain)
        assert np.array_equal(carried.offset, native.offset)


def test_corrections_without_what_they_are_made_of_are_refused():
    prior = prior_of(*predictions(), channel_grams=np.zeros((2, 0, 0, 0)))
    assert make_correction("drift", prior, SCHEDULE).method == "drift"
    with pytest.raises(InputError, match="correction 'affine': the error prior holds no channel statistics"):
        make_correction("affine", prior, SCHEDULE)
    bare = dataclasses.replace(prior, channel_means=np.zeros((2, 0, 0)))
    with pytest.raises(InputError, match="correction 'drift': the error prior holds no"):
        make_correction("drift", bare, SCHEDULE)
    with pytest.raises(InputError, match=r"unknown correction 'drfit'.*did you mean 'drift'"):
        make_correction("drfit", prior, SCHEDULE)
