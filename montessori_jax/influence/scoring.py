"""Candidates scored on a student as settings say: what the stage and the command line call."""

import logging
from collections.abc import Container, Sequence
from typing import Any

import jax
import numpy as np
import optax

from montessori_jax.config import InfluenceConfig
from montessori_jax.data.chat import EncodedChat
from montessori_jax.influence.chats import (
    KEPT_ACTIVATIONS,
    MeanLoss,
    TokenLosses,
    chat_candidate,
    chat_reference,
)
from montessori_jax.influence.local import OnChunk, local_influence
from montessori_jax.influence.memory import activation_bytes, block_size
from montessori_jax.influence.noise import noise_floor
from montessori_jax.influence.reference import Reference
from montessori_jax.influence.scores import Candidate, Score
from montessori_jax.influence.step import candidate_update
from montessori_jax.models import Model, Params

log = logging.getLogger(__name__)


def score_candidates(
    model: Model,
    params: Params,
    opt_state: optax.OptState,
    tx: optax.GradientTransformation,
    chats: Sequence[EncodedChat],
    reference_chats: Sequence[EncodedChat],
    settings: InfluenceConfig,
    *,
    ids: Sequence[str] | None = None,
    finished: Container[int] = (),
    on_chunk: OnChunk | None = None,
) -> list[Score]:
    """Local data influence of chats on a student, chunk by chunk, as ``settings`` say.

    Args:
        model: the student's decoder.
        params: its float32 parameters after the warm-up.
        opt_state: the optimizer's state after the warm-up, of ``tx``'s structure.
        tx: the probe step (`montessori_jax.training.optimizer.probe_optimizer`), which carries
            the learning rate.
        chats: the candidates.
        reference_chats: the reference set.
        settings: method, reduction, precision, block and chunk.
        ids: one a candidate; by default its number.
        finished: numbers of chunks of ``settings.chunk`` candidates that are done already. The
            others get the scores that they would have had.
        on_chunk: called with each chunk's number and scores as they are made.

    Returns:
        The scores made in this call, in order. A candidate that cannot be measured has influence
        None and a reason.

    Raises:
        UserError: no reference sample has response tokens, or the reference loss is not finite.
    """
    reference = reference_for(model, reference_chats, settings)
    loss = MeanLoss(TokenLosses(model, settings.dtype))
    names = [str(index) for index in range(len(chats))] if ids is None else ids
    candidates = [
        chat_candidate(name, chat, settings.max_length, coarse=settings.method == "exact")
        for name, chat in zip(names, chats, strict=True)
    ]
    options: dict[str, Any] = {"gradient_scale": settings.gradient_scale}
    if settings.method == "first_order":
        options["expansion_point"] = settings.expansion_point
    scores = local_influence(
        loss,
        params,
        opt_state,
        tx,
        candidates,
        reference,
        method=settings.method,
        chunk=settings.chunk,
        block=min(settings.block or lanes(model, params, candidates, reference), settings.chunk),
        finished=finished,
        on_chunk=on_chunk,
        **options,
    )
    usable = [one for one in candidates if one.data is not None]
    if settings.method == "exact" and settings.dtype == "bfloat16" and usable and scores:
        step = jax.jit(candidate_update, static_argnums=1)
        _, updates = step(loss, tx, params, opt_state, usable[0].data)
        report_noise(noise_floor(reference, params, updates), scores)
    return scores


def reference_for(
    model: Model, chats: Sequence[EncodedChat], settings: InfluenceConfig
) -> Reference:
    """The reference set as ``settings`` want it.

    Losses that are subtracted are computed in float32, except by ``exact`` in bf16, which then
    measures what it says; gradients are computed in ``settings.dtype``.
    """
    return chat_reference(
        model,
        chats,
        reduction=settings.reference_reduction,
        max_length=settings.max_length,
        row_length=settings.row_length,
        rows_per_pass=settings.rows_per_pass,
        dtype=settings.dtype if settings.method == "exact" else "float32",
        gradient_dtype=settings.dtype,
    )


def lanes(
    model: Model, params: Params, candidates: Sequence[Candidate], reference: Reference
) -> int:
    """`block_size` for the largest of what a lane runs, a candidate or a reference batch."""
    shapes = {one.data.tokens.shape for one in candidates if one.data is not None}
    shapes.add(reference.batches.tokens.shape[1:])
    needed = max(activation_bytes(model.config, *shape) for shape in shapes)
    return block_size(params, min(needed, KEPT_ACTIVATIONS))


def report_noise(floor: float, scores: Sequence[Score]) -> None:
    """Log the noise floor of the differences, and warn where the scores hardly rise above it."""
    found = [score.influence for score in scores if score.influence is not None]
    spread = float(np.std(found)) if found else 0.0
    log.info("noise floor %.2e nats, spread of the scores %.2e", floor, spread)
    if spread < 3 * floor:
        log.warning(
            "exact influence in bfloat16 is mostly rounding here: its noise floor is %.1e nats, "
            "the spread of the scores %.1e; use float32, or first_order",
            floor,
            spread,
        )
