"""Scoring chats as settings say: bad rows, resuming, precision, and the audit."""

import json
import logging
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from montessori_jax.config import InfluenceConfig
from montessori_jax.data.chat import EncodedChat
from montessori_jax.errors import UserError
from montessori_jax.influence import (
    METHODS,
    TokenLosses,
    chat_reference,
    choose_estimator,
    noise_floor,
    score_candidates,
    scoring,
    zero_gradient_update,
)
from montessori_jax.influence.first_order import first_order
from tests.influence.students import MODEL, chats, student

REFERENCES = chats(8, 41)
ROWS = chats(10, 42)
ROWS[3] = EncodedChat(np.arange(6, dtype=np.int32), 6)
ROWS[7] = EncodedChat(np.arange(60, dtype=np.int32), 55)
FAST = InfluenceConfig(method="first_order", chunk=4, max_length=48, audit=4)
EXACT = InfluenceConfig(method="exact", chunk=4, max_length=48)


def score(settings, **how):
    params, state, tx = student(1e-4)
    return score_candidates(MODEL, params, state, tx, ROWS, REFERENCES, settings, **how)


@pytest.fixture(scope="module")
def fast():
    return score(FAST)


@pytest.mark.parametrize("settings", [FAST, EXACT], ids=["first_order", "exact"])
def test_bad_rows_have_a_reason_and_the_others_a_score(settings, caplog):
    scores = score(settings)
    assert caplog.text == ""
    assert [one.id for one in scores] == [str(i) for i in range(10)]
    assert [one.influence is None for one in scores] == [i in (3, 7) for i in range(10)]
    assert scores[3].reason == "the response has no tokens"
    assert scores[7].reason == (
        "the prompt has 55 tokens, which leaves no room for a response below max_length 48"
    )
    json.dumps([one.as_row() for one in scores], allow_nan=False)


def test_resuming_gives_the_same_scores(fast):
    written = {}
    resumed = score(FAST, finished={0}, on_chunk=written.__setitem__)
    assert resumed == fast[4:]
    assert list(written) == [1, 2]
    assert written[2] == fast[8:]


def test_ids_are_the_callers():
    scores = score(FAST, ids=[f"row-{i}" for i in range(10)], finished={1, 2})
    assert [one.id for one in scores] == ["row-0", "row-1", "row-2", "row-3"]


def test_a_response_is_cut_at_max_length(fast):
    # Beyond max_length nothing is read, so a longer response changes nothing.
    params, state, tx = student(1e-4)
    longer = [
        EncodedChat(np.concatenate([chat.tokens, chat.tokens])[: len(chat.tokens) + 5], 4)
        for chat in chats(2, 9, 48, 48)
    ]
    cut = [EncodedChat(chat.tokens[:48], 4) for chat in longer]

    def run(rows):
        return score_candidates(MODEL, params, state, tx, rows, REFERENCES, FAST)

    assert run(longer) == run(cut)
    assert longer[0].tokens[:48].tolist() == cut[0].tokens.tolist()


def choose(settings, groups=None, seed=3):
    params, state, tx = student(1e-4)
    return choose_estimator(
        MODEL, params, state, tx, ROWS, REFERENCES, settings, groups=groups, seed=seed
    )


def test_the_audit_measures_chosen_scores_again(fast):
    found = choose(FAST, [i // 2 for i in range(10)])
    [audit] = found.audits
    assert (found.method, audit.method, audit.count) == ("first_order", "first_order", 4)
    truth = {one.id: one.influence for one in score(EXACT)}
    estimates = {one.id: one.influence for one in fast}
    for one in audit.scores:
        assert one.estimate == pytest.approx(estimates[one.id], rel=1e-5)
        assert one.truth == pytest.approx(truth[one.id], abs=1e-7)
    assert audit.agreement.error.total < 0.2
    # Whole prompts are drawn, but for the last one.
    prompts = [int(one.id) // 2 for one in audit.scores]
    assert len(set(prompts)) < len(prompts)
    json.dumps(audit.as_row(), allow_nan=False)


@pytest.mark.parametrize("method", ["first_order", "auto"])
def test_the_audited_estimator_is_not_built_twice(method, fast, monkeypatch):
    made = []

    def counted(probe, **given):
        made.append(given)
        return first_order(probe, **given)

    monkeypatch.setitem(METHODS, "first_order", counted)
    settings = replace(
        FAST, method=method, audit=8, audit_spearman=0.0, audit_pairs=0.0, audit_error=0.0
    )
    monkeypatch.setattr(scoring, "FEWEST", 4)  # eight candidates would be measured by exact
    monkeypatch.setattr(scoring, "ladder", lambda *_, **__: ["first_order"])
    names = [f"row-{i}" for i in range(10)]
    params, state, tx = student(1e-4)
    choice = choose_estimator(MODEL, params, state, tx, ROWS, REFERENCES, settings, ids=names)
    found = score(settings, ids=names, choice=choice)
    assert (choice.method, len(made)) == ("first_order", 1)
    assert found == [replace(one, id=f"row-{one.id}") for one in fast]
    # Several reference sets were not audited together: the estimator is made for them.
    several = {"one": REFERENCES[:4], "two": REFERENCES[4:]}
    scores = score_candidates(MODEL, params, state, tx, ROWS, several, settings, choice=choice)
    assert len(made) == 2
    assert set(scores[0].sets) == {"one", "two"}


def test_auto_takes_the_definition_where_there_are_few():
    few = choose(replace(FAST, method="auto", audit=32))
    assert (few.method, few.audits) == ("exact", ())


def test_no_audit_where_none_is_asked_for():
    assert choose(replace(FAST, audit=0)).audits == ()
    assert choose(EXACT).audits == ()


def test_bf16_exact_warns_that_it_measures_rounding(caplog):
    # At the paper's rate a step changes the loss by less than bf16 can tell.
    params, state, tx = student(5e-6)
    coarse = replace(EXACT, precision="bfloat16")
    with caplog.at_level(logging.INFO):
        score_candidates(MODEL, params, state, tx, ROWS, REFERENCES, coarse)
    assert "mostly rounding" in caplog.text
    assert "use float32, or first_order" in caplog.text


def test_noise_floor_of_float32_is_far_below_that_of_bf16():
    params, state, tx = student(5e-6)
    step = zero_gradient_update(tx, params, state)
    floors = {
        dtype: noise_floor(chat_reference(MODEL, REFERENCES, dtype=dtype), params, step)
        for dtype in ("float32", "bfloat16")
    }
    assert 0 < floors["float32"] < floors["bfloat16"] / 30


def test_bf16_gradients_leave_first_order_nearly_exact(fast):
    coarse = score(replace(FAST, precision="bfloat16"))
    truth, found = (
        np.array([one.influence for one in scores if one.influence is not None])
        for scores in (fast, coarse)
    )
    # 8 bits of mantissa: a few thousandths of each product.
    assert np.std(found - truth) < 0.05 * np.std(truth)
    assert not np.array_equal(found, truth)
    # What is subtracted stays in float32.
    assert coarse[0].loss_before == fast[0].loss_before


def test_a_student_that_is_broken_stops():
    params, state, tx = student(1e-4)
    broken = {**params, "norm": {"scale": jnp.full_like(params["norm"]["scale"], jnp.nan)}}
    with pytest.raises(UserError, match="reference loss is nan"):
        score_candidates(MODEL, broken, state, tx, ROWS, REFERENCES, FAST)


def test_plain_sgd_needs_no_state():
    params = student().params
    tx = optax.sgd(1e-2)
    scores = score_candidates(
        MODEL, params, tx.init(params), tx, ROWS[:2], REFERENCES, replace(FAST, optimizer="sgd")
    )
    assert all(one.offset == 0.0 for one in scores)
    assert all(one.influence for one in scores)


def test_losses_of_equal_models_share_programs():
    assert TokenLosses(MODEL) == TokenLosses(MODEL)
    assert hash(TokenLosses(MODEL)) == hash(TokenLosses(MODEL))
