"""The definition: one optimizer step on the candidate, the reference loss before minus after."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from montessori_jax.influence.blocks import map_blocks, score_in_blocks, shape_key
from montessori_jax.influence.reference import (
    BatchLosses,
    Reference,
    batch_by_batch,
    require_finite,
)
from montessori_jax.influence.scores import Candidate, Score, Scorer, measured_score
from montessori_jax.influence.step import CandidateLoss, Params, candidate_update
from montessori_jax.pytrees import as_pytree

# What a probe does before it measures the reference loss.
STAY, ZERO_GRADIENT, STEP = 0, 1, 2


class Probes(NamedTuple):
    """Results of a program run: leaves ``[blocks, K, ...]``."""

    candidate_loss: Float[Array, "blocks lanes"]
    reference_losses: Float[Array, "blocks lanes passes *tokens"]


@partial(jax.jit, static_argnames=("tx", "gradient_scale"))
def probe(
    candidate_loss: CandidateLoss,
    tx: optax.GradientTransformation,
    reference_losses: BatchLosses,
    params: Params,
    opt_state: optax.OptState,
    batches: Any,
    data: Any,
    mode: Int[Array, "blocks lanes"],
    filled: Bool[Array, " blocks"],
    gradient_scale: float = 1.0,
) -> Probes:
    """Reference token losses after each candidate's step, all in one program.

    ``mode`` chooses what each probe does: stay where it is (the loss before), take the step with
    a zero gradient, or the candidate's step. So before and after differ in their parameters and
    in nothing else, and a step of zero gives exactly zero. Only the new parameters of one block
    are made; params and opt_state are read where they lie.
    """

    def one(inputs: tuple[Any, Array]) -> tuple[Array, Array]:
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
        return loss, batch_by_batch(reference_losses, after, batches)

    return Probes(*map_blocks(one, (data, mode), filled))


def exact(
    candidate_loss: CandidateLoss,
    params: Params,
    opt_state: optax.OptState,
    tx: optax.GradientTransformation,
    reference: Reference,
    *,
    gradient_scale: float = 1.0,
    block: int = 1,
    chunk: int = 16,
    offset: bool = True,
) -> Scorer:
    """A scorer of ``L_ref(theta) - L_ref(theta + Delta)`` (arXiv 2410.14208, section 3.2).

    ``Delta`` is the optimizer's update for the candidate alone, from the warm-up's state. A
    candidate costs its gradient and one forward pass over the reference; each shape of candidate
    costs one more pass for the loss before, and one for ``offset``.

    Args:
        candidate_loss: ``(params, data) -> scalar``, hashable or a pytree.
        params: the student's parameters.
        opt_state: the optimizer's state after the warm-up.
        tx: the optimizer, with the probe step's learning rate.
        reference: the reference set.
        gradient_scale: candidate gradients are multiplied by it.
        block: candidates probed side by side; each needs its own copy of the parameters.
        chunk: most candidates a call; longer sequences go through in several program runs.
        offset: also measure the zero-gradient step.
    """
    blocks = -(-chunk // block)
    loss, reference_losses = as_pytree(candidate_loss), as_pytree(reference.losses_of_batch)
    measured: dict[Any, tuple[np.ndarray, float | None]] = {}

    def run(data: Any, mode: int, filled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = probe(
            loss,
            tx,
            reference_losses,
            params,
            opt_state,
            reference.batches,
            data,
            np.full((blocks, block), mode, np.int32),
            filled,
            gradient_scale,
        )
        return np.asarray(found.candidate_loss), np.asarray(found.reference_losses)

    def start(data: Any) -> tuple[np.ndarray, float | None]:
        """Losses before, lane by lane, and the offset: once for each shape of candidate."""
        key = shape_key(data)
        if key not in measured:
            first = np.arange(blocks) == 0
            before = run(data, STAY, first)[1][0]
            require_finite(reference.loss(before[0]))
            shared = None
            if offset:
                after = run(data, ZERO_GRADIENT, first)[1][0]
                shared = reference.difference(before[0], after[0])
            measured[key] = before, shared
        return measured[key]

    def score(members: Sequence[Candidate], data: Any, filled: np.ndarray) -> list[Score]:
        before, shared = start(data)
        losses, after_step = run(data, STEP, filled)
        scores = []
        for place, one in enumerate(members):
            at, lane = divmod(place, block)
            after = after_step[at, lane]
            influence = reference.difference(before[lane], after)
            scores.append(
                measured_score(
                    one,
                    influence,
                    float(losses[at, lane]),
                    loss_before=reference.loss(before[lane]),
                    loss_after=reference.loss(after),
                    offset=shared,
                    method="exact",
                )
            )
        return scores

    return partial(score_in_blocks, score=score, block=block, blocks=blocks, method="exact")
