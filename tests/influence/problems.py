"""A small curved problem in float64: nothing of it is a language model, so it compiles at once."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from montessori_jax.influence import Candidate, Reference, Score, local_influence, single_batch

INPUTS, WIDTH, REFERENCES = 4, 3, 24


class Problem(NamedTuple):
    """What `local_influence` takes after the candidate loss."""

    params: dict
    opt_state: optax.OptState
    tx: optax.GradientTransformation
    items: list[Candidate]
    reference: Reference

    def score(self, method: str, **how):
        given = {"candidates": self.items, "reference": self.reference} | how
        return local_influence(
            candidate_loss,
            self.params,
            self.opt_state,
            self.tx,
            given.pop("candidates"),
            given.pop("reference"),
            method=method,
            **given,
        )

    def influences(self, method: str, **how) -> np.ndarray:
        return influences(self.score(method, **how))


def influences(scores: Sequence[Score]) -> np.ndarray:
    return np.array([score.influence for score in scores])


def from_rest(loss, params, tx, items, reference, **how) -> list[Score]:
    """`local_influence` with the optimizer's state as it starts."""
    return local_influence(loss, params, tx.init(params), tx, items, reference, **how)


def predict(params, x):
    return jnp.tanh(x @ params["inner"]) @ params["outer"]


def candidate_loss(params, data):
    return jnp.square(predict(params, data["x"]) - data["y"])


def reference_points():
    rng = np.random.default_rng(11)
    return rng.normal(size=(REFERENCES, INPUTS)), rng.normal(size=REFERENCES)


def reference_losses(params):
    x, y = reference_points()
    return jnp.square(predict(params, x) - y)


def curved(tx: optax.GradientTransformation, count: int = 6, moments: bool = False) -> Problem:
    """The problem at random weights; ``moments`` puts Adam's far from zero. Call under x64."""
    rng = np.random.default_rng(12)
    params = {
        "inner": jnp.asarray(rng.normal(size=(INPUTS, WIDTH))),
        "outer": jnp.asarray(rng.normal(size=WIDTH)),
    }
    state = tx.init(params)
    if moments:
        adam = state[0]._replace(
            count=jnp.int32(50),
            mu=jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape)), params),
            nu=jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(1, 3, leaf.shape)), params),
        )
        state = (adam, *state[1:])
    items = [
        Candidate(str(i), {"x": rng.normal(size=INPUTS), "y": rng.normal()}) for i in range(count)
    ]
    weights = np.full(REFERENCES, 1 / REFERENCES)
    return Problem(params, state, tx, items, single_batch(reference_losses, weights))
