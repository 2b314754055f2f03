"""A model in training, as one value."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from montessori_jax.mesh import mesh_of, place
from montessori_jax.models import Params
from montessori_jax.models.sharding import moment_shardings


class TrainState(NamedTuple):
    """Float32 parameters, the optimizer's state, and how many updates were made (int32)."""

    params: Params
    opt_state: Any
    step: Int[Array, ""]


def state_shardings(
    params: Params, tx: optax.GradientTransformation, mesh: Mesh | None
) -> TrainState | None:
    """Where each array of a state lies, as a tree of `NamedSharding`; None on one device."""
    if mesh is None:
        return None
    return TrainState(
        jax.tree.map(lambda leaf: leaf.sharding, params),
        moment_shardings(tx, params, mesh),
        # A sharding stands where the state has an array: the same tree, one leaf of it typed.
        NamedSharding(mesh, PartitionSpec()),  # type: ignore[arg-type]
    )


def start(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """A state before its first update, on a copy of ``params``.

    A copy because steps are donated their state: the caller's arrays stay valid. The moments are
    made where their parameters lie.
    """
    shardings = state_shardings(params, tx, mesh_of(params))
    copied = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    if shardings is None:
        return TrainState(copied, tx.init(copied), jnp.zeros((), jnp.int32))
    moments = jax.jit(tx.init, out_shardings=shardings.opt_state)(copied)
    zero: Any = place(np.int32(0), mesh_of(params))
    return TrainState(copied, moments, zero)
