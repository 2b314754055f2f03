"""The built-in sampler: prompts prefilled once, their samples decoded side by side, under jit.

A batch is some whole prompts of one padded length, ``samples`` rows each. Between chunks of steps
the host looks for stop strings and ends what is finished. Batches are planned over all requests,
so a stage that was interrupted goes on with the same batches and writes the same text.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from montessori_jax.config import SamplingConfig
from montessori_jax.data.chat import ChatFormat
from montessori_jax.data.packing import shared_buckets
from montessori_jax.errors import UserError
from montessori_jax.generation.endings import Ending, find_ending
from montessori_jax.generation.generator import Completion, PromptRequest
from montessori_jax.generation.sampling import (
    TokenCounts,
    count_tokens,
    draw,
    penalise,
    sample_keys,
    start_counts,
)
from montessori_jax.models import Model, Params
from montessori_jax.models.inference import Cache, decode, empty_cache, logits, prefill, unstack

# Decode steps between two looks at the text. A look costs a few milliseconds, a row that is
# finished half a chunk of steps on average.
CHUNK = 16
# Slots that a cache of generated tokens starts with; it doubles when they are filled.
FIRST_SLOTS = 128


class Batch(NamedTuple):
    """What stays as it is while a batch is decoded."""

    prompt: Cache
    lengths: Array  # [prompts] int32
    keys: Array  # [rows] typed keys


class State(NamedTuple):
    """A batch in progress; rows are ordered by prompt, then sample."""

    written: Array  # tokens of each row so far, at least 1
    tokens: Array  # [rows, max_tokens] int32
    finished: Array  # [rows] bool
    finite: Array  # bool: every logit so far was a number
    counts: TokenCounts
    own: Cache  # keys and values of all tokens written but the last


@partial(jax.jit, static_argnames=("model", "settings", "stop_ids", "samples"))
def _begin(
    model: Model,
    weights: Params,
    tokens: Array,
    lengths: Array,
    numbers: Array,
    seed: Array,
    idle: Array,
    *,
    settings: SamplingConfig,
    stop_ids: tuple[int, ...],
    samples: int,
) -> tuple[Batch, State]:
    """Prefill and the first token of each sample; ``idle`` prompts only fill up the batch."""
    hidden, prompt = prefill(model, weights, tokens, lengths)
    first = jnp.repeat(logits(model, weights, hidden), samples, axis=0)
    prompts, rows = tokens.shape[0], tokens.shape[0] * samples
    batch = Batch(prompt, lengths, sample_keys(seed, numbers, samples))
    slots = _slots(1, settings.max_tokens)
    state = State(
        written=jnp.int32(0),
        tokens=jnp.zeros((rows, settings.max_tokens), jnp.int32),
        finished=jnp.repeat(idle, samples),
        finite=jnp.bool_(True),
        counts=start_counts(settings, tokens, lengths, samples, model.config.vocab_size),
        own=empty_cache(model, prompts, samples, slots, hidden.dtype),
    )
    return batch, _write(first, batch, state, settings, stop_ids)


@partial(
    jax.jit,
    static_argnames=("model", "settings", "stop_ids"),
    donate_argnames=("state",),
)
def _continue(
    model: Model,
    weights: Params,
    batch: Batch,
    state: State,
    finished: Array,
    until: Array,
    *,
    settings: SamplingConfig,
    stop_ids: tuple[int, ...],
) -> State:
    """Write tokens until there are ``until``, or until all rows are finished."""
    prompts = batch.lengths.shape[0]
    state = state._replace(finished=state.finished | finished)

    def going(state: State) -> Array:
        return (state.written < until) & ~jnp.all(state.finished)

    def step(state: State) -> State:
        newest = jax.lax.dynamic_index_in_dim(state.tokens, state.written - 1, 1, keepdims=False)
        hidden, own = decode(
            model,
            weights,
            newest.reshape(prompts, -1),
            state.written - 1,
            batch.prompt,
            batch.lengths,
            state.own,
        )
        rows = hidden.reshape(-1, hidden.shape[-1])
        state = state._replace(own=own)
        return _write(logits(model, weights, rows), batch, state, settings, stop_ids)

    return jax.lax.while_loop(going, step, state)


def _write(
    scores: Array, batch: Batch, state: State, settings: SamplingConfig, stop_ids: tuple[int, ...]
) -> State:
    """Draw a token a row from float32 logits ``[rows, vocab]`` and put it behind the others."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(batch.keys, state.written)
    new = draw(penalise(scores, state.counts, settings), keys, settings)
    ended = jnp.any(new[:, None] == jnp.asarray(stop_ids, jnp.int32)[None, :], axis=-1)
    return state._replace(
        written=state.written + 1,
        tokens=jax.lax.dynamic_update_index_in_dim(state.tokens, new, state.written, axis=1),
        finished=state.finished | ended,
        finite=state.finite & jnp.all(jnp.isfinite(scores)),
        counts=count_tokens(state.counts, new),
    )


def _slots(count: int, max_tokens: int) -> int:
    """Slots of the cache while there are up to ``count`` tokens (the last needs none yet)."""
    slots = FIRST_SLOTS
    while slots < count - 1:
        slots *= 2
    return max(1, min(slots, max_tokens - 1))


@partial(jax.jit, static_argnames="slots")
def _enlarge(own: Cache, slots: int) -> Cache:
    def longer(x: Array) -> Array:
        return jnp.pad(x, ((0, 0),) * 3 + ((0, slots - x.shape[3]), (0, 0)))

    return jax.tree.map(longer, own)


@dataclass(frozen=True)
class JaxSampler:
    """A `Generator` on this process's default device.

    What a completion's text depends on is in `Generator.generate`. Whole numbers and keys come
    from the request alone; float32 sums may be rounded differently in a batch padded to another
    length, which shows only where two tokens tie to within that rounding.

    Attributes:
        model: the decoder.
        params: its parameters; a copy laid out for decoding is made on first use and kept.
        chat: decodes ids, and knows which of them end a turn.
        programs: what was compiled so far, as ``(name, shapes)``.
    """

    model: Model
    params: Params
    chat: ChatFormat
    programs: set[tuple[object, ...]] = field(default_factory=set, compare=False, repr=False)
    _weights: dict[str, Params] = field(default_factory=dict, compare=False, repr=False)

    def generate(
        self,
        requests: Sequence[PromptRequest],
        settings: SamplingConfig,
        *,
        samples: int,
        stop: tuple[str, ...] = (),
        seed: int,
        finished: Collection[str] = (),
    ) -> Iterator[list[Completion]]:
        """See `Generator.generate`.

        Raises:
            UserError: a prompt is empty, or exceeds the model's positions together with
                ``settings.max_tokens``; or the model's logits are not numbers.
        """
        self._check(requests, settings)
        for length, batch in plan(requests, settings.prompts_per_batch):
            if all(request.id in finished for request in batch):
                continue
            made = self._run(batch, length, settings, samples, stop, seed)
            yield [one for one in made if one.prompt_id not in finished]

    def _check(self, requests: Sequence[PromptRequest], settings: SamplingConfig) -> None:
        limit = self.model.config.max_position_embeddings
        for request in requests:
            if not request.tokens:
                raise UserError(f"prompt {request.id} is empty: give it at least one token")
            if len(request.tokens) + settings.max_tokens > limit:
                raise UserError(
                    f"prompt {request.id} has {len(request.tokens)} tokens, and with max_tokens "
                    f"{settings.max_tokens} it exceeds the model's {limit} positions: lower "
                    "max_tokens, or shorten the prompt"
                )

    def _run(
        self,
        requests: Sequence[PromptRequest],
        length: int,
        settings: SamplingConfig,
        samples: int,
        stop: tuple[str, ...],
        seed: int,
    ) -> list[Completion]:
        prompts = settings.prompts_per_batch
        tokens = np.zeros((prompts, length), np.int32)
        lengths, numbers = np.ones(prompts, np.int32), np.zeros(prompts, np.uint32)
        for place, request in enumerate(requests):
            tokens[place, : len(request.tokens)] = request.tokens
            lengths[place], numbers[place] = len(request.tokens), request.row
        idle = np.arange(prompts) >= len(requests)
        shape = (prompts, samples, length)
        static = {"settings": _drawing(settings), "stop_ids": self.chat.stop_ids}
        weights = self._laid_out(settings.dtype)
        self.programs.add(("begin", *shape, *static.values()))
        batch, state = _begin(
            self.model,
            weights,
            *jax.device_put((tokens, lengths, numbers, np.uint32(seed), idle)),
            samples=samples,
            **static,
        )
        endings: dict[int, Ending] = {}
        count = 1
        while True:
            self._look(state, requests, samples, settings, stop, endings)
            if len(endings) == len(requests) * samples:
                break
            finished = np.repeat(idle, samples)
            finished[list(endings)] = True
            until = min(count + CHUNK - count % CHUNK, settings.max_tokens)
            slots = _slots(until, settings.max_tokens)
            if slots > _slots(count, settings.max_tokens):
                state = state._replace(own=_enlarge(state.own, slots))
            self.programs.add(("continue", *shape, slots, *static.values()))
            state = _continue(
                self.model,
                weights,
                batch,
                state,
                *jax.device_put((finished, np.int32(until))),
                **static,
            )
            count = until
        written = jax.device_get(state.tokens)
        return [
            Completion(
                prompt_id=request.id,
                index=sample,
                tokens=tuple(written[row, : endings[row].used].tolist()),
                text=endings[row].text,
                finish=endings[row].finish,
                stop=endings[row].stop,
            )
            for place, request in enumerate(requests)
            for sample in range(samples)
            for row in (place * samples + sample,)
        ]

    def _look(
        self,
        state: State,
        requests: Sequence[PromptRequest],
        samples: int,
        settings: SamplingConfig,
        stop: tuple[str, ...],
        endings: dict[int, Ending],
    ) -> None:
        """Add the rows that have ended since the last look to ``endings``."""
        count, tokens, finished, finite = jax.device_get(
            (state.written, state.tokens, state.finished, state.finite)
        )
        if not finite:
            raise UserError(
                f"the model's logits for prompts {requests[0].id} to {requests[-1].id} are not "
                "finite: its weights are broken; train with a lower learning rate"
            )
        for row in range(len(requests) * samples):
            if row in endings or not (stop or finished[row] or count >= settings.max_tokens):
                continue
            ending = find_ending(
                tokens[row, :count].tolist(),
                self.chat.decode,
                stop_ids=self.chat.stop_ids,
                stop=stop,
                limit=settings.max_tokens,
            )
            if ending is not None:
                endings[row] = ending

    def _laid_out(self, dtype: str) -> Params:
        if dtype not in self._weights:
            self._weights.clear()
            self._weights[dtype] = unstack(self.model, self.params, jnp.dtype(dtype))
        return self._weights[dtype]


def _drawing(settings: SamplingConfig) -> SamplingConfig:
    """The settings that programs depend on: stages with other settings beside share them."""
    shared = {one.name: getattr(settings, one.name) for one in fields(SamplingConfig)}
    return SamplingConfig(**{**shared, "prompts_per_batch": 1})


def plan(
    requests: Sequence[PromptRequest], prompts_per_batch: int
) -> list[tuple[int, list[PromptRequest]]]:
    """Batches as ``(padded length, requests)``, by length and then in the order given.

    A length that does not fill a batch joins the next longer one.
    """
    lengths = shared_buckets([len(request.tokens) for request in requests], prompts_per_batch)
    batches = []
    for length in sorted(set(lengths)):
        members = [one for one, size in zip(requests, lengths, strict=True) if size == length]
        for start in range(0, len(members), prompts_per_batch):
            batches.append((length, members[start : start + prompts_per_batch]))
    return batches
