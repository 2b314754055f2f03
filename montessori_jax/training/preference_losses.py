"""Losses on preference pairs: one value a pair, reduced once, outside."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from montessori_jax.config import DpoConfig


class PairSums(NamedTuple):
    """What the losses need of each pair, chosen response first and rejected second.

    ``policy`` and ``reference`` are log-probs summed over a response's tokens (nats), ``tokens``
    how many those are, ``divergence`` the sum of `reference_divergence`.
    """

    policy: Float[Array, "pairs 2"]
    reference: Float[Array, "pairs 2"]
    tokens: Float[Array, "pairs 2"]
    divergence: Float[Array, "pairs 2"]


def sigmoid_loss(
    margin: Float[Array, " pairs"], *, label_smoothing: float = 0.0
) -> Float[Array, " pairs"]:
    """DPO's ``-log sigmoid(margin)`` (arXiv 2305.18290, equation 7), conservative if smoothed.

    ``margin`` is the difference of implicit rewards, ``beta`` included. With a share ``e`` of
    pairs assumed the wrong way round: ``-(1 - e) log sigmoid(margin) - e log sigmoid(-margin)``
    (Mitchell, "A note on DPO with noisy preferences", 2023).
    """
    right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(log_ratio_difference: Float[Array, " pairs"], *, tau: float) -> Float[Array, " pairs"]:
    """IPO's ``(h - 1 / (2 tau))^2`` (arXiv 2310.12036, equation 17).

    ``h`` is the chosen response's log-ratio to the reference less the rejected one's. The paper
    sums it over tokens; its authors' experiments, and TRL, average: that is ``length_normalized``.
    """
    return jnp.square(log_ratio_difference - 1 / (2 * tau))


def reference_divergence(
    policy: Float[Array, "*tokens"], reference: Float[Array, "*tokens"]
) -> Float[Array, "*tokens"]:
    """``exp(d) - 1 - d`` with ``d`` the policy's log-prob of a token less the reference's.

    Never negative; its mean over tokens drawn from the *reference* estimates
    ``KL(reference || policy)`` without bias (the k3 estimator of Schulman, "Approximating KL
    divergence", 2020). A teacher's pairs are such tokens: it wrote both responses itself.
    """
    difference = policy - reference
    return jnp.expm1(difference) - difference


def log_ratios(sums: PairSums, settings: DpoConfig) -> Float[Array, "pairs 2"]:
    """``log pi(y|x) - log pi_ref(y|x)``, a token on average if ``length_normalized``."""
    ratios = sums.policy - sums.reference
    return ratios / jnp.maximum(sums.tokens, 1) if settings.length_normalized else ratios


def pair_losses(sums: PairSums, settings: DpoConfig) -> Float[Array, " pairs"]:
    """The loss of each pair that ``settings`` name."""
    ratios = log_ratios(sums, settings)
    difference = ratios[:, 0] - ratios[:, 1]
    if settings.loss == "ipo":
        return ipo_loss(difference, tau=settings.beta)
    return sigmoid_loss(settings.beta * difference, label_smoothing=settings.label_smoothing)


def pair_measures(sums: PairSums, settings: DpoConfig) -> dict[str, Float[Array, " pairs"]]:
    """What is logged of each pair, named as in the metrics.

    Rewards are ``beta`` times the log-ratios that the loss sees; ``reward_accuracy`` is 1 where
    the chosen response's is the larger (a tie is 0); ``kl`` is nats *a pair*, to be divided by
    ``response_tokens``.
    """
    rewards = settings.beta * log_ratios(sums, settings)
    return {
        "loss": pair_losses(sums, settings),
        "reward_chosen": rewards[:, 0],
        "reward_rejected": rewards[:, 1],
        "reward_margin": rewards[:, 0] - rewards[:, 1],
        "reward_accuracy": (rewards[:, 0] > rewards[:, 1]).astype(rewards.dtype),
        "log_prob_chosen": sums.policy[:, 0],
        "log_prob_rejected": sums.policy[:, 1],
        "kl": jnp.sum(sums.divergence, axis=1),
        "response_tokens": jnp.sum(sums.tokens, axis=1),
    }


def means(totals: dict[str, Array], pairs: Array) -> dict[str, Array]:
    """Sums over pairs -> the metrics: means a pair, and ``kl`` in nats a response token."""
    tokens = jnp.maximum(totals["response_tokens"], 1)
    averaged = {
        name: total / jnp.maximum(pairs, 1)
        for name, total in totals.items()
        if name not in ("kl", "response_tokens")
    }
    return {**averaged, "kl": totals["kl"] / tokens}
