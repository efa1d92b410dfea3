import dataclasses

import numpy as np
import pytest
import torch

from cemq.correction import METHODS, Correction, channel_axis, make_correction
from cemq.errors import InputError
from cemq.prior import ErrorPrior
from cemq.schedule import CacheSchedule

STEPS, PLACES, CHANNELS = 6, 40, 3
SCHEDULE = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 4), predictor="taylor1")


def predictions(seed=0):
    """Quantized and full-precision ones, (steps, places, channels), with a bias and a gain of their own."""
    random = np.random.default_rng(seed)
    v = random.normal(size=(1, CHANNELS)) + np.cumsum(random.normal(size=(STEPS, PLACES, CHANNELS)), axis=0)
    return 0.9 * v + 0.2 + 0.1 * random.normal(size=v.shape), v


def prior_of(q, v, **fields):
    qq, qv, vv = (np.einsum("ipc,jpc->ij", a, b) / a[0].size for a, b in ((q, q), (q, v), (v, v)))
    grams = np.stack([np.einsum("ipc,jpc->cij", q, x) / PLACES for x in (q, v)])
    known = {"channel_means": np.stack([q.mean(1), v.mean(1)]), "channel_grams": grams} | fields
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
