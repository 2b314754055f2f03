"""One direction made in advance, then a forward pass in forward mode scores a whole batch."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from montessori_jax.errors import UserError
from montessori_jax.influence.blocks import map_blocks, score_in_blocks
from montessori_jax.influence.expansion import (
    PILOTS,
    ExpansionPoint,
    all_finite,
    dot_by_leaf,
    expand,
    total,
)
from montessori_jax.influence.first_order import first_order_around
from montessori_jax.influence.mesh import candidate_devices, reference_ways, split_candidates
from montessori_jax.influence.probe import Probe
from montessori_jax.influence.response import FEWEST, Response, fit_response
from montessori_jax.influence.scores import (
    Candidate,
    Measured,
    Score,
    Scorer,
    measured_score,
    unmeasured,
)
from montessori_jax.influence.step import (
    CandidateLoss,
    Params,
    apply_optimizer,
    scaled_gradient,
    zero_gradient_update,
)
from montessori_jax.mesh import fetch
from montessori_jax.pytrees import as_argument

Sensitivity = Literal["secant", "tangent"]
# The secant runs between this many times a leaf's usual gradient, on both sides of zero.
REACH = 2.0


@runtime_checkable
class Batched(Protocol):
    """A candidate loss that can lay many candidates out together; else they are stacked."""

    def together(
        self, data: Sequence[Any], parts: int = 1, ways: int = 1
    ) -> Iterable[tuple[Any, list[int]]]:
        """Batches of packed candidates, and which of ``data`` each one's samples are.

        A batch's leaves have a leading axis of ``parts``, which devices compute apart, and then one
        of rows, which the ``ways`` devices of a part split.
        """

    def each(self, params: Params, packed: Any) -> Float[Array, " samples"]:
        """The loss of every sample of a batch in one of its parts, 0 for those of other parts;
        trailing ones may be fillers."""


class PilotSums(NamedTuple):
    """Over pilots, for each weight: ``sum g_j^2`` and ``sum g_j (Delta_j - Delta_0_j)``."""

    pilots: Float[Array, ""]
    gradient_square: Params
    product: Params


@partial(jax.jit, static_argnames=("tx", "gradient_scale"), donate_argnames=("sums",))
def add_pilot(
    candidate_loss: CandidateLoss,
    tx: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    sums: PilotSums,
    data: Any,
    gradient_scale: float,
) -> PilotSums:
    """Add one pilot; one that is not finite is left out."""
    _, gradient = scaled_gradient(candidate_loss, params, data, gradient_scale)
    updates = apply_optimizer(tx, gradient, opt_state, params)
    own = jax.tree.map(jnp.subtract, updates, zero_gradient_update(tx, params, opt_state))
    new = PilotSums(
        sums.pilots + 1,
        jax.tree.map(lambda total, g: total + g * g, sums.gradient_square, gradient),
        jax.tree.map(lambda total, g, u: total + g * u, sums.product, gradient, own),
    )
    fine = all_finite(gradient) & all_finite(updates)
    return jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, sums)


@partial(jax.jit, static_argnames=("tx",))
def secant_slope(
    tx: optax.GradientTransformation, params: Params, opt_state: optax.OptState, sums: PilotSums
) -> Params:
    """``b_j``: the optimizer's own secant, with one factor a leaf fitted on the pilots.

    The secant runs from ``-h`` to ``h`` with ``h`` twice the pilots' usual gradient in the leaf,
    and so holds what the moments say of every weight, seen by a pilot or not. A line fitted weight
    by weight on as many pilots follows the few large gradients among them.
    """

    def usual(square: Array) -> Array:
        moved = jnp.maximum(jnp.sum(square > 0), 1).astype(square.dtype)
        size = jnp.sum(square) / moved / jnp.maximum(sums.pilots, 1).astype(square.dtype)
        return REACH * jnp.sqrt(jnp.maximum(size, jnp.finfo(square.dtype).tiny))

    sizes = jax.tree.map(usual, sums.gradient_square)

    def probe(sign: int) -> Params:
        gradient = jax.tree.map(
            lambda p, h: jnp.full(p.shape, sign, p.dtype) * h.astype(p.dtype), params, sizes
        )
        return apply_optimizer(tx, gradient, opt_state, params)

    def slope(square: Array, product: Array, high: Array, low: Array, h: Array) -> Array:
        secant = (high - low) / (2 * h)
        # Two large factors apart from each other: their product may leave float32's range.
        scale = jnp.max(jnp.abs(secant))
        unit = secant / jnp.where(scale > 0, scale, 1)
        most = jnp.sum(unit * unit * square)
        factor = jnp.sum(unit * product) / jnp.where(most > 0, most, 1)
        return jnp.where(most > 0, factor * unit, secant)

    return jax.tree.map(slope, sums.gradient_square, sums.product, probe(1), probe(-1), sizes)


@partial(jax.jit, static_argnames=("tx",))
def tangent_slope(
    tx: optax.GradientTransformation, params: Params, opt_state: optax.OptState
) -> Params:
    """``b_j = d Delta_j / d g_j`` at ``g = 0``, for optimizers that act weight by weight."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    ones = jax.tree.map(jnp.ones_like, params)
    return jax.jvp(lambda g: apply_optimizer(tx, g, opt_state, params), (zeros,), (ones,))[1]


@jax.jit
def _times(slope: Params, gradient: Params) -> Params:
    return jax.tree.map(jnp.multiply, slope, gradient)


@jax.jit
def _scaled(tree: Params, factor: Array) -> Params:
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), tree)


_dots = jax.jit(dot_by_leaf)


def along(
    function: Any, params: Params, directions: tuple[Params, ...]
) -> tuple[Array, tuple[Array, ...]]:
    """Values of ``function`` and their derivative along each direction, by forward mode."""
    if len(directions) == 1:
        values, slope = jax.jvp(function, (params,), directions)
        return values, (slope,)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *directions)
    values, slopes = jax.vmap(lambda d: jax.jvp(function, (params,), (d,)), out_axes=(None, 0))(
        stacked
    )
    return values, tuple(slopes)


@partial(jax.jit, static_argnames=("mesh",))
def packed_slopes(
    candidate_loss: Batched,
    params: Params,
    directions: tuple[Params, ...],
    packed: Any,
    mesh: Mesh | None = None,
) -> tuple[Array, tuple[Array, ...]]:
    """Losses of the samples of a packed batch and their derivatives, ``[parts, samples]`` each.

    A sample is in one part, and its numbers in the others are 0. With a mesh, a part a device.
    """

    def one(shared: Any, packed: Any) -> tuple[Array, tuple[Array, ...]]:
        candidate_loss, params, directions = shared
        return along(lambda p: candidate_loss.each(p, packed), params, directions)

    def run(shared: Any, packed: Any) -> tuple[Array, tuple[Array, ...]]:
        return jax.lax.map(partial(one, shared), packed)

    parts = split_candidates(run, mesh, axes=(None, 0), out_axis=0)
    return parts((candidate_loss, params, directions), packed)


@partial(jax.jit, static_argnames=("mesh",))
def stacked_slopes(
    candidate_loss: CandidateLoss,
    params: Params,
    directions: tuple[Params, ...],
    data: Any,
    filled: Bool[Array, " blocks"],
    mesh: Mesh | None = None,
) -> tuple[Array, tuple[Array, ...]]:
    """The same for candidates of one shape, ``[blocks, K]`` each."""

    def one(shared: Any, data: Any) -> tuple[Array, tuple[Array, ...]]:
        candidate_loss, params, directions = shared
        return along(lambda p: candidate_loss(p, data), params, directions)

    return map_blocks(one, (candidate_loss, params, directions), data, filled, mesh)


def sum_pilots(probe: Probe, pilots: Sequence[Candidate]) -> PilotSums:
    """`PilotSums` of these candidates."""
    zeros = [jax.tree.map(jnp.zeros_like, probe.params) for _ in range(2)]
    sums = PilotSums(jnp.zeros(()), *zeros)
    for one in pilots:
        sums = add_pilot(
            as_argument(probe.candidate_loss),
            probe.tx,
            probe.params,
            probe.opt_state,
            sums,
            one.data,
            probe.gradient_scale,
        )
    return sums


def linearized(
    probe: Probe,
    *,
    sensitivity: Sensitivity = "secant",
    expansion_point: ExpansionPoint = "zero_gradient",
    pilots: int = PILOTS,
) -> Scorer:
    """A scorer of ``L_ref(theta) - L_ref(theta_c) - G_ref(theta_c) . (Delta_0 + b * g - Delta_c)``.

    The optimizer is made linear, weight by weight: ``Delta_j(g) = Delta_0_j + b_j g_j`` with
    ``Delta_0`` the zero-gradient step. So `first_order`'s product has one direction for all
    candidates, ``d = b * G_ref(theta_c)``, and ``d . g`` of every candidate of a packed batch is
    one forward pass in forward mode (`jax.jvp` of the samples' losses along ``d``): no gradient of
    a candidate exists. About ``4NT`` a candidate in batches of any number, with the activations of
    a forward pass and ``2N`` memory; once, the reference gradient and two gradients a pilot.

    - ``secant``: ``b`` is the optimizer's secant over the pilots' usual gradients, scaled leaf by
      leaf to their actual updates (`secant_slope`); then the scores follow the curve by which the
      pilots' first-order scores answer to their linear ones (`Response`; from 8 pilots on). Works
      for any optax transformation that acts weight by weight; SGD's ``b`` is ``-lr`` to rounding,
      and the score is that of `first_order`.
    - ``tangent``: ``b = d Delta / d g`` at ``g = 0``; for AdamW
      ``-lr (1 - b1) / (1 - b1^t) / (sqrt(v_hat) + eps)``. No pilots, but far too steep where the
      second moment is near zero.

    Clipping by global norm is no function of one weight: the secant holds its mean effect on the
    pilots, so long and short candidates are off by the ratio of their factors, and the tangent
    leaves it out (a zero gradient is not clipped). Forward mode needs losses with JVP rules.

    Args:
        probe: the student, its optimizer and the reference sets.
        sensitivity: how the optimizer is made linear.
        expansion_point: the centre (`first_order`); ``params`` uses ``-G . Delta_0`` for the
            shared step.
        pilots: how many candidates of the pool the secant and the curve are fitted on, and
            ``mean_update`` averages.

    Raises:
        UserError: a reference loss is not finite, there is no pilot, or the sensitivity is not
            finite.
    """
    tx, params, state = probe.tx, probe.params, probe.opt_state
    chosen = probe.pilots(pilots) if sensitivity == "secant" else []
    if chosen:
        slope = secant_slope(tx, params, state, sum_pilots(probe, chosen))
    else:
        slope = tangent_slope(tx, params, state)
    if not bool(all_finite(slope)):
        raise UserError(
            "the optimizer's sensitivity is not finite: its second moments may be zero; use the "
            "secant, or warm the student up"
        )
    around = expand(probe, expansion_point, pilots=pilots)
    slope = _scaled(slope, jnp.asarray(probe.gradient_scale))
    trees = tuple(_times(slope, gradient) for gradient in around.gradients)
    constants = []
    for known in around.sets.values():
        constant = known.offset if around.point == "params" else known.base
        if around.shared is not None:
            still = zero_gradient_update(tx, params, state)
            beyond = jax.tree.map(jnp.subtract, around.shared, still)
            constant += total(fetch(_dots(known.gradient, beyond)))
        constants.append(constant)
    facts = {name: (known.loss_before, known.offset) for name, known in around.sets.items()}
    responses = dict.fromkeys(facts, Response())

    def make(one: Candidate, loss: float, slopes: Sequence[float]) -> Score:
        sets = {
            name: Measured(
                influence=offset + responses[name](constant - slope - offset),
                loss_before=before,
                offset=offset,
            )
            for (name, (before, offset)), constant, slope in zip(
                facts.items(), constants, slopes, strict=True
            )
        }
        return measured_score(one, loss, sets, "linearized")

    def packed(candidates: Sequence[Candidate]) -> list[Score]:
        loss = cast(Batched, probe.candidate_loss)
        usable = [i for i, one in enumerate(candidates) if one.data is not None]
        scores = {
            i: unmeasured(one, "linearized") for i, one in enumerate(candidates) if one.data is None
        }
        parts, ways = candidate_devices(probe.mesh), reference_ways(probe.mesh)
        data = [candidates[i].data for i in usable]
        for batch, members in loss.together(data, parts, ways):
            found = fetch(packed_slopes(loss, probe.params, trees, batch, probe.mesh))
            values, slopes = jax.tree.map(lambda leaf: leaf.sum(axis=0), found)
            for place, member in enumerate(members):
                one = candidates[usable[member]]
                loss_of_one, *own = (float(part[place]) for part in (values, *slopes))
                if len(members) > 1 and not all(map(math.isfinite, (loss_of_one, *own))):
                    # Neighbours in a row have attention 0 to each other, and 0 x NaN is NaN.
                    [scores[usable[member]]] = packed([one])
                else:
                    scores[usable[member]] = make(one, loss_of_one, own)
        return [scores[i] for i in range(len(candidates))]

    def stacked(members: Sequence[Candidate], data: Any, filled: np.ndarray) -> list[Score]:
        values, slopes = fetch(
            stacked_slopes(
                as_argument(probe.candidate_loss), probe.params, trees, data, filled, probe.mesh
            )
        )
        places = [divmod(place, probe.block) for place in range(len(members))]
        return [
            make(one, float(values[at]), [float(s[at]) for s in slopes])
            for one, at in zip(members, places, strict=True)
        ]

    scorer: Scorer = packed
    if not isinstance(probe.candidate_loss, Batched):
        scorer = partial(
            score_in_blocks,
            score=stacked,
            block=probe.block,
            blocks=probe.blocks,
            method="linearized",
        )
    if len(chosen) >= FEWEST:
        linear, true = scorer(chosen), first_order_around(probe, around)(chosen)
        for name, (_, offset) in facts.items():
            x, y = (np.array([one.on(name) for one in rows], float) for rows in (linear, true))
            responses[name] = fit_response(x - offset, y - offset)
    return scorer
