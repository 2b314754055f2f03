"""What becomes of candidates and references that nothing can be learnt from: docs/influence.md."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from montessori_jax.config import InfluenceConfig
from montessori_jax.data.chat import EncodedChat
from montessori_jax.errors import UserError
from montessori_jax.influence import score_candidates
from tests.influence.small import MODEL, student
from tests.influence.students import VOCABULARY, chats

BROKEN = VOCABULARY - 1  # a token whose embedding is NaN; only one candidate has it
LONGEST = 48
SETTINGS = InfluenceConfig(method="exact", chunk=4, max_length=LONGEST, audit=0)
EMPTY, MASKED, NO_ROOM, CUT, NAN = 1, 3, 4, 6, 7
REASONS = {
    EMPTY: "the response has no tokens",
    MASKED: "the response has no tokens",
    NO_ROOM: "the prompt has 48 tokens, which leaves no room for a response below max_length 48",
    NAN: "the loss on the candidate is nan",
}


def whole(chat: EncodedChat) -> EncodedChat:
    return EncodedChat(np.where(chat.tokens == BROKEN, 0, chat.tokens), chat.prompt_length)


REFERENCES = [whole(chat) for chat in chats(6, 41)]
ROWS = [whole(chat) for chat in chats(10, 42, 12, 40)]
LONG = whole(chats(1, 43, 70, 70)[0])
ROWS[EMPTY] = EncodedChat(ROWS[EMPTY].tokens[:5], 5)
ROWS[MASKED] = EncodedChat(ROWS[MASKED].tokens, len(ROWS[MASKED].tokens))
ROWS[NO_ROOM] = EncodedChat(LONG.tokens, LONGEST)
ROWS[CUT] = EncodedChat(LONG.tokens, 9)
ROWS[NAN] = EncodedChat(np.insert(ROWS[NAN].tokens, 8, np.int32(BROKEN)), 4)


def score(rows=ROWS, references=REFERENCES, settings=SETTINGS, **how):
    params, state, tx = student(1e-4)
    table = params["embed"]["embedding"].at[BROKEN].set(jnp.nan)
    params = {**params, "embed": {**params["embed"], "embedding": table}}
    return score_candidates(MODEL, params, state, tx, rows, references, settings, **how)


@pytest.mark.parametrize("method", ["exact", "linearized"])
def test_each_has_a_reason_and_harms_no_other(method):
    settings = replace(SETTINGS, method=method)
    found = score(settings=settings)
    assert {i: one.reason for i, one in enumerate(found) if one.reason} == REASONS
    for place, one in enumerate(found):
        assert (one.influence is None) == (place in REASONS)
        if one.influence is None:
            assert one.loss_after is None
            assert one.standard_error is None
    json.dumps([one.as_row() for one in found], allow_nan=False)
    # The others have the scores that they have without a broken row among them, and what is cut at
    # max_length has the score of what is left.
    healthy = [row for place, row in enumerate(ROWS) if place not in REASONS]
    healthy[CUT - 3] = EncodedChat(LONG.tokens[:LONGEST], 9)
    alone = iter(score(healthy, settings=settings))
    for place, one in enumerate(found):
        if place not in REASONS:
            assert one.influence == pytest.approx(next(alone).influence, rel=1e-3, abs=1e-8)


def test_references_without_response_tokens_have_no_say():
    nothing = EncodedChat(REFERENCES[0].tokens, len(REFERENCES[0].tokens))
    mixed = score(ROWS[:1], [nothing, *REFERENCES, ROWS[NO_ROOM]])
    assert mixed[0].influence == pytest.approx(score(ROWS[:1])[0].influence, rel=1e-5)
    for references in ([nothing], [nothing, ROWS[NO_ROOM]], {"one": REFERENCES, "two": [nothing]}):
        with pytest.raises(UserError, match="no sample has response tokens") as caught:
            score(references=references)
        assert "\n" not in str(caught.value)


def test_an_id_given_twice_is_named():
    with pytest.raises(UserError, match="two candidates have the id 'b'"):
        score(ROWS[:3], ids=["a", "b", "b"])


def test_a_reference_that_is_nan_stops():
    with pytest.raises(UserError, match="the reference loss is nan before any step"):
        score(references=[*REFERENCES, ROWS[NAN]])
