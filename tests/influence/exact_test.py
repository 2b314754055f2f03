"""The definition: by hand, against a plain loop, and whatever runs beside a candidate."""

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
    chat_candidate,
    chat_reference,
    local_influence,
    single_batch,
)
from tests.influence.problems import from_rest, influences
from tests.influence.students import MODEL, adamw, chats, student

LOSS = MeanLoss(TokenLosses(MODEL))


@pytest.fixture(scope="module")
def reference():
    return chat_reference(MODEL, chats(6, 1), row_length=64, rows_per_pass=2)


@pytest.fixture(scope="module")
def candidates():
    return [chat_candidate(f"c{i}", chat, 64) for i, chat in enumerate(chats(11, 2))]


def squared_error(params, data):
    x, y = data
    return 0.5 * jnp.square(jnp.sum(params["w"] * x) - y)


def test_sgd_on_a_linear_model_by_hand():
    # w = (1, 2). Candidate x = (1, 0), y = 0: residual 1, gradient (1, 0); at rate 1/4 the step
    # leads to (3/4, 2). References (1, 1) -> 2 and (2, 0) -> 0, half the squared residual each:
    # before  (1^2 + 2^2) / 2 = 5/2, after (.75^2 + 1.5^2) / 2 = 1.40625; means over two.
    points, answers = jnp.array([[1.0, 1.0], [2.0, 0.0]]), jnp.array([2.0, 0.0])

    def losses(params):
        return 0.5 * jnp.square(points @ params["w"] - answers)

    tx = optax.sgd(0.25)
    params = {"w": jnp.array([1.0, 2.0])}
    items = [Candidate("one", (np.array([1.0, 0.0], np.float32), np.float32(0.0)))]
    reference = single_batch(losses, np.array([0.5, 0.5]))
    [score] = from_rest(squared_error, params, tx, items, reference)
    assert score.loss_before == 1.25
    assert score.loss_after == 0.703125
    assert score.influence == 1.25 - 0.703125
    assert score.candidate_loss == 0.5
    assert score.offset == 0.0
    assert score.id == "one"


def test_adamw_from_warm_moments_by_hand():
    # One weight at 1, m = .5, v = .04 after 3 steps, gradient 1 (residual 1 at x = 1, y = 0).
    # m' = .9 * .5 + .1 = .55, v' = .999 * .04 + .001 = .04096, step 4:
    # m_hat = .55 / (1 - .9^4) = .55 / .3439, v_hat = .04096 / (1 - .999^4).
    m_hat, v_hat = 0.55 / 0.3439, 0.04096 / (1 - 0.999**4)
    rate, decay = 0.01, 0.1
    after = 1 - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * 1.0)
    tx = optax.adamw(rate, weight_decay=decay)
    with jax.enable_x64(True):
        params = {"w": jnp.array([1.0])}
        state = tx.init(params)
        adam = state[0]._replace(
            count=jnp.int32(3), mu={"w": jnp.array([0.5])}, nu={"w": jnp.array([0.04])}
        )
        [score] = local_influence(
            squared_error,
            params,
            (adam, *state[1:]),
            tx,
            [Candidate("one", (np.array([1.0]), np.float64(0.0)))],
            single_batch(lambda params: jnp.square(params["w"]), np.array([1.0])),
        )
    np.testing.assert_allclose(score.influence, 1 - after**2, rtol=1e-12)


def test_a_plain_loop_gives_the_same(reference, candidates):
    params, state, tx = student()

    @jax.jit
    def step(data):
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = tx.update(jax.grad(LOSS)(params, data), state, params)
            return optax.apply_updates(params, updates)

    before = reference.losses(params)
    expected = [
        reference.difference(before, reference.losses(step(one.data))) for one in candidates
    ]
    for block in (1, 4):
        scores = local_influence(
            LOSS, params, state, tx, candidates, reference, block=block, chunk=8
        )
        # Differences of losses near 3 in float32: the rounding of a mean over 77 tokens.
        np.testing.assert_allclose(influences(scores), expected, atol=1e-7)
        assert np.std(expected) > 1e-4


def test_zero_learning_rate_gives_exactly_zero(reference, candidates):
    params, state, _ = student()
    scores = local_influence(
        LOSS, params, state, adamw(0.0), candidates, reference, block=4, chunk=8
    )
    assert [score.influence for score in scores] == [0.0] * 11
    assert {score.offset for score in scores} == {0.0}


def test_a_candidate_without_targets_takes_the_momentum_step(reference, candidates):
    params, state, tx = student()
    data = candidates[0].data
    masked = data._replace(target_weights=np.zeros_like(data.target_weights))
    [score] = local_influence(
        LOSS, params, state, tx, [Candidate("masked", masked)], reference, chunk=8
    )
    assert score.influence == score.offset
    assert abs(score.influence) > 1e-4


def test_neither_order_nor_chunk_nor_padding_matters(reference, candidates):
    params, state, tx = student()

    def by_id(items, chunk=8):
        scores = local_influence(LOSS, params, state, tx, items, reference, chunk=chunk)
        return {score.id: score.influence for score in scores}

    first = by_id(candidates)
    assert by_id(candidates[::-1]) == first
    assert by_id(candidates, chunk=3) == pytest.approx(first, abs=1e-8)

    def widen(leaf):
        return np.pad(leaf, ((0, 0), (0, 9)))

    wide = [Candidate(one.id, jax.tree.map(widen, one.data)) for one in candidates]
    mixed = [pair[i % 2] for i, pair in enumerate(zip(candidates, wide, strict=True))]
    assert by_id(mixed) == pytest.approx(first, abs=1e-7)


def test_finished_chunks_are_skipped_and_the_rest_is_the_same(reference, candidates):
    params, state, tx = student()
    written = {}

    def score(finished):
        return local_influence(
            LOSS,
            params,
            state,
            tx,
            candidates,
            reference,
            chunk=8,
            finished=finished,
            on_chunk=lambda number, scores: written.setdefault(number, []).append(scores),
        )

    whole = score(())
    rest = score((0,))
    assert [score.id for score in rest] == ["c8", "c9", "c10"]
    assert rest == whole[8:]
    assert {number: len(calls) for number, calls in written.items()} == {0: 1, 1: 2}


def linear(count):
    """A linear model with a quadratic reference loss, and candidates for it."""
    rng = np.random.default_rng(3)
    params = {"w": jnp.asarray(rng.normal(size=4), jnp.float32)}
    items = [
        Candidate(str(i), (x.astype(np.float32), np.float32(0)))
        for i, x in enumerate(rng.normal(size=(count, 4)))
    ]
    return params, items, single_batch(lambda params: jnp.square(params["w"]), np.ones(4) / 4)


@pytest.mark.parametrize("method", ["exact", "first_order"])
def test_a_broken_candidate_has_a_reason_and_harms_no_other(method):
    params, items, reference = linear(7)
    broken = list(items)
    broken[4] = Candidate("4", (items[4].data[0], np.float32(np.nan)))
    broken[5] = Candidate("5", None, "no tokens")
    tx = optax.sgd(0.1)

    def run(items):
        how = {"method": method, "block": 2, "chunk": 4}
        return from_rest(squared_error, params, tx, items, reference, **how)

    healthy, found = run(items), run(broken)
    assert found[4].influence is None
    assert found[4].candidate_loss is None
    assert found[4].reason == "the loss on the candidate is nan"
    assert (found[5].influence, found[5].reason, found[5].id) == (None, "no tokens", "5")
    assert [*found[:4], found[6]] == [*healthy[:4], healthy[6]]


@pytest.mark.parametrize("method", ["exact", "first_order"])
def test_gradient_scale_scales_the_gradient(method):
    params, items, reference = linear(3)

    def run(rate, scale):
        how = {"method": method, "gradient_scale": scale}
        return influences(
            from_rest(squared_error, params, optax.sgd(rate), items, reference, **how)
        )

    np.testing.assert_allclose(run(0.2, 0.5), run(0.1, 1.0), rtol=1e-5)


def test_a_gradient_that_is_not_finite_has_a_reason():
    # The square root's derivative at 0 is infinite, its value is not.
    tx = optax.sgd(0.1)
    params = {"w": jnp.array([0.0])}
    [score] = from_rest(
        lambda params, data: jnp.sum(jnp.sqrt(params["w"]) * data),
        params,
        tx,
        [Candidate("steep", np.float32(1.0))],
        single_batch(lambda params: params["w"], np.array([1.0])),
    )
    assert score.influence is None
    assert score.candidate_loss == 0.0
    assert score.reason == "the step on the candidate gives an influence of inf"


def test_a_reference_that_is_not_finite_stops(candidates):
    params, state, tx = student()
    broken = single_batch(
        lambda params: params["norm"]["scale"][:2] * jnp.nan, np.array([0.5, 0.5])
    )
    with pytest.raises(UserError, match="the reference loss is nan before any step"):
        local_influence(LOSS, params, state, tx, candidates, broken)
