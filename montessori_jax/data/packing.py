"""Encoded samples -> dense rows, several samples a row, with targets counted from lengths."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from montessori_jax.data.chat import EncodedChat


class Batch(NamedTuple):
    """Rows of packed samples and the tokens that the loss falls on.

    ``segment_ids`` is 0 on padding and 1, 2, ... for the samples of a row; ``positions`` restart
    at 0 in each sample. The hidden state at ``target_positions`` predicts ``targets``;
    ``target_samples`` says which sample of the batch (0, 1, ...) that token belongs to, and
    ``target_weights`` is 1 for a real target and 0 for a filler. A leading axis of micro-batches
    may precede ``rows``. ``branches``, where given, is 0 on a prompt and 1, 2, ... on responses
    that share it and do not see each other.
    """

    tokens: Int[Array, "rows length"]
    segment_ids: Int[Array, "rows length"]
    positions: Int[Array, "rows length"]
    target_positions: Int[Array, "rows slots"]
    targets: Int[Array, "rows slots"]
    target_samples: Int[Array, "rows slots"]
    target_weights: Float[Array, "rows slots"]
    branches: Int[Array, "rows length"] | None = None


def bucket(size: int, smallest: int = 16) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, 128, ... that holds ``size``.

    Two sizes an octave: a run compiles a handful of programs and pads by a third at worst.
    """
    power = smallest
    while power < size:
        if power * 3 // 2 >= size:
            return power * 3 // 2
        power *= 2
    return power


def shared_buckets(sizes: Sequence[int], worth: int) -> list[int]:
    """A bucketed length for each size; one that fewer than ``worth`` use joins the next longer one.

    So short runs compile one program, and long ones pad little.
    """
    chosen = [bucket(size) for size in sizes]
    counts = Counter(chosen)
    merged: dict[int, int] = {}
    lengths = sorted(counts)
    for size, larger in pairwise(lengths):
        if counts[size] < worth:
            merged[size] = larger
            counts[larger] += counts[size]

    def final(size: int) -> int:
        while size in merged:
            size = merged[size]
        return size

    return [final(size) for size in chosen]


def assign_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """First-fit decreasing: which samples share a row, as lists of indices into ``lengths``.

    Rows come in the order of their first sample and samples in the order given, so that the same
    lengths always give the same rows. Raises `ValueError` for a sample longer than a row.
    """
    free = np.zeros(len(lengths), np.int64)
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = lengths[index]
        if size > row_length:
            raise ValueError(f"sample {index} has {size} tokens, a row holds {row_length}")
        fits = free[: len(rows)] >= size
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            free[row] = row_length
        rows[row].append(index)
        free[row] -= size
    return sorted(sorted(row) for row in rows)


def count_targets(chat: EncodedChat) -> int:
    """Tokens of the response: what the loss falls on."""
    return len(chat.tokens) - chat.prompt_length


def pack(
    chats: Sequence[EncodedChat],
    layout: Sequence[Sequence[int]],
    *,
    row_length: int,
    slots: int | None = None,
    rows: int | None = None,
) -> Batch:
    """Lay samples out in rows; a target's weight comes from lengths, never from a token's value.

    Args:
        chats: encoded samples; sample ``i`` of the batch is ``chats[i]``.
        layout: for each row the indices of its samples (`assign_rows`), or ``[[0], [1], ...]``.
        row_length: tokens a row.
        slots: target slots a row; by default what the fullest row needs, bucketed.
        rows: pad with empty rows up to this many.

    Raises `ValueError` for samples that do not fit, and for one whose prompt is empty (nothing
    would predict its first token) or longer than the sample.
    """
    for members in layout:
        for index in members:
            if not 1 <= chats[index].prompt_length <= len(chats[index].tokens):
                raise ValueError(
                    f"sample {index} has {len(chats[index].tokens)} tokens, "
                    f"{chats[index].prompt_length} of them its prompt"
                )
    needed = max((sum(count_targets(chats[i]) for i in row) for row in layout), default=1)
    slots = bucket(needed) if slots is None else slots
    if needed > slots:
        raise ValueError(f"a row has {needed} targets, {slots} slots were asked for")
    rows = len(layout) if rows is None else rows
    if len(layout) > rows:
        raise ValueError(f"{len(layout)} rows do not fit in {rows}")

    def empty(width: int) -> np.ndarray:
        return np.zeros((rows, width), np.int32)

    tokens, segments, positions = empty(row_length), empty(row_length), empty(row_length)
    at, targets, samples = empty(slots), empty(slots), empty(slots)
    weights = np.zeros((rows, slots), np.float32)
    for row, members in enumerate(layout):
        start = filled = 0
        for segment, index in enumerate(members, start=1):
            chat = chats[index]
            size, count = len(chat.tokens), count_targets(chat)
            end = start + size
            if end > row_length:
                raise ValueError(f"row {row} needs over {row_length} tokens")
            tokens[row, start:end] = chat.tokens
            segments[row, start:end] = segment
            positions[row, start:end] = np.arange(size)
            slot = slice(filled, filled + count)
            at[row, slot] = np.arange(start + chat.prompt_length - 1, end - 1)
            targets[row, slot] = chat.tokens[chat.prompt_length :]
            samples[row, slot] = index
            weights[row, slot] = 1.0
            start, filled = end, filled + count
    # NumPy's arrays; a program that takes a batch sees JAX's.
    return Batch(tokens, segments, positions, at, targets, samples, weights)  # type: ignore[arg-type]
