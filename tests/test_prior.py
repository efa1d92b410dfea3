import dataclasses

import numpy as np
import pytest

from cemq.errors import BundleError, InputError
from cemq.prior import VIEWS, ErrorPrior, PriorMetadata, SamplerFingerprint

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


def trajectories(seed=0):
    random = np.random.default_rng(seed)
    v = np.cumsum(random.normal(size=(STEPS, ELEMENTS)), axis=0)
    return v + 0.1 * random.normal(size=v.shape), v


def prior_of(q, v, **fields):
    elements = q.shape[1]
    return ErrorPrior(
        qq=q @ q.T / elements, qv=q @ v.T / elements, vv=v @ v.T / elements, step_sizes=np.ones(len(q)), **fields
    )


def cached_and_true(view):
    q, v = trajectories()
    return {"combined": (q, v), "cache": (v, v), "self": (q, q)}[view]


@pytest.mark.parametrize("view", VIEWS)
def test_the_error_of_a_linear_prediction_is_its_relative_distance(view):
    x, y = cached_and_true(view)
    prior = prior_of(*trajectories())
    for step, sources, weights in [(5, (3, 1), (1.7, -0.7)), (2, (0,), (1.0,)), (4, (3, 2, 0), (0.5, 0.25, 2.0))]:
        served = sum(weight * x[source] for source, weight in zip(sources, weights, strict=True))
        expected = np.linalg.norm(served - y[step]) / np.linalg.norm(y[step])
        assert prior.error(step, sources, weights, view) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("view", VIEWS)
def test_reuse_errors_are_relative_distances_and_nan_before_the_first_step(view):
    x, y = cached_and_true(view)
    table = prior_of(*trajectories()).reuse_errors(view)
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
    table = prior_of(*trajectories()).cosine_distances(view)
    assert table.shape == (STEPS, STEPS)
    for age in range(STEPS):
        for step in range(STEPS):
            if step < age:
                assert table[age, step] == 0
            else:
                old, true = x[step - age], y[step]
                cosine = old @ true / (np.linalg.norm(old) * np.linalg.norm(true))
                assert table[age, step] == pytest.approx(1 - cosine, rel=1e-9, abs=1e-12)


def test_reuse_errors_agree_with_the_error_of_one_unit_weight():
    prior = prior_of(*trajectories())
    table = prior.reuse_errors()
    assert all(table[c, s] == prior.error(s, (s - c,), (1.0,)) for c in range(STEPS) for s in range(c, STEPS))


def test_without_quantization_error_all_views_are_equal():
    _, v = trajectories()
    prior = prior_of(v, v)
    for view in ("cache", "self"):
        assert np.array_equal(prior.reuse_errors("combined"), prior.reuse_errors(view), equal_nan=True)
        assert np.array_equal(prior.cosine_distances("combined"), prior.cosine_distances(view))
        assert prior.error(4, (2, 1), (2.0, -1.0), "combined") == prior.error(4, (2, 1), (2.0, -1.0), view)


def test_with_quantization_error_no_two_views_are_equal():
    tables = [prior_of(*trajectories()).reuse_errors(view)[1, 1:] for view in VIEWS]
    assert all((a != b).all() for a, b in [(tables[0], tables[1]), (tables[0], tables[2]), (tables[1], tables[2])])


def test_row_zero_of_the_combined_view_is_the_quantization_floor():
    q, v = trajectories()
    prior = prior_of(q, v)
    expected = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(q, v, strict=True)]
    assert prior.reuse_errors("combined")[0] == pytest.approx(expected, rel=1e-9)
    assert prior.quantization_floor == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("view", ["cache", "self"])
def test_a_step_computed_in_full_costs_nothing_where_nothing_is_quantized_away(view):
    assert (prior_of(*trajectories()).reuse_errors(view)[0] == 0).all()


def test_an_unknown_view_names_the_nearest_one():
    with pytest.raises(InputError, match=r"unknown prior 'combine'.*did you mean 'combined'"):
        prior_of(*trajectories()).reuse_errors("combine")


def test_a_saved_prior_loads_bit_for_bit_with_its_metadata(tmp_path):
    prior = prior_of(*trajectories(), metadata=METADATA)
    prior.save(tmp_path / "prior.safetensors")
    loaded = ErrorPrior.load(tmp_path / "prior.safetensors")
    for name in ("qq", "qv", "vv", "step_sizes"):
        assert getattr(loaded, name).dtype == np.float64
        assert np.array_equal(getattr(loaded, name), getattr(prior, name))
    assert loaded.metadata == METADATA
    assert loaded.metadata.sampler.matches(SAMPLER)


def test_a_prior_without_metadata_loads_without_metadata(tmp_path):
    prior_of(*trajectories()).save(tmp_path / "prior.safetensors")
    assert ErrorPrior.load(tmp_path / "prior.safetensors").metadata is None


def test_a_matrix_in_another_memory_order_is_saved_as_it_reads(tmp_path):
    q, v = trajectories()
    prior = dataclasses.replace(prior_of(q, v), qv=np.asfortranarray(q @ v.T))
    prior.save(tmp_path / "prior.safetensors")
    assert np.array_equal(ErrorPrior.load(tmp_path / "prior.safetensors").qv, prior.qv)


@pytest.mark.parametrize("damage", ["cut", "text", "gone", "metadata", "tensor"])
def test_a_damaged_prior_file_is_refused_by_name(tmp_path, damage):
    from safetensors.numpy import save_file

    path = tmp_path / "prior.safetensors"
    prior_of(*trajectories(), metadata=METADATA).save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "text":
        path.write_text("not a prior")
    elif damage == "gone":
        path.unlink()
    elif damage == "metadata":
        save_file({name: np.ones((1, 1)) for name in ("qq", "qv", "vv", "step_sizes")}, path, {"cemq": '{"scheme": 1}'})
    else:
        save_file({"qq": np.ones((1, 1))}, path)
    with pytest.raises(BundleError, match=r"prior\.safetensors' cannot be read"):
        ErrorPrior.load(path)


@pytest.mark.parametrize("name", ["qq", "qv", "vv"])
@pytest.mark.parametrize("shape", [(STEPS - 1, STEPS), (STEPS, STEPS + 1), (STEPS,), (STEPS, STEPS, 1)])
def test_a_misshapen_matrix_is_refused_by_name(name, shape):
    with pytest.raises(InputError, match=f"{name} has shape"):
        dataclasses.replace(prior_of(*trajectories()), **{name: np.ones(shape)})


@pytest.mark.parametrize("name", ["qq", "qv", "vv", "step_sizes"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_refused_by_name(name, bad):
    prior = prior_of(*trajectories())
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
