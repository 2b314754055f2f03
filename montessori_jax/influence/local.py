"""Local data influence of many candidates, by any estimator, for any JAX model and optimizer."""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import optax

from montessori_jax.influence.exact import exact
from montessori_jax.influence.first_order import first_order
from montessori_jax.influence.reference import Reference
from montessori_jax.influence.scores import Candidate, Score, Scorer
from montessori_jax.influence.step import CandidateLoss, Params

# An estimator is a function of the student that returns a `Scorer`, and one line here.
METHODS: dict[str, Callable[..., Scorer]] = {"exact": exact, "first_order": first_order}

OnChunk = Callable[[int, Sequence[Score]], None]


def local_influence(
    candidate_loss: CandidateLoss,
    params: Params,
    opt_state: optax.OptState,
    tx: optax.GradientTransformation,
    candidates: Iterable[Candidate],
    reference: Reference,
    *,
    method: str = "exact",
    chunk: int = 16,
    block: int = 1,
    finished: Container[int] = (),
    on_chunk: OnChunk | None = None,
    **options: Any,
) -> list[Score]:
    """Score candidates: how much one optimizer step on each lowers the reference loss.

    ``influence(z) = L_ref(theta) - L_ref(theta + Delta(z))`` with ``Delta(z)`` the update of
    ``tx`` in state ``opt_state`` for the gradient of ``candidate_loss`` on ``z`` (Local data
    influence, arXiv 2410.14208). A score depends on the candidate alone, not on its neighbours.

    Args:
        candidate_loss: ``(params, data) -> scalar``, hashable or a pytree.
        params: the student's parameters, any pytree of float arrays.
        opt_state: the optimizer's state after the warm-up, of ``tx``'s structure.
        tx: any optax transformation; its learning rate is the probe step's.
        candidates: read ``chunk`` at a time.
        reference: the reference set (`Reference`, `single_batch`).
        method: a key of `METHODS`.
        chunk: candidates between two calls of ``on_chunk``.
        block: candidates side by side on the device (`block_size`).
        finished: numbers of chunks that are done already; they are skipped.
        on_chunk: called with each chunk's number and scores, for instance to write them down.
        options: the estimator's own, such as ``gradient_scale`` or ``expansion_point``.

    Returns:
        The scores made in this call, in order.

    Raises:
        UserError: the reference loss is not finite.
    """
    scorer = METHODS[method](
        candidate_loss,
        params,
        opt_state,
        tx,
        reference,
        chunk=chunk,
        block=block,
        **options,
    )
    scores: list[Score] = []
    for number, part in enumerate(chunks(candidates, chunk)):
        if number in finished:
            continue
        made = scorer(part)
        scores += made
        if on_chunk is not None:
            on_chunk(number, made)
    return scores


def chunks(candidates: Iterable[Candidate], size: int) -> Iterator[list[Candidate]]:
    """Consecutive lists of ``size``, the last one shorter."""
    source = iter(candidates)
    while part := list(islice(source, size)):
        yield part
