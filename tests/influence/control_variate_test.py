"""The correction: exact with the whole reference, and honest about its error with a part."""

import jax
import numpy as np
import optax
import pytest
import scipy.stats

from montessori_jax.influence.control_variate import difference_estimate, part_of
from tests.influence.problems import REFERENCES, curved, influences


@pytest.fixture(scope="module")
def measured():
    """A warm Adam step: exact, first order, and the correction on the whole and on parts."""
    with jax.enable_x64(True):
        problem = curved(optax.adam(5e-2), count=7, moments=True)
        return {
            "exact": problem.score("exact"),
            "first": problem.score("first_order"),
            "whole": problem.score("control_variate", count=REFERENCES),
            "part": problem.score("control_variate", fraction=0.5, block=2, chunk=4),
            "sign": problem.score("control_variate", fraction=0.5, refine="sign"),
            "again": problem.score("control_variate", fraction=0.5, candidates=problem.items[3:]),
        }


def test_the_whole_reference_gives_exact(measured):
    np.testing.assert_allclose(
        influences(measured["whole"]), influences(measured["exact"]), rtol=1e-11
    )
    assert {score.standard_error for score in measured["whole"]} == {0.0}


def test_half_of_it_is_closer_than_first_order(measured):
    truth = influences(measured["exact"])

    def error(name):
        return np.sqrt(np.mean((influences(measured[name]) - truth) ** 2))

    assert error("part") < error("first")
    # All scores share the part, so their errors do not average out: none is wild.
    for score, value in zip(measured["part"], truth, strict=True):
        assert 0 < abs(score.influence - value) < 3 * score.standard_error


def test_neighbours_and_blocks_do_not_matter(measured):
    np.testing.assert_allclose(
        influences(measured["again"]), influences(measured["part"])[3:], rtol=1e-11
    )


def test_only_doubtful_signs_are_refined(measured):
    first, part, sign = (influences(measured[name]) for name in ("first", "part", "sign"))
    doubt = np.sqrt(np.mean((part - first) ** 2))
    expected = np.where(np.abs(first) < 2 * doubt, part, first)
    np.testing.assert_allclose(sign, expected, rtol=1e-11)
    for score, value in zip(measured["sign"], first, strict=True):
        if abs(value) >= 2 * doubt:
            assert score.standard_error == pytest.approx(doubt, rel=1e-9)


def test_the_estimate_by_hand():
    # Three of six: mean 2, so a total of 12; sd 1, error 6 sqrt((1 - 1/2) / 3) = sqrt(6).
    estimate, error = difference_estimate(np.array([1.0, 2.0, 3.0]), 6)
    assert (estimate, error) == (12.0, pytest.approx(6**0.5, rel=1e-12))
    assert difference_estimate(np.array([1.0]), 6) == (6.0, None)


@pytest.mark.parametrize(("size", "draws"), [(6, 4000), (24, 4000)])
def test_standard_errors_cover_the_truth_as_often_as_they_say(size, draws):
    # 48 residuals, many random parts of them: within one error as often as Student's t says.
    residuals = np.random.default_rng(3).normal(0.2, 1, 48)
    inside = 0
    for seed in range(draws):
        estimate, error = difference_estimate(residuals[part_of(48, size, seed)], 48)
        inside += abs(estimate - residuals.sum()) < error
    within = 2 * scipy.stats.t.cdf(1, size - 1) - 1
    assert inside / draws == pytest.approx(within, abs=0.03)
