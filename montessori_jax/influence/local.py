"""Local data influence of many candidates, by any estimator, for any JAX model and optimizer."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import optax
from jax.sharding import Mesh

from montessori_jax.influence.baselines import grad_cos, grad_dot, less
from montessori_jax.influence.control_variate import control_variate
from montessori_jax.influence.exact import exact
from montessori_jax.influence.first_order import first_order
from montessori_jax.influence.linearized import linearized
from montessori_jax.influence.probe import Probe
from montessori_jax.influence.reference import Reference
from montessori_jax.influence.scores import Candidate, Score, Scorer
from montessori_jax.influence.second_order import second_order
from montessori_jax.influence.step import CandidateLoss, Params
from montessori_jax.mesh import mesh_of, use_mesh

T = TypeVar("T")

# An estimator is a function of a `Probe` that returns a `Scorer`, and one line here.
METHODS: dict[str, Callable[..., Scorer]] = {
    "exact": exact,
    "first_order": first_order,
    "control_variate": control_variate,
    "linearized": linearized,
    "second_order": second_order,
    "grad_dot": grad_dot,
    "grad_cos": grad_cos,
    "less": less,
}

OnChunk = Callable[[int, Sequence[Score]], None]


def local_influence(
    candidate_loss: CandidateLoss,
    params: Params,
    opt_state: optax.OptState,
    tx: optax.GradientTransformation,
    candidates: Iterable[Candidate],
    reference: Reference | Mapping[str, Reference],
    *,
    method: str = "exact",
    gradient_scale: float = 1.0,
    chunk: int = 16,
    block: int = 1,
    pool: Sequence[Candidate] | None = None,
    mesh: Mesh | None = None,
    finished: Container[int] = (),
    on_chunk: OnChunk | None = None,
    **options: Any,
) -> list[Score]:
    """Score candidates: how much one optimizer step on each lowers the reference loss.

    ``influence(z) = L_ref(theta) - L_ref(theta + Delta(z))`` with ``Delta(z)`` the update of
    ``tx`` in state ``opt_state`` for the gradient of ``candidate_loss`` on ``z`` (Local data
    influence, arXiv 2410.14208). A score depends on the candidate and, where an estimator fits
    something, on the pool; not on its neighbours, its chunk or the order.

    Args:
        candidate_loss: ``(params, data) -> scalar``; hashable, or a pytree that can be called.
        params: the student's parameters, any pytree of float arrays.
        opt_state: the optimizer's state after the warm-up, of ``tx``'s structure.
        tx: any optax transformation; its learning rate is the probe step's.
        candidates: read ``chunk`` at a time.
        reference: the reference set (`Reference`, `single_batch`), or several by name: they are
            measured in one pass over the candidates, and `Score.sets` holds each one's numbers.
        method: a key of `METHODS`.
        gradient_scale: candidate gradients are multiplied by it; 1/8 is the public code's.
        chunk: candidates between two calls of ``on_chunk``.
        block: candidates side by side on the device (`block_size`).
        pool: candidates that pilots are taken from; by default ``candidates``, where they are a
            sequence.
        mesh: devices that candidates are split over (`make_mesh`), ``block`` on each; by default
            those that ``params`` lie on.
        finished: numbers of chunks that are done already; they are skipped.
        on_chunk: called with each chunk's number and scores, for instance to write them down.
        options: the estimator's own, such as ``expansion_point`` or ``fraction``.

    Returns:
        The scores made in this call, in order.

    Raises:
        UserError: a reference loss is not finite, or pilots are wanted and there are none.
    """
    if pool is None:
        pool = candidates if isinstance(candidates, Sequence) else ()
    references = {"reference": reference} if isinstance(reference, Reference) else reference
    probe = Probe(
        candidate_loss,
        params,
        opt_state,
        tx,
        references,
        gradient_scale=gradient_scale,
        block=block,
        chunk=chunk,
        pool=pool,
    ).on_mesh(mesh or mesh_of(params))
    scorer = build_scorer(method, probe, **options)
    scores: list[Score] = []
    for number, part in enumerate(chunks(candidates, chunk)):
        if number in finished:
            continue
        made = scorer(part)
        scores += made
        if on_chunk is not None:
            on_chunk(number, made)
    return scores


def build_scorer(method: str, probe: Probe, **options: Any) -> Scorer:
    """The scorer of ``method``; it, and what it is made of, is traced for the probe's mesh."""
    with use_mesh(probe.mesh):
        scorer = METHODS[method](probe, **options)

    def score(candidates: Sequence[Candidate]) -> list[Score]:
        with use_mesh(probe.mesh):
            return scorer(candidates)

    return score


def chunks(candidates: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of ``size``, the last one shorter."""
    source = iter(candidates)
    while part := list(islice(source, size)):
        yield part
