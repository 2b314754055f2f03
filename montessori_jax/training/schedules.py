"""Learning rates by optimizer step: linear warm-up, stable, decay (WSD, arXiv 2404.06395)."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from montessori_jax.config import OptimizerConfig
from montessori_jax.errors import UserError


class Phases(NamedTuple):
    """Optimizer steps spent in each part of the schedule; they add up to the run's."""

    warmup: int
    stable: int
    decay: int


def phases(settings: OptimizerConfig, steps: int) -> Phases:
    """Split ``steps``: ``ceil(ratio * steps)`` for the warm-up, then for the decay what is left."""
    # Rounded first: 0.1 * 70 is 7.000000000000001 in binary, which is no reason for an 8th step.
    warmup = min(steps, math.ceil(round(settings.warmup_ratio * steps, 6)))
    decay = min(steps - warmup, math.ceil(round(settings.decay_ratio * steps, 6)))
    return Phases(warmup, steps - warmup - decay, decay)


def wsd(settings: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate of update ``i`` (0 is the first), as Hugging Face's ``get_wsd_schedule`` has it.

    With ``p`` the peak and ``f = final_learning_rate`` (of ``p`` at most), in the warm-up
    ``f + (p - f) i / warmup``; then ``p``; ``k`` steps into the decay
    ``f + (p - f) (1 - k / decay)``, or with ``(1 + cos(pi k / decay)) / 2`` for a cosine. After
    the last step it stays at ``f``, or at ``p`` where there is no decay (there Hugging Face drops
    to ``f``): a student warmed up over all its steps is probed at its peak.

    Returns:
        A function of an integer step, float32 (float64 under x64), usable inside jit.

    Raises:
        UserError: a final rate above the peak.
    """
    peak, final = settings.learning_rate, settings.final_learning_rate
    warmup, stable, decay = phases(settings, steps)
    if final > peak:
        raise UserError(
            f"final_learning_rate {final} is above learning_rate {peak}: lower it (0 is allowed)"
        )

    def rate(step: Array | int) -> Array:
        count = jnp.asarray(step).astype(float)
        rising = count / max(1, warmup)
        fallen = jnp.clip((count - (warmup + stable)) / max(1, decay), 0.0, 1.0)
        left = 0.5 * (1 + jnp.cos(math.pi * fallen)) if settings.decay == "cosine" else 1 - fallen
        share = jnp.where(count < warmup, rising, left if decay else jnp.ones_like(left))
        return final + (peak - final) * share

    return rate


def rate_table(settings: OptimizerConfig, steps: int) -> np.ndarray:
    """The rates of updates ``0 .. steps`` on the host, float32 ``[steps + 1]``.

    The last is the rate of the update *after* the run: that of a probe step.
    """
    return np.asarray(wsd(settings, steps)(np.arange(steps + 1)))
