"""Preference optimisation of a small model, end to end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from montessori_jax.config import DpoConfig
from montessori_jax.errors import Interrupted, UserError
from montessori_jax.training.checkpoints import Checkpoints
from montessori_jax.training.dpo import evaluate_dpo, train_dpo
from montessori_jax.training.reference_log_probs import pair_log_probs
from tests.training import samples

SETTINGS = DpoConfig(
    learning_rate=1e-2,
    final_learning_rate=0.0,
    epochs=3,
    batch_size=4,
    micro_batch=2,
    max_length=24,
    remat="none",
    beta=0.5,
)


def test_it_learns_resumes_and_is_measured(tmp_path: Path) -> None:
    model, params = samples.student()
    pairs = samples.pairs(10)
    reference = pair_log_probs(model, params, pairs, SETTINGS)
    records: list[dict[str, Any]] = []
    before = jax.device_get(params)
    state = train_dpo(
        model, params, pairs, SETTINGS, reference=reference, seed=0, metrics=records.append
    )
    assert samples.equal(jax.device_get(params), before)
    assert len(records) == 9  # 3 epochs of 4, 4, 2
    np.testing.assert_allclose(records[0]["loss"], np.log(2), rtol=1e-6)
    assert abs(records[0]["reward_margin"]) < 1e-5
    assert records[-1]["loss"] < 0.3
    assert records[-1]["reward_accuracy"] == 1.0
    assert records[-1]["kl"] > 0.01
    for record in records:
        np.testing.assert_allclose(
            record["reward_margin"],
            record["reward_chosen"] - record["reward_rejected"],
            atol=1e-5,
        )
        assert record["programs"] == 1
    assert sum(record["tokens"] for record in records) == 3 * sum(pair.length for pair in pairs)

    untrained = evaluate_dpo(pairs, reference, reference, SETTINGS)
    np.testing.assert_allclose(untrained["loss"], np.log(2), rtol=1e-6)
    assert (untrained["reward_margin"], untrained["reward_accuracy"]) == (0, 0)
    assert (untrained["kl"], untrained["pairs"]) == (0, 10)
    policy = pair_log_probs(model, state.params, pairs, SETTINGS)
    trained = evaluate_dpo(pairs, policy, reference, SETTINGS)
    assert trained["loss"] < 0.3
    assert trained["reward_accuracy"] == 1.0
    # What is measured outside is what a step would log of the same pairs and parameters.
    frozen = replace(SETTINGS, epochs=1, batch_size=10, learning_rate=1e-12)
    measured: list[dict[str, Any]] = []
    train_dpo(
        model, state.params, pairs, frozen, reference=reference, seed=0, metrics=measured.append
    )
    record = measured[0]
    for name in ("loss", "reward_chosen", "reward_margin", "reward_accuracy", "kl"):
        np.testing.assert_allclose(trained[name], record[name], rtol=1e-4, err_msg=name)

    steps = iter(range(1, 10))
    with pytest.raises(Interrupted):
        train_dpo(
            model, params, pairs, SETTINGS, reference=reference, seed=0,
            checkpoints=Checkpoints(tmp_path), stop_requested=lambda: next(steps) == 5,
        )  # fmt: skip
    again = train_dpo(
        model, params, pairs, SETTINGS, reference=reference, seed=0,
        checkpoints=Checkpoints(tmp_path),
    )  # fmt: skip
    assert samples.equal(again, state)


def test_log_probs_have_to_be_of_the_same_pairs() -> None:
    model, params = samples.student()
    pairs = samples.pairs(3)
    zeros = [np.zeros(pair.targets, np.float32) for pair in pairs]
    wrong = [zeros[0], np.zeros(1, np.float32), zeros[2]]
    with pytest.raises(ValueError, match=r"pair pair1 has \d+ response tokens and 1 log-probs"):
        train_dpo(model, params, pairs, SETTINGS, reference=wrong, seed=0)
    with pytest.raises(ValueError, match="shorter"):
        evaluate_dpo(pairs, zeros, zeros[:2], SETTINGS)


def test_pairs_without_room_are_left_out() -> None:
    model, params = samples.student()
    pairs = samples.pairs(6)
    longest = max(pair.chosen.prompt_length for pair in pairs)
    short = replace(SETTINGS, max_length=max(8, longest))
    out = [pair.chosen.prompt_length >= short.max_length for pair in pairs]
    assert 0 < sum(out) < len(pairs)
    reference = pair_log_probs(model, params, pairs, short)
    assert [len(row) == 0 for row in reference] == out
    said: list[str] = []
    with pytest.raises(Interrupted):
        train_dpo(model, params, pairs, short, reference=reference, seed=0, say=said.append,
                  stop_requested=lambda: True)  # fmt: skip
    assert said[0].startswith(f"{sum(out)} of 6 pairs have a prompt of max_length")
    assert evaluate_dpo(pairs, reference, reference, short)["pairs"] == 6 - sum(out)
    alone = [pair for pair, left in zip(pairs, out, strict=True) if left]
    empty = [np.zeros(0, np.float32) for _ in alone]
    with pytest.raises(UserError, match="no preference pair to train on"):
        train_dpo(model, params, alone, short, reference=empty, seed=0)
    with pytest.raises(UserError, match="no preference pair to measure"):
        evaluate_dpo(alone, empty, empty, short)
