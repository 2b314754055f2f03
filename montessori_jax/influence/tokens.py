"""A candidate's influence, token by token."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from montessori_jax.influence.expansion import expand
from montessori_jax.influence.probe import Probe
from montessori_jax.influence.step import (
    Params,
    apply_optimizer,
    scaled_gradient,
    zero_gradient_update,
)
from montessori_jax.pytrees import as_argument

# (params, one candidate's data) -> terms whose sum is the candidate's loss.
LossTerms = Callable[[Params, Any], Float[Array, "*tokens"]]


class TokenContributions(NamedTuple):
    """What each term of a candidate's loss adds to its first-order influence, in nats.

    ``contributions`` has the shape of the terms; with ``offset`` its sum is the influence.
    """

    contributions: Float[np.ndarray, "*tokens"]
    offset: float

    @property
    def influence(self) -> float:
        return self.offset + float(self.contributions.sum(dtype=np.float64))


@partial(jax.jit, static_argnames=("tx", "gradient_scale"))
def _contributions(
    terms: LossTerms,
    tx: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    reference_gradient: Params,
    data: Any,
    gradient_scale: float,
) -> Array:
    def loss(params: Params, data: Any) -> Array:
        return jnp.sum(terms(params, data))

    _, gradient = scaled_gradient(loss, params, data, gradient_scale)
    updates = apply_optimizer(tx, gradient, opt_state, params)
    still = zero_gradient_update(tx, params, opt_state)

    def direction(reference: Array, g: Array, update: Array, shared: Array) -> Array:
        # A gradient that is all rounding would give a slope that is all rounding.
        moved = jnp.abs(g) > jnp.finfo(g.dtype).eps * jnp.max(jnp.abs(g))
        slope = jnp.where(moved, (update - shared) / jnp.where(moved, g, 1), 0)
        return reference * slope * jnp.asarray(gradient_scale, g.dtype)

    along = jax.tree.map(direction, reference_gradient, gradient, updates, still)
    return -jax.jvp(lambda p: terms(p, data), (params,), (along,))[1]


def token_contributions(probe: Probe, terms: LossTerms, data: Any) -> dict[str, TokenContributions]:
    """Split a candidate's first-order influence over the terms of its loss, by reference set.

    The update is a line through the zero-gradient step and the candidate's own step,
    ``Delta_j = Delta_0j + b_j g_j`` with the secant ``b_j = (Delta_j - Delta_0j) / g_j`` of each
    weight, so ``influence - offset = -sum_t (b * G_ref) . grad terms_t``: one forward pass in
    forward mode along ``b * G_ref``. The sum is `first_order`'s own part for every optimizer that
    acts weight by weight, and with clipping too, whose factor is in ``b``. For SGD each term is
    what it would be alone; for AdamW the step is not additive, and ``b`` shares it out by each
    token's gradient.

    Args:
        probe: the student, its optimizer and the reference sets.
        terms: ``(params, data) -> terms`` whose sum is the candidate's loss (`MeanLoss.terms`).
        data: one candidate's data.

    Raises:
        UserError: a reference loss is not finite.
    """
    around = expand(probe, "zero_gradient")
    return {
        name: TokenContributions(
            np.asarray(
                _contributions(
                    as_argument(terms),
                    probe.tx,
                    probe.params,
                    probe.opt_state,
                    known.gradient,
                    data,
                    probe.gradient_scale,
                )
            ),
            known.offset,
        )
        for name, known in around.sets.items()
    }
