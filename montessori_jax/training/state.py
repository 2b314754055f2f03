"""A model in training, as one value."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from montessori_jax.models import Params


class TrainState(NamedTuple):
    """Float32 parameters, the optimizer's state, and how many updates were made (int32)."""

    params: Params
    opt_state: Any
    step: Int[Array, ""]


def start(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """A state before its first update, on a copy of ``params``.

    A copy because steps are donated their state: the caller's arrays stay valid.
    """
    copied = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    return TrainState(copied, tx.init(copied), jnp.zeros((), jnp.int32))
