"""Fine-tuning a small model: it learns, resumes to the bit, and leaves its inputs alone."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from montessori_jax.config import SftConfig
from montessori_jax.data.chat import EncodedChat
from montessori_jax.errors import Interrupted, UserError
from montessori_jax.training.checkpoints import Checkpoints
from montessori_jax.training.sft import train_sft
from tests.training import samples

SETTINGS = SftConfig(
    learning_rate=2e-2,
    final_learning_rate=0.0,
    epochs=3,
    batch_size=8,
    micro_batch=2,
    max_length=24,
    remat="none",
)


def patterned(count: int) -> list[EncodedChat]:
    """Responses that follow from their prompts: each token is the one before plus 1."""
    made = []
    for chat in samples.chats(count, seed=4):
        first = int(chat.tokens[0]) % 20 + 3
        tokens = np.arange(first, first + len(chat.tokens), dtype=np.int32)
        made.append(EncodedChat(tokens, chat.prompt_length))
    return made


def test_it_learns_and_says_how(tmp_path: Path) -> None:
    model, params = samples.student()
    records: list[dict[str, Any]] = []
    before = jax.device_get(params)
    chats = patterned(20)
    state = train_sft(model, params, chats, SETTINGS, seed=0, metrics=records.append)
    assert [record["step"] for record in records] == list(range(1, 10))  # 3 epochs of 8, 8, 4
    assert records[0]["loss"] > 4.0  # log 61 is 4.1
    assert records[-1]["loss"] < 3.0
    assert samples.equal(jax.device_get(params), before)  # the caller's arrays stay valid
    assert int(state.step) == 9
    for record in records:
        assert {"loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"} <= set(record)
        assert record["programs"] == 1
    tokens = sum(record["tokens"] for record in records)
    assert tokens == 3 * sum(len(chat.tokens) for chat in chats)
    targets = sum(record["targets"] for record in records)
    assert targets == 3 * sum(len(chat.tokens) - chat.prompt_length for chat in chats)

    # The same again, stopped on the way: the same bits.
    steps = iter(range(1, 10))
    with pytest.raises(Interrupted):
        train_sft(
            model, params, chats, SETTINGS, seed=0,
            checkpoints=Checkpoints(tmp_path), stop_requested=lambda: next(steps) == 4,
        )  # fmt: skip
    resumed: list[dict[str, Any]] = []
    again = train_sft(
        model, params, chats, SETTINGS, seed=0,
        checkpoints=Checkpoints(tmp_path), metrics=resumed.append,
    )  # fmt: skip
    assert samples.equal(again, state)
    timeless = [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]
    assert timeless[4:] == [
        {k: v for k, v in r.items() if k != "tokens_per_second"} for r in resumed
    ]

    # A checkpoint of a run from other parameters, or of other data, is not gone on from.
    said: list[str] = []
    for changes in ({"fingerprint": "other"}, {"seed": 1}):
        with pytest.raises(Interrupted):
            train_sft(model, params, chats, SETTINGS, **{"seed": 0, **changes},
                      checkpoints=Checkpoints(tmp_path, say=said.append),
                      stop_requested=lambda: True)  # fmt: skip
    assert len(said) == 2
    assert all("belongs to a run with other data or settings" in line for line in said)


def test_responses_are_cut_and_long_prompts_left_out() -> None:
    model, params = samples.student()
    said: list[str] = []
    records: list[dict[str, Any]] = []
    chats = [
        EncodedChat(np.arange(3, 15, dtype=np.int32), 4),  # cut to 8 tokens
        EncodedChat(np.arange(3, 15, dtype=np.int32), 8),  # no room for its response
        EncodedChat(np.arange(3, 8, dtype=np.int32), 4),
        EncodedChat(np.arange(3, 8, dtype=np.int32), 4),  # beyond ``rows``
    ]
    settings = SftConfig(max_length=8, batch_size=4, rows=3, remat="none")
    train_sft(model, params, chats, settings, seed=0, say=said.append, metrics=records.append)
    assert said == ["1 of 3 samples have a prompt of max_length 8 tokens or more and are left out"]
    assert [(record["tokens"], record["targets"]) for record in records] == [(13, 5)]
    with pytest.raises(UserError, match="no sample to train on"):
        train_sft(model, params, chats[1:2], settings, seed=0)
