"""The curve from cheap scores to dear ones: recovers what it is made of, and always rises."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from montessori_jax.influence.response import FEWEST, Response, fit_response

X = np.linspace(-2e-4, 3e-4, 12)


def test_a_saturating_curve_is_found():
    truth = Response(1e-5, 1.3, 2500.0)
    y = np.array([truth(x) for x in X])
    found = fit_response(X, y)
    np.testing.assert_allclose((found.a, found.b, found.k), (1e-5, 1.3, 2500.0), rtol=1e-5)
    # By hand, far beyond the pilots: 1e-5 + 1.3e-3 / 3.5.
    np.testing.assert_allclose(found(1e-3), 1e-5 + 1.3e-3 / 3.5, rtol=1e-5)


def test_a_line_stays_a_line():
    found = fit_response(X, 1e-5 + 2 * X)
    np.testing.assert_allclose((found.a, found.b), (1e-5, 2.0), rtol=1e-9)
    assert found.k == 0.0
    # It does not bend upwards either: then the line is the best of what it may be.
    assert fit_response(X, X + 1e3 * X * np.abs(X)).k == 0.0


def test_scores_that_do_not_go_together_are_left_alone():
    assert fit_response(X, -X) == Response()
    rng = np.random.default_rng(0)
    assert fit_response(X, rng.permutation(X)) == Response()


def test_few_or_broken_pilots_leave_scores_as_they_are():
    assert fit_response(X[: FEWEST - 1], 2 * X[: FEWEST - 1]) == Response()
    assert fit_response(np.full(12, 1e-4), X) == Response()
    broken = np.where(np.arange(12) < 5, np.nan, X)
    assert fit_response(broken, 2 * X) == Response()
    assert Response()(1.5e-4) == 1.5e-4


def test_pilots_that_are_not_finite_have_no_say():
    x, y = np.append(X, [np.nan, 1e-4]), np.append(2 * X, [1.0, np.inf])
    assert fit_response(x, y) == fit_response(X, 2 * X)


numbers = arrays.arrays(np.float64, 10, elements=st.floats(-1 / 64, 1 / 64, width=32))


@settings(deadline=None, max_examples=50)
@given(numbers, numbers)
def test_it_rises_everywhere(x, y):
    found = fit_response(x, y)
    at = np.linspace(-3, 3, 61) * (np.abs(x).max() or 1.0)
    assert (np.diff([found(float(one)) for one in at]) > 0).all()
