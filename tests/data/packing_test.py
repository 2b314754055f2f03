"""Where samples lie in rows and which tokens the loss falls on, by hand and for random lengths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from montessori_jax.data.chat import EncodedChat
from montessori_jax.data.packing import assign_rows, bucket, count_targets, pack, shared_buckets


def chat(tokens: list[int], prompt_length: int) -> EncodedChat:
    return EncodedChat(np.asarray(tokens, np.int32), prompt_length)


def test_by_hand():
    chats = [chat([11, 12, 13], 1), chat([21, 22, 23, 24], 3), chat([31, 32], 1)]
    batch = pack(chats, [[0, 1], [2]], row_length=8, slots=4, rows=3)
    np.testing.assert_array_equal(
        batch.tokens, [[11, 12, 13, 21, 22, 23, 24, 0], [31, 32, 0, 0, 0, 0, 0, 0], [0] * 8]
    )
    np.testing.assert_array_equal(
        batch.segment_ids, [[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0] * 8]
    )
    np.testing.assert_array_equal(
        batch.positions, [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 0, 0, 0, 0, 0, 0], [0] * 8]
    )
    # The state at 0 predicts 12, the one at 1 predicts 13; in the second sample 23 predicts 24.
    np.testing.assert_array_equal(batch.target_positions, [[0, 1, 5, 0], [0, 0, 0, 0], [0] * 4])
    np.testing.assert_array_equal(batch.targets, [[12, 13, 24, 0], [32, 0, 0, 0], [0] * 4])
    np.testing.assert_array_equal(batch.target_samples, [[0, 0, 1, 0], [2, 0, 0, 0], [0] * 4])
    np.testing.assert_array_equal(batch.target_weights, [[1, 1, 1, 0], [1, 0, 0, 0], [0] * 4])
    assert batch.branches is None
    assert {array.dtype for array in batch[:6]} == {np.dtype(np.int32)}
    assert batch.target_weights.dtype == np.float32


def test_weights_come_from_lengths_and_never_from_a_token():
    """A response of zeros, the value that padding has too, counts in full."""
    batch = pack([chat([0, 0, 0, 0], 1)], [[0]], row_length=8)
    assert batch.target_weights.sum() == 3


lengths = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 29)), min_size=1, max_size=30)


@given(lengths)
@settings(deadline=None)
def test_every_token_and_every_target_lies_somewhere_once(pairs: list[tuple[int, int]]):
    chats = [
        chat([1000 * index + at for at in range(size)], min(size, 1 + cut))
        for index, (size, cut) in enumerate(pairs)
    ]
    layout = assign_rows([len(c.tokens) for c in chats], 32)
    assert sorted(index for row in layout for index in row) == list(range(len(chats)))
    batch = pack(chats, layout, row_length=32)
    held = batch.segment_ids > 0
    assert sorted(batch.tokens[held]) == sorted(t for c in chats for t in c.tokens)
    assert np.array_equal(batch.tokens[held] % 1000, batch.positions[held])
    for row in range(len(layout)):
        assert np.all(np.diff(batch.tokens[row][held[row]] // 1000 != 0) <= 1)
        owners = batch.tokens[row][held[row]] // 1000
        segments = batch.segment_ids[row][held[row]]
        assert (
            len(set(zip(owners, segments, strict=True))) == len(set(segments)) == len(layout[row])
        )
    real = batch.target_weights > 0
    rows = np.nonzero(real)[0]
    predicting = batch.tokens[rows, batch.target_positions[real]]
    assert np.array_equal(predicting + 1, batch.targets[real])  # the token just before its target
    assert np.array_equal(batch.targets[real] // 1000, batch.target_samples[real])
    counts = np.bincount(batch.target_samples[real], minlength=len(chats))
    assert list(counts) == [count_targets(c) for c in chats]


def test_rows_are_filled_first_fit_from_the_longest():
    # 9 opens a row of 10; 6 another; 5 a third; 4 joins 6; 3 joins 5; 1 joins 9; 1 joins 5 + 3.
    assert assign_rows([1, 3, 9, 4, 5, 6, 1], 10) == [[0, 2], [1, 4, 6], [3, 5]]


@given(st.lists(st.integers(1, 64), max_size=60))
@settings(deadline=None)
def test_rows_hold_what_fits_and_no_two_could_be_one(sizes: list[int]):
    rows = assign_rows(sizes, 64)
    loads = [sum(sizes[index] for index in row) for row in rows]
    assert all(load <= 64 for load in loads)
    assert all(row == sorted(row) for row in rows)
    assert rows == sorted(rows)
    # First fit leaves at most one row half empty.
    assert sum(load * 2 <= 64 for load in loads) <= 1


def test_errors_name_the_sample():
    with pytest.raises(ValueError, match="sample 1 has 11 tokens, a row holds 10"):
        assign_rows([3, 11], 10)
    with pytest.raises(ValueError, match="row 0 needs over 4 tokens"):
        pack([chat([1, 2, 3], 1), chat([1, 2], 1)], [[0, 1]], row_length=4)
    with pytest.raises(ValueError, match="a row has 2 targets, 1 slots"):
        pack([chat([1, 2, 3], 1)], [[0]], row_length=4, slots=1)
    with pytest.raises(ValueError, match="2 rows do not fit in 1"):
        pack([chat([1, 2], 1)] * 2, [[0], [1]], row_length=4, rows=1)
    with pytest.raises(ValueError, match="sample 0 has 2 tokens, 0 of them its prompt"):
        pack([chat([1, 2], 0)], [[0]], row_length=4)
    with pytest.raises(ValueError, match="sample 0 has 2 tokens, 3 of them its prompt"):
        pack([chat([1, 2], 3)], [[0]], row_length=4)


def test_buckets_by_hand():
    assert [bucket(n) for n in (0, 1, 16, 17, 24, 25, 32, 33, 49, 65, 97, 1024, 1025)] == [
        16, 16, 16, 24, 24, 32, 32, 48, 64, 96, 128, 1024, 1536,
    ]  # fmt: skip


@given(st.integers(17, 100_000))
def test_buckets_hold_and_waste_a_third_at_most(size: int):
    assert size <= bucket(size) <= 1.5 * size
    assert (bucket(size) - size) / bucket(size) < 1 / 3


def test_rare_buckets_join_the_next_longer_one():
    # Buckets 16 (once), 24 (three times) and 32 (once).
    sizes = [10, 20, 21, 22, 30]
    assert shared_buckets(sizes, worth=1) == [16, 24, 24, 24, 32]
    assert shared_buckets(sizes, worth=2) == [24, 24, 24, 24, 32]  # the longest stays
    assert shared_buckets(sizes, worth=5) == [32] * 5
    assert shared_buckets([], worth=3) == []
