"""What a difference of two losses measures when there is nothing to measure."""

import jax
import numpy as np
from jaxtyping import Array

from montessori_jax.influence.reference import Reference
from montessori_jax.influence.step import Params


@jax.jit
def _random_signs(params: Params, updates: Params, key: Array) -> Params:
    leaves, structure = jax.tree.flatten(updates)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))
    return jax.tree.map(
        lambda p, u, k: p + u * jax.random.rademacher(k, u.shape, u.dtype), params, updates, keys
    )


def noise_floor(
    reference: Reference, params: Params, updates: Params, *, draws: int = 8, seed: int = 0
) -> float:
    """Standard deviation, in nats, of the influence that is measured for steps without any.

    Each draw takes the step ``updates`` with a random sign for every weight: as many weights
    cross a rounding boundary as in a real step, while the loss itself hardly changes (by
    ``norm(G_ref * updates)``, a random walk). What is measured is the rounding of ``reference``'s
    compute dtype. A score below three times this says little.
    """
    before = reference.losses(params)
    differences = [
        reference.difference(before, reference.losses(_random_signs(params, updates, key)))
        for key in jax.random.split(jax.random.key(seed), draws)
    ]
    return float(np.std(differences, ddof=1))
