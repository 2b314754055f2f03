"""Metrics against scipy, and by hand."""

import json

import numpy as np
import pytest
import scipy.stats

from montessori_jax.influence import agreement
from montessori_jax.influence.agreement import (
    error_size,
    kendall,
    pair_agreement,
    pearson,
    ranks,
    sign_agreement,
    sign_pairs,
    spearman,
    top_overlap,
)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_correlations_are_those_of_scipy(seed, ties):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=40)
    y = x + rng.normal(size=40)
    if ties:
        x, y = np.round(x), np.round(y)
    np.testing.assert_allclose(ranks(x), scipy.stats.rankdata(x))
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, rel=1e-12)
    assert kendall(x, y) == pytest.approx(scipy.stats.kendalltau(x, y).statistic, rel=1e-12)
    assert pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, rel=1e-12)


def test_signs_by_hand():
    truth = np.array([1.0, 2.0, 3.0, -1.0, -2.0])
    estimate = np.array([1.0, -1.0, 0.5, -3.0, 1.0])
    found = sign_agreement(truth, estimate)
    assert (found.overall, found.positive, found.negative) == (0.6, 2 / 3, 0.5)
    above_two = sign_agreement(truth, estimate, baseline=2.5)
    assert (above_two.positive, above_two.negative) == (0.0, 1.0)


def test_one_sided_scores_have_no_rate_for_the_other_side():
    found = sign_agreement(np.array([1.0, 2.0]), np.array([1.0, 1.0]))
    assert (found.overall, found.positive, found.negative) == (1.0, 1.0, None)


def test_top_overlap_by_hand():
    truth, estimate = np.array([5.0, 4.0, 3.0, 2.0]), np.array([5.0, 1.0, 4.0, 0.0])
    assert top_overlap(truth, estimate, 1) == 1.0
    assert top_overlap(truth, estimate, 2) == 0.5


def test_error_by_hand():
    # Truth -1, 1 (spread 1); errors 3 and 1: mean 2, around it 1, root mean square sqrt(5).
    found = error_size(np.array([-1.0, 1.0]), np.array([2.0, 2.0]))
    assert (found.offset, found.centred) == (2.0, 1.0)
    assert found.total == pytest.approx(5**0.5)


def test_pairs_by_hand():
    truth = np.array([1.0, 2.0, -1.0, 3.0, -4.0])
    estimate = np.array([1.0, -2.0, -1.0, 3.0, -4.0])
    groups = ["a", "a", "a", "b", "b"]
    assert sign_pairs(truth, groups) == {(0, 2), (1, 2), (3, 4)}
    assert sign_pairs(estimate, groups) == {(0, 1), (0, 2), (3, 4)}
    found = pair_agreement(truth, estimate, groups)
    assert (found.true_pairs, found.estimated_pairs) == (3, 3)
    assert (found.precision, found.recall, found.jaccard) == (2 / 3, 2 / 3, 0.5)


def test_a_wrong_offset_hides_from_ranks_alone():
    truth = np.array([-2e-4, 1e-4, 3e-4, -1e-4])
    measured = agreement(truth, truth + 1e-3, ["a", "a", "b", "b"])
    assert measured.spearman == pytest.approx(1.0)
    assert measured.error.centred == pytest.approx(0.0, abs=1e-9)
    assert measured.error.offset > 4
    assert (measured.sign.positive, measured.sign.negative) == (1.0, 0.0)
    assert measured.pairs.jaccard == 0.0


def test_what_is_not_defined_is_none_and_json():
    measured = agreement([1.0], [2.0], ["a"])
    assert measured.spearman is None
    assert measured.kendall is None
    assert measured.error is None
    assert measured.pairs.jaccard is None
    assert json.loads(json.dumps(measured.as_row(), allow_nan=False))["count"] == 1


def test_unequal_lists_are_refused():
    with pytest.raises(ValueError, match="equally long"):
        agreement([1.0, 2.0], [1.0])


def test_equal_scores_have_no_spread_however_their_mean_is_rounded():
    truth = np.full(3, 0.1)
    assert truth.std() > 0  # The case in point: all of it rounding.
    estimate = truth + 1e-4
    assert error_size(truth, estimate) is None
    assert pearson(truth, estimate) is None
    assert pearson(np.arange(3.0), truth) is None
