"""The estimate against the definition: exact to first order in the step, offset measured."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from montessori_jax.errors import UserError
from montessori_jax.influence import (
    Candidate,
    MeanLoss,
    TokenLosses,
    agreement,
    chat_candidate,
    chat_reference,
    local_influence,
    single_batch,
)
from tests.influence.problems import influences
from tests.influence.students import MODEL, adamw, chats, student

LOSS = MeanLoss(TokenLosses(MODEL))


@pytest.fixture(scope="module")
def reference():
    return chat_reference(MODEL, chats(12, 5), row_length=64, rows_per_pass=2)


@pytest.fixture(scope="module")
def candidates():
    return [chat_candidate(f"c{i}", chat, 64) for i, chat in enumerate(chats(24, 6))]


def quadratic(rate):
    """Eight weights, a quadratic reference loss, and Adam with moments far from zero."""
    rng = np.random.default_rng(7)
    curvature = rng.normal(size=(8, 8))
    curvature = curvature @ curvature.T
    tx = adamw(rate)
    params = {"w": jnp.asarray(rng.normal(size=8))}
    state = tx.init(params)
    adam = state[0]._replace(
        count=jnp.int32(50),
        mu={"w": jnp.asarray(0.3 * rng.normal(size=8))},
        nu={"w": jnp.asarray(rng.uniform(0.5, 2, 8))},
    )
    reference = single_batch(lambda p: (p["w"] @ curvature @ p["w"])[None], np.array([1.0]))
    items = [Candidate(str(i), rng.normal(size=8)) for i in range(4)]
    return params, (adam, *state[1:]), tx, items, reference


def inner(params, data):
    return jnp.sum(jnp.sin(params["w"]) * data)


@pytest.mark.parametrize("point", ["params", "zero_gradient"])
def test_halving_the_rate_with_moments_fixed_halves_the_relative_error(point):
    errors = []
    with jax.enable_x64(True):
        for rate in (1e-3, 5e-4):
            problem = quadratic(rate)
            truth = influences(local_influence(inner, *split(problem)))
            estimate = influences(
                local_influence(inner, *split(problem), method="first_order", expansion_point=point)
            )
            errors.append((estimate - truth) / truth)
    np.testing.assert_allclose(errors[1] / errors[0], 0.5, rtol=0.02)


def split(problem):
    params, state, tx, items, reference = problem
    return params, state, tx, items, reference


def test_expansion_points_by_hand():
    # Loss w^2 at w = 3; SGD with momentum .5 and trace 2 at rate .1. A zero gradient moves w by
    # -.1 (.5 * 2) = -.1, the candidate's gradient 4 by -.1 (4 + 1) = -.5.
    # zero_gradient: offset 9 - 2.9^2 = .59, slope 5.8: .59 + 5.8 * .4 = 2.91.
    # params: slope 6: offset .6, influence .6 + 6 * .4 = 3. The truth is 9 - 2.5^2 = 2.75.
    tx = optax.sgd(0.1, momentum=0.5)
    with jax.enable_x64(True):
        params = {"w": jnp.array([3.0])}
        state = jax.tree.map(lambda leaf: leaf + 2.0, tx.init(params))
        reference = single_batch(lambda params: jnp.square(params["w"]), np.array([1.0]))

        def score(**how):
            [found] = local_influence(
                lambda params, data: jnp.sum(params["w"] * data),
                params,
                state,
                tx,
                [Candidate("one", np.array([4.0]))],
                reference,
                **how,
            )
            return found

        centred = score(method="first_order")
        plain = score(method="first_order", expansion_point="params")
        truth = score(method="exact")
    np.testing.assert_allclose([centred.offset, centred.influence], [0.59, 2.91], rtol=1e-12)
    np.testing.assert_allclose([plain.offset, plain.influence], [0.6, 3.0], rtol=1e-12)
    np.testing.assert_allclose([truth.offset, truth.influence], [0.59, 2.75], rtol=1e-12)
    assert centred.loss_after is None
    assert centred.loss_before == 9.0
    assert centred.candidate_loss == 12.0


def test_close_to_exact_on_a_trained_student(reference, candidates):
    params, state, tx = student(1e-4)
    truth = local_influence(LOSS, params, state, tx, candidates, reference, chunk=8)
    estimate = local_influence(
        LOSS, params, state, tx, candidates, reference, chunk=8, method="first_order"
    )
    measured = agreement(influences(truth), influences(estimate))
    assert measured.spearman > 0.99
    assert measured.error.total < 0.1
    # The shared step is measured, by other programs than exact's but on the same batches.
    np.testing.assert_allclose(estimate[0].offset, truth[0].offset, atol=1e-7)
    assert abs(truth[0].offset) > 1e-5


def test_neither_block_nor_chunk_nor_order_matters(reference, candidates):
    params, state, tx = student(1e-4)

    def by_id(items, chunk=8, block=1):
        scores = local_influence(
            LOSS,
            params,
            state,
            tx,
            items,
            reference,
            method="first_order",
            chunk=chunk,
            block=block,
        )
        return {score.id: score.influence for score in scores}

    first = by_id(candidates)
    assert by_id(candidates[::-1]) == first
    # Relative to scores near 1e-4, the rounding of float32 gradients.
    assert by_id(candidates, chunk=7, block=4) == pytest.approx(first, rel=1e-4)


def test_a_candidate_without_targets_has_the_offset(reference, candidates):
    params, state, tx = student(1e-4)
    data = candidates[0].data
    masked = data._replace(target_weights=np.zeros_like(data.target_weights))
    [score] = local_influence(
        LOSS,
        params,
        state,
        tx,
        [Candidate("masked", masked)],
        reference,
        method="first_order",
        chunk=8,
    )
    # Delta and Delta_c are the same formula in two places: apart by the last bit of a float32.
    assert score.influence == pytest.approx(score.offset, rel=1e-6)


def test_a_reference_that_is_not_finite_stops(candidates):
    params, state, tx = student(1e-4)
    broken = single_batch(lambda params: params["norm"]["scale"][:1] / 0.0, np.array([1.0]))
    with pytest.raises(UserError, match="the reference loss is inf before any step"):
        local_influence(LOSS, params, state, tx, candidates, broken, method="first_order")


def test_mean_update_is_the_mean_of_the_pilots_whatever_their_order():
    # Loss w^2 at w = 3, SGD at rate .1 with gradients 1 and 3: mean update -.2, so the centre is
    # 2.8 and 9 - 7.84 = 1.16 is measured there; slope 5.6: 1.16 -+ 5.6 * .1.
    tx = optax.sgd(0.1)
    with jax.enable_x64(True):
        params = {"w": jnp.array([3.0])}
        reference = single_batch(lambda params: jnp.square(params["w"]), np.array([1.0]))
        items = [Candidate("one", np.array([1.0])), Candidate("three", np.array([3.0]))]

        def run(items):
            found = local_influence(
                lambda params, data: jnp.sum(params["w"] * data),
                params,
                tx.init(params),
                tx,
                items,
                reference,
                method="first_order",
                expansion_point="mean_update",
            )
            return {one.id: (one.influence, one.offset) for one in found}

        found, turned = run(items), run(items[::-1])
    assert found["one"] == pytest.approx((0.6, 0.0), rel=1e-12)
    assert found["three"] == pytest.approx((1.72, 0.0), rel=1e-12)
    assert turned == found
