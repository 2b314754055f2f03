"""Scores that research compares with: gradient products and LESS. None is in nats of loss."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from montessori_jax.errors import UserError
from montessori_jax.influence.blocks import map_blocks, score_in_blocks
from montessori_jax.influence.expansion import dot_by_leaf, total
from montessori_jax.influence.probe import Probe
from montessori_jax.influence.reference import Reference
from montessori_jax.influence.scores import Candidate, Measured, Score, Scorer, measured_score
from montessori_jax.influence.step import CandidateLoss, Params, apply_optimizer, scaled_gradient
from montessori_jax.mesh import fetch
from montessori_jax.pytrees import as_argument

# What is compared with the reference: the gradient, LESS's Adam feature, or the actual update.
Feature = Literal["gradient", "adam", "update"]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Aligned(NamedTuple):
    """Results of a program run: leaves ``[blocks, K]``, parameter leaf by parameter leaf."""

    candidate_loss: Float[Array, "blocks lanes"]
    products: tuple[list[Float[Array, "blocks lanes"]], ...]
    squares: list[Float[Array, "blocks lanes"]]


@partial(jax.jit, static_argnames=("tx", "feature", "gradient_scale", "mesh"))
def aligned(
    candidate_loss: CandidateLoss,
    tx: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    directions: tuple[Params, ...],
    feature: Feature,
    data: Any,
    filled: Bool[Array, " blocks"],
    gradient_scale: float,
    mesh: Mesh | None = None,
) -> Aligned:
    """``direction . feature`` and ``|feature|^2`` of each candidate."""

    def one(shared: Any, data: Any) -> tuple[Array, tuple[list[Array], ...], list[Array]]:
        candidate_loss, params, opt_state, directions = shared
        loss, gradient = scaled_gradient(candidate_loss, params, data, gradient_scale)
        found = gradient
        if feature == "adam":
            found = less_feature(gradient, *adam_moments(opt_state))
        elif feature == "update":
            updates = apply_optimizer(tx, gradient, opt_state, params)
            found = jax.tree.map(jnp.negative, updates)
        products = tuple(dot_by_leaf(direction, found) for direction in directions)
        return loss, products, dot_by_leaf(found, found)

    shared = (candidate_loss, params, opt_state, directions)
    return Aligned(*map_blocks(one, shared, data, filled, mesh))


def adam_moments(opt_state: optax.OptState) -> tuple[Params, Params]:
    """The moments ``(m, v)`` in an optax state.

    Raises:
        UserError: the state holds none, as SGD's.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: hasattr(node, "nu"))
    for node in nodes:
        if hasattr(node, "nu"):
            return node.mu, node.nu
    raise UserError("less needs Adam's moments, which this optimizer's state does not hold")


def less_feature(gradient: Params, first: Params, second: Params) -> Params:
    """``(b1 m + (1 - b1) g) / sqrt(b2 v + (1 - b2) g^2 + eps)``, as LESS's public code has it."""

    def one(g: Array, m: Array, v: Array) -> Array:
        return (BETA1 * m + (1 - BETA1) * g) / jnp.sqrt(BETA2 * v + (1 - BETA2) * g * g + EPSILON)

    return jax.tree.map(one, gradient, first, second)


def _scorer(
    probe: Probe,
    directions: Sequence[Params],
    feature: Feature,
    method: str,
    value: Callable[[float, float, float], float],
) -> Scorer:
    """Scores ``value(direction . feature, |direction|, |feature|)``."""
    sizes = [math.sqrt(total(fetch(_dots(one, one)))) for one in directions]

    def score(members: Sequence[Candidate], data: Any, filled: np.ndarray) -> list[Score]:
        found = fetch(
            aligned(
                as_argument(probe.candidate_loss),
                probe.tx,
                probe.params,
                probe.opt_state,
                tuple(directions),
                feature,
                data,
                filled,
                probe.gradient_scale,
                probe.mesh,
            )
        )
        scores = []
        for place, one in enumerate(members):
            at = divmod(place, probe.block)
            own = math.sqrt(total([part[at] for part in found.squares]))
            sets = {
                name: Measured(value(total([part[at] for part in product]), size, own))
                for name, product, size in zip(probe.references, found.products, sizes, strict=True)
            }
            scores.append(measured_score(one, float(found.candidate_loss[at]), sets, method))
        return scores

    return partial(
        score_in_blocks, score=score, block=probe.block, blocks=probe.blocks, method=method
    )


_dots = jax.jit(dot_by_leaf)


def cosine(product: float, first: float, second: float) -> float:
    """``product / (first second)``; 0 where either vector is 0."""
    return product / (first * second) if first * second != 0 else 0.0


def grad_dot(probe: Probe) -> Scorer:
    """A scorer of ``G_ref(theta) . grad loss(z; theta)``: TracIn at one checkpoint
    (arXiv 2002.08484, equation 1 without its rate).

    In squared nats over squared weights; times the rate it is SGD's first-order influence. 6NT a
    candidate and the reference gradient once.
    """
    directions = [one.gradient(probe.params) for one in probe.references.values()]
    return _scorer(probe, directions, "gradient", "grad_dot", lambda product, _, __: product)


def grad_cos(probe: Probe) -> Scorer:
    """A scorer of the cosine of ``G_ref(theta)`` and ``grad loss(z; theta)``: `grad_dot` without
    the lengths, which favour short samples. 6NT a candidate.
    """
    directions = [one.gradient(probe.params) for one in probe.references.values()]
    return _scorer(probe, directions, "gradient", "grad_cos", cosine)


def less(probe: Probe, *, form: Literal["published", "mended"] = "published") -> Scorer:
    """A scorer of the mean cosine of a candidate's Adam direction with each reference gradient
    (LESS, arXiv 2402.04333, equation 4, one checkpoint and no random projection).

    ``mean_s cos(grad l_s, Gamma(z))``. ``published`` takes ``Gamma`` as LESS's public code does:
    epsilon inside the root, no bias correction, betas .9 and .999 whatever the optimizer's.
    ``mended`` takes minus the update that the optimizer really makes. 6NT a candidate; once, a
    gradient for each reference sample by itself (weighted alike).

    Raises:
        UserError: ``published`` and the optimizer's state holds no Adam moments.
    """
    if form == "published":
        adam_moments(probe.opt_state)
    directions = [mean_direction(one, probe.params) for one in probe.references.values()]
    feature: Feature = "adam" if form == "published" else "update"
    return _scorer(
        probe,
        directions,
        feature,
        "less",
        lambda product, _, own: product / own if own else 0.0,
    )


def mean_direction(reference: Reference, params: Params) -> Params:
    """``mean_s grad l_s / |grad l_s|`` over the reference samples."""
    result = jax.tree.map(jnp.zeros_like, params)
    for sample in range(reference.count):
        gradient = reference.part([sample]).gradient(params)
        size = math.sqrt(total(fetch(_dots(gradient, gradient))))
        if size > 0:
            result = _added(result, gradient, jnp.asarray(1 / (size * reference.count)))
    return result


@partial(jax.jit, donate_argnums=0)
def _added(tree: Params, other: Params, factor: Array) -> Params:
    return jax.tree.map(lambda a, b: a + b * factor.astype(b.dtype), tree, other)
