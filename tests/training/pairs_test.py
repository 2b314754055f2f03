"""A pair in one row against its two responses in rows of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from montessori_jax.config import DpoConfig
from montessori_jax.data.chat import EncodedChat
from montessori_jax.data.packing import pack
from montessori_jax.models import Params
from montessori_jax.training.losses import sum_by_sample, token_losses
from montessori_jax.training.pairs import EncodedPair, fit_pair, pack_pairs
from montessori_jax.training.preference_losses import pair_losses
from montessori_jax.training.steps import pair_sums
from tests.training import samples


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> EncodedPair:
    def chat(response: list[int]) -> EncodedChat:
        return EncodedChat(np.array(prompt + response, np.int32), len(prompt))

    return EncodedPair("p", chat(chosen), chat(rejected))


def test_layout_by_hand() -> None:
    made = pack_pairs([pair([5, 6, 7], [11, 12], [21])], [np.array([-1.0, -2.0, -3.0])],
                      row_length=8, slots=4, rows=2)  # fmt: skip
    batch = made.batch
    np.testing.assert_array_equal(batch.tokens[0], [5, 6, 7, 11, 12, 21, 0, 0])
    np.testing.assert_array_equal(batch.segment_ids[0], [1, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(batch.positions[0], [0, 1, 2, 3, 4, 3, 0, 0])
    np.testing.assert_array_equal(batch.branches[0], [0, 0, 0, 1, 1, 2, 0, 0])
    # Both responses' first tokens are predicted where the prompt ends.
    np.testing.assert_array_equal(batch.target_positions[0], [2, 3, 2, 0])
    np.testing.assert_array_equal(batch.targets[0], [11, 12, 21, 0])
    np.testing.assert_array_equal(batch.target_samples[0], [0, 0, 1, 0])
    np.testing.assert_array_equal(batch.target_weights[0], [1, 1, 1, 0])
    np.testing.assert_array_equal(made.reference[0], [-1, -2, -3, 0])
    assert not np.any(batch.target_weights[1])
    assert not np.any(batch.segment_ids[1])


def test_shared_prompts_give_the_log_probs_and_gradients_of_separate_rows() -> None:
    model, params, _ = samples.twins()
    pairs = samples.pairs(8)
    random = np.random.default_rng(1)
    references = [random.normal(-3, 1, one.targets).astype(np.float32) for one in pairs]
    settings = DpoConfig(beta=0.5)
    shared = pack_pairs(pairs, references, row_length=32, slots=16, rows=10)
    chats = [chat for one in pairs for chat in (one.chosen, one.rejected)]
    plain = pack(chats, [[index] for index in range(len(chats))], row_length=24)
    reference = np.array([[np.sum(values[: len(one.chosen.tokens) - one.chosen.prompt_length]),
                           np.sum(values[len(one.chosen.tokens) - one.chosen.prompt_length :])]
                          for one, values in zip(pairs, references, strict=True)])  # fmt: skip

    def shared_loss(params: Params) -> tuple[jax.Array, jax.Array]:
        sums = jax.tree.map(
            lambda leaf: leaf[: len(pairs)], pair_sums(model, params, shared, dtype="float32")
        )
        return jnp.mean(pair_losses(sums, settings)), sums

    def plain_loss(params: Params) -> tuple[jax.Array, jax.Array]:
        losses = token_losses(model, params, plain)
        policy = -sum_by_sample(losses, plain, len(chats)).total.reshape(-1, 2)
        ratios = policy - jnp.asarray(reference, jnp.float32)
        margin = settings.beta * (ratios[:, 0] - ratios[:, 1])
        return -jnp.mean(jax.nn.log_sigmoid(margin)), policy

    (one, sums), gradient = jax.value_and_grad(shared_loss, has_aux=True)(params)
    (two, policy), expected = jax.value_and_grad(plain_loss, has_aux=True)(params)
    np.testing.assert_allclose(sums.policy, policy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sums.reference, reference, rtol=1e-5)
    np.testing.assert_allclose(sums.tokens.sum(), sum(one.targets for one in pairs))
    np.testing.assert_allclose(one, two, rtol=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert samples.largest_difference(gradient, expected) < 1e-5 * scale


def test_the_rejected_response_does_not_see_the_chosen_one() -> None:
    model, params, _ = samples.twins()
    first = pair([5, 6, 7], [11, 12, 13], [21, 22])
    second = pair([5, 6, 7], [31, 32, 33], [21, 22])
    rows = pack_pairs([first, second], row_length=16, slots=8, rows=2)
    losses = np.asarray(token_losses(model, params, rows.batch))
    np.testing.assert_array_equal(losses[0, 3:5], losses[1, 3:5])
    assert not np.allclose(losses[0, :3], losses[1, :3])


def test_unlike_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="different prompts"):
        EncodedPair("x", EncodedChat(np.array([1, 2, 3]), 2), EncodedChat(np.array([1, 4, 3]), 2))
    with pytest.raises(ValueError, match="different prompts"):
        EncodedPair("x", EncodedChat(np.array([1, 2, 3]), 2), EncodedChat(np.array([1, 2, 3]), 1))


def test_responses_are_cut_and_prompts_never() -> None:
    cut = fit_pair(pair([5, 6, 7], [11, 12, 13], [21]), 5)
    assert cut is not None
    np.testing.assert_array_equal(cut.chosen.tokens, [5, 6, 7, 11, 12])
    np.testing.assert_array_equal(cut.rejected.tokens, [5, 6, 7, 21])
    assert (cut.length, cut.targets) == (6, 3)
    assert fit_pair(pair([5, 6, 7], [11], [21]), 3) is None


def test_what_does_not_fit_is_named() -> None:
    one = pair([5, 6, 7], [11, 12], [21])
    with pytest.raises(ValueError, match="pair p does not fit"):
        pack_pairs([one], row_length=5, slots=8, rows=1)
    with pytest.raises(ValueError, match="2 pairs do not fit in 1 rows"):
        pack_pairs([one, one], row_length=8, slots=8, rows=1)
