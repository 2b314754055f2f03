"""One direction made in advance, then a forward pass in forward mode scores a whole batch."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
from montessori_jax.influence.probe import Probe
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
from montessori_jax.pytrees import as_argument

Sensitivity = Literal["secant", "tangent"]
# The prior slope counts as much as this share of one pilot with a gradient of usual size.
PRIOR = 0.1


@runtime_checkable
class Batched(Protocol):
    """A candidate loss that can lay many candidates out together; else they are stacked."""

    def together(self, data: Sequence[Any]) -> Iterable[tuple[Any, list[int]]]:
        """Batches of packed candidates, and which of ``data`` each one's samples are."""

    def each(self, params: Params, packed: Any) -> Float[Array, " samples"]:
        """The loss of every sample of a batch; trailing ones may be fillers."""


class Line(NamedTuple):
    """Sums over pilots for the least-squares line of ``Delta_j`` in ``g_j``, for each weight."""

    pilots: Float[Array, ""]
    mean_gradient: Params
    mean_update: Params
    gradient_square: Params
    product: Params


@partial(
    jax.jit,
    static_argnames=("tx", "gradient_scale", "through_centre"),
    donate_argnames=("line",),
)
def add_pilot(
    candidate_loss: CandidateLoss,
    tx: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    line: Line,
    data: Any,
    gradient_scale: float,
    through_centre: bool,
) -> Line:
    """Add one pilot: running means and centred products (Welford 1962), stable in float32.

    With ``through_centre`` the means stay as they are: the line goes through the centre's point.
    A pilot that is not finite is left out.
    """
    _, gradient = scaled_gradient(candidate_loss, params, data, gradient_scale)
    updates = apply_optimizer(tx, gradient, opt_state, params)
    fine = all_finite(gradient) & all_finite(updates)
    count = line.pilots + 1

    def towards(mean: Array, value: Array) -> Array:
        return mean if through_centre else mean + (value - mean) / count.astype(mean.dtype)

    gradient_mean = jax.tree.map(towards, line.mean_gradient, gradient)
    update_mean = jax.tree.map(towards, line.mean_update, updates)

    def add(total: Array, g: Array, old: Array, value: Array, mean: Array) -> Array:
        return total + (g - old) * (value - mean)

    new = Line(
        count,
        gradient_mean,
        update_mean,
        jax.tree.map(
            add, line.gradient_square, gradient, line.mean_gradient, gradient, gradient_mean
        ),
        jax.tree.map(add, line.product, gradient, line.mean_gradient, updates, update_mean),
    )
    return jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, line)


@partial(jax.jit, static_argnames=("tx",))
def secant_slope(
    tx: optax.GradientTransformation, params: Params, opt_state: optax.OptState, line: Line
) -> Params:
    """``b_j``: the least-squares slope, with a little weight on a prior slope.

    The prior is the optimizer's own secant between ``+h`` and ``-h``, with ``h`` the pilots' usual
    gradient in that leaf: what counts for weights that no pilot moves (rows of the embedding).
    """

    def usual(square: Array) -> Array:
        moved = square > 0
        share = jnp.maximum(jnp.sum(moved), 1).astype(square.dtype)
        size = jnp.sum(square) / share / jnp.maximum(line.pilots, 1).astype(square.dtype)
        return jnp.sqrt(jnp.maximum(size, jnp.finfo(square.dtype).tiny))

    sizes = jax.tree.map(usual, line.gradient_square)

    def probe(sign: int) -> Params:
        gradient = jax.tree.map(
            lambda p, h: jnp.full(p.shape, sign, p.dtype) * h.astype(p.dtype), params, sizes
        )
        return apply_optimizer(tx, gradient, opt_state, params)

    def slope(square: Array, product: Array, high: Array, low: Array, h: Array) -> Array:
        weight = jnp.asarray(PRIOR, square.dtype) * h * h
        prior = (high - low) / (2 * h)
        return (product + weight * prior) / (square + weight)

    return jax.tree.map(slope, line.gradient_square, line.product, probe(1), probe(-1), sizes)


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


@jax.jit
def packed_slopes(
    candidate_loss: Batched, params: Params, directions: tuple[Params, ...], packed: Any
) -> tuple[Array, tuple[Array, ...]]:
    """Losses of the samples of a packed batch and their derivatives, ``[samples]`` each."""
    return along(lambda p: candidate_loss.each(p, packed), params, directions)


@jax.jit
def stacked_slopes(
    candidate_loss: CandidateLoss,
    params: Params,
    directions: tuple[Params, ...],
    data: Any,
    filled: Bool[Array, " blocks"],
) -> tuple[Array, tuple[Array, ...]]:
    """The same for candidates of one shape, ``[blocks, K]`` each."""

    def one(data: Any) -> tuple[Array, tuple[Array, ...]]:
        return along(lambda p: candidate_loss(p, data), params, directions)

    return map_blocks(one, data, filled)


def fit_line(probe: Probe, pilots: int, through_centre: bool) -> Line:
    """`Line` over the pilots: through the zero-gradient step's point, or through their means."""
    params = probe.params
    zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(4)]
    if through_centre:
        zeros[1] = zero_gradient_update(probe.tx, params, probe.opt_state)
    line = Line(jnp.zeros(()), *zeros)
    for one in probe.pilots(pilots):
        line = add_pilot(
            as_argument(probe.candidate_loss),
            probe.tx,
            params,
            probe.opt_state,
            line,
            one.data,
            probe.gradient_scale,
            through_centre,
        )
    return line


def linearized(
    probe: Probe,
    *,
    sensitivity: Sensitivity = "secant",
    expansion_point: ExpansionPoint = "mean_update",
    pilots: int = PILOTS,
) -> Scorer:
    """A scorer of ``[L_ref(theta) - L_ref(theta_c)] - d . (grad loss(z) - g_c)``.

    The optimizer is made linear, weight by weight: ``Delta_j(g) = Delta_c_j + b_j (g_j - g_c_j)``.
    So ``G_ref(theta_c) . (Delta - Delta_c) = d . (g - g_c)`` with one direction
    ``d = b * G_ref(theta_c)``, and ``d . g`` of every candidate of a packed batch is one forward
    pass in forward mode (`jax.jvp` of the samples' losses along ``d``): no gradient of a candidate
    exists. About ``4NT`` a candidate in batches of any number, with the activations of a forward
    pass and ``2N`` memory; once, the reference gradient and a gradient for each pilot.

    - ``secant``: ``b`` is fitted by least squares on the pilots' actual gradients and updates:
      through their means (``mean_update``), or through the zero-gradient step. Works for
      any optax transformation that acts weight by weight; SGD's ``b`` is ``-lr`` to rounding, and
      the score is that of `first_order`.
    - ``tangent`` (around the zero-gradient step, never the mean update): ``b = d Delta / d g`` at
      ``g = 0``; for AdamW ``-lr (1 - b1) / (1 - b1^t) / (sqrt(v_hat) + eps)``. No pilots, but far
      too steep where the second moment is near zero.

    Clipping by global norm is no function of one weight: the secant holds its mean effect on the
    pilots, so long and short candidates are off by the ratio of their factors, and the tangent
    leaves it out (a zero gradient is not clipped). Forward mode needs losses with JVP rules.

    Args:
        probe: the student, its optimizer and the reference sets.
        sensitivity: how the optimizer is made linear.
        expansion_point: the centre (`first_order`); ``params`` uses ``-G . Delta_0`` for the
            shared step.
        pilots: how many candidates of the pool the secant is fitted on.

    Raises:
        UserError: a reference loss is not finite, there is no pilot, or the sensitivity is not
            finite.
    """
    if sensitivity == "tangent" and expansion_point == "mean_update":
        expansion_point = "zero_gradient"
    tx, params, state = probe.tx, probe.params, probe.opt_state
    scale = jnp.asarray(probe.gradient_scale)
    centred = expansion_point == "mean_update"
    line = None
    if sensitivity == "secant":
        line = fit_line(probe, pilots, through_centre=not centred)
        slope = secant_slope(tx, params, state, line)
    else:
        slope = tangent_slope(tx, params, state)
    if not bool(all_finite(slope)):
        raise UserError(
            "the optimizer's sensitivity is not finite: its second moments may be zero; use the "
            "secant, or warm the student up"
        )
    shared = line.mean_update if line is not None and centred else None
    around = expand(probe, expansion_point, pilots=pilots, shared=shared)
    slope = _scaled(slope, scale)
    trees = tuple(_times(slope, gradient) for gradient in around.gradients)
    at_params = around.point == "params"
    bases = [one.offset if at_params else one.base for one in around.sets.values()]
    if line is not None and centred:
        # The line goes through the pilots' mean gradient, not through zero.
        means = _scaled(line.mean_gradient, 1 / scale)
        shifts = [total(jax.device_get(_dots(tree, means))) for tree in trees]
        bases = [base + shift for base, shift in zip(bases, shifts, strict=True)]
    constants = tuple(bases)
    facts = {name: (known.loss_before, known.offset) for name, known in around.sets.items()}
    del around, slope, line, shared  # only the directions are needed from here on

    def make(one: Candidate, loss: float, slopes: Sequence[float]) -> Score:
        sets = {
            name: Measured(influence=constant - slope, loss_before=before, offset=offset)
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
        for batch, members in loss.together([candidates[i].data for i in usable]):
            values, slopes = jax.device_get(packed_slopes(loss, probe.params, trees, batch))
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
        values, slopes = jax.device_get(
            stacked_slopes(as_argument(probe.candidate_loss), probe.params, trees, data, filled)
        )
        places = [divmod(place, probe.block) for place in range(len(members))]
        return [
            make(one, float(values[at]), [float(s[at]) for s in slopes])
            for one, at in zip(members, places, strict=True)
        ]

    if isinstance(probe.candidate_loss, Batched):
        return packed
    return partial(
        score_in_blocks, score=stacked, block=probe.block, blocks=probe.blocks, method="linearized"
    )
