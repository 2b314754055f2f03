"""One reference gradient, dotted with each candidate's actual optimizer update."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from montessori_jax.influence.blocks import map_blocks, score_in_blocks
from montessori_jax.influence.reference import Reference, require_finite
from montessori_jax.influence.scores import Candidate, Score, Scorer, measured_score
from montessori_jax.influence.step import (
    CandidateLoss,
    Params,
    candidate_update,
    zero_gradient_update,
)
from montessori_jax.pytrees import as_pytree

ExpansionPoint = Literal["zero_gradient", "params"]


class Products(NamedTuple):
    """Results of a program run: leaves ``[blocks, K]``; ``own`` one product a parameter leaf."""

    candidate_loss: Float[Array, "blocks lanes"]
    own: list[Float[Array, "blocks lanes"]]


def dot_by_leaf(first: Params, second: Params) -> list[Float[Array, ""]]:
    """``sum_j first_j second_j`` of each leaf; the caller adds them up in float64."""
    return jax.tree.leaves(jax.tree.map(_dot, first, second))


def _dot(a: Array, b: Array) -> Float[Array, ""]:
    # In two or more pieces, for the sake of the loop: XLA's CPU compiler would fuse the sum with
    # the update before it and then fill arrays of a leaf's size with the optimizer's constants
    # (1.9 GB instead of 0.6 at 135M parameters).
    rows = a.shape[0] if a.ndim > 1 else 1
    pieces = next((n for n in range(2, 65) if rows % n == 0), 1)
    if pieces == 1:
        return jnp.sum(a * b)

    def split(leaf: Array) -> Array:
        return leaf.reshape(pieces, rows // pieces, *leaf.shape[1:])

    return jnp.sum(jax.lax.map(lambda pair: jnp.sum(pair[0] * pair[1]), (split(a), split(b))))


@partial(jax.jit, static_argnames=("tx", "gradient_scale"))
def products(
    candidate_loss: CandidateLoss,
    tx: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    reference_gradient: Params,
    data: Any,
    filled: Bool[Array, " blocks"],
    gradient_scale: float = 1.0,
) -> Products:
    """``G_ref . (Delta - Delta_c)`` of each candidate, leaf by leaf.

    Gradient, update and product are one program: the update of a leaf is used up as it is made.
    ``Delta_c`` is made again with it, as that reads nothing which ``Delta`` does not.
    """

    def one(data: Any) -> tuple[Array, list[Array]]:
        loss, updates = candidate_update(
            candidate_loss, tx, params, opt_state, data, gradient_scale=gradient_scale
        )
        shared = zero_gradient_update(tx, params, opt_state)
        own = jax.tree.map(jnp.subtract, updates, shared)
        return loss, dot_by_leaf(reference_gradient, own)

    return Products(*map_blocks(one, data, filled))


@partial(jax.jit, static_argnames=("tx",))
def _zero_gradient_step(
    tx: optax.GradientTransformation, params: Params, opt_state: optax.OptState
) -> Params:
    return optax.apply_updates(params, zero_gradient_update(tx, params, opt_state))


@partial(jax.jit, static_argnames=("tx",))
def _shared_product(
    tx: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    reference_gradient: Params,
) -> list[Array]:
    return dot_by_leaf(reference_gradient, zero_gradient_update(tx, params, opt_state))


def total(parts: Sequence[Any]) -> float:
    """A sum over leaves in float64."""
    return float(np.sum([np.float64(part) for part in parts]))


def first_order(
    candidate_loss: CandidateLoss,
    params: Params,
    opt_state: optax.OptState,
    tx: optax.GradientTransformation,
    reference: Reference,
    *,
    gradient_scale: float = 1.0,
    block: int = 1,
    chunk: int = 16,
    expansion_point: ExpansionPoint = "zero_gradient",
) -> Scorer:
    """A scorer of ``[L_ref(theta) - L_ref(theta_c)] - G_ref(theta_c) . (Delta - Delta_c)``.

    ``Delta`` is the optimizer's actual update for the candidate, ``Delta_c`` that for a zero
    gradient, ``theta_c = theta + Delta_c``: nothing of the optimizer is linearised, and the step
    that momentum makes whatever the candidate is measured and not estimated (it is the score's
    ``offset``). With ``expansion_point="params"`` the gradient is taken at ``theta`` and the
    offset is ``-G_ref(theta) . Delta_c``, so that the influence is ``-G_ref(theta) . Delta``.

    A candidate costs its gradient and one pass over the parameters; the reference gradient is
    taken once, here. It is held beside params and opt_state.

    Args:
        candidate_loss: ``(params, data) -> scalar``, hashable or a pytree.
        params: the student's parameters.
        opt_state: the optimizer's state after the warm-up.
        tx: the optimizer, with the probe step's learning rate.
        reference: the reference set.
        gradient_scale: candidate gradients are multiplied by it.
        block: candidates side by side; each needs its own copy of the gradient.
        chunk: most candidates a program run.
        expansion_point: where the reference gradient is taken.

    Raises:
        UserError: the reference loss is not finite.
    """
    blocks = -(-chunk // block)
    loss = as_pytree(candidate_loss)
    before = reference.losses(params)
    loss_before = reference.loss(before)
    require_finite(loss_before)
    if expansion_point == "zero_gradient":
        centre = _zero_gradient_step(tx, params, opt_state)
        shared = reference.difference(before, reference.losses(centre))
        gradient = reference.gradient(centre)
        del centre
    else:
        gradient = reference.gradient(params)
        shared = -total(jax.device_get(_shared_product(tx, params, opt_state, gradient)))
    require_finite(loss_before - shared)

    def score(members: Sequence[Candidate], data: Any, filled: np.ndarray) -> list[Score]:
        found = jax.device_get(
            products(loss, tx, params, opt_state, gradient, data, filled, gradient_scale)
        )
        scores = []
        for place, one in enumerate(members):
            at = divmod(place, block)
            own = -total([part[at] for part in found.own])
            scores.append(
                measured_score(
                    one,
                    shared + own,
                    float(found.candidate_loss[at]),
                    loss_before=loss_before,
                    loss_after=None,
                    offset=shared,
                    method="first_order",
                )
            )
        return scores

    return partial(score_in_blocks, score=score, block=block, blocks=blocks, method="first_order")
