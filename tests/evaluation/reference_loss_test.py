import math

import jax
import numpy as np
import pytest
import torch

from montessori_jax.config import EvaluationConfig
from montessori_jax.data.chat import EncodedChat
from montessori_jax.evaluation import reference_loss


def chats(count=7, vocab=61):
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        length = int(rng.integers(6, 40))
        prompt = int(rng.integers(2, length - 1))
        made.append(EncodedChat(rng.integers(3, vocab, length).astype(np.int32), prompt))
    return made


def test_losses_are_those_of_transformers_row_by_row(student):
    theirs, model, params = student
    rows = chats()
    found = reference_loss(model, params, rows, EvaluationConfig(rows_per_pass=2))
    means, totals, counts = [], [], []
    for chat in rows:
        ids = torch.tensor(chat.tokens.astype(np.int64))[None]
        labels = ids.clone()
        labels[:, : chat.prompt_length] = -100
        with torch.no_grad():
            means.append(float(theirs(ids, labels=labels).loss))
        counts.append(len(chat.tokens) - chat.prompt_length)
        totals.append(means[-1] * counts[-1])
    np.testing.assert_allclose(found.by_sample, means, rtol=1e-5)
    assert found.loss == pytest.approx(np.mean(means), rel=1e-5)
    assert found.token_loss == pytest.approx(sum(totals) / sum(counts), rel=1e-5)
    assert found.standard_error == pytest.approx(
        np.std(means, ddof=1) / math.sqrt(len(means)), rel=1e-4
    )
    assert (found.samples, found.tokens) == (len(rows), sum(counts))


def test_the_number_of_rows_a_pass_changes_nothing(student):
    _, model, params = student
    rows = chats()
    losses = [
        reference_loss(model, params, rows, EvaluationConfig(rows_per_pass=size)).by_sample
        for size in (1, 3, 8)
    ]
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-6)


def test_progress_counts_every_sample(student):
    _, model, params = student
    told = []
    reference_loss(model, params, chats(), EvaluationConfig(rows_per_pass=1), progress=told.append)
    assert sum(told) == 7


def test_one_sample_has_no_standard_error(student):
    _, model, params = student
    found = reference_loss(model, params, chats(1), EvaluationConfig())
    assert found.standard_error is None
    assert jax.tree.leaves(found.as_row())
