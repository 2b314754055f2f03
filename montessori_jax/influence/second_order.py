"""First order and half the curvature along the update: the yardstick of studies."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from montessori_jax.influence.blocks import map_blocks, score_in_blocks
from montessori_jax.influence.expansion import (
    PILOTS,
    ExpansionPoint,
    centre_of,
    dot_by_leaf,
    expand,
    from_centre,
    total,
)
from montessori_jax.influence.probe import Probe
from montessori_jax.influence.reference import BatchLosses, gradient_of
from montessori_jax.influence.scores import Candidate, Measured, Score, Scorer, measured_score
from montessori_jax.influence.step import CandidateLoss, Params, candidate_update
from montessori_jax.mesh import fetch
from montessori_jax.pytrees import as_argument


class Curved(NamedTuple):
    """Results of a program run, as `montessori_jax.influence.first_order.Products`."""

    candidate_loss: Float[Array, "blocks lanes"]
    slope: tuple[list[Float[Array, "blocks lanes"]], ...]
    curvature: tuple[list[Float[Array, "blocks lanes"]], ...]


@partial(jax.jit, static_argnames=("tx", "point", "gradient_scale", "use_gradient", "mesh"))
def curved(
    candidate_loss: CandidateLoss,
    tx: optax.GradientTransformation,
    losses: tuple[BatchLosses, ...],
    params: Params,
    opt_state: optax.OptState,
    centre: Params,
    gradients: tuple[Params, ...],
    batches: tuple[Any, ...],
    weights: tuple[Array, ...],
    point: ExpansionPoint,
    shared: Params | None,
    data: Any,
    filled: Bool[Array, " blocks"],
    gradient_scale: float = 1.0,
    use_gradient: bool = True,
    mesh: Mesh | None = None,
) -> Curved:
    """``G . delta`` and ``delta . H delta`` with ``delta = Delta - Delta_c``, leaf by leaf."""

    def one(given: Any, data: Any) -> Curved:
        candidate_loss, params, opt_state, centre, gradients, shared, reference = given
        loss, updates = candidate_update(
            candidate_loss,
            tx,
            params,
            opt_state,
            data,
            gradient_scale=gradient_scale,
            use_gradient=None if use_gradient else jax.numpy.asarray(False),
        )
        own = from_centre(updates, point, shared, tx, params, opt_state)
        bent = [
            jax.jvp(lambda p, s=sums: gradient_of(s[0], p, s[1], s[2]), (centre,), (own,))[1]
            for sums in zip(*reference, strict=True)
        ]
        return Curved(
            loss,
            tuple(dot_by_leaf(gradient, own) for gradient in gradients),
            tuple(dot_by_leaf(product, own) for product in bent),
        )

    reference = (losses, batches, weights)
    given = (candidate_loss, params, opt_state, centre, gradients, shared, reference)
    return map_blocks(one, given, data, filled, mesh)


def second_order(
    probe: Probe, *, expansion_point: ExpansionPoint = "zero_gradient", pilots: int = PILOTS
) -> Scorer:
    """A scorer of ``L_ref(theta) - L_ref(theta_c) - (G . delta + 1/2 delta . H delta)``.

    ``delta = Delta - Delta_c``, with ``G`` and ``H`` the reference loss's gradient and Hessian at
    ``theta_c`` (`first_order` says which centres there are). The Hessian-vector product is
    forward over reverse (Pearlmutter 1994), one for each candidate: ``6NT + ~10NR`` and the
    activations of a reference batch, more than `exact`. A yardstick for what is left of an
    estimate's error, and nothing to score pools with.

    Args:
        probe: the student, its optimizer and the reference sets.
        expansion_point: the centre.
        pilots: candidates of the pool whose updates ``mean_update`` averages.

    Raises:
        UserError: a reference loss is not finite, or ``mean_update`` has no pilot.
    """
    around = expand(probe, expansion_point, pilots=pilots)
    centre = centre_of(around, probe)
    references = list(probe.references.values())
    offsets: list[float] = []

    def run(data: Any, filled: np.ndarray, use_gradient: bool) -> Curved:
        return fetch(
            curved(
                as_argument(probe.candidate_loss),
                probe.tx,
                tuple(
                    as_argument(one.gradient_losses_of_batch or one.losses_of_batch)
                    for one in references
                ),
                probe.params,
                probe.opt_state,
                centre,
                around.gradients,
                tuple(one.batches for one in references),
                tuple(one.weights for one in references),
                around.point,
                around.shared,
                data,
                filled,
                probe.gradient_scale,
                use_gradient,
                probe.mesh,
            )
        )

    def own_parts(found: Curved, at: tuple[int, int]) -> list[float]:
        return [
            total([part[at] for part in slope]) + total([part[at] for part in bend]) / 2
            for slope, bend in zip(found.slope, found.curvature, strict=True)
        ]

    def score(members: Sequence[Candidate], data: Any, filled: np.ndarray) -> list[Score]:
        if not offsets:
            offsets.extend(known.offset for known in around.sets.values())
            if around.point == "params":
                first = np.arange(probe.blocks) == 0
                offsets[:] = [-part for part in own_parts(run(data, first, False), (0, 0))]
        found = run(data, filled, True)
        scores = []
        for place, one in enumerate(members):
            at = divmod(place, probe.block)
            sets = {
                name: Measured(
                    influence=known.base - own,
                    loss_before=known.loss_before,
                    offset=still,
                )
                for (name, known), own, still in zip(
                    around.sets.items(), own_parts(found, at), offsets, strict=True
                )
            }
            loss = float(found.candidate_loss[at])
            scores.append(measured_score(one, loss, sets, "second_order"))
        return scores

    return partial(
        score_in_blocks, score=score, block=probe.block, blocks=probe.blocks, method="second_order"
    )
