import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.schedules import full_steps_of

from cemq.errors import InputError
from cemq.predict.predictors import PREDICTORS, chebyshev, check_predictor, serving_matrix

# rows 2, 4 and 5 of six steps with the full-compute steps 0, 1 and 3, as weights of their three outputs
BY_HAND = {
    "reuse": [(0, 1, 0), (0, 0, 1), (0, 0, 1)],
    "damped": [(-0.5, 1.5, 0), (0, -0.25, 1.25), (0, -0.5, 1.5)],
    "taylor1": [(-1, 2, 0), (0, -0.5, 1.5), (0, -1, 2)],
    "taylor2": [(-1, 2, 0), (1, -2, 2), (8 / 3, -5, 10 / 3)],  # Lagrange's polynomials through 0, 1 and 3
    "goc": [(-0.8, 1.8, 0), (0.64, -1.44, 1.8), (1.152, -2.592, 2.44)],
    "mean-velocity": [(0, 1, 0), (0, 0, 1), (0, -0.25, 1.25)],
    "mean-velocity-2": [(-1 / 4, 5 / 4, 0), (1 / 16, -5 / 16, 5 / 4), (5 / 64, -25 / 64, 21 / 16)],
    "mean-velocity-3": [(-1 / 4, 5 / 4, 0), (-1 / 36, -1 / 12, 10 / 9), (2 / 81, -10 / 27, 109 / 81)],
    "mean-velocity-4": [(-1 / 4, 5 / 4, 0), (-13 / 64, 9 / 64, 17 / 16), (-237 / 1024, 41 / 1024, 305 / 256)],
    "mean-velocity-5": [(-1 / 4, 5 / 4, 0), (-13 / 64, 9 / 64, 17 / 16), (-0.38125, 0.23625, 1.145)],
}


def ridge_row(step, nodes):
    """The other way to a ridge regression: plain least squares, with a row for the penalty of each coefficient."""
    basis = np.cos(np.outer(np.arccos(2 * np.array([*nodes, step]) / 50 - 1), np.arange(5)))
    rows = np.vstack([basis[:-1], np.sqrt(0.1) * np.eye(5)])
    weights = basis[-1] @ np.linalg.lstsq(rows, np.eye(len(rows), len(nodes)), rcond=None)[0]
    return np.append(weights, np.zeros(3 - len(nodes)))


BY_HAND["chebyshev"] = [ridge_row(2, (0, 1)), ridge_row(4, (0, 1, 3)), ridge_row(5, (0, 1, 3))]
ADD_UP_TO_ONE = [name for name in PREDICTORS if name != "chebyshev"]  # whose penalty is on the constant too


@pytest.mark.parametrize("name", PREDICTORS)
def test_every_predictor_has_the_rows_computed_by_hand(name):
    served = serving_matrix(6, (0, 1, 3), (name,) * 3)
    assert np.array_equal(served[[0, 1, 3]], np.eye(6)[[0, 1, 3]])
    assert served[np.ix_([2, 4, 5], [0, 1, 3])] == pytest.approx(np.array(BY_HAND[name]))
    assert not served[:, [2, 4, 5]].any()  # nothing is served from a skipped step


@pytest.mark.parametrize("name", PREDICTORS)
def test_with_one_output_to_look_at_it_is_taken_as_it_is(name):
    assert serving_matrix(3, (0,), (name,))[:, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize(("name", "degree"), [("reuse", 0), ("taylor1", 1), ("taylor2", 2)])
@given(case=full_steps_of(at_least=3), coefficients=st.tuples(*[st.integers(-9, 9)] * 3))
@settings(max_examples=40, deadline=None)
def test_taylor_k_reproduces_polynomials_of_degree_k_on_any_gaps(name, degree, case, coefficients):
    steps, full = case
    truth = np.polyval(coefficients[: degree + 1], np.arange(steps) / steps)
    found = serving_matrix(steps, full, (name,) * len(full)) @ truth
    known = full[degree]  # from here on there are enough outputs to look back at
    assert found[known:] == pytest.approx(truth[known:], rel=1e-7, abs=1e-7)


@given(case=full_steps_of(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_step_is_served_from_full_steps_up_to_itself_with_weights_that_add_up_to_one(case, data):
    steps, full = case
    names = data.draw(st.lists(st.sampled_from(ADD_UP_TO_ONE), min_size=len(full), max_size=len(full)))
    served = serving_matrix(steps, full, names)
    assert not np.triu(served, 1).any()
    assert not np.delete(served, full, axis=1).any()
    assert served.sum(1) == pytest.approx(1, rel=1e-6)


@given(case=full_steps_of(at_least=5), coefficients=st.tuples(*[st.integers(-9, 9)] * 5))
@settings(max_examples=40, deadline=None)
def test_without_a_penalty_chebyshev_reproduces_polynomials_of_its_degree(case, coefficients):
    steps, full = case
    truth = np.polyval(coefficients, np.arange(steps) / steps)
    rule, known = chebyshev(4, 0.0, steps), list(full[4::-1])
    for step in range(full[4] + 1, min(full[4] + 4, steps)):
        row = rule(step, known, np.zeros((steps, steps)))
        assert set(np.flatnonzero(row)) <= set(known)
        assert row @ truth == pytest.approx(truth[step], rel=1e-4, abs=1e-2)


def test_each_segment_is_served_by_its_own_predictor():
    served = serving_matrix(7, (0, 2, 4), ("goc", "reuse", "taylor1"))
    assert served[3].tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert served[5].tolist() == [0, 0, -0.5, 0, 1.5, 0, 0]


def test_a_known_predictor_is_handed_back():
    assert [check_predictor(name) for name in PREDICTORS] == list(PREDICTORS)


def test_an_unknown_predictor_names_the_nearest_one():
    with pytest.raises(InputError, match=r"unknown predictor 'taylor': .*did you mean 'taylor[12]'"):
        check_predictor("taylor")


def test_an_unknown_predictor_like_no_other_gets_no_suggestion():
    with pytest.raises(InputError, match=r"choose from reuse, damped, taylor1, taylor2, goc, mean-velocity, "):
        check_predictor("zzzz")
