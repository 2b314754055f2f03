"""K from memory, by hand."""

import numpy as np

from montessori_jax.influence import block_size
from montessori_jax.influence.memory import activation_bytes
from tests.influence.students import CONFIG


class Device:
    """A device with so many free bytes."""

    def __init__(self, free: int, platform: str = "gpu"):
        self.platform = platform
        self.free = free

    def memory_stats(self):
        return {"bytes_limit": self.free + 1000, "bytes_in_use": 1000}


def test_as_many_as_fit():
    # A lane: 3 copies of 400 bytes and 800 of activations, 2,000 in all; 80% of the free bytes.
    params = {"w": np.zeros(100, np.float32)}
    assert block_size(params, 800, device=Device(10_000)) == 4
    assert block_size(params, 800, device=Device(100)) == 1
    assert block_size(params, 800, device=Device(10**9)) == 16


def test_one_on_a_cpu():
    params = {"w": np.zeros(100, np.float32)}
    assert block_size(params) == 1
    assert block_size(params, device=Device(10**9, "cpu")) == 1


def test_activations_grow_with_rows_and_faster_with_length():
    one = activation_bytes(CONFIG, 1, 64)
    assert activation_bytes(CONFIG, 4, 64) == 4 * one
    assert activation_bytes(CONFIG, 1, 128) > 2 * one
