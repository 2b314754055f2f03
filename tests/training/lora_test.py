"""LoRA in training: peft with torch's AdamW step by step, DPO's reference, resuming."""

from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from montessori_jax.config import DpoConfig, SftConfig
from montessori_jax.errors import Interrupted
from montessori_jax.training.checkpoints import Checkpoints
from montessori_jax.training.dpo import train_dpo
from montessori_jax.training.reference_log_probs import pair_log_probs
from montessori_jax.training.sft import train_sft
from montessori_jax.training.state import TrainState
from tests.models.peft_twin import to_tree, twins
from tests.training import samples

SFT = SftConfig(
    learning_rate=2e-3,  # AdamW makes a float32 gradient's last bits into shares of this
    final_learning_rate=2e-3,
    warmup_ratio=0.0,
    decay_ratio=0.0,
    batch_size=6,
    micro_batch=2,
    max_length=24,
    epochs=4,
    max_grad_norm=0.0,
    weight_decay=0.01,
    remat="full",
)
CHATS = samples.chats(6, seed=3)


@cache
def whole() -> TrainState:
    """The run that is not interrupted."""
    ours, adapter, _ = twins()
    return train_sft(ours, adapter, CHATS, SFT, seed=0)


def test_sft_steps_are_pefts_with_torchs_adamw() -> None:
    _, adapter, theirs = twins()
    state = whole()

    weights = {name: p for name, p in theirs.named_parameters() if ".lora_" in name}
    optimizer = torch.optim.AdamW(weights.values(), lr=2e-3, weight_decay=0.01)
    for _ in range(SFT.epochs):  # every step is the whole data, whose order does not matter
        losses = [-samples.torch_log_probs(theirs, chat) for chat in CHATS]
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        optimizer.step()
    expected = to_tree({name: p.detach().numpy() for name, p in weights.items()})
    assert samples.largest_difference(state.params, expected) < 1e-5
    assert samples.largest_difference(state.params, adapter) > 5e-3


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    ours, adapter, _ = twins()
    polls = iter(range(1, 10))
    with pytest.raises(Interrupted):
        train_sft(
            ours, adapter, CHATS, SFT, seed=0,
            checkpoints=Checkpoints(tmp_path), stop_requested=lambda: next(polls) == 2,
        )  # fmt: skip
    # The base is in no checkpoint.
    saved = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert saved < 200_000
    base = jax.device_get(ours.base)
    resumed = train_sft(
        ours, adapter, CHATS, SFT, seed=0, checkpoints=Checkpoints(tmp_path), consume=True
    )
    assert samples.equal(resumed, whole())
    assert samples.equal(jax.device_get(ours.base), base)  # only the adapter was given away


def test_dpos_reference_is_the_policy_without_its_adapter() -> None:
    ours, _, theirs = twins()
    fresh = ours.init(jax.random.key(2))
    settings = DpoConfig(
        learning_rate=1e-2, batch_size=2, micro_batch=2, max_length=24, remat="none"
    )
    pairs = samples.pairs(4)
    reference = pair_log_probs(ours.decoder, ours.base, pairs, settings)
    with theirs.disable_adapter(), torch.no_grad():
        for pair, found in zip(pairs, reference, strict=True):
            expected = [
                samples.torch_log_probs(theirs, chat).numpy()
                for chat in (pair.chosen, pair.rejected)
            ]
            np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-4, atol=1e-5)
    records = []
    state = train_dpo(
        ours, fresh, pairs, settings, reference=reference, seed=0, metrics=records.append
    )
    np.testing.assert_allclose(records[0]["loss"], np.log(2), rtol=1e-6)
    assert records[0]["kl"] < 1e-6
    assert records[0]["grad_norm"] > 1e-3
    # After the first step B is no longer zero, and the policy has left its reference.
    policy = pair_log_probs(ours, state.params, pairs, settings)
    assert max(np.abs(a - b).max() for a, b in zip(policy, reference, strict=True)) > 1e-3
