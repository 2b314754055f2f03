"""The definition: one optimizer step on the candidate, the reference loss before minus after."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from montessori_jax.influence.blocks import map_blocks, score_in_blocks, shape_key
from montessori_jax.influence.probe import Probe
from montessori_jax.influence.reference import BatchLosses, batch_by_batch, require_finite
from montessori_jax.influence.scores import Candidate, Measured, Score, Scorer, measured_score
from montessori_jax.influence.step import CandidateLoss, Params, candidate_update
from montessori_jax.mesh import fetch
from montessori_jax.pytrees import as_argument

# What a probe does before it measures the reference loss.
STAY, ZERO_GRADIENT, STEP = 0, 1, 2


class Probes(NamedTuple):
    """Results of a program run: leaves ``[blocks, K, ...]``, token losses set by set."""

    candidate_loss: Float[Array, "blocks lanes"]
    reference_losses: tuple[Float[Array, "blocks lanes passes *tokens"], ...]


@partial(jax.jit, static_argnames=("tx", "gradient_scale", "mesh"))
def probe_step(
    candidate_loss: CandidateLoss,
    tx: optax.GradientTransformation,
    reference_losses: tuple[BatchLosses, ...],
    params: Params,
    opt_state: optax.OptState,
    batches: tuple[Any, ...],
    data: Any,
    mode: Int[Array, "blocks lanes"],
    filled: Bool[Array, " blocks"],
    gradient_scale: float = 1.0,
    mesh: Mesh | None = None,
) -> Probes:
    """Reference token losses after each candidate's step, all in one program.

    ``mode`` chooses what each probe does: stay where it is (the loss before), take the step with
    a zero gradient, or the candidate's step. So before and after differ in their parameters and
    in nothing else, and a step of zero gives exactly zero. Only the new parameters of one block
    are made; params and opt_state are read where they lie.
    """

    def one(shared: Any, inputs: tuple[Any, Array]) -> tuple[Array, tuple[Array, ...]]:
        candidate_loss, reference_losses, params, opt_state, batches = shared
        data, mode = inputs
        loss, updates = candidate_update(
            candidate_loss,
            tx,
            params,
            opt_state,
            data,
            gradient_scale=gradient_scale,
            use_gradient=mode == STEP,
        )
        after = jax.tree.map(
            lambda p, u: jnp.where(mode == STAY, p, p + u.astype(p.dtype)), params, updates
        )
        found = (
            batch_by_batch(losses, after, own)
            for losses, own in zip(reference_losses, batches, strict=True)
        )
        return loss, tuple(found)

    shared = (candidate_loss, reference_losses, params, opt_state, batches)
    return Probes(*map_blocks(one, shared, (data, mode), filled, mesh))


def exact(probe: Probe, *, offset: bool = True) -> Scorer:
    """A scorer of ``L_ref(theta) - L_ref(theta + Delta)`` (arXiv 2410.14208, section 3.2).

    ``Delta`` is the optimizer's update for the candidate alone, from the warm-up's state. A
    candidate costs its gradient and one forward pass over the reference, ``6NT + 2NR``; each shape
    of candidate costs one more pass for the loss before, and one for ``offset``. Memory: a copy of
    the parameters and a gradient a lane, and one reference batch.

    Args:
        probe: the student, its optimizer and the reference sets.
        offset: also measure the zero-gradient step.
    """
    references = list(probe.references.values())
    measured: dict[Any, tuple[list[np.ndarray], list[float | None]]] = {}

    def run(data: Any, mode: int, filled: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        found = probe_step(
            as_argument(probe.candidate_loss),
            probe.tx,
            tuple(as_argument(one.losses_of_batch) for one in references),
            probe.params,
            probe.opt_state,
            tuple(one.batches for one in references),
            data,
            np.full((probe.blocks, probe.block), mode, np.int32),
            filled,
            probe.gradient_scale,
            probe.mesh,
        )
        return fetch((found.candidate_loss, found.reference_losses))

    def start(data: Any) -> tuple[list[np.ndarray], list[float | None]]:
        """Losses before, lane by lane, and the offset: once for each shape of candidate."""
        key = shape_key(data)
        if key not in measured:
            first = np.arange(probe.blocks) == 0
            before = [losses[0] for losses in run(data, STAY, first)[1]]
            for reference, losses in zip(references, before, strict=True):
                require_finite(reference.loss(losses[0]))
            shared: list[float | None] = [None] * len(references)
            if offset:
                after = [losses[0, 0] for losses in run(data, ZERO_GRADIENT, first)[1]]
                shared = [
                    reference.difference(old[0], new)
                    for reference, old, new in zip(references, before, after, strict=True)
                ]
            measured[key] = before, shared
        return measured[key]

    def score(members: Sequence[Candidate], data: Any, filled: np.ndarray) -> list[Score]:
        before, shared = start(data)
        candidate_losses, after_step = run(data, STEP, filled)
        scores = []
        for place, one in enumerate(members):
            at, lane = divmod(place, probe.block)
            sets = {
                name: Measured(
                    influence=reference.difference(old[lane], after[at, lane]),
                    loss_before=reference.loss(old[lane]),
                    loss_after=reference.loss(after[at, lane]),
                    offset=still,
                )
                for (name, reference), old, after, still in zip(
                    probe.references.items(), before, after_step, shared, strict=True
                )
            }
            scores.append(measured_score(one, float(candidate_losses[at, lane]), sets, "exact"))
        return scores

    return partial(
        score_in_blocks, score=score, block=probe.block, blocks=probe.blocks, method="exact"
    )
