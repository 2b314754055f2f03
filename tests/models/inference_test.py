"""Decoding with a cache against the training decoder on whole rows."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from montessori_jax.models import Model, ModelConfig
from montessori_jax.models.inference import decode, empty_cache, logits, prefill, unstack
from tests.models.decoder_test import BASE, RICH, random_params


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "config", [BASE, replace(BASE, tie_word_embeddings=True), RICH], ids=["plain", "tied", "rich"]
)
def test_prefill_and_decoding_give_the_logits_of_whole_rows(dtype, config: ModelConfig):
    """The rich one's sliding layers see 6 tokens: fewer than the prompt, more than a few steps."""
    model, params = Model(config), random_params(config)
    weights = unstack(model, params, dtype)
    lengths, samples, slots = np.array([5, 8], np.int32), 3, 4
    rng = np.random.default_rng(5)
    prompts = rng.integers(0, 61, (2, 8)).astype(np.int32)
    new = rng.integers(0, 61, (2, samples, slots)).astype(np.int32)

    last, cache = jax.jit(partial(prefill, model))(weights, prompts, lengths)
    assert last.dtype == cache[0].key.dtype == dtype
    assert len(cache) == 3
    assert cache[0].key.shape == (2, 2, 8, 8)
    own = empty_cache(model, 2, samples, slots, dtype)
    step_once = jax.jit(partial(decode, model))
    steps = []
    for step in range(slots):
        at = jnp.asarray(step, jnp.int32)
        hidden, own = step_once(weights, new[:, :, step], at, cache, lengths, own)
        steps.append(np.asarray(logits(model, weights, hidden)))

    rows = np.zeros((2, samples, 12), np.int32)
    for p in range(2):
        rows[p, :, : lengths[p]] = prompts[p, : lengths[p]]
        rows[p, :, lengths[p] : lengths[p] + slots] = new[p]
    flat = rows.reshape(-1, 12)
    places = np.broadcast_to(np.arange(12, dtype=np.int32), flat.shape)
    hidden = model.hidden(params, flat, np.ones_like(flat), places, dtype=dtype)
    whole = np.asarray(model.logits(params, hidden)).reshape(2, samples, 12, -1)
    tolerance = (2e-5 if dtype == jnp.float32 else 0.1) * np.abs(whole).max()
    first = np.asarray(logits(model, weights, last))
    for p in range(2):
        assert np.abs(first[p] - whole[p, 0, lengths[p] - 1]).max() < tolerance
        for step in range(slots):
            error = np.abs(steps[step][p] - whole[p, :, lengths[p] + step]).max()
            assert error < tolerance


def test_a_row_is_the_same_to_the_bit_beside_a_longer_one():
    """Other rows are attended to further; what lies beyond a row's own end does not matter."""
    model, params = Model(BASE), random_params(BASE)
    weights = unstack(model, params, jnp.float32)
    rng = np.random.default_rng(6)
    prompts = rng.integers(0, 61, (3, 8)).astype(np.int32)
    lengths = np.array([5, 8, 7], np.int32)
    new = rng.integers(0, 61, (3, 2)).astype(np.int32)
    _, cache = jax.jit(partial(prefill, model))(weights, prompts, lengths)
    step_once = jax.jit(partial(decode, model))

    values = np.random.default_rng(7)
    own = jax.tree.map(
        lambda one: values.normal(size=one.shape).astype(np.float32),
        empty_cache(model, 3, 2, 512, jnp.float32),
    )
    alone, _ = step_once(weights, new, np.array([3, 100, 127], np.int32), cache, lengths, own)
    for beside in (200, 300, 511):
        steps = np.array([3, beside, 127], np.int32)
        found, _ = step_once(weights, new, steps, cache, lengths, own)
        for slot in (0, 2):
            assert np.array_equal(found[slot], alone[slot])
        assert not np.array_equal(found[1], alone[1])
