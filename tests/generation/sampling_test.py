import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from montessori_jax.config import SamplingConfig
from montessori_jax.generation import sampling
from montessori_jax.generation.sampling import penalise

# Compiled once a shape and setting, as the sampler has them.
keep_top_k = jax.jit(sampling.keep_top_k, static_argnums=1)
keep_top_p = jax.jit(sampling.keep_top_p, static_argnums=1)
draw = jax.jit(sampling.draw, static_argnums=2)

ROWS, VOCAB = 7, 211


def random_logits(seed, scale=3.0, rows=ROWS, vocab=VOCAB):
    return np.random.default_rng(seed).normal(0, scale, (rows, vocab)).astype(np.float32)


def kept(logits):
    return np.isfinite(np.asarray(logits))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_top_p_keeps_what_transformers_keeps(p, scale):
    for seed in range(20):
        logits = random_logits(seed, scale)
        theirs = TopPLogitsWarper(p)(torch.zeros(1), torch.tensor(logits)).numpy()
        assert (kept(keep_top_p(jnp.asarray(logits), p)) == kept(theirs)).all(), seed


@pytest.mark.parametrize("k", [1, 2, 50, 210])
def test_top_k_keeps_what_transformers_keeps(k):
    for seed in range(20):
        logits = random_logits(seed)
        theirs = TopKLogitsWarper(k)(torch.zeros(1), torch.tensor(logits)).numpy()
        assert (kept(keep_top_k(jnp.asarray(logits), k)) == kept(theirs)).all(), seed


def test_cuts_that_are_off_change_nothing():
    logits = jnp.asarray(random_logits(0))
    np.testing.assert_array_equal(keep_top_p(logits, 1.0), logits)
    np.testing.assert_array_equal(keep_top_k(logits, 0), logits)
    np.testing.assert_array_equal(keep_top_k(logits, VOCAB), logits)


def test_top_p_by_hand():
    # Probabilities .5 .25 .125 .125: the third token's likelier ones have .75.
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]], jnp.float32))
    assert kept(keep_top_p(logits, 0.4)).tolist() == [[True, False, False, False]]
    assert kept(keep_top_p(logits, 0.7)).tolist() == [[True, True, False, False]]
    # Ties at the cut stay together.
    assert kept(keep_top_p(logits, 0.8)).tolist() == [[True, True, True, True]]


def test_one_token_stays_where_all_are_equal_or_one_has_everything():
    flat = jnp.zeros((1, 9), jnp.float32)
    assert kept(keep_top_p(flat, 1e-6)).sum() == 9
    sure = jnp.full((1, 9), -jnp.inf).at[0, 4].set(0.0)
    assert kept(keep_top_p(sure, 0.5)).tolist() == [[i == 4 for i in range(9)]]


def by_definition(logits, prompt, output, repetition, frequency, presence):
    """vLLM's penalties, token by token."""
    result = logits.astype(np.float64).copy()
    for token in range(len(logits)):
        count = output.count(token)
        if token in prompt or count:
            value = result[token]
            result[token] = value / repetition if value > 0 else value * repetition
        result[token] -= frequency * count + presence * (count > 0)
    return result


@pytest.mark.parametrize(
    ("repetition", "frequency", "presence"),
    [(1.5, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, 0.0, 1.0), (1.3, 0.4, -0.5), (0.8, -1.0, 2.0)],
)
def test_penalties_by_definition(repetition, frequency, presence):
    rng = np.random.default_rng(1)
    settings = SamplingConfig(
        repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence
    )
    logits = random_logits(2)
    prompts = [rng.integers(0, VOCAB, 30).tolist() for _ in range(ROWS)]
    outputs = [rng.integers(0, 40, 25).tolist() for _ in range(ROWS)]
    counts = np.stack([np.bincount(one, minlength=VOCAB) for one in outputs]).astype(np.int32)
    seen = np.stack([np.isin(np.arange(VOCAB), one) for one in prompts])
    ours = penalise(jnp.asarray(logits), jnp.asarray(counts), jnp.asarray(seen), settings)
    for row in range(ROWS):
        expected = by_definition(
            logits[row], prompts[row], outputs[row], repetition, frequency, presence
        )
        np.testing.assert_allclose(ours[row], expected, rtol=1e-5, atol=1e-5)


def test_repetition_penalty_is_transformers_over_prompt_and_output():
    logits, tokens = random_logits(3), np.random.default_rng(0).integers(0, VOCAB, (ROWS, 12))
    theirs = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor(tokens), torch.tensor(logits))
    counts = np.stack([np.bincount(one[:5], minlength=VOCAB) for one in tokens]).astype(np.int32)
    seen = np.stack([np.isin(np.arange(VOCAB), one[5:]) for one in tokens])
    ours = penalise(
        jnp.asarray(logits),
        jnp.asarray(counts),
        jnp.asarray(seen),
        SamplingConfig(repetition_penalty=1.4),
    )
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


def test_temperature_zero_takes_the_likeliest():
    logits = jnp.asarray(random_logits(4))
    keys = jax.random.split(jax.random.key(0), ROWS)
    tokens = draw(logits, keys, SamplingConfig(temperature=0.0, top_p=0.5))
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))


def test_draws_follow_the_warped_distribution():
    logits = random_logits(5, scale=1.5, rows=1, vocab=30)
    settings = SamplingConfig(temperature=0.7, top_k=12, top_p=0.8)
    warped = torch.tensor(logits)
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8)):
        warped = warper(torch.zeros(1), warped)
    expected = torch.softmax(warped, -1).numpy()[0]
    count = 20_000
    keys = jax.random.split(jax.random.key(7), count)
    tokens = draw(jnp.broadcast_to(jnp.asarray(logits), (count, 30)), keys, settings)
    found = np.bincount(np.asarray(tokens), minlength=30)
    assert found[expected == 0].sum() == 0
    support = expected > 0
    assert support.sum() > 3
    assert stats.chisquare(found[support], expected[support] * count).pvalue > 1e-3


def test_a_rows_token_depends_on_its_own_logits_and_key_alone():
    logits, settings = jnp.asarray(random_logits(6)), SamplingConfig(top_p=0.95)
    keys = jax.random.split(jax.random.key(1), ROWS)
    together = draw(logits, keys, settings)
    order = np.array([4, 2, 6, 0])
    np.testing.assert_array_equal(draw(logits[order], keys[order], settings), together[order])
