"""Which samples a step takes and how they are laid out."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from montessori_jax.data.packing import bucket, shared_buckets
from montessori_jax.training.batches import Shape, plan_steps, stack, step_samples


def test_every_epoch_takes_every_sample_once_in_its_own_order() -> None:
    steps = step_samples(seed=1, samples=10, batch_size=4, epochs=3)
    assert [len(step) for step in steps] == [4, 4, 2] * 3
    epochs = [list(chain(*steps[at : at + 3])) for at in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_is_keyed_by_seed_and_epoch_alone() -> None:
    assert step_samples(1, 10, 4, 3)[:3] == step_samples(1, 10, 4, 1)
    assert step_samples(1, 10, 4, 1) != step_samples(2, 10, 4, 1)
    assert list(chain(*step_samples(1, 10, 4, 1))) == list(chain(*step_samples(1, 10, 3, 1)))


def test_rare_row_lengths_are_merged_upwards() -> None:
    # Buckets 16 (three steps), 24 (one) and 32 (four).
    longest = [10, 20, 30, 30, 12, 30, 30, 16]
    assert shared_buckets(longest, worth=1) == [16, 24, 32, 32, 16, 32, 32, 16]
    assert shared_buckets(longest, worth=2) == [16, 32, 32, 32, 16, 32, 32, 16]
    # 16 goes to 24, which now serves four steps and stays.
    assert shared_buckets(longest, worth=4) == [24, 24, 32, 32, 24, 32, 32, 24]
    assert shared_buckets(longest, worth=5) == [32] * 8
    # The longest has nowhere to go, however rare.
    assert shared_buckets([100], worth=16) == [128]


def test_plan_by_hand() -> None:
    lengths, targets = [10, 6, 16, 5, 3], [4, 2, 8, 1, 1]
    first, second = plan_steps(
        [[0, 1, 2], [4, 3]], lengths, targets, micro_batch=2, share_rows=True
    )
    # Rows of 16: 10 + 6 share one, 16 fills one; 5 + 3 share one.
    assert first.micro_batches == (((0, 1), (2,)),)
    assert second.micro_batches == (((4, 3),),)
    assert first.shape == second.shape == Shape(1, 2, 16, 16)
    alone = plan_steps([[0, 1, 2], [4, 3]], lengths, targets, micro_batch=2, share_rows=False)
    assert alone[0].micro_batches == (((0,), (1,)), ((2,),))
    assert alone[0].shape == alone[1].shape == Shape(2, 2, 16, 16)


def test_a_shape_is_no_larger_than_its_steps_need() -> None:
    (plan,) = plan_steps([[0]], [300], [40], micro_batch=8, share_rows=True)
    assert plan.shape == Shape(1, 1, 384, 48)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 90), min_size=1, max_size=40),
    batch=st.integers(1, 9),
    micro=st.integers(1, 4),
    share=st.booleans(),
    worth=st.integers(1, 20),
)
def test_every_plan_holds_its_step_and_fits_its_shape(
    lengths: list[int], batch: int, micro: int, share: bool, worth: int
) -> None:
    targets = [size // 2 for size in lengths]
    steps = step_samples(0, len(lengths), batch, 2)
    plans = plan_steps(steps, lengths, targets, micro, share_rows=share, worth=worth)
    assert len(plans) == len(steps)
    for step, plan in zip(steps, plans, strict=True):
        shape = plan.shape
        rows = [row for part in plan.micro_batches for row in part]
        assert sorted(i for row in rows for i in row) == sorted(step)
        assert len(plan.micro_batches) <= shape.micro_batches
        assert all(0 < len(part) <= shape.rows <= micro for part in plan.micro_batches)
        assert all(sum(lengths[i] for i in row) <= shape.row_length for row in rows)
        assert all(sum(targets[i] for i in row) <= shape.slots for row in rows)
        assert share or all(len(row) == 1 for row in rows)
    counts = Counter(plan.shape for plan in plans)
    largest = bucket(max(lengths))
    assert all(n >= worth or shape.row_length == largest for shape, n in counts.items())


def test_stacking_puts_fillers_last() -> None:
    plans = plan_steps([[0, 1, 2], [3]], [16] * 4, [4] * 4, micro_batch=1, share_rows=True)

    def pack_rows(rows: Sequence[Sequence[int]], shape: Shape) -> np.ndarray:
        made = np.full(shape.rows, -1)
        for at, row in enumerate(rows):
            made[at] = row[0]
        return made

    np.testing.assert_array_equal(stack(plans[0], pack_rows), [[0], [1], [2]])
    np.testing.assert_array_equal(stack(plans[1], pack_rows), [[3], [-1], [-1]])


def test_a_longer_sample_never_fits_a_shorter_row() -> None:
    with pytest.raises(ValueError, match="max"):
        plan_steps([[]], [3], [1], 1, share_rows=True)
