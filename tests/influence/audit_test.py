"""Audits: floors, falling back, how many, and intervals against scipy's."""

import logging

import numpy as np
import pytest
import scipy.stats

from montessori_jax.influence import Score, audit, choose_method
from montessori_jax.influence.agreement import spearman
from montessori_jax.influence.audit import Floors, audit_count, choose_audited
from montessori_jax.influence.bootstrap import bootstrap_intervals
from montessori_jax.influence.costs import costs, ladder

TRUTH = np.random.default_rng(1).normal(size=16)
GROUPS = [i // 2 for i in range(16)]


def scores(values, method):
    return [Score(str(i), float(v), 1.0, None, None, method) for i, v in enumerate(values)]


def rung(values, method, made):
    def make():
        made.append(method)
        found = scores(values, method)
        return lambda places: [found[place] for place in places]

    return make


def choose(made, **how):
    ladder = {
        "rough": rung(-TRUTH, "rough", made),
        "good": rung(TRUTH * 1.01, "good", made),
        "dear": rung(TRUTH, "dear", made),
    }
    true = scores(TRUTH, "exact")
    return choose_method(ladder, lambda places: [true[i] for i in places], range(16), GROUPS, **how)


def test_the_first_that_passes_is_taken_and_the_next_is_not_made(caplog):
    made = []
    with caplog.at_level(logging.INFO):
        found = choose(made)
    assert found.method == "good"
    assert made == ["rough", "good"]
    assert [one.method for one in found.audits] == ["rough", "good"]
    assert found.audit.failures == ()
    assert "rough FAILED ITS AUDIT: Spearman -1.000 is below 0.95" in caplog.text
    assert "good, 16 audited: Spearman 1.000" in caplog.text


def test_with_warn_the_first_is_kept():
    found = choose([], on_failure="warn")
    assert found.method == "rough"
    assert len(found.audit.failures) == 3


def test_where_none_passes_the_definition_is_left():
    found = choose([], floors=Floors(spearman=None, pairs=None, error=-1.0))
    assert (found.method, found.audit, len(found.audits)) == ("exact", None, 3)


def test_floors_that_are_off_do_not_ask():
    found = audit("rough", scores(TRUTH, "exact"), scores(-TRUTH, "rough"), GROUPS)
    assert len(found.failures) == 3
    assert Floors(None, None, None).failures(found.agreement) == ()


def test_how_many_are_audited():
    # 15% of the whole cost: 15/85 of what scoring costs, between 8 and 32.
    assert audit_count(32, 1000, 1000.0, 1.0) == 32
    assert audit_count(32, 1000, 100.0, 1.0) == 17
    assert audit_count(32, 1000, 1.0, 1.0) == 8
    assert audit_count(32, 5, 1000.0, 1.0) == 5
    assert audit_count(4, 1000, 1000.0, 1.0) == 4


def test_whole_prompts_are_audited():
    chosen = choose_audited(range(16), 8, 3, GROUPS)
    assert len({GROUPS[i] for i in chosen}) == 4
    assert chosen == choose_audited(range(16), 8, 3, GROUPS)
    assert any(chosen != choose_audited(range(16), 8, seed, GROUPS) for seed in (4, 5, 6))
    assert len(choose_audited(range(16), 8, 3)) == 8


def test_intervals_are_those_of_scipy():
    estimate = TRUTH + np.random.default_rng(2).normal(size=16)
    found = bootstrap_intervals(TRUTH, estimate, draws=4000)
    expected = scipy.stats.bootstrap(
        (TRUTH, estimate),
        lambda x, y: spearman(x, y),
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert found["spearman"] == pytest.approx((expected.low, expected.high), abs=0.04)
    assert found["pairs"] is None
    assert bootstrap_intervals(TRUTH, estimate, GROUPS, draws=200)["pairs"] is not None


def test_cheap_estimators_come_first_where_the_pool_is_large():
    # 2NR is a hundred gradients here; 32 pilots weigh more than a few candidates.
    known = costs(1.0, 1.0, 300.0)
    assert ladder(known, 10_000) == ["linearized", "first_order", "control_variate"]
    assert ladder(known, 40)[0] == "first_order"
    assert ladder(known, 10_000, start="first_order") == ["first_order", "control_variate"]
    # A reference as small as a candidate: nothing is cheaper than the definition by much.
    assert "control_variate" in ladder(costs(1.0, 100.0, 100.0), 10_000)
