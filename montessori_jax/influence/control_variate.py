"""First order on the whole reference, corrected by the definition on a random part of it."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from montessori_jax.influence.blocks import (
    map_blocks,
    score_in_blocks,
    shape_key,
    stack_blocks,
)
from montessori_jax.influence.expansion import (
    PILOTS,
    ExpansionPoint,
    centre_of,
    dot_by_leaf,
    expand,
    from_centre,
    total,
)
from montessori_jax.influence.first_order import score_to_first_order
from montessori_jax.influence.probe import Probe
from montessori_jax.influence.reference import BatchLosses, Reference, batch_by_batch
from montessori_jax.influence.scores import Candidate, Measured, Score, Scorer, measured_score
from montessori_jax.influence.step import CandidateLoss, Params, candidate_update
from montessori_jax.mesh import fetch
from montessori_jax.pytrees import as_argument

Refine = Literal["none", "sign"]
SMALLEST_PART = 4
REFINE_PILOTS = 8


class Corrected(NamedTuple):
    """Results of a program run: leaves ``[blocks, K, ...]``, set by set."""

    candidate_loss: Float[Array, "blocks lanes"]
    own: tuple[list[Float[Array, "blocks lanes"]], ...]
    losses: tuple[Float[Array, "blocks lanes passes *tokens"], ...]
    tangents: tuple[Float[Array, "blocks lanes passes *tokens"], ...]


@partial(jax.jit, static_argnames=("tx", "point", "gradient_scale", "mesh"))
def corrected(
    candidate_loss: CandidateLoss,
    tx: optax.GradientTransformation,
    losses: tuple[BatchLosses, ...],
    params: Params,
    opt_state: optax.OptState,
    centre: Params,
    gradients: tuple[Params, ...],
    batches: tuple[Any, ...],
    point: ExpansionPoint,
    shared: Params | None,
    data: Any,
    step: Bool[Array, "blocks lanes"],
    filled: Bool[Array, " blocks"],
    gradient_scale: float = 1.0,
    mesh: Mesh | None = None,
) -> Corrected:
    """First order's products, the part's token losses after the step and their derivative.

    Where ``step`` is False the losses are those at the centre, by the same program: with the
    derivative along ``delta`` taken there, everything that is subtracted is paired.
    """

    def one(given: Any, inputs: tuple[Any, Array]) -> tuple[Any, ...]:
        candidate_loss, losses, params, opt_state, centre, gradients, batches, shared = given
        data, step = inputs
        loss, updates = candidate_update(
            candidate_loss, tx, params, opt_state, data, gradient_scale=gradient_scale
        )
        own = from_centre(updates, point, shared, tx, params, opt_state)
        after = jax.tree.map(
            lambda p, u, c: jnp.where(step, p + u.astype(p.dtype), c), params, updates, centre
        )
        found, tangents = [], []
        for part_losses, part in zip(losses, batches, strict=True):
            found.append(batch_by_batch(part_losses, after, part))
            along = partial(batch_by_batch, part_losses, batches=part)
            tangents.append(jax.jvp(along, (centre,), (own,))[1])
        return loss, tuple(dot_by_leaf(g, own) for g in gradients), tuple(found), tuple(tangents)

    given = (candidate_loss, losses, params, opt_state, centre, gradients, batches, shared)
    return Corrected(*map_blocks(one, given, (data, step), filled, mesh))


def part_of(count: int, size: int, seed: int) -> Int[np.ndarray, " part"]:
    """A random part of samples ``0..count-1`` without replacement, in order."""
    draw = np.random.Generator(np.random.Philox(key=[seed, count]))
    return np.sort(draw.permutation(count)[:size])


def difference_estimate(
    residuals: Float[np.ndarray, " part"], count: int
) -> tuple[float, float | None]:
    """A total over ``count`` samples from ``n`` drawn without replacement, and its error.

    ``count / n sum_s r_s`` with the standard error ``count sqrt((1 - n / count) / n) sd(r)``: the
    difference estimator of survey sampling with the finite-population correction (Cochran,
    Sampling Techniques, sections 2.6 and 7.2). 0 where all are drawn, None where n is 1. It has
    ``n - 1`` degrees of freedom: for small parts an interval takes Student's t.
    """
    n = len(residuals)
    estimate = count / n * float(residuals.sum())
    if n == count:
        return estimate, 0.0
    if n == 1:
        return estimate, None
    spread = float(residuals.std(ddof=1))
    return estimate, count * math.sqrt((1 - n / count) / n) * spread


def control_variate(
    probe: Probe,
    *,
    fraction: float = 0.125,
    count: int | None = None,
    seed: int = 0,
    refine: Refine = "none",
    z: float = 2.0,
    expansion_point: ExpansionPoint = "zero_gradient",
    pilots: int = PILOTS,
) -> Scorer:
    """A scorer of ``first_order + S / n sum over a part of (exact - first_order)``.

    The part is ``n`` of the ``S`` reference samples, drawn once by ``seed`` and the same for all
    candidates. Each of its samples gives a residual: its own exact difference minus its own
    first-order one, ``l_s(theta_c) - l_s(theta + Delta) + grad l_s(theta_c) . delta``, the last
    term by forward mode. Their mean corrects the score and their spread is its ``standard_error``
    (`difference_estimate`). The correction removes first order's bias; what is left is sampling
    noise as small as the residuals are alike.

    With ``refine="sign"`` the part is measured only where the sign is in doubt: where
    ``|first order| < z e``, with ``e`` the root mean square of the correction over a few pilots.
    The others keep their first-order score, with ``e`` for its error.

    Cost a candidate: ``6NT + ~6NRn/S``. Control variates: Owen, Monte Carlo theory, section 8.9.

    Args:
        probe: the student, its optimizer and the reference sets.
        fraction: the part's share of the reference samples; at least 4 samples are drawn.
        count: the part's size in samples instead.
        seed: draws the part.
        refine: whether every score is corrected.
        z: how many errors from zero leave no doubt.
        expansion_point: the centre of `first_order`.
        pilots: candidates of the pool whose updates ``mean_update`` averages.

    Raises:
        UserError: a reference loss is not finite, or pilots are wanted and there are none.
    """
    around = expand(probe, expansion_point, pilots=pilots)
    centre = centre_of(around, probe)
    parts: list[Reference] = []
    sizes: list[int] = []
    for reference in probe.references.values():
        size = count or max(SMALLEST_PART, math.ceil(fraction * reference.count))
        chosen = part_of(reference.count, min(size, reference.count), seed)
        parts.append(reference.part(chosen.tolist()))
        sizes.append(reference.count)
    at_centre: dict[Any, list[np.ndarray]] = {}

    def run(data: Any, step: bool, filled: np.ndarray) -> Corrected:
        return fetch(
            corrected(
                as_argument(probe.candidate_loss),
                probe.tx,
                tuple(as_argument(one.losses_of_batch) for one in parts),
                probe.params,
                probe.opt_state,
                centre,
                around.gradients,
                tuple(one.batches for one in parts),
                around.point,
                around.shared,
                data,
                np.full((probe.blocks, probe.block), step),
                filled,
                probe.gradient_scale,
                probe.mesh,
            )
        )

    def correct(members: Sequence[Candidate], data: Any, filled: np.ndarray) -> list[Score]:
        key = shape_key(data)
        if key not in at_centre:
            found = run(data, False, np.arange(probe.blocks) == 0)
            at_centre[key] = [np.asarray(losses)[0] for losses in found.losses]
        found = run(data, True, filled)
        scores = []
        for place, one in enumerate(members):
            at = divmod(place, probe.block)
            sets = {}
            for i, (name, known) in enumerate(around.sets.items()):
                before, after = at_centre[key][i][at[1]], found.losses[i][at]
                residuals = parts[i].by_sample(
                    before.astype(np.float64) - after + found.tangents[i][at]
                )
                correction, error = difference_estimate(residuals, sizes[i])
                estimate = known.base - total([part[at] for part in found.own[i]])
                sets[name] = Measured(
                    influence=estimate + correction,
                    loss_before=known.loss_before,
                    offset=known.offset,
                    standard_error=error,
                )
            loss = float(found.candidate_loss[at])
            scores.append(measured_score(one, loss, sets, "control_variate"))
        return scores

    errors: dict[str, float] = {}
    first = partial(score_to_first_order, probe, around, method="control_variate", errors=errors)

    def in_doubt(score: Score) -> bool:
        found = score.sets or {next(iter(around.sets)): {"influence": score.influence}}
        return any(
            (value := one["influence"]) is not None and abs(value) < z * errors[name]
            for name, one in found.items()
        )

    def refined(members: Sequence[Candidate], data: Any, filled: np.ndarray) -> list[Score]:
        scores = first(members, data, filled)
        doubted = [place for place, one in enumerate(scores) if in_doubt(one)]
        if doubted:
            ones = [members[place] for place in doubted]
            again = stack_blocks([one.data for one in ones], probe.block, probe.blocks)
            for place, score in zip(doubted, correct(ones, *again), strict=True):
                scores[place] = score
        return scores

    def in_blocks(score: Any) -> Scorer:
        return partial(
            score_in_blocks,
            score=score,
            block=probe.block,
            blocks=probe.blocks,
            method="control_variate",
        )

    if refine == "none":
        return in_blocks(correct)
    trial = probe.pilots(REFINE_PILOTS)
    rough, fine = in_blocks(first)(trial), in_blocks(correct)(trial)
    for name in around.sets:
        pairs = [(a.on(name), b.on(name)) for a, b in zip(rough, fine, strict=True)]
        shifts = [b - a for a, b in pairs if a is not None and b is not None]
        errors[name] = float(np.sqrt(np.mean(np.square(shifts)))) if shifts else math.inf
    return in_blocks(refined)
