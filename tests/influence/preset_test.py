"""Settings through `score_candidates` are the pieces that they name: preset, estimator, pool."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from montessori_jax.config import InfluenceConfig
from montessori_jax.data.packing import pack
from montessori_jax.influence import (
    MeanLoss,
    TokenLosses,
    chat_candidate,
    chat_reference,
    local_influence,
    score_candidates,
)
from montessori_jax.influence.regime import label
from tests.influence.small import MODEL, student
from tests.influence.students import chats

REFERENCES = chats(11, 51)
ROWS = chats(5, 52)
PLAIN = InfluenceConfig(method="exact", chunk=4, block=1, max_length=48, audit=0, attention="xla")
ORIGINAL = replace(PLAIN, preset="original")


def score(settings):
    params, state, tx = student(1e-3)
    return score_candidates(MODEL, params, state, tx, ROWS, REFERENCES, settings)


def numbers(scores):
    return np.array([(one.influence, one.loss_before, one.offset) for one in scores])


def as_bfloat16(tree):
    def one(leaf):
        return leaf.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)


@pytest.fixture(scope="module")
def original():
    return score(ORIGINAL)


def test_the_original_preset_is_its_pieces(original):
    params, state, tx = student(1e-3)
    candidates = [chat_candidate(str(i), row, 48, coarse=True) for i, row in enumerate(ROWS)]
    reference = chat_reference(
        MODEL, REFERENCES, reduction="batch8", max_length=48, dtype="bfloat16"
    )
    expected = local_influence(
        MeanLoss(TokenLosses(MODEL, "bfloat16")),
        *as_bfloat16((params, state)),
        tx,
        candidates,
        reference,
        gradient_scale=1 / 8,
        chunk=4,
    )
    np.testing.assert_array_equal(numbers(original), numbers(expected))


def test_its_reference_loss_is_a_mean_over_batches_of_8(original):
    # 11 references are a batch of 8 and one of 3: the mean of two token means, in bf16 weights.
    params = as_bfloat16(student(1e-3).params)
    rows = pack(REFERENCES, [[i] for i in range(11)], row_length=48, slots=48)
    losses = np.asarray(jax.jit(TokenLosses(MODEL, "bfloat16"))(params, rows), np.float64)
    counted = rows.target_weights > 0
    batches = [losses[part][counted[part]].mean() for part in (slice(8), slice(8, 11))]
    assert original[0].loss_before == pytest.approx(np.mean(batches), rel=1e-5)
    samples = [row[weights].mean() for row, weights in zip(losses, counted, strict=True)]
    assert abs(np.mean(samples) - np.mean(batches)) > 1e-3


@pytest.mark.parametrize(
    "other",
    [{"gradient_scale": 0.5}, {"reference_reduction": "token"}, {"precision": "bf16_split"}],
    ids=lambda other: next(iter(other)),
)
def test_the_preset_decides_whatever_the_settings_say(original, other):
    # Settings that the preset names are its own: what is given beside it has no say.
    assert score(replace(ORIGINAL, **other)) == original


def test_auto_is_the_definition_there(original):
    assert score(replace(ORIGINAL, method="auto", audit=8)) == original


def test_scores_say_what_they_were_measured_in(original):
    assert {one.method for one in original} == {"exact (preset original, bfloat16)"}
    assert label(PLAIN) == "exact"
    assert label(replace(PLAIN, precision="bfloat16")) == "exact (bfloat16)"


def test_linearized_is_local_influences():
    params, state, tx = student(1e-3)
    found = score(replace(PLAIN, method="linearized", pilots=4))
    expected = local_influence(
        MeanLoss(TokenLosses(MODEL)),
        params,
        state,
        tx,
        [chat_candidate(str(i), row, 48) for i, row in enumerate(ROWS)],
        chat_reference(MODEL, REFERENCES, max_length=48),
        method="linearized",
        pilots=4,
        chunk=4,
    )
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=1e-6, atol=1e-9)
    assert np.std(numbers(found)[:, 0]) > 1e-5
