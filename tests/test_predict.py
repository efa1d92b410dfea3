import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cemq.errors import InputError
from cemq.predict import PREDICTORS, get_predictor


@given(
    newest=st.integers(0, 500), gap=st.integers(1, 60), ahead=st.integers(1, 60), slope=st.integers(-9, 9),
    start=st.integers(-9, 9),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_taylor1_reproduces_any_linear_function_of_the_step_index(newest, gap, ahead, slope, start):
    older, step = newest, newest + gap + ahead
    newest += gap
    weights = get_predictor("taylor1").coefficients(step, (newest, older))
    predicted = weights[0] * (start + slope * newest) + weights[1] * (start + slope * older)
    assert predicted == pytest.approx(start + slope * step, rel=1e-9, abs=1e-6)


def test_taylor1_looks_at_the_two_newest_of_many_steps():
    taylor = get_predictor("taylor1")
    assert taylor.coefficients(10, (8, 4, 1, 0)) == taylor.coefficients(10, (8, 4)) == (1.5, -0.5)


def test_taylor1_falls_back_to_reuse_with_one_step():
    assert get_predictor("taylor1").coefficients(4, (1,)) == (1.0,)


@pytest.mark.parametrize("full_steps", [(3,), (3, 1), (3, 2, 0)])
def test_reuse_takes_the_newest_step_as_it_is(full_steps):
    assert get_predictor("reuse").coefficients(7, full_steps) == (1.0,)


@pytest.mark.parametrize("name", PREDICTORS)
def test_no_predictor_returns_more_weights_than_its_depth(name):
    predictor = get_predictor(name)
    assert predictor.name == name
    assert len(predictor.coefficients(9, (7, 5, 2, 1, 0))) == predictor.depth


def test_an_unknown_predictor_names_the_nearest_one():
    with pytest.raises(InputError, match=r"unknown predictor 'taylor': .*did you mean 'taylor1'"):
        get_predictor("taylor")


def test_an_unknown_predictor_like_no_other_gets_no_suggestion():
    with pytest.raises(InputError, match=r"choose from reuse, taylor1$"):
        get_predictor("zzzz")
