"""What a score says where a number is missing."""

import json
import math

import jax
import numpy as np
import optax

from montessori_jax.influence import Candidate, Measured, Probe, measured_score

ONE = Candidate("one", "data")
FINE = Measured(0.5, 2.0, 1.5, 0.1, 0.01)


def test_a_number_that_is_not_finite_is_none_with_its_reason():
    score = measured_score(ONE, math.nan, {"a": FINE, "b": FINE}, "exact")
    assert score.reason == "the loss on the candidate is nan"
    assert (score.influence, score.loss_after, score.standard_error) == (None, None, None)
    assert (score.loss_before, score.offset, score.candidate_loss) == (2.0, 0.1, None)
    assert {one["influence"] for one in score.sets.values()} == {None}


def test_a_set_without_a_number_is_named():
    broken = FINE._replace(influence=-math.inf, loss_after=math.inf)
    score = measured_score(ONE, 1.0, {"a": FINE, "b": broken}, "exact")
    assert score.influence == 0.5
    assert score.sets["b"]["influence"] is None
    assert score.reason == "the step on the candidate gives an influence of -inf on b"
    score = measured_score(ONE, 1.0, {"a": broken, "b": FINE}, "exact")
    assert score.influence is None
    assert score.sets["b"]["influence"] == 0.5
    assert score.reason == "the step on the candidate gives an influence of -inf"
    json.dumps(score.as_row(), allow_nan=False)


def test_an_error_that_is_not_known_is_none():
    score = measured_score(ONE, 1.0, {"a": FINE._replace(standard_error=math.inf)}, "exact")
    assert (score.influence, score.standard_error, score.reason) == (0.5, None, None)


def test_a_student_in_numpys_arrays_goes_to_the_device_once():
    params, tx = {"weight": np.ones(3, np.float32)}, optax.adam(1e-3)
    state = jax.device_get(tx.init(params))
    probe = Probe(lambda params, data: data @ params["weight"], params, state, tx, {})
    leaves = jax.tree.leaves((probe.params, probe.opt_state))
    assert len(leaves) == 4
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert probe.params["weight"].dtype == np.float32
