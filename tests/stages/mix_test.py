"""How much of each iteration's rows a mixture has."""

import pytest

from montessori_jax.stages.mix import fair_shares


@pytest.mark.parametrize(
    ("sizes", "room", "shares"),
    [
        ({"a": 9, "b": 9}, 10, {"a": 5, "b": 5}),
        ({"a": 9, "b": 2}, 10, {"a": 8, "b": 2}),
        ({"a": 2, "b": 2}, 10, {"a": 2, "b": 2}),
        ({"a": 9, "b": 9, "c": 1}, 10, {"a": 4, "b": 5, "c": 1}),
        ({"a": 9}, 0, {"a": 0}),
    ],
)
def test_shares_are_as_equal_as_sizes_let_them_be(sizes, room, shares):
    assert fair_shares(sizes, room) == shares
