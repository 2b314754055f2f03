"""Candidates scored on a student as settings say: what the stage and the command line call."""

import logging
from collections import Counter
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from montessori_jax import cluster
from montessori_jax.config import InfluenceConfig
from montessori_jax.data.chat import EncodedChat
from montessori_jax.errors import UserError
from montessori_jax.influence.audit import (
    FEWEST,
    Choice,
    Floors,
    ScoreSome,
    audit_count,
    choose_audited,
    choose_method,
)
from montessori_jax.influence.chats import (
    KEPT_ACTIVATIONS,
    ChatCandidates,
    MeanLoss,
    TokenLosses,
    chat_reference,
)
from montessori_jax.influence.costs import costs, ladder
from montessori_jax.influence.local import OnChunk, build_scorer, chunks
from montessori_jax.influence.memory import activation_bytes, block_size
from montessori_jax.influence.mesh import candidate_devices, reference_ways
from montessori_jax.influence.noise import noise_floor
from montessori_jax.influence.precision import require_precision
from montessori_jax.influence.probe import Probe
from montessori_jax.influence.reference import Reference
from montessori_jax.influence.regime import attention_of, label, resolved, with_method
from montessori_jax.influence.scores import Candidate, Score, Scorer
from montessori_jax.influence.step import candidate_update
from montessori_jax.mesh import mesh_of, put, use_mesh
from montessori_jax.models import Model, Params
from montessori_jax.models.sharding import moment_shardings
from montessori_jax.pytrees import as_argument

log = logging.getLogger(__name__)

# Reference rows, or several sets of them by name.
ReferenceChats = Sequence[EncodedChat] | Mapping[str, Sequence[EncodedChat]]
BASELINES = ("grad_dot", "grad_cos", "less")


class Student(NamedTuple):
    """What is probed: a decoder, its parameters, the optimizer's state and the probe step."""

    model: Model
    params: Params
    opt_state: optax.OptState
    tx: optax.GradientTransformation


def score_candidates(
    model: Model,
    params: Params,
    opt_state: optax.OptState,
    tx: optax.GradientTransformation,
    chats: Sequence[EncodedChat],
    reference_chats: ReferenceChats,
    settings: InfluenceConfig,
    *,
    ids: Sequence[str] | None = None,
    groups: Sequence[Hashable] | None = None,
    finished: Container[int] = (),
    on_chunk: OnChunk | None = None,
    seed: int = 0,
    choice: Choice | None = None,
) -> list[Score]:
    """Local data influence of chats on a student, chunk by chunk, as ``settings`` say.

    Args:
        model: the student's decoder.
        params: its float32 parameters after the warm-up. Where they lie on a mesh
            (`montessori_jax.models.sharding.laid_out`), candidates are split over it.
        opt_state: the optimizer's state after the warm-up, of ``tx``'s structure.
        tx: the probe step (`montessori_jax.training.optimizer.probe_optimizer`), which carries
            the learning rate.
        chats: the candidates.
        reference_chats: the reference set, or several by name in one pass (`Score.sets`).
        settings: method, reduction, precision, block and chunk. ``auto`` chooses first
            (`choose_estimator`).
        ids: one a candidate; by default its number.
        groups: each candidate's prompt, which ``auto`` compares pairs by.
        finished: numbers of chunks of ``settings.chunk`` candidates that are done already. The
            others get the scores that they would have had.
        on_chunk: called with each chunk's number and scores as they are made.
        seed: of what is drawn: audited candidates, parts of the reference.
        choice: `choose_estimator`'s for the same arguments: its method is used, and the estimator
            is not built twice.

    Returns:
        The scores made in this call, in order. A candidate that cannot be measured has influence
        None and a reason. `Score.method` is `label`'s.

    Raises:
        UserError: an id is given twice, no reference sample has response tokens, a reference loss
            is not finite, or the backend has no products of the precision asked for.
    """
    student = Student(model, params, opt_state, tx)
    settings = resolved(settings)
    names = names_of(ids, len(chats))
    if choice is None and settings.method == "auto":
        choice = choose_estimator(
            *student, chats, reference_chats, settings, ids=names, groups=groups, seed=seed
        )
    if choice is not None:
        settings = with_method(settings, choice.method)
    candidates = candidates_of(chats, names, settings)
    # The audit is on one reference set: with several, the estimator is another one.
    score = choice.scores if choice and len(_named(reference_chats)) == 1 else None
    if score is None:
        score = score_by(student, candidates, reference_chats, settings, seed)
    scores: list[Score] = []
    for number, places in enumerate(chunks(range(len(candidates)), settings.chunk)):
        if number in finished:
            continue
        made = [replace(one, method=label(settings)) for one in score(places)]
        scores += made
        if on_chunk is not None:
            on_chunk(number, made)
    if settings.method == "exact" and settings.precision == "bfloat16" and scores:
        usable = next((one for one in candidates if one.data is not None), None)
        if usable is None:
            return scores
        probe = probe_of(student, candidates, reference_chats, settings)
        step = jax.jit(
            partial(candidate_update, gradient_scale=probe.gradient_scale), static_argnums=1
        )
        loss = as_argument(probe.candidate_loss)
        first = next(iter(probe.references.values()))
        with use_mesh(probe.mesh):
            _, updates = step(loss, probe.tx, probe.params, probe.opt_state, usable.data)
            floor = noise_floor(first, probe.params, updates)
        report_noise(floor, scores)
    return scores


def choose_estimator(
    model: Model,
    params: Params,
    opt_state: optax.OptState,
    tx: optax.GradientTransformation,
    chats: Sequence[EncodedChat],
    reference_chats: ReferenceChats,
    settings: InfluenceConfig,
    *,
    ids: Sequence[str] | None = None,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    measured: Mapping[int, Score] | None = None,
    on_audit: Callable[[int], None] = lambda count: None,
    on_measured: Callable[[Mapping[int, Score]], None] = lambda scores: None,
) -> Choice:
    """Hold estimators to ``exact`` in float32 on a random subset; the cheapest that passes.

    ``auto`` starts with the cheapest for so many candidates, another method with itself. With
    ``on_audit_failure=fallback`` (and ``auto`` always) an estimator that misses a floor hands on
    to the next dearer one, ``exact`` at last. At most ``settings.audit`` candidates are audited
    and at most 15% of the scoring's cost, but at least 8; so few candidates are best measured by
    ``exact`` alone.

    Args:
        model: as given to `score_candidates`, like the next five.
        params: the student's parameters.
        opt_state: the optimizer's state.
        tx: the probe step.
        chats: the candidates.
        reference_chats: the reference sets; the first one is audited.
        settings: the method, the floors and how many are audited.
        ids: one a candidate; by default its number.
        groups: each candidate's prompt: whole prompts are audited and their pairs compared.
        seed: draws the audited candidates.
        measured: scores by the definition, by the candidate's place, that an interrupted call
            for the same arguments was given: they are not measured again.
        on_audit: told how many candidates are audited, before the long work begins.
        on_measured: given scores by the definition as they are made, ``settings.chunk`` at a time.
    """
    student = Student(model, params, opt_state, tx)
    settings = resolved(settings)
    names = names_of(ids, len(chats))
    candidates = candidates_of(chats, names, settings)
    usable = [place for place, one in enumerate(candidates) if one.data is not None]
    automatic = settings.method == "auto"
    if automatic and len(usable) <= FEWEST:
        return Choice("exact", ())
    if not usable or not settings.audit or settings.method in BASELINES:
        return Choice(settings.method, ())
    if settings.method == "exact" and settings.precision == "float32":
        return Choice("exact", ())
    sets = dict(list(_named(reference_chats).items())[:1])
    tokens = [len(chats[place].tokens) for place in usable]
    known = costs(
        model.parameter_count(),
        float(np.mean(tokens)),
        float(sum(len(chat.tokens) for rows in sets.values() for chat in rows)),
        part=settings.control_fraction,
        pilots=min(settings.pilots, len(usable)),
    )
    order = ladder(known, len(usable), start=None if automatic else settings.method)
    if not order:
        return Choice("exact", ())
    scoring = known[order[0]].of(len(usable))
    count = audit_count(settings.audit, len(usable), scoring, known["exact"].each)
    audited = choose_audited(usable, count, seed, groups)
    on_audit(len(audited))

    def made(settings: InfluenceConfig) -> ScoreSome:
        return score_by(student, candidates_of(chats, names, settings), sets, settings, seed)

    def rung(name: str) -> Callable[[], ScoreSome]:
        return lambda: made(with_method(settings, name))

    kernel = "auto" if settings.attention == "cudnn" else settings.attention
    true = replace(
        settings, preset="corrected", method="exact", precision="float32", attention=kernel
    )

    def truth(places: Sequence[int]) -> list[Score]:
        known = dict(measured or {})
        rest = [place for place in places if place not in known]
        score = made(true) if rest else None
        for part in chunks(rest, settings.chunk):
            assert score is not None
            new = dict(zip(part, score(part), strict=True))
            known |= new
            on_measured(new)
        return [known[place] for place in places]

    return choose_method(
        {name: rung(name) for name in order},
        truth,
        audited,
        groups,
        floors=Floors(
            settings.audit_spearman or None,
            settings.audit_pairs or None,
            settings.audit_error or None,
        ),
        on_failure="fallback" if automatic else settings.on_audit_failure,
        seed=seed,
    )


def names_of(ids: Sequence[str] | None, count: int) -> Sequence[str]:
    """The candidates' ids, or their numbers; `UserError` where two are the same."""
    if ids is None:
        return [str(index) for index in range(count)]
    if len(set(ids)) < len(ids):
        twice = next(one for one, times in Counter(ids).items() if times > 1)
        raise UserError(f"two candidates have the id {twice!r}: scores are told apart by it")
    return ids


def candidates_of(
    chats: Sequence[EncodedChat], names: Sequence[str], settings: InfluenceConfig
) -> ChatCandidates:
    """Chats as candidates, in few shapes where the method's other work outweighs padding, and
    where only pilots are padded (``linearized``)."""
    coarse = settings.method in ("exact", "linearized", "second_order")
    return ChatCandidates(
        chats, names, settings.max_length, coarse=coarse, attention=attention_of(settings)
    )


def probe_of(
    student: Student,
    candidates: Sequence[Candidate],
    reference_chats: ReferenceChats,
    settings: InfluenceConfig,
) -> Probe:
    """A `Probe` as settings want it: precision, reference sets, block size."""
    require_precision(settings.precision)
    mesh = mesh_of((student.model, student.params))
    params, opt_state = student.params, student.opt_state
    if mesh is not None:
        opt_state = put(opt_state, moment_shardings(student.tx, params, mesh))
    if settings.preset == "original":
        params, opt_state = jax.tree.map(_as_bfloat16, (params, opt_state))
    references = {
        name: reference_for(student.model, rows, settings, reference_ways(mesh))
        for name, rows in _named(reference_chats).items()
    }
    most = -(-settings.chunk // candidate_devices(mesh))
    # The same in every process of a job, whose program is one.
    block = settings.block or cluster.smallest(
        min(lanes(student.model, params, candidates, one) for one in references.values())
    )
    return Probe(
        MeanLoss(TokenLosses(student.model, settings.precision, attention_of(settings))),
        params,
        opt_state,
        student.tx,
        references,
        gradient_scale=settings.gradient_scale,
        block=min(block, most),
        chunk=settings.chunk,
        pool=candidates,
    ).on_mesh(mesh)


def score_by(
    student: Student,
    candidates: Sequence[Candidate],
    reference_chats: ReferenceChats,
    settings: InfluenceConfig,
    seed: int = 0,
) -> ScoreSome:
    """Build ``settings.method`` for these candidates; what is returned scores any of them."""
    scorer = estimator(probe_of(student, candidates, reference_chats, settings), settings, seed)
    return lambda places: [
        score
        for part in chunks([candidates[place] for place in places], settings.chunk)
        for score in scorer(part)
    ]


def estimator(probe: Probe, settings: InfluenceConfig, seed: int = 0) -> Scorer:
    """The scorer of ``settings.method`` with the settings that it takes."""
    given: dict[str, Any] = {}
    if settings.method in ("first_order", "control_variate", "linearized", "second_order"):
        given |= {"pilots": settings.pilots, "expansion_point": settings.expansion_point}
    if settings.method == "control_variate":
        given |= {"fraction": settings.control_fraction, "refine": settings.refine}
        given |= {"z": settings.refine_z, "seed": seed}
    if settings.method == "linearized":
        given["sensitivity"] = settings.sensitivity
    return build_scorer(settings.method, probe, **given)


def reference_for(
    model: Model, chats: Sequence[EncodedChat], settings: InfluenceConfig, ways: int = 1
) -> Reference:
    """The reference set as ``settings`` want it.

    Losses that are subtracted are computed in float32, except by ``exact`` in bf16, which then
    measures what it says; gradients are computed in ``settings.precision``. ``ways`` is into how
    many parts devices split a batch's rows.
    """
    as_asked = settings.method == "exact" or settings.precision == "bf16_split"
    dtype = settings.precision if as_asked else "float32"
    return chat_reference(
        model,
        chats,
        reduction=settings.reference_reduction,
        max_length=settings.max_length,
        row_length=settings.row_length,
        rows_per_pass=settings.rows_per_pass * ways,
        dtype=dtype,
        gradient_dtype=settings.precision,
        attention=attention_of(settings, dtype),
        gradient_attention=attention_of(settings),
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


def _named(reference_chats: ReferenceChats) -> Mapping[str, Sequence[EncodedChat]]:
    if isinstance(reference_chats, Mapping):
        return reference_chats
    return {"reference": reference_chats}


def _as_bfloat16(leaf: Any) -> Any:
    return leaf.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
