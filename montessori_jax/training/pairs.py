"""Preference pairs as token ids, and as rows in which the two responses share their prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from montessori_jax.data.chat import EncodedChat, fit
from montessori_jax.data.packing import Batch, count_targets


@dataclass(frozen=True)
class EncodedPair:
    """One prompt with a chosen and a rejected response; both chats begin with the same prompt."""

    id: str
    chosen: EncodedChat
    rejected: EncodedChat

    def __post_init__(self) -> None:
        size = self.chosen.prompt_length
        if size != self.rejected.prompt_length or not np.array_equal(
            self.chosen.tokens[:size], self.rejected.tokens[:size]
        ):
            raise ValueError(f"pair {self.id}: the two responses have different prompts")

    @property
    def length(self) -> int:
        """Tokens of the row: prompt, chosen and rejected response."""
        return len(self.chosen.tokens) + count_targets(self.rejected)

    @property
    def targets(self) -> int:
        """Tokens of both responses."""
        return count_targets(self.chosen) + count_targets(self.rejected)


def fit_pair(pair: EncodedPair, max_length: int) -> EncodedPair | None:
    """The pair with both responses cut at ``max_length``; None if that leaves nothing of one."""
    chosen, rejected = fit(pair.chosen, max_length), fit(pair.rejected, max_length)
    if chosen is None or rejected is None:
        return None
    return EncodedPair(pair.id, chosen, rejected)


class PairBatch(NamedTuple):
    """A pair a row; ``batch.target_samples`` is ``2 row + 0`` on chosen tokens, ``+ 1`` on others.

    ``reference`` has the reference model's log-prob of each target.
    """

    batch: Batch
    reference: Float[Array, "rows slots"]


def pack_pairs(
    pairs: Sequence[EncodedPair],
    reference: Sequence[np.ndarray] | None = None,
    *,
    row_length: int,
    slots: int,
    rows: int,
) -> PairBatch:
    """Rows ``prompt | chosen response | rejected response``, padded with empty rows to ``rows``.

    Positions of the rejected response go on from the prompt, its first token is predicted by the
    prompt's last, and `Batch.branches` keeps it from seeing the chosen one: the log-probs are
    those of two separate rows, and the prompt is computed once.

    Args:
        pairs: at most ``rows`` of them.
        reference: for each pair the log-probs of its targets, chosen's then rejected's; zeros if
            left out.
        row_length: tokens a row, at least each pair's ``length``.
        slots: target slots a row, at least each pair's ``targets``.
        rows: rows of the batch.
    """
    if len(pairs) > rows:
        raise ValueError(f"{len(pairs)} pairs do not fit in {rows} rows")

    # Any, as jit takes host arrays where device arrays are declared.
    def empty(width: int, dtype: type = np.int32) -> Any:
        return np.zeros((rows, width), dtype)

    branches = empty(row_length)
    batch = Batch(
        tokens=empty(row_length),
        segment_ids=empty(row_length),
        positions=empty(row_length),
        target_positions=empty(slots),
        targets=empty(slots),
        target_samples=empty(slots),
        target_weights=empty(slots, np.float32),
        branches=branches,
    )
    log_probs = empty(slots, np.float32)
    for row, pair in enumerate(pairs):
        if pair.length > row_length or pair.targets > slots:
            raise ValueError(f"pair {pair.id} does not fit in a row of {row_length} and {slots}")
        prompt = pair.chosen.prompt_length
        start, filled = prompt, 0
        batch.tokens[row, :prompt] = pair.chosen.tokens[:prompt]
        batch.positions[row, :prompt] = np.arange(prompt)
        batch.segment_ids[row, : pair.length] = 1
        for branch, chat in enumerate((pair.chosen, pair.rejected)):
            count = count_targets(chat)
            at, slot = slice(start, start + count), slice(filled, filled + count)
            batch.tokens[row, at] = chat.tokens[prompt:]
            batch.positions[row, at] = prompt + np.arange(count)
            branches[row, at] = branch + 1
            # Token k of a response is predicted at token k - 1, its first at the prompt's last.
            batch.target_positions[row, slot] = start - 1 + np.arange(count)
            batch.target_positions[row, slot][:1] = prompt - 1
            batch.targets[row, slot] = chat.tokens[prompt:]
            batch.target_samples[row, slot] = 2 * row + branch
            batch.target_weights[row, slot] = 1.0
            start, filled = start + count, filled + count
        if reference is not None:
            log_probs[row, :filled] = reference[row]
    return PairBatch(batch, log_probs)
