"""Preference losses: numbers by hand, and loss and gradient against TRL on the same batch."""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from montessori_jax.config import DpoConfig
from montessori_jax.models import Model, Params
from montessori_jax.models.weights import from_params
from montessori_jax.training.losses import token_losses
from montessori_jax.training.pairs import EncodedPair, PairBatch, pack_pairs
from montessori_jax.training.preference_losses import (
    PairSums,
    means,
    pair_losses,
    pair_measures,
    reference_divergence,
)
from montessori_jax.training.steps import pair_sums
from tests.models import tiny
from tests.training import samples

# Two pairs. Log-ratios: chosen 2 and -1, rejected -1 and -1; differences 3 and 0.
SUMS = PairSums(
    policy=jnp.array([[-8.0, -21.0], [-6.0, -4.0]]),
    reference=jnp.array([[-10.0, -20.0], [-5.0, -3.0]]),
    tokens=jnp.array([[4.0, 10.0], [2.0, 5.0]]),
    divergence=jnp.array([[0.5, 0.25], [0.0, 0.125]]),
)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (DpoConfig(beta=0.1), [-log_sigmoid(0.3), math.log(2)]),
        (DpoConfig(beta=0.5), [-log_sigmoid(1.5), math.log(2)]),
        (
            DpoConfig(beta=0.1, label_smoothing=0.2),
            [-0.8 * log_sigmoid(0.3) - 0.2 * log_sigmoid(-0.3), math.log(2)],
        ),
        # A token on average the log-ratios are .5, -.1 and -.5, -.2: differences .6 and -.3.
        (
            DpoConfig(beta=2.0, length_normalized=True),
            [-log_sigmoid(1.2), -log_sigmoid(-0.6)],
        ),
        (DpoConfig(beta=0.1, loss="ipo"), [(3 - 5) ** 2, (0 - 5) ** 2]),
        (
            DpoConfig(beta=0.5, loss="ipo", length_normalized=True),
            [(0.6 - 1) ** 2, (-0.3 - 1) ** 2],
        ),
    ],
)
def test_losses_by_hand(settings: DpoConfig, expected: list[float]) -> None:
    np.testing.assert_allclose(pair_losses(SUMS, settings), expected, rtol=1e-6)


def test_measures_by_hand() -> None:
    found = pair_measures(SUMS, DpoConfig(beta=0.5))
    expected = {
        "reward_chosen": [1.0, -0.5],
        "reward_rejected": [-0.5, -0.5],
        "reward_margin": [1.5, 0.0],
        "reward_accuracy": [1.0, 0.0],  # a tie is a miss
        "log_prob_chosen": [-8.0, -6.0],
        "log_prob_rejected": [-21.0, -4.0],
        "kl": [0.75, 0.125],
        "response_tokens": [14.0, 7.0],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)
    averaged = means({name: jnp.sum(values) for name, values in found.items()}, jnp.array(2.0))
    assert float(averaged["reward_margin"]) == 0.75
    np.testing.assert_allclose(averaged["kl"], 0.875 / 21, rtol=1e-6)  # a token, not a pair
    assert "response_tokens" not in averaged


def test_divergence_estimates_kl_over_tokens_of_the_reference() -> None:
    """Weighted by the reference's probabilities its sum is the KL divergence, exactly."""
    reference = np.array([0.5, 0.3, 0.2])
    policy = np.array([0.2, 0.2, 0.6])
    each = reference_divergence(jnp.log(policy), jnp.log(reference))
    exact = float(np.sum(reference * np.log(reference / policy)))
    np.testing.assert_allclose(np.sum(reference * np.asarray(each)), exact, rtol=1e-5)
    assert np.all(np.asarray(each) > 0)
    assert float(reference_divergence(jnp.array(-3.0), jnp.array(-3.0))) == 0.0


def test_extreme_margins_stay_finite() -> None:
    sums = SUMS._replace(policy=jnp.array([[-1e4, -10.0], [-10.0, -1e4]]))
    for settings in (DpoConfig(beta=1.0), DpoConfig(beta=1.0, label_smoothing=0.1)):
        loss, gradient = jax.value_and_grad(
            lambda policy, how=settings: jnp.sum(pair_losses(sums._replace(policy=policy), how))
        )(sums.policy)
        assert np.isfinite(loss)
        assert np.all(np.isfinite(gradient))


# -- against TRL ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A real DPOTrainer around transformers' twin of our model, and its reference model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import DPOConfig as TrlConfig
        from trl import DPOTrainer

        policy = samples.twins(0)[2]
        reference = samples.twins(1)[2]
        tokenizer = tiny.tokenizer(samples.VOCABULARY)
        tokenizer.pad_token = "w0"
        folder: Path = tmp_path_factory.mktemp("trl")
        rows = {"prompt": ["w3 w4"], "chosen": ["w5"], "rejected": ["w6"]}
        trainer = DPOTrainer(
            model=policy,
            ref_model=reference,
            args=TrlConfig(
                output_dir=str(folder),
                use_cpu=True,
                bf16=False,
                report_to="none",
                disable_tqdm=True,
            ),
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict(rows),
        )
    return trainer, policy


def trl_loss(
    trl: tuple[Any, Any], kind: str, settings: DpoConfig, pairs: list[EncodedPair]
) -> tuple[torch.Tensor, dict[str, float]]:
    """TRL's loss on padded rows (chosen ones first) and what it logs."""
    trainer, _ = trl
    chats = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    width = max(len(chat.tokens) for chat in chats)
    ids, seen, response = (torch.zeros(len(chats), width, dtype=torch.long) for _ in range(3))
    for row, chat in enumerate(chats):
        size = len(chat.tokens)
        ids[row, :size] = torch.tensor(chat.tokens)
        seen[row, :size] = 1
        response[row, chat.prompt_length : size] = 1
    trainer.beta, trainer.loss_types, trainer.loss_weights = settings.beta, [kind], [1.0]
    trainer.label_smoothing = settings.label_smoothing
    trainer._metrics["train"].clear()
    trainer._metrics["eval"].clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = trainer.compute_loss(
            trainer.model,
            {"input_ids": ids, "attention_mask": seen, "completion_mask": response},
        )
    logged = {**trainer._metrics["train"], **trainer._metrics["eval"]}
    return loss, {name: values[-1] for name, values in logged.items() if isinstance(values, list)}


def our_loss(settings: DpoConfig, pairs: list[EncodedPair]) -> tuple[Any, Params, dict, Model]:
    """Loss, gradient and measures of the same batch, the reference's log-probs from our side."""
    model, params, _ = samples.twins(0)
    _, other, _ = samples.twins(1)

    def packed(reference: list[np.ndarray] | None) -> PairBatch:
        return pack_pairs(pairs, reference, row_length=32, slots=16, rows=len(pairs))

    zeros = packed(None)
    log_probs = -np.asarray(token_losses(model, other, zeros.batch))
    batch = packed([log_probs[row, : pair.targets] for row, pair in enumerate(pairs)])

    def loss(params: Params) -> tuple[Any, Any]:
        sums = pair_sums(model, params, batch, dtype="float32")
        return jnp.mean(pair_losses(sums, settings)), pair_measures(sums, settings)

    (value, measures), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, gradient, measures, model


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sigmoid", DpoConfig(beta=0.1)),
        ("sigmoid", DpoConfig(beta=0.7)),
        ("sigmoid_norm", DpoConfig(beta=0.5, length_normalized=True)),
        ("ipo", DpoConfig(beta=0.2, loss="ipo", length_normalized=True)),
    ],
    ids=["sigmoid", "sigmoid-beta", "normalized", "ipo"],
)
def test_loss_and_gradient_are_those_of_trl(
    trl: tuple[Any, Any], kind: str, settings: DpoConfig
) -> None:
    pairs = samples.pairs(6)
    _, policy = trl
    policy.zero_grad()
    theirs, logged = trl_loss(trl, kind, settings, pairs)
    theirs.backward()
    ours, gradient, measures, model = our_loss(settings, pairs)
    np.testing.assert_allclose(float(ours), theirs.item(), rtol=1e-5)
    assert_gradients_equal(model, gradient, policy)
    if not settings.length_normalized:
        for name, key in (
            ("rewards/chosen", "reward_chosen"),
            ("rewards/rejected", "reward_rejected"),
            ("rewards/margins", "reward_margin"),
            ("rewards/accuracies", "reward_accuracy"),
            ("logps/chosen", "log_prob_chosen"),
            ("logps/rejected", "log_prob_rejected"),
        ):
            np.testing.assert_allclose(
                np.mean(measures[key]), logged[name], rtol=1e-4, atol=1e-5, err_msg=name
            )


def test_label_smoothing_is_trls_loss_on_pairs_partly_swapped(trl: tuple[Any, Any]) -> None:
    """A share of pairs the wrong way round: TRL's plain loss on both orders, weighted."""
    pairs = samples.pairs(5, seed=3)
    swapped = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    settings = DpoConfig(beta=0.3, label_smoothing=0.2)
    _, policy = trl
    policy.zero_grad()
    right, _ = trl_loss(trl, "sigmoid", settings, pairs)
    wrong, _ = trl_loss(trl, "sigmoid", settings, swapped)
    theirs = 0.8 * right + 0.2 * wrong
    theirs.backward()
    ours, gradient, _, model = our_loss(settings, pairs)
    np.testing.assert_allclose(float(ours), theirs.item(), rtol=1e-5)
    assert_gradients_equal(model, gradient, policy)


def assert_gradients_equal(model: Model, gradient: Params, policy: torch.nn.Module) -> None:
    ours = dict(from_params(model.config, jax.device_get(gradient)))
    theirs = {name: value.grad.numpy() for name, value in policy.named_parameters()}
    assert ours.keys() == theirs.keys()
    scale = max(np.abs(value).max() for value in theirs.values())
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-5 * scale, err_msg=name)
