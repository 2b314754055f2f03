"""A random part of the scores measured again by the definition, and how well they agree."""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import optax

from montessori_jax.config import InfluenceConfig
from montessori_jax.data.chat import EncodedChat
from montessori_jax.influence.agreement import Agreement, agreement
from montessori_jax.influence.chats import MeanLoss, TokenLosses, chat_candidate
from montessori_jax.influence.local import local_influence
from montessori_jax.influence.scores import Score
from montessori_jax.influence.scoring import lanes, reference_for
from montessori_jax.models import Model, Params


@dataclass(frozen=True)
class Audited:
    """One score and what it is in truth, in nats."""

    id: str
    estimate: float
    truth: float


@dataclass(frozen=True)
class Audit:
    """Scores held to ``exact`` in float32: how many, their agreement, and each of them."""

    method: str
    agreement: Agreement
    scores: tuple[Audited, ...]

    @property
    def count(self) -> int:
        return len(self.scores)

    def as_row(self) -> dict[str, Any]:
        """Nested JSON-able values."""
        return asdict(self)


def choose(scores: Sequence[Score], count: int, seed: int) -> list[int]:
    """A random set of scored candidates, in order; the same for the same scores and seed."""
    scored = [index for index, score in enumerate(scores) if score.influence is not None]
    order = np.random.Generator(np.random.Philox(key=[seed, len(scored)])).permutation(len(scored))
    return sorted(scored[place] for place in order[:count])


def audit_scores(
    model: Model,
    params: Params,
    opt_state: optax.OptState,
    tx: optax.GradientTransformation,
    chats: Sequence[EncodedChat],
    reference_chats: Sequence[EncodedChat],
    settings: InfluenceConfig,
    scores: Sequence[Score],
    *,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
    baseline: float = 0.0,
) -> Audit | None:
    """Measure ``settings.audit`` of the scores again with ``exact`` in float32 and compare.

    Args:
        model: the student's decoder; this and what follows as given to `score_candidates`.
        params: its parameters.
        opt_state: the optimizer's state.
        tx: the probe step.
        chats: the candidates.
        reference_chats: the reference set.
        settings: how the scores were made; ``audit`` says how many to measure again.
        scores: its result, one a chat.
        seed: chooses which scores are audited.
        groups: each candidate's prompt, to compare preference pairs too.
        baseline: what signs and pairs are relative to (`agreement`).

    Returns:
        The audit; None where ``settings.audit`` is 0 or no candidate has a score.
    """
    if len(scores) != len(chats):
        raise ValueError(f"{len(scores)} scores for {len(chats)} candidates")
    chosen = choose(scores, settings.audit, seed)
    if not chosen:
        return None
    settings = replace(settings, method="exact", dtype="float32")
    reference = reference_for(model, reference_chats, settings)
    candidates = [
        chat_candidate(scores[index].id, chats[index], settings.max_length, coarse=True)
        for index in chosen
    ]
    block = settings.block or lanes(model, params, candidates, reference)
    truth = local_influence(
        MeanLoss(TokenLosses(model)),
        params,
        opt_state,
        tx,
        candidates,
        reference,
        method="exact",
        chunk=len(candidates),
        block=min(block, len(candidates)),
        gradient_scale=settings.gradient_scale,
        offset=False,
    )
    compared = [
        (index, Audited(found.id, estimate, found.influence))
        for index, found in zip(chosen, truth, strict=True)
        if (estimate := scores[index].influence) is not None and found.influence is not None
    ]
    if not compared:
        return None
    rows = tuple(row for _, row in compared)
    return Audit(
        method=scores[compared[0][0]].method,
        agreement=agreement(
            [row.truth for row in rows],
            [row.estimate for row in rows],
            None if groups is None else [groups[index] for index, _ in compared],
            baseline=baseline,
        ),
        scores=rows,
    )
