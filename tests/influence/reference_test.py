"""Reductions by hand; the gradient in batches against the gradient of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from montessori_jax.data.chat import EncodedChat
from montessori_jax.data.packing import pack
from montessori_jax.errors import UserError
from montessori_jax.influence import MeanLoss, TokenLosses, chat_reference, single_batch
from montessori_jax.influence.reference import sample_weights
from tests.influence.students import MODEL, chats, student


def reduce(reduction, samples):
    """The reference loss of samples given as lists of token losses."""
    weights = sample_weights(np.array([len(losses) for losses in samples]), reduction)
    return sum(weight * sum(losses) for weight, losses in zip(weights, samples, strict=True))


def test_reductions_by_hand():
    samples = [[1.0, 3.0], [8.0], [2.0, 2.0, 5.0]]
    # Sample means 2, 8, 3; all tokens add up to 21, six of them.
    assert reduce("sample", samples) == pytest.approx(13 / 3, rel=1e-15)
    assert reduce("token", samples) == pytest.approx(21 / 6, rel=1e-15)
    # One batch of eight and one of two: 8 tokens of 1 to 8 (36 / 8), then (10 + 20 + 30) / 3.
    ten = [[float(i)] for i in range(1, 9)] + [[10.0, 20.0], [30.0]]
    assert reduce("batch8", ten) == pytest.approx((4.5 + 20) / 2, rel=1e-15)


def test_samples_without_tokens_have_no_say():
    samples = [[1.0, 3.0], [], [8.0]]
    assert reduce("sample", samples) == 5.0
    assert reduce("token", samples) == 4.0
    assert reduce("batch8", [*samples, *[[]] * 13]) == 4.0


@pytest.mark.parametrize("reduction", ["sample", "token", "batch8"])
def test_packed_losses_are_those_of_single_rows(reduction):
    params = student().params
    rows = chats(11, 3)
    reference = chat_reference(MODEL, rows, reduction=reduction, row_length=64, rows_per_pass=2)
    assert reference.batches.tokens.shape[0] > 1

    @jax.jit
    def mean(batch):
        return MeanLoss(TokenLosses(MODEL))(params, batch)

    by_hand = [float(mean(pack([chat], [[0]], row_length=64, slots=64))) for chat in rows]
    counts = np.array([chat.response_length for chat in rows])
    expected = {
        "sample": np.mean(by_hand),
        "token": np.average(by_hand, weights=counts),
        "batch8": (
            np.average(by_hand[:8], weights=counts[:8])
            + np.average(by_hand[8:], weights=counts[8:])
        )
        / 2,
    }[reduction]
    np.testing.assert_allclose(reference.loss(reference.losses(params)), expected, rtol=1e-6)


def test_gradient_is_that_of_the_loss():
    params = student().params
    reference = chat_reference(MODEL, chats(11, 3), row_length=64, rows_per_pass=2)
    losses = TokenLosses(MODEL)

    @jax.jit
    @jax.grad
    def whole(params):
        weights = jnp.asarray(reference.weights, jnp.float32)
        return jnp.sum(jax.vmap(losses, in_axes=(None, 0))(params, reference.batches) * weights)

    expected, found = whole(params), reference.gradient(params)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_differences_are_taken_token_by_token():
    # Losses of 1e8 and 1 in one sum would swallow the change of the second in float32.
    reference = single_batch(lambda params: params, np.array([0.5, 0.5]))
    before = np.array([[1e8, 1.0]], np.float32)
    after = np.array([[1e8, 0.75]], np.float32)
    assert reference.difference(before, after) == 0.125


def test_fillers_do_not_count_even_if_infinite():
    reference = single_batch(lambda params: params["w"] / jnp.array([1.0, 0.0]), np.array([1, 0]))
    params = {"w": jnp.array([3.0, 1.0])}
    assert reference.loss(reference.losses(params)) == 3.0
    assert reference.gradient(params)["w"][0] == 1.0


def test_a_reference_without_responses_is_refused():
    empty = EncodedChat(np.arange(5, dtype=np.int32), 5)
    long_prompt = EncodedChat(np.arange(50, dtype=np.int32), 45)
    with pytest.raises(UserError, match="no sample has response tokens"):
        chat_reference(MODEL, [empty, long_prompt], max_length=40)


def test_a_row_too_short_for_a_sample_is_refused():
    with pytest.raises(UserError, match=r"row_length 16: a reference sample has \d+ tokens"):
        chat_reference(MODEL, chats(4, 3, 20, 30), row_length=16)
