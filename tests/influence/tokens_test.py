"""A candidate's influence, term by term: the sum, and SGD's terms one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from montessori_jax.influence import Candidate, Probe, token_contributions
from tests.influence.problems import curved, predict


def terms(params, data):
    return jnp.square(predict(params, data["x"]) - data["y"])


def loss(params, data):
    return jnp.sum(terms(params, data))


def several(problem):
    rng = np.random.default_rng(8)
    data = {"x": rng.normal(size=(5, 4)), "y": rng.normal(size=5)}
    given = (loss, problem.params, problem.opt_state, problem.tx)
    return data, Probe(*given, {"reference": problem.reference})


def first_order(problem, data):
    from montessori_jax.influence import local_influence

    [score] = local_influence(
        loss,
        problem.params,
        problem.opt_state,
        problem.tx,
        [Candidate("all", data)],
        problem.reference,
        method="first_order",
    )
    return score


@pytest.mark.parametrize("clip", [None, 0.01])
def test_contributions_add_up_to_first_order(clip):
    with jax.enable_x64(True):
        problem = curved(optax.adam(1e-2), moments=True)
        if clip:
            tx = optax.chain(optax.clip_by_global_norm(clip), problem.tx)
            problem = problem._replace(tx=tx, opt_state=(optax.EmptyState(), problem.opt_state))
        data, probe = several(problem)
        found = token_contributions(probe, terms, data)["reference"]
        score = first_order(problem, data)
    assert found.contributions.shape == (5,)
    assert found.offset == pytest.approx(score.offset, rel=1e-12)
    assert found.influence == pytest.approx(score.influence, rel=1e-9)


def test_with_sgd_each_term_is_what_it_would_be_alone():
    with jax.enable_x64(True):
        problem = curved(optax.sgd(0.05))
        data, probe = several(problem)
        found = token_contributions(probe, terms, data)["reference"].contributions
        alone = [
            first_order(problem, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], data)).influence
            for i in range(5)
        ]
    np.testing.assert_allclose(found, alone, rtol=1e-10)
