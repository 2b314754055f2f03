"""The probe step as a pure function: gradient of one candidate, then any optax update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

Params = Any
# (params, one candidate's data) -> its loss, a scalar. A pytree, whose arrays are then arguments of
# the compiled programs, or else hashable: programs are cached by it.
CandidateLoss = Callable[[Params, Any], Float[Array, ""]]


def candidate_update(
    candidate_loss: CandidateLoss,
    tx: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    data: Any,
    *,
    gradient_scale: float = 1.0,
    use_gradient: Bool[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Params]:
    """One candidate's loss and the update that the optimizer makes of its gradient.

    ``updates, _ = tx.update(gradient_scale * grad loss(params, data), opt_state, params)``; the
    optimizer's new state is not kept, and the old one is only read.

    Args:
        candidate_loss: ``(params, data) -> scalar``.
        tx: the optimizer, learning rate and sign included: new parameters are ``params + updates``.
        params: the student's parameters.
        opt_state: the optimizer's state after the warm-up.
        data: one candidate.
        gradient_scale: 1/8 reproduces the public code, which divides by its number of devices.
        use_gradient: where False the gradient is taken as zero (`zero_gradient_update`).
    """
    loss, gradient = scaled_gradient(candidate_loss, params, data, gradient_scale)
    if use_gradient is not None:
        # A choice and not a product: a gradient of NaN times zero would still be NaN.
        gradient = jax.tree.map(lambda g: jnp.where(use_gradient, g, jnp.zeros_like(g)), gradient)
    return loss, apply_optimizer(tx, gradient, opt_state, params)


def scaled_gradient(
    candidate_loss: CandidateLoss, params: Params, data: Any, gradient_scale: float = 1.0
) -> tuple[Float[Array, ""], Params]:
    """One candidate's loss and ``gradient_scale`` times its gradient."""
    loss, gradient = jax.value_and_grad(candidate_loss)(params, data)
    if gradient_scale != 1.0:
        gradient = jax.tree.map(lambda g: g * jnp.asarray(gradient_scale, g.dtype), gradient)
    return loss, gradient


def zero_gradient_update(
    tx: optax.GradientTransformation, params: Params, opt_state: optax.OptState
) -> Params:
    """The update that momentum and weight decay make alone; zero for plain SGD."""
    return apply_optimizer(tx, jax.tree.map(jnp.zeros_like, params), opt_state, params)


def apply_optimizer(
    tx: optax.GradientTransformation, gradient: Params, opt_state: optax.OptState, params: Params
) -> Params:
    """The update that the optimizer makes of a gradient; its new state is not kept."""
    # optax's own Adam raises a Python float to an integer count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        return tx.update(gradient, opt_state, params)[0]
