"""Blocks: each candidate through the same function, empty blocks through none."""

import jax
import jax.numpy as jnp
import numpy as np

from montessori_jax.influence.blocks import map_blocks, stack_blocks


def test_rows_lie_where_they_are_looked_for():
    rows = [{"x": np.array([i, -i])} for i in range(5)]
    data, filled = stack_blocks(rows, 2, 4)
    assert data["x"].shape == (4, 2, 2)
    for i in range(5):
        np.testing.assert_array_equal(data["x"][i // 2, i % 2], rows[i]["x"])
    np.testing.assert_array_equal(filled, [True, True, True, False])


def test_blocks_without_candidates_are_not_run():
    calls = []

    def one(_, x):
        jax.debug.callback(lambda value: calls.append(float(value)), x)
        return x * 2

    data, filled = stack_blocks([np.float32(1), np.float32(2), np.float32(3)], 1, 5)
    found = jax.jit(lambda data, filled: map_blocks(one, (), data, filled))(data, filled)
    jax.effects_barrier()
    np.testing.assert_array_equal(found[:, 0], [2, 4, 6, 0, 0])
    assert sorted(calls) == [1.0, 2.0, 3.0]


def test_lanes_share_what_is_shared():
    weights = jnp.arange(3.0)
    data, filled = stack_blocks([np.full(3, i, np.float32) for i in range(4)], 2, 2)
    found = map_blocks(jnp.dot, weights, data, filled)
    np.testing.assert_array_equal(found, [[0, 3], [6, 9]])
