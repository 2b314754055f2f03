"""Several reference sets in one pass, and the parts of one."""

import json

import jax
import numpy as np
import optax
import pytest

from montessori_jax.influence import Score, chat_reference, single_batch
from tests.influence.problems import curved, reference_losses
from tests.influence.students import MODEL, chats, student


@pytest.mark.parametrize(
    "method", ["exact", "first_order", "control_variate", "linearized", "grad_cos"]
)
def test_each_set_has_the_score_that_it_has_alone(method):
    with jax.enable_x64(True):
        problem = curved(optax.adam(1e-2), count=3, moments=True)
        half = single_batch(lambda params: reference_losses(params)[:10], np.full(10, 0.1))
        both = problem.score(method, reference={"all": problem.reference, "half": half})
        alone = problem.score(method, reference=half)
    for score, expected in zip(both, alone, strict=True):
        assert list(score.sets) == ["all", "half"]
        assert score.influence == score.sets["all"]["influence"] != expected.influence
        assert expected.sets is None
        for key, value in score.sets["half"].items():
            wanted = getattr(expected, key)
            assert value == (wanted and pytest.approx(wanted, rel=1e-9))
        assert Score(**json.loads(json.dumps(score.as_row()))) == score


def test_a_part_holds_its_samples_weights_and_losses():
    reference = chat_reference(MODEL, chats(7, 3), row_length=64, rows_per_pass=2)
    part = reference.part([5, 1])
    assert (reference.count, part.count) == (7, 2)
    params = student().params
    whole = reference.by_sample(reference.losses(params))
    np.testing.assert_allclose(part.by_sample(part.losses(params)), whole[[5, 1]], rtol=1e-5)
    assert whole.sum() == pytest.approx(reference.loss(reference.losses(params)), rel=1e-12)


def test_a_part_of_plain_losses():
    with jax.enable_x64(True):
        problem = curved(optax.sgd(0.1))
        part = problem.reference.part([4, 9])
        losses = np.asarray(reference_losses(problem.params)) / 24
        np.testing.assert_allclose(
            part.by_sample(part.losses(problem.params)), losses[[4, 9]], rtol=1e-12
        )
