"""The sampler's programs: a prompt enters a slot, all slots write on.

A slot is one prompt with its samples; it has its own count of tokens, so that a prompt can enter
while the others are in mid-text. Rows are ordered by slot, then sample.
"""

from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from montessori_jax.config import SamplingConfig
from montessori_jax.generation.sampling import (
    TokenCounts,
    count_tokens,
    draw,
    empty_counts,
    penalise,
    sample_keys,
    start_counts,
)
from montessori_jax.mesh import split_rows
from montessori_jax.models import Model, Params
from montessori_jax.models.attention import OWN_BLOCK
from montessori_jax.models.decoder import KeyValue
from montessori_jax.models.inference import Cache, decode, empty_cache, logits, prefill

T = TypeVar("T")


class Asked(NamedTuple):
    """What stays as it is while a slot's texts are written."""

    prompt: Cache
    lengths: Array  # [slots] int32
    keys: Array  # [rows] typed keys


class Written(NamedTuple):
    """The texts so far."""

    lengths: Array  # [slots] int32: tokens of each row of a slot, at least 1
    tokens: Array  # [rows, max_tokens] int32
    finished: Array  # [rows] bool
    finite: Array  # [slots] bool: every logit so far was a number
    counts: TokenCounts


@partial(jax.jit, static_argnames=("model", "settings", "slots", "samples", "length", "dtype"))
def vacant(
    model: Model,
    *,
    settings: SamplingConfig,
    slots: int,
    samples: int,
    length: int,
    dtype: str,
) -> tuple[Asked, Written, Cache]:
    """Empty slots for prompts of up to ``length`` tokens; their rows count as finished."""
    config, rows = model.config, slots * samples
    shape = (slots, config.num_kv_heads, length, config.head_dim)
    prompt = tuple(
        KeyValue(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)
    )
    keys = sample_keys(jnp.uint32(0), jnp.zeros(slots, jnp.uint32), samples)
    written = Written(
        lengths=jnp.ones(slots, jnp.int32),
        tokens=jnp.zeros((rows, settings.max_tokens), jnp.int32),
        finished=jnp.ones(rows, bool),
        finite=jnp.ones(slots, bool),
        counts=empty_counts(settings, rows, config.vocab_size),
    )
    own = empty_cache(model, slots, samples, places(settings.max_tokens), jnp.dtype(dtype))
    asked = Asked(prompt, jnp.ones(slots, jnp.int32), keys)
    return split_asked(asked), split(written, slots), split(own, slots, heads=2)


def split(tree: T, slots: int, heads: int | None = None) -> T:
    """Slots, and so their rows, over the devices that split rows, and the axis ``heads`` of caches
    over those that split heads; nothing without a mesh.

    All programs leave their arrays so, and each finds them as it was compiled for.
    """
    return jax.tree.map(lambda leaf: split_rows(leaf, slots, heads), tree)


def split_asked(asked: Asked) -> Asked:
    """`split` of what does not change."""
    slots = asked.lengths.shape[0]
    rest = split(asked._replace(prompt=()), slots)
    return rest._replace(prompt=split(asked.prompt, slots, heads=1))


@partial(
    jax.jit,
    static_argnames=("model", "settings", "stop_ids", "samples"),
    donate_argnames=("asked", "written"),
)
def enter(
    model: Model,
    weights: Params,
    asked: Asked,
    written: Written,
    slot: Array,
    tokens: Array,
    length: Array,
    number: Array,
    seed: Array,
    *,
    settings: SamplingConfig,
    stop_ids: tuple[int, ...],
    samples: int,
) -> tuple[Asked, Written]:
    """Prefill one prompt (``tokens`` padded, ``[1, any length]``) and draw its first tokens.

    One prompt at a time, so that its numbers cannot depend on what else there is to prefill.
    """
    hidden, prompt = prefill(model, weights, tokens, length[None])
    scores = jnp.repeat(logits(model, weights, hidden), samples, axis=0)
    keys = sample_keys(seed, number[None], samples)
    counts = start_counts(settings, tokens, length[None], samples, model.config.vocab_size)
    new, ended, counts = _next(scores, keys, jnp.zeros(samples, jnp.int32), counts, settings,
                               stop_ids)  # fmt: skip
    first = jnp.zeros((samples, settings.max_tokens), jnp.int32).at[:, 0].set(new)

    def by_slot(all: Array, one: Array) -> Array:
        return jax.lax.dynamic_update_slice(all, one, (slot, *[0] * (all.ndim - 1)))

    def by_row(all: Array, one: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(all, one, slot * samples, axis=0)

    asked = Asked(
        prompt=jax.tree.map(by_slot, asked.prompt, prompt),
        lengths=by_slot(asked.lengths, length[None]),
        keys=by_row(asked.keys, keys),
    )
    written = Written(
        lengths=by_slot(written.lengths, jnp.ones(1, jnp.int32)),
        tokens=by_row(written.tokens, first),
        finished=by_row(written.finished, ended | (settings.max_tokens == 1)),
        finite=by_slot(written.finite, jnp.all(jnp.isfinite(scores))[None]),
        counts=jax.tree.map(by_row, written.counts, counts),
    )
    slots = asked.lengths.shape[0]
    return split_asked(asked), split(written, slots)


@partial(
    jax.jit,
    static_argnames=("model", "settings", "stop_ids", "chunk"),
    donate_argnames=("written", "own"),
)
def write(
    model: Model,
    weights: Params,
    asked: Asked,
    written: Written,
    own: Cache,
    finished: Array,
    waiting: Array,
    *,
    settings: SamplingConfig,
    stop_ids: tuple[int, ...],
    chunk: int,
) -> tuple[Written, Cache]:
    """Up to ``chunk`` more tokens a row; fewer once all rows are ``finished``.

    ``waiting`` says that prompts wait for a slot: then it returns as soon as one becomes vacant.
    A slot whose rows are all finished stands still; the place of its cache is its next prompt's.
    """
    slots = asked.lengths.shape[0]
    written = written._replace(finished=written.finished | finished)

    def busy(written: Written) -> Array:
        return ~jnp.all(written.finished.reshape(slots, -1), axis=1)

    began = busy(written)

    def going(carry: tuple[Array, Written, Cache]) -> Array:
        steps, written, _ = carry
        now = busy(written)
        return (steps < chunk) & jnp.any(now) & ~(waiting & jnp.any(began & ~now))

    def step(carry: tuple[Array, Written, Cache]) -> tuple[Array, Written, Cache]:
        steps, written, own = carry
        lengths, tokens = written.lengths, written.tokens
        samples = tokens.shape[0] // slots
        by_row = jnp.repeat(lengths, samples)
        newest = jnp.take_along_axis(tokens, (by_row - 1)[:, None], axis=1)
        on = busy(written)
        hidden, own = decode(
            model,
            weights,
            newest.reshape(slots, samples),
            jnp.where(on, lengths - 1, 0),
            asked.prompt,
            asked.lengths,
            own,
        )
        scores = logits(model, weights, hidden.reshape(-1, hidden.shape[-1]))
        new, ended, counts = _next(scores, asked.keys, by_row, written.counts, settings, stop_ids)
        lengths = lengths + on.astype(jnp.int32)
        place = jnp.where(jnp.repeat(on, samples), by_row, settings.max_tokens)
        full = jnp.repeat(lengths, samples) >= settings.max_tokens
        finite = jnp.all(jnp.isfinite(scores).reshape(slots, -1), axis=1)
        written = Written(
            lengths=lengths,
            tokens=tokens.at[jnp.arange(tokens.shape[0]), place].set(new, mode="drop"),
            finished=written.finished | ended | full,
            finite=written.finite & finite,
            counts=counts,
        )
        return steps + 1, written, own

    _, written, own = jax.lax.while_loop(going, step, (jnp.int32(0), written, own))
    return split(written, slots), split(own, slots, heads=2)


def _next(
    scores: Array,
    keys: Array,
    count: Array,
    counts: TokenCounts,
    settings: SamplingConfig,
    stop_ids: tuple[int, ...],
) -> tuple[Array, Array, TokenCounts]:
    """A token a row from float32 logits ``[rows, vocab]``, and whether it ends the text."""
    keys = jax.vmap(jax.random.fold_in)(keys, count)
    new = draw(penalise(scores, counts, settings), keys, settings)
    ended = jnp.any(new[:, None] == jnp.asarray(stop_ids, jnp.int32)[None, :], axis=-1)
    return new, ended, count_tokens(counts, new)


def places(max_tokens: int) -> int:
    """Places of a row's cache: one a token but the last, and whole blocks if more than one."""
    most = max(1, max_tokens - 1)
    return most if most <= OWN_BLOCK else -(-most // OWN_BLOCK) * OWN_BLOCK
