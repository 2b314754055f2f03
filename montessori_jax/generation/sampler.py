"""The built-in sampler: prompts prefilled once, their samples decoded side by side, under jit.

A batch is some whole prompts of one padded length, ``samples`` rows each. Between chunks of steps
the host looks for stop strings and ends what is finished. Batches are planned over all requests,
so a stage that was interrupted goes on with the same batches and writes the same text.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
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
from montessori_jax.generation.generator import Completion, PromptRequest
from montessori_jax.generation.sampling import draw, penalise, uses_penalties
from montessori_jax.models import KeyValue, Model, Params

# Decode steps between two looks at the text; a look costs a millisecond or two.
CHUNK = 16


class State(NamedTuple):
    """A batch in progress. Leading axes are ``[prompts, samples]``, except in ``own``."""

    step: Array  # tokens written so far
    logits: Array  # [prompts, samples, vocab] float32: what the next token is drawn from
    finished: Array  # bool
    tokens: Array  # [prompts, samples, slots] int32
    own: KeyValue  # [layers, prompts, samples, slots, kv_heads, head_dim]
    counts: Array | None  # [prompts, samples, vocab] int32, where a penalty needs it


class Prompts(NamedTuple):
    """What the samples of a batch share."""

    cache: KeyValue
    lengths: Array
    keys: Array  # [prompts, samples] typed keys
    contains: Array | None  # [prompts, vocab] bool, where a penalty needs it


@partial(jax.jit, static_argnames=("model", "settings", "samples"))
def _prefill(
    model: Model,
    params: Params,
    tokens: Array,
    lengths: Array,
    rows: Array,
    seed: Array,
    active: Array,
    settings: SamplingConfig,
    samples: int,
) -> tuple[Prompts, State]:
    dtype = jnp.dtype(settings.dtype)
    hidden, cache = model.prefill(params, tokens, lengths, dtype=dtype)
    logits = _logits(model, params, hidden)
    config, prompts = model.config, tokens.shape[0]
    root = jax.random.key(seed)
    fold = jax.random.fold_in
    keys = jax.vmap(
        lambda row: jax.vmap(lambda sample: fold(fold(root, row), sample))(jnp.arange(samples))
    )(rows)
    slots = settings.max_tokens
    shape = (config.num_layers, prompts, samples, slots, config.num_kv_heads, config.head_dim)
    contains = counts = None
    if uses_penalties(settings):
        real = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
        place = jnp.where(real, tokens, config.vocab_size)
        empty = jnp.zeros((prompts, config.vocab_size), bool)
        contains = empty.at[jnp.arange(prompts)[:, None], place].set(True, mode="drop")
        counts = jnp.zeros((prompts, samples, config.vocab_size), jnp.int32)
    state = State(
        step=jnp.int32(0),
        logits=jnp.repeat(logits[:, None], samples, axis=1),
        finished=jnp.repeat(~active[:, None], samples, axis=1),
        tokens=jnp.zeros((prompts, samples, slots), jnp.int32),
        own=KeyValue(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)),
        counts=counts,
    )
    return Prompts(cache, lengths, keys, contains), state


def _logits(model: Model, params: Params, hidden: Array) -> Array:
    head = model.head(params).astype(hidden.dtype)
    return jnp.dot(hidden, head, preferred_element_type=jnp.float32)


@partial(jax.jit, static_argnames=("model", "settings", "stop_ids"), donate_argnames=("state",))
def _decode(
    model: Model,
    params: Params,
    prompts: Prompts,
    state: State,
    until: Array,
    settings: SamplingConfig,
    stop_ids: tuple[int, ...],
) -> State:
    """Write tokens until step ``until``, or until all rows are finished."""
    dtype = jnp.dtype(settings.dtype)
    count, samples, vocab = state.logits.shape

    def going(state: State) -> Array:
        return (state.step < until) & ~jnp.all(state.finished)

    def one(state: State) -> State:
        logits, counts = state.logits.reshape(-1, vocab), state.counts
        if counts is not None and prompts.contains is not None:
            seen = jnp.repeat(prompts.contains, samples, axis=0)
            logits = penalise(logits, counts.reshape(-1, vocab), seen, settings)
        keys = jax.vmap(jax.random.fold_in, (0, None))(prompts.keys.reshape(-1), state.step)
        new = draw(logits, keys, settings).reshape(count, samples)
        new = jnp.where(state.finished, 0, new)
        if counts is not None:
            at = jnp.arange(count)[:, None], jnp.arange(samples)[None, :], new
            counts = counts.at[at].add(jnp.where(state.finished, 0, 1))
        ended = jnp.isin(new, jnp.asarray(stop_ids, jnp.int32))
        hidden, cache = model.decode(
            params, new, state.step, prompts.cache, prompts.lengths, state.own, dtype=dtype
        )
        insert = jax.lax.dynamic_update_index_in_dim
        return State(
            step=state.step + 1,
            logits=_logits(model, params, hidden),
            finished=state.finished | ended,
            tokens=insert(state.tokens, new, state.step, axis=2),
            own=KeyValue(
                insert(state.own.key, cache.key, state.step, axis=3),
                insert(state.own.value, cache.value, state.step, axis=3),
            ),
            counts=counts,
        )

    return jax.lax.while_loop(going, one, state)


@dataclass(frozen=True)
class JaxSampler:
    """A `Generator` on this process's default device.

    Attributes:
        model: the decoder.
        params: its parameters.
        chat: decodes ids, and knows which of them end a turn.
    """

    model: Model
    params: Params
    chat: ChatFormat

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
            UserError: a prompt and ``settings.max_tokens`` together exceed the model's positions.
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
            if len(request.tokens) + settings.max_tokens > limit:
                raise UserError(
                    f"prompt {request.id} has {len(request.tokens)} tokens, and with max_tokens "
                    f"{settings.max_tokens} it exceeds the model's {limit} positions: lower "
                    "max_tokens, or shorten the prompt"
                )

    def _run(
        self,
        batch: Sequence[PromptRequest],
        length: int,
        settings: SamplingConfig,
        samples: int,
        stop: tuple[str, ...],
        seed: int,
    ) -> list[Completion]:
        count = settings.prompts_per_batch
        tokens = np.zeros((count, length), np.int32)
        lengths, rows = np.ones(count, np.int32), np.zeros(count, np.int32)
        active = np.arange(count) < len(batch)
        for place, request in enumerate(batch):
            tokens[place, : len(request.tokens)] = request.tokens
            lengths[place], rows[place] = len(request.tokens), request.row
        prompts, state = _prefill(
            self.model,
            self.params,
            tokens,
            lengths,
            rows,
            np.uint32(seed),
            active,
            settings,
            samples,
        )
        stopped: dict[tuple[int, int], tuple[int, str, str]] = {}
        step = 0
        while step < settings.max_tokens:
            until = np.int32(min(step + CHUNK, settings.max_tokens))
            state = _decode(
                self.model, self.params, prompts, state, until, settings, self.chat.stop_ids
            )
            step = int(state.step)
            written, done = np.array(state.tokens), np.array(state.finished)
            for place, sample in zip(*np.nonzero(~done[: len(batch)]), strict=True):
                found = self._find_stop(written[place, sample, :step], stop)
                if found is not None:
                    stopped[place, sample] = found
                    done[place, sample] = True
            if done.all():
                break
            if stop:
                state = state._replace(finished=jnp.asarray(done))
        written = np.array(state.tokens)
        return [
            self._completion(
                request, sample, written[place, sample, :step], stopped.get((place, sample)), stop
            )
            for place, request in enumerate(batch)
            for sample in range(samples)
        ]

    def _find_stop(self, ids: np.ndarray, stop: tuple[str, ...]) -> tuple[int, str, str] | None:
        """``(tokens, text before it, stop string)`` of the earliest stop string, if any."""
        if not any(name in (text := self.chat.decode(ids)) for name in stop):
            return None
        place, name = min((text.find(name), name) for name in stop if name in text)
        # The fewest tokens whose text has all of the stop string.
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if name in self.chat.decode(ids[:middle]):
                high = middle
            else:
                low = middle + 1
        return low, text[:place], name

    def _completion(
        self,
        request: PromptRequest,
        sample: int,
        ids: np.ndarray,
        stopped: tuple[int, str, str] | None,
        stop: tuple[str, ...],
    ) -> Completion:
        ends = np.nonzero(np.isin(ids, self.chat.stop_ids))[0]
        if stopped is None:
            # The turn may have ended in the chunk in which a stop string was written.
            stopped = self._find_stop(ids[: ends[0]] if len(ends) else ids, stop)
        if stopped is not None:
            used, text, name = stopped
            return Completion(request.id, sample, tuple(map(int, ids[:used])), text, "stop", name)
        if len(ends):
            used = int(ends[0])
            return Completion(
                request.id,
                sample,
                tuple(map(int, ids[: used + 1])),
                self.chat.decode(ids[:used]),
                "end",
            )
        return Completion(request.id, sample, tuple(map(int, ids)), self.chat.decode(ids), "length")


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
