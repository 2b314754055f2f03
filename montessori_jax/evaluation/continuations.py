"""Log-likelihoods of continuations: each context computed once, rows packed, few programs."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from montessori_jax.data.packing import Batch, assign_rows, bucket
from montessori_jax.errors import UserError
from montessori_jax.mesh import fetch, mesh_of, place_rows, row_groups, row_ways, use_mesh
from montessori_jax.models import Model, Params
from montessori_jax.models.attention import soft_capped, wide
from montessori_jax.training.losses import CHUNK, picked, target_states

# Shorter contexts share rows of this many tokens: on a CPU shorter rows gain nothing.
SHORTEST_ROW = 256


class Continuation(NamedTuple):
    """Token ids; at least one of each."""

    context: Sequence[int]
    tokens: Sequence[int]


class Scored(NamedTuple):
    """Of the ``request``-th continuation: its log-likelihood in nats, and whether greedy decoding
    would have written it."""

    request: int
    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class Tree:
    """A context and continuations of it, by index; ``size`` tokens are read.

    Of a continuation all tokens but the last are read, after the context and unseen by the others.
    """

    context: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    indices: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.branches)

    @property
    def targets(self) -> int:
        return sum(len(tokens) for tokens in self.branches)

    @property
    def branched(self) -> bool:
        """Whether tokens of several continuations are read."""
        return sum(len(tokens) > 1 for tokens in self.branches) > 1


def score(
    model: Model,
    params: Params,
    requests: Sequence[Continuation],
    *,
    max_length: int,
    tokens_per_pass: int,
    dtype: str = "float32",
    attention: str = "auto",
) -> Iterator[tuple[list[Scored], int]]:
    """Yield after each pass what it scored and how many tokens it read, padding left out.

    Inputs that are too long lose tokens on their left. Log-softmax and sums are float32 or wider.

    Args:
        model: the decoder.
        params: its parameters, on one device or a mesh, over which rows are split.
        requests: what to score, in any order.
        max_length: the most tokens read of a context and one continuation.
        tokens_per_pass: on a device at one time; a longer context is one row.
        dtype: compute dtype.
        attention: see `Model.hidden`.

    Raises:
        UserError: a context or a continuation is empty, or a continuation alone is too long.
    """
    mesh = mesh_of(params)
    ways = row_ways(mesh)
    for length, branched, trees in classes(plant(requests, max_length), tokens_per_pass):
        layout = assign_rows([tree.size for tree in trees], length)
        most = max(1, tokens_per_pass // length) * ways
        passes = -(-len(layout) // most)
        rows = -(-len(layout) // passes)
        rows = -(-rows // ways) * ways
        slots = bucket(max(sum(trees[i].targets for i in row) for row in layout))
        for start in range(0, len(layout), rows):
            part = [[trees[i] for i in row] for row in layout[start : start + rows]]
            batch = lay_out(part, length=length, slots=slots, rows=rows, branched=branched)
            held = place_rows(batch, mesh, axis=0)
            with use_mesh(mesh):
                found = fetch(target_scores(model, params, held, dtype, attention))
            yield collect(part, *found), sum(tree.size for row in part for tree in row)


def plant(requests: Sequence[Continuation], max_length: int) -> list[Tree]:
    """Requests by their contexts, as these are after truncation; longest trees first."""
    contexts: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, (context, tokens) in enumerate(requests):
        if not context or not tokens or len(tokens) > max_length:
            raise UserError(
                f"continuation {index} has {len(context)} tokens of context and {len(tokens)} of "
                f"its own, not at least 1 of each and at most {max_length} of its own: mend the "
                "task, or raise max_length"
            )
        contexts[tuple(context[-(max_length + 1 - len(tokens)) :])].append(index)
    trees = []
    for context, members in contexts.items():
        branches: list[int] = []
        size = len(context)
        for index in members:
            own = len(requests[index].tokens) - 1
            if branches and size + own > max_length:
                trees.append(_tree(context, branches, requests))
                branches, size = [], len(context)
            branches.append(index)
            size += own
        trees.append(_tree(context, branches, requests))
    return sorted(trees, key=lambda tree: -tree.size)


def _tree(
    context: tuple[int, ...], members: Sequence[int], requests: Sequence[Continuation]
) -> Tree:
    return Tree(context, tuple(tuple(requests[i].tokens) for i in members), tuple(members))


def row_length(size: int) -> int:
    """The smallest row that holds ``size`` tokens, of four an octave: a row pads a fifth at most,
    since long contexts have no other to share it with."""
    quarter = SHORTEST_ROW // 4
    while quarter * 8 < size:
        quarter *= 2
    return max(SHORTEST_ROW, -(-size // quarter) * quarter)


def classes(trees: Sequence[Tree], tokens_per_pass: int) -> Iterator[tuple[int, bool, list[Tree]]]:
    """Trees that share a program, longest first: their row length, whether they have branches.

    Too few for a pass of their own join the next longer ones.
    """
    for branched in (True, False):
        these = [tree for tree in trees if tree.branched == branched]
        lengths = [row_length(tree.size) for tree in these]
        tokens = Counter[int]()
        for tree, length in zip(these, lengths, strict=True):
            tokens[length] += tree.size
        joined: dict[int, int] = {}
        for shorter, longer in pairwise(sorted(tokens)):
            if tokens[shorter] < tokens_per_pass:
                joined[shorter] = longer
                tokens[longer] += tokens.pop(shorter)
        for length in sorted(tokens, reverse=True):
            of_length = [
                tree for tree, own in zip(these, lengths, strict=True)
                if _final(own, joined) == length
            ]  # fmt: skip
            yield length, branched, of_length


def _final(length: int, joined: dict[int, int]) -> int:
    while length in joined:
        length = joined[length]
    return length


def lay_out(
    layout: Sequence[Sequence[Tree]], *, length: int, slots: int, rows: int, branched: bool
) -> Batch:
    """Rows of trees, each a segment; targets in the order of the trees and their branches."""

    def empty(width: int) -> np.ndarray:
        return np.zeros((rows, width), np.int32)

    tokens, segments, positions, branches = (empty(length) for _ in range(4))
    at, targets, weights = empty(slots), empty(slots), np.zeros((rows, slots), np.float32)
    for row, members in enumerate(layout):
        start = filled = 0
        for segment, tree in enumerate(members, start=1):
            trunk = len(tree.context)
            tokens[row, start : start + trunk] = tree.context
            positions[row, start : start + trunk] = np.arange(trunk)
            segments[row, start : start + tree.size] = segment
            place = start + trunk
            for branch, continuation in enumerate(tree.branches, start=1):
                own = len(continuation) - 1
                tokens[row, place : place + own] = continuation[:-1]
                positions[row, place : place + own] = trunk + np.arange(own)
                branches[row, place : place + own] = branch
                slot = slice(filled, filled + own + 1)
                at[row, slot] = [start + trunk - 1, *range(place, place + own)]
                targets[row, slot] = continuation
                weights[row, slot] = 1.0
                place, filled = place + own, filled + own + 1
            start = place
    kept = branches if branched else None
    # NumPy's arrays; a program that takes a batch sees JAX's.
    return Batch(tokens, segments, positions, at, targets, np.zeros_like(at), weights, kept)  # type: ignore[arg-type]


@partial(jax.jit, static_argnames=("model", "dtype", "attention"))
def target_scores(
    model: Model, params: Params, batch: Batch, dtype: str, attention: str
) -> tuple[Float[Array, "rows slots"], Bool[Array, "rows slots"]]:
    """Log-probability of each target and whether it is the likeliest token; the head sees targets
    alone, in chunks."""
    states = target_states(model, params, batch, dtype=jnp.dtype(dtype), attention=attention)
    rows, slots = batch.targets.shape
    groups = row_groups(rows)
    each = rows * slots // groups
    chunk = min(CHUNK, each)
    padding = ((0, 0), (0, -each % chunk))
    states = jnp.pad(states.reshape(groups, each, -1), (*padding, (0, 0)))
    states = states.reshape(groups, -1, chunk, states.shape[-1]).swapaxes(0, 1)
    labels = jnp.pad(batch.targets.reshape(groups, each), padding)
    labels = labels.reshape(groups, -1, chunk).swapaxes(0, 1)
    head = model.head(params)

    def one(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        states, labels = inputs
        kernel = head.astype(states.dtype)
        logits = jnp.dot(states, kernel, preferred_element_type=wide(states.dtype))
        logits = soft_capped(logits, model.config.logit_soft_cap)
        log_probs = picked(logits, labels) - jax.nn.logsumexp(logits, axis=-1)
        return log_probs, jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels

    def rowwise(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(groups, -1)[:, :each].reshape(rows, slots)

    log_probs, best = jax.lax.map(one, (states, labels))
    return rowwise(log_probs), rowwise(best)


def collect(
    layout: Sequence[Sequence[Tree]], log_probs: np.ndarray, best: np.ndarray
) -> list[Scored]:
    """Sums over the slots of each continuation of `lay_out`'s rows."""
    scored = []
    for row, members in enumerate(layout):
        filled = 0
        for tree in members:
            for index, tokens in zip(tree.indices, tree.branches, strict=True):
                slot = slice(filled, filled + len(tokens))
                total = float(log_probs[row, slot].sum(dtype=np.float64))
                scored.append(Scored(index, total, bool(best[row, slot].all())))
                filled += len(tokens)
    return scored
