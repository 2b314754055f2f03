"""One reference gradient, dotted with each candidate's actual optimizer update."""

from collections.abc import Mapping, Sequence
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
    Expansion,
    ExpansionPoint,
    dot_by_leaf,
    expand,
    from_centre,
    total,
)
from montessori_jax.influence.probe import Probe
from montessori_jax.influence.scores import Candidate, Measured, Score, Scorer, measured_score
from montessori_jax.influence.step import CandidateLoss, Params, candidate_update
from montessori_jax.mesh import fetch
from montessori_jax.pytrees import as_argument


class Products(NamedTuple):
    """Results of a program run: leaves ``[blocks, K]``; a product a set and parameter leaf."""

    candidate_loss: Float[Array, "blocks lanes"]
    own: tuple[list[Float[Array, "blocks lanes"]], ...]


@partial(jax.jit, static_argnames=("tx", "point", "gradient_scale", "mesh"))
def products(
    candidate_loss: CandidateLoss,
    tx: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    gradients: tuple[Params, ...],
    point: ExpansionPoint,
    shared: Params | None,
    data: Any,
    filled: Bool[Array, " blocks"],
    gradient_scale: float = 1.0,
    mesh: Mesh | None = None,
) -> Products:
    """``G_ref . (Delta - Delta_c)`` of each candidate, set by set and leaf by leaf.

    Gradient, update and product are one program: the update of a leaf is used up as it is made.
    """

    def one(given: Any, data: Any) -> tuple[Array, tuple[list[Array], ...]]:
        candidate_loss, params, opt_state, gradients, shared = given
        loss, updates = candidate_update(
            candidate_loss, tx, params, opt_state, data, gradient_scale=gradient_scale
        )
        own = from_centre(updates, point, shared, tx, params, opt_state)
        return loss, tuple(dot_by_leaf(gradient, own) for gradient in gradients)

    given = (candidate_loss, params, opt_state, gradients, shared)
    return Products(*map_blocks(one, given, data, filled, mesh))


def first_order(
    probe: Probe, *, expansion_point: ExpansionPoint = "zero_gradient", pilots: int = PILOTS
) -> Scorer:
    """A scorer of ``[L_ref(theta) - L_ref(theta_c)] - G_ref(theta_c) . (Delta - Delta_c)``.

    ``Delta`` is the optimizer's actual update for the candidate and nothing of the optimizer is
    linearised. The centre ``theta_c = theta + Delta_c`` is

    - ``zero_gradient``: ``Delta_c`` is the update for a zero gradient: the step that momentum makes
      whatever the candidate is measured and not estimated;
    - ``mean_update``: the mean of the pilots' updates, so that what all candidates' own steps
      share is measured too;
    - ``params``: ``theta`` itself, and the influence ``-G_ref(theta) . Delta``.

    A score's ``offset`` is the influence of the zero-gradient step; it is measured, except with
    ``params``. A candidate costs its gradient and one pass over the parameters, ``6NT + O(N)``;
    the reference gradient (6NR) is taken once, here, and held beside params and opt_state.
    First-order Taylor; the update's form is that of arXiv 2402.04333, its state that of 2410.14208.

    Args:
        probe: the student, its optimizer and the reference sets.
        expansion_point: where the reference gradient is taken.
        pilots: candidates of the pool whose updates ``mean_update`` averages.

    Raises:
        UserError: a reference loss is not finite, or ``mean_update`` has no pilot.
    """
    return first_order_around(probe, expand(probe, expansion_point, pilots=pilots))


def first_order_around(probe: Probe, around: Expansion) -> Scorer:
    """The scorer of `first_order` where the reference is expanded already."""
    return partial(
        score_in_blocks,
        score=partial(score_to_first_order, probe, around),
        block=probe.block,
        blocks=probe.blocks,
        method="first_order",
    )


def score_to_first_order(
    probe: Probe,
    around: Expansion,
    members: Sequence[Candidate],
    data: Any,
    filled: np.ndarray,
    *,
    method: str = "first_order",
    errors: Mapping[str, float] | None = None,
) -> list[Score]:
    """Scores of stacked candidates, as `score_in_blocks` asks for them.

    ``method`` is what they are called, ``errors`` a standard error for each reference set, for
    estimators that begin with this one.
    """
    found = fetch(
        products(
            as_argument(probe.candidate_loss),
            probe.tx,
            probe.params,
            probe.opt_state,
            around.gradients,
            around.point,
            around.shared,
            data,
            filled,
            probe.gradient_scale,
            probe.mesh,
        )
    )
    scores = []
    for place, one in enumerate(members):
        at = divmod(place, probe.block)
        sets = {
            name: Measured(
                influence=known.base - total([part[at] for part in own]),
                loss_before=known.loss_before,
                offset=known.offset,
                standard_error=(errors or {}).get(name),
            )
            for (name, known), own in zip(around.sets.items(), found.own, strict=True)
        }
        scores.append(measured_score(one, float(found.candidate_loss[at]), sets, method))
    return scores
