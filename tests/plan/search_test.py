"""The search for the largest setting on memory functions that are known."""

import math
from collections.abc import Callable

import pytest

from montessori_jax.plan.search import TRIES, largest


def search(memory: Callable[[int], float], limit: float, start: int = 2, step: int = 1):
    """What is found, and what was measured on the way."""
    tried: list[int] = []

    def measure(value: int) -> float:
        assert value % step == 0
        tried.append(value)
        return memory(value)

    found = largest("sft.micro_batch", start, int(memory(start)), measure, limit, step=step)
    assert len(tried) == len(set(tried)) <= TRIES
    assert memory(found.value) == found.bytes <= limit
    return found, tried


@pytest.mark.parametrize("limit", [29, 30, 31, 47, 100])
def test_a_straight_line_is_followed_to_its_end(limit: int):
    found, tried = search(lambda n: 10 + 3 * n, limit)
    assert found.value == (limit - 10) // 3
    assert found.too_large == found.value + 1
    assert len(tried) <= 4


def test_a_guess_that_does_not_fit_is_not_the_end():
    """From 8 on a value needs more than the line says: neither 2 nor 4 is the answer."""

    def memory(n: int) -> float:
        return 10 + 3 * n + (40 if n >= 8 else 0)

    found, tried = search(memory, 60)
    assert 16 in tried
    assert (found.value, found.too_large) == (7, 8)


def test_what_the_compiler_refuses_without_a_number_is_halved():
    found, tried = search(lambda n: 10 + n if n <= 11 else math.inf, 1000)
    assert (found.value, found.too_large) == (11, 12)
    assert tried[0] == 4


def test_a_double_that_does_not_fit_leaves_what_lies_between():
    found, _ = search(lambda n: 10 * n, 75, start=4)
    assert (found.value, found.too_large) == (7, 8)


def test_lengths_are_whole_blocks():
    found, _ = search(lambda n: 500 + n, 3400, start=1024, step=128)
    assert (found.value, found.too_large) == (2816, 2944)


def test_memory_that_does_not_grow_ends_the_search():
    found, tried = search(lambda n: 7, 10)
    assert found.value == tried[-1] == 2 * 2**TRIES
    assert found.too_large is None


def test_nothing_larger_fits():
    found, tried = search(lambda n: 10 * n, 45, start=4)
    assert (found.value, found.too_large) == (4, 5)
    assert len(tried) <= 2


def test_nothing_beyond_what_is_of_use_is_tried():
    tried = []

    def measure(value: int) -> float:
        tried.append(value)
        return 3.0 * value

    found = largest("influence.block", 2, 6, measure, 1000, most=5)
    assert (found.value, found.too_large, found.enough) == (5, None, True)
    assert max(tried) == 5
    already = largest("influence.block", 5, 15, measure, 1000, most=5)
    assert (already.value, already.enough) == (5, True)
