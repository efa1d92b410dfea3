import dataclasses

import numpy as np
import pytest
from support.priors import prior_of, trajectories

from cemq.errors import BundleError, InputError, PriorMismatchError
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.predict.predictors import reused_steps, serving_matrix
from cemq.prior.error_prior import VIEWS, ErrorPrior, PriorMetadata
from cemq.schedule import CacheSchedule, uniform_steps

STEPS, ELEMENTS = 6, 9
SAMPLER = SamplerFingerprint(
    scheduler="DDIMScheduler", config={"eta": 0.0, "betas": [1, 2]}, timesteps=(900.0, 600.0, 300.0)
)
METADATA = PriorMetadata(
    sampler=SAMPLER,
    scheme="w4a8",
    dtype="float32",
    call={"guidance_scale": 2.5},
    samples=2,
    seeds=(3, 4),
    conditions=("a seven", 7),
)


def predictions():
    """Quantized ones and those of full precision."""
    return trajectories(STEPS, elements=ELEMENTS, noise=0.1)[:2]


def cached_and_true(view):
    q, v = predictions()
    return {"combined": (q, v), "cache": (v, v), "self": (q, q)}[view]


def served_and_errors(view, seed=1):
    """Weights of any kind, and what is left of each step's prediction after them."""
    x, y = cached_and_true(view)
    served = np.random.default_rng(seed).normal(size=(STEPS, STEPS))
    return served, served @ x - y, y


@pytest.mark.parametrize("view", VIEWS)
def test_the_error_gram_holds_the_inner_products_of_the_errors(view):
    served, errors, _ = served_and_errors(view)
    found = prior_of(*predictions()).error_gram(served, view)
    assert found == pytest.approx(errors @ errors.T / ELEMENTS, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("view", VIEWS)
def test_a_step_error_is_the_relative_distance(view):
    served, errors, y = served_and_errors(view)
    expected = np.linalg.norm(errors, axis=1) / np.linalg.norm(y, axis=1)
    assert prior_of(*predictions()).step_errors(served, view) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("view", VIEWS)
def test_coherent_errors_add_up_with_sign_in_the_final_sample(view):
    served, errors, _ = served_and_errors(view)
    sizes, sensitivity = np.array([1.0, 2, 0.5, 1, 3, 1]), np.array([0.1, 0.2, 1, 2, 1, 4])
    prior = prior_of(*predictions(), sensitivity=sensitivity)
    prior = dataclasses.replace(prior, step_sizes=sizes)
    moved = sum(size * gain * error for size, gain, error in zip(sizes, sensitivity, errors, strict=True))
    assert prior.final_error(served, view=view) == pytest.approx(np.sqrt(np.mean(moved**2)), rel=1e-9)


@pytest.mark.parametrize(
    ("full_steps", "predictors", "rows"),
    [
        # step 1 has but one output to go by, and counts as what follows
        ((0, 2, 4), ("reuse", "taylor1", "reuse"), [0, 0, 0, 0, 0, 1]),
        ((0, 2, 4), ("taylor1", "reuse", "taylor1"), [0, 1, 0, 1, 0, 0]),
        ((0, 2, 3), ("taylor1", "taylor1", "damped"), [0, 0, 0, 0, 0, 0]),
        ((0,), ("taylor1",), [0, 1, 1, 1, 1, 1]),
    ],
)
def test_a_step_that_reuses_an_output_has_a_sensitivity_of_its_own(full_steps, predictors, rows):
    sensitivity = np.array([[0.1, 0.2, 1, 2, 1, 4], [3, 5, 7, 9, 11, 13]])
    prior = prior_of(*predictions(), sensitivity=sensitivity)
    served = serving_matrix(STEPS, full_steps, predictors)
    q, v = predictions()
    moved = sum(sensitivity[row, step] * (served @ q - v)[step] for step, row in enumerate(rows))
    assert prior.final_error(served) == pytest.approx(np.sqrt(np.mean(moved**2)), rel=1e-9)
    assert reused_steps(served).tolist() == [bool(row) for row in rows]


def test_errors_without_coherence_add_up_in_squares():
    served, errors, _ = served_and_errors("combined")
    prior = prior_of(*predictions(), coherence=1e-3)
    assert prior.final_error(served) == pytest.approx(np.sqrt(np.sum(errors**2) / ELEMENTS), rel=1e-9)


def test_the_coherence_is_the_number_of_steps_after_which_a_third_of_the_agreement_is_left():
    served, errors, _ = served_and_errors("combined")
    total = sum(np.exp(-abs(s - t) / 2.5) * np.mean(errors[s] * errors[t]) for s in range(STEPS) for t in range(STEPS))
    assert prior_of(*predictions(), coherence=2.5).final_error(served) == pytest.approx(np.sqrt(total), rel=1e-9)


@pytest.mark.parametrize("view", VIEWS)
def test_reuse_errors_are_relative_distances_and_nan_before_the_first_step(view):
    x, y = cached_and_true(view)
    table = prior_of(*predictions()).reuse_errors(view)
    assert table.shape == (STEPS, STEPS)
    for age in range(STEPS):
        for step in range(STEPS):
            if step < age:
                assert np.isnan(table[age, step])
            else:
                expected = np.linalg.norm(x[step - age] - y[step]) / np.linalg.norm(y[step])
                assert table[age, step] == pytest.approx(expected, rel=1e-9, abs=1e-7)


@pytest.mark.parametrize("view", VIEWS)
def test_cosine_distances_are_one_minus_the_cosine_and_zero_before_the_first_step(view):
    x, y = cached_and_true(view)
    table = prior_of(*predictions()).cosine_distances(view)
    assert table.shape == (STEPS, STEPS)
    for age in range(STEPS):
        for step in range(STEPS):
            if step < age:
                assert table[age, step] == 0
            else:
                old, true = x[step - age], y[step]
                cosine = old @ true / (np.linalg.norm(old) * np.linalg.norm(true))
                assert table[age, step] == pytest.approx(1 - cosine, rel=1e-9, abs=1e-12)


def test_reuse_errors_agree_with_the_step_errors_of_one_unit_weight():
    prior = prior_of(*predictions())
    table = prior.reuse_errors()
    for age in range(STEPS):
        served = np.eye(STEPS)[np.maximum(np.arange(STEPS) - age, 0)]
        assert prior.step_errors(served)[age:] == pytest.approx(table[age, age:], rel=1e-9)


def test_without_quantization_error_all_views_are_equal():
    _, v = predictions()
    prior = prior_of(v, v)
    for view in ("cache", "self"):
        assert np.array_equal(prior.reuse_errors("combined"), prior.reuse_errors(view), equal_nan=True)
        assert np.array_equal(prior.cosine_distances("combined"), prior.cosine_distances(view))
        served = np.tri(STEPS) / 2
        assert prior.final_error(served, view="combined") == prior.final_error(served, view=view)


def test_with_quantization_error_no_two_views_are_equal():
    tables = [prior_of(*predictions()).reuse_errors(view)[1, 1:] for view in VIEWS]
    assert all((a != b).all() for a, b in [(tables[0], tables[1]), (tables[0], tables[2]), (tables[1], tables[2])])


def test_row_zero_of_the_combined_view_is_the_quantization_floor():
    q, v = predictions()
    prior = prior_of(q, v)
    expected = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(q, v, strict=True)]
    assert prior.reuse_errors("combined")[0] == pytest.approx(expected, rel=1e-9)
    assert prior.quantization_floor == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("view", ["cache", "self"])
def test_a_step_computed_in_full_costs_nothing_where_nothing_is_quantized_away(view):
    assert (prior_of(*predictions()).reuse_errors(view)[0] == 0).all()


def test_an_unknown_view_names_the_nearest_one():
    with pytest.raises(InputError, match=r"unknown prior 'combine'.*did you mean 'combined'"):
        prior_of(*predictions()).reuse_errors("combine")


def test_a_saved_prior_loads_bit_for_bit_with_its_metadata(tmp_path):
    random = np.random.default_rng(0)
    prior = prior_of(
        *predictions(),
        metadata=METADATA,
        sensitivity=random.uniform(1, 2, STEPS),
        coherence=7.5,
        token_cosines=random.normal(size=(3, STEPS, STEPS)),
        channel_means=random.normal(size=(2, STEPS, 4)),
        channel_grams=random.normal(size=(2, 4, STEPS, STEPS)),
    )
    prior.save(tmp_path / "prior.safetensors")
    loaded = ErrorPrior.load(tmp_path / "prior.safetensors")
    assert loaded.coherence == 7.5
    for name in ("qq", "qv", "vv", "step_sizes", "sensitivity", "token_cosines", "channel_means", "channel_grams"):
        assert getattr(loaded, name).dtype == np.float64
        assert np.array_equal(getattr(loaded, name), getattr(prior, name))
    assert loaded.metadata == METADATA
    assert loaded.metadata.sampler.matches(SAMPLER)


def test_a_prior_without_metadata_loads_without_metadata(tmp_path):
    prior_of(*predictions()).save(tmp_path / "prior.safetensors")
    loaded = ErrorPrior.load(tmp_path / "prior.safetensors")
    assert loaded.metadata is None
    assert loaded.coherence == np.inf
    assert loaded.token_cosines.size == loaded.channel_means.size == loaded.channel_grams.size == 0


def test_a_matrix_in_another_memory_order_is_saved_as_it_reads(tmp_path):
    q, v = predictions()
    prior = dataclasses.replace(prior_of(q, v), qv=np.asfortranarray(q @ v.T))
    prior.save(tmp_path / "prior.safetensors")
    assert np.array_equal(ErrorPrior.load(tmp_path / "prior.safetensors").qv, prior.qv)


@pytest.mark.parametrize("damage", ["cut", "text", "gone", "metadata", "tensor"])
def test_a_damaged_prior_file_is_refused_by_name(tmp_path, damage):
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "prior.safetensors"
    prior_of(*predictions(), metadata=METADATA).save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "text":
        path.write_text("not a prior")
    elif damage == "gone":
        path.unlink()
    elif damage == "metadata":
        save_file(load_file(path), path, {"cemq": '{"scheme": 1}'})
    else:
        save_file({"qq": np.ones((1, 1))}, path)
    with pytest.raises(BundleError, match=r"prior\.safetensors' cannot be read"):
        ErrorPrior.load(path)


@pytest.mark.parametrize("name", ["qq", "qv", "vv"])
@pytest.mark.parametrize("shape", [(STEPS - 1, STEPS), (STEPS, STEPS + 1), (STEPS,), (STEPS, STEPS, 1)])
def test_a_misshapen_matrix_is_refused_by_name(name, shape):
    with pytest.raises(InputError, match=f"{name} has shape"):
        dataclasses.replace(prior_of(*predictions()), **{name: np.ones(shape)})


@pytest.mark.parametrize("coherence", [0.0, -1.0, np.nan])
def test_a_coherence_that_is_not_positive_is_refused(coherence):
    with pytest.raises(InputError, match="expected more than 0 steps"):
        prior_of(*predictions(), coherence=coherence)


def test_one_response_is_that_of_all_steps_and_none_of_another_length_is_taken():
    q, v = predictions()
    assert np.array_equal(prior_of(q, v, response=np.array([0.5, 2.0])).response, [[0.5] * len(q), [2.0] * len(q)])
    for wrong in (np.ones(3), np.ones((2, len(q) + 1))):
        with pytest.raises(InputError, match=r"response has shape \(.*\), expected \(2, "):
            prior_of(q, v, response=wrong)


def test_a_sensitivity_of_another_length_is_refused():
    with pytest.raises(InputError, match=r"sensitivity has shape \(5,\), expected \(2, 6\)"):
        prior_of(*predictions(), sensitivity=np.ones(STEPS - 1))


def test_token_cosines_take_the_place_of_the_grams_in_cosine_distances():
    cosines = np.stack([np.full((STEPS, STEPS), value) for value in (0.75, 0.5, 0.25)])
    prior = prior_of(*predictions(), token_cosines=cosines)
    for view, expected in (("cache", 0.25), ("self", 0.5), ("combined", 0.75)):
        assert prior.cosine_distances(view)[2].tolist() == [0, 0] + [expected] * 4


@pytest.mark.parametrize("name", ["qq", "qv", "vv", "step_sizes", "sensitivity"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_refused_by_name(name, bad):
    prior = prior_of(*predictions())
    damaged = getattr(prior, name).copy()
    damaged.flat[-1] = bad
    with pytest.raises(InputError, match=f"{name} is not finite"):
        dataclasses.replace(prior, **{name: damaged})


def test_a_fingerprint_matches_itself_up_to_rounding_of_the_timesteps():
    assert SAMPLER.matches(dataclasses.replace(SAMPLER, timesteps=(900.00001, 600.0, 300.0)))


@pytest.mark.parametrize(
    "other",
    [
        {"scheduler": "DDPMScheduler"},
        {"timesteps": (900.0, 601.0, 300.0)},
        {"timesteps": (900.0, 600.0)},
        {"timesteps": (900.0,)},
        {"timesteps": ()},
        {"config": {"eta": 0.5, "betas": [1, 2]}},
        {"config": {"eta": 0.0}},
    ],
)
def test_a_fingerprint_matches_no_other_sampler(other):
    twin = dataclasses.replace(SAMPLER, **other)
    assert not SAMPLER.matches(twin)
    assert not twin.matches(SAMPLER)


# --- other step counts


def sampler_of(steps, **changes):
    """DDIM's leading timesteps."""
    times = tuple(float(time) for time in np.arange(steps)[::-1] * (1000 // steps) + 1)
    fields = {"scheduler": "DDIMScheduler", "config": {"beta_end": 0.02, "shift": 1.0}, "timesteps": times}
    return SamplerFingerprint(**fields | changes)


def smooth_prior(sampler):
    """Predictions of two channels and five places that turn with the timestep, measured at any timesteps."""
    times = np.array(sampler.timesteps)
    phases = times[:, None, None] / 1000 * np.array([1.0, 2.0, 3.0, 4.0, 0.5]) + np.array([[0.0], [0.7]])
    v = np.cos(phases)  # (steps, channels, places)
    q = 1.05 * v + 0.1 * np.sin(2 * phases)
    channels = [[np.mean(x[:, None, c] * y[None, :, c], axis=2) for c in range(2)] for x, y in ((q, q), (q, v))]
    q_flat, v_flat = (x.reshape(len(times), -1) for x in (q, v))
    metadata = dataclasses.replace(METADATA, sampler=sampler)
    spans = -np.diff(times, append=0)
    return dataclasses.replace(
        prior_of(q_flat, v_flat, metadata=metadata),
        step_sizes=(1 + times / 500) * spans / 1000,
        sensitivity=np.exp([-times / 300, -times / 400]),
        coherence=len(times) / 5,
        token_cosines=np.stack([np.cos((times[:, None] - times) / 900)] * 3),
        channel_means=np.stack([x.mean(2) for x in (q, v)]),
        channel_grams=np.array(channels),
    )


@pytest.mark.parametrize("steps", [20, 28, 100])
def test_a_resampled_prior_agrees_with_one_measured_there(steps):
    resampled, native = smooth_prior(sampler_of(50)).resampled(sampler_of(steps)), smooth_prior(sampler_of(steps))
    assert resampled.metadata.sampler == sampler_of(steps)
    assert resampled.coherence == pytest.approx(native.coherence)
    inside = np.array(sampler_of(steps).timesteps) <= 981  # what was measured; beyond it, the end is held
    assert inside.sum() >= steps - 1
    both = np.ix_(inside, inside)
    for name in ("qq", "qv", "vv"):
        assert getattr(resampled, name)[both] == pytest.approx(getattr(native, name)[both], abs=1e-5)
    assert resampled.step_sizes[inside] == pytest.approx(native.step_sizes[inside], rel=0.01)
    assert resampled.sensitivity[:, inside] == pytest.approx(native.sensitivity[:, inside], rel=1e-6)
    assert resampled.channel_means[:, inside] == pytest.approx(native.channel_means[:, inside], abs=1e-5)
    assert resampled.channel_grams[..., inside, :][..., inside] == pytest.approx(
        native.channel_grams[..., inside, :][..., inside], abs=1e-5
    )
    assert resampled.token_cosines[:, inside][..., inside] == pytest.approx(
        native.token_cosines[:, inside][..., inside], abs=1e-3
    )
    for budget in (steps // 5, steps // 2):
        schedule = CacheSchedule(num_steps=steps, full_steps=uniform_steps(steps, budget))
        assert resampled.final_error(schedule.served) == pytest.approx(native.final_error(schedule.served), rel=0.02)


@pytest.mark.parametrize("steps", [20, 28, 100])
def test_noise_of_its_own_has_its_variance_at_other_timesteps_and_correlates_with_none(steps):
    def noisy(sampler):  # beside the smooth error of q, one that is drawn anew at every step
        prior = smooth_prior(sampler)
        return dataclasses.replace(prior, qq=prior.qq + np.diag(1e-3 + 1e-6 * np.array(sampler.timesteps)))

    resampled, native = noisy(sampler_of(50)).resampled(sampler_of(steps)), noisy(sampler_of(steps))
    inside = np.array(sampler_of(steps).timesteps) <= 981
    both = np.ix_(inside, inside)
    assert resampled.qq[both] == pytest.approx(native.qq[both], abs=3e-5)
    for full_steps in (range(0, steps, 2), range(0, steps, 5)):  # what extrapolation makes of noise, above all
        schedule = CacheSchedule(num_steps=steps, full_steps=full_steps)
        assert resampled.final_error(schedule.served) == pytest.approx(native.final_error(schedule.served), rel=0.02)


def test_resampled_to_its_own_timesteps_a_prior_stays_as_it_is():
    prior = smooth_prior(sampler_of(50))
    same = prior.resampled(sampler_of(50))
    for name in ("qq", "qv", "vv", "step_sizes", "sensitivity", "channel_grams"):
        assert getattr(same, name) == pytest.approx(getattr(prior, name), abs=1e-12)


def test_timesteps_have_their_places_among_others():
    coarse, fine = (dataclasses.replace(sampler_of(50), timesteps=t) for t in ((900.0, 500.0, 100.0), (900.0, 300.0)))
    assert coarse.places_in(fine).tolist() == pytest.approx([0, 2 / 3, 1])
    assert fine.places_in(coarse).tolist() == pytest.approx([0, 1.5])


def test_a_change_of_the_shift_carries_over():
    shifted = sampler_of(40, config={"beta_end": 0.02, "shift": 3.0})
    shifted = dataclasses.replace(shifted, timesteps=tuple(3 * t / (1 + 2 * t / 1000) for t in shifted.timesteps))
    resampled, native = smooth_prior(sampler_of(50)).resampled(shifted), smooth_prior(shifted)
    inside = np.array(shifted.timesteps) <= 981
    assert resampled.qv[np.ix_(inside, inside)] == pytest.approx(native.qv[np.ix_(inside, inside)], abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": "DDPMScheduler"},
        {"config": {"beta_end": 0.03, "shift": 1.0}},
        {"config": {"beta_end": 0.02, "shift": 1.0, "eta": 1.0}},
        {"timesteps": (900.0, 900.0, 300.0)},  # two evaluations a step
        {"timesteps": (100.0, 500.0, 900.0)},
        {"timesteps": (1900.0, 500.0, 1.0)},  # beyond what was measured
        {"timesteps": (900.0,)},
    ],
)
def test_a_prior_does_not_carry_over_to_another_curve(changes):
    with pytest.raises(PriorMismatchError, match="measured under another noise scheduler"):
        smooth_prior(sampler_of(50)).resampled(sampler_of(20, **changes))


def test_a_prior_that_does_not_know_its_sampler_does_not_carry_over():
    prior = dataclasses.replace(smooth_prior(sampler_of(50)), metadata=None)
    with pytest.raises(PriorMismatchError, match="profile anew"):
        prior.resampled(sampler_of(20))
    with pytest.raises(PriorMismatchError, match="nothing says which sampler it was measured under"):
        _ = prior.sampler
