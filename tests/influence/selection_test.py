"""Choosing rows: by hand, at the edges, and what holds whatever the rows are."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from montessori_jax.errors import UserError
from montessori_jax.generation.dedupe import rouge_l
from montessori_jax.influence import bounds, select

# Ranked: 2 (5.0), then 0 and 3 (2.0 each, the earlier first), 5 (0.5), 6 (-1.0).
VALUES = [2.0, None, 5.0, 2.0, math.nan, 0.5, -1.0]


@pytest.mark.parametrize(
    ("how", "places"),
    [
        ({"top_k": 2}, (2, 0)),
        ({"top_k": 99}, (2, 0, 3, 5, 6)),
        ({"top_k": 2, "lowest": True}, (6, 5)),
        ({"top_k": 4, "lowest": True}, (6, 5, 0, 3)),
        ({"threshold": 2.0}, (2, 0, 3)),
        ({"threshold": 0.5, "lowest": True}, (6, 5)),
        ({"threshold": 2.0, "top_k": 1}, (2,)),
        ({"threshold": 9.0}, ()),
        # Two fifths of five rows are two; a little more is three.
        ({"top_share": 0.4}, (2, 0)),
        ({"top_share": 0.41}, (2, 0, 3)),
        ({"top_share": 1.0}, (2, 0, 3, 5, 6)),
    ],
)
def test_by_hand(how, places):
    found = select(VALUES, **how)
    assert found.places == places
    assert found.skipped == 2


def test_a_share_is_counted_in_decimals():
    # In binary 0.1 * 30 is 3.0000000000000004 and 0.07 * 100 is 7.000000000000001.
    assert len(select(range(30), top_share=0.1).places) == 3
    assert len(select(range(100), top_share=0.07).places) == 7
    assert len(select(range(3), top_share=0.01).places) == 1


def test_groups_by_hand():
    groups = ["a", "a", "a", "b", "b", None, None]
    found = select([9, 8, 7, 6, 5, 4, 3], groups=groups, per_group=1)
    # The rows of no group are groups of their own.
    assert (found.places, found.crowded) == ((0, 3, 5, 6), 3)
    found = select([9, 8, 7, 6, 5, 4, 3], groups=groups, per_group=2, top_k=3)
    assert (found.places, found.crowded) == ((0, 1, 3), 1)


def test_near_duplicates_give_way_to_the_next():
    # Four words of five in common: F1 .8. The third shares one word of three.
    texts = ["one two three four five", "one two three four six", "one other thing", "Ärger  groß"]
    found = select([1, 4, 3, 2], texts=texts, spread=0.7, top_k=2)
    assert (found.places, found.alike) == ((1, 2), 0)
    found = select([3, 4, 2, 1], texts=texts, spread=0.7, top_k=2)
    assert (found.places, found.alike) == ((1, 2), 1)
    assert select([3, 4, 2, 1], texts=texts, spread=0.85).alike == 0
    # What ROUGE-L has no tokens for is still compared as it is.
    same = [*texts, "ärger GROSS", "写一首诗", "写一首诗"]
    found = select(range(7), texts=same, spread=1.0)
    assert (found.places, found.alike) == ((6, 4, 2, 1, 0), 2)


def test_bounds_by_hand():
    assert bounds([3.0, 3.0, None, 1.0], [1.0, None, 1.0, 0.0], 2.0) == [1.0, None, None, 1.0]
    assert bounds([3.0, -3.0], [1.0, 1.0], -2.0) == [5.0, -1.0]
    # By value the first is the best; what is sure of it is less than nothing.
    sure = bounds([3.0, 1.0], [2.0, 0.1], 2.0)
    assert select(sure, threshold=0.0).places == (1,)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({}, "nothing says how many"),
        ({"top_k": 1, "top_share": 0.5}, "give one of them"),
        ({"top_k": 0}, "top-k is 0"),
        ({"per_group": -1, "groups": [1]}, "per-group is -1"),
        ({"top_share": 0.0}, "top-share is 0.0"),
        ({"top_share": 1.5}, "top-share is 1.5"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"spread": 2.0, "texts": ["a"]}, "ROUGE-L threshold is 2.0"),
    ],
)
def test_what_cannot_be_is_one_line(how, words):
    with pytest.raises(UserError, match=words) as caught:
        select([1.0], **how)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", [{"per_group": 1}, {"spread": 0.7, "texts": ["a"]}])
def test_what_is_wanted_of_each_row_must_be_there(how):
    with pytest.raises(ValueError, match="one for each of the 2 values"):
        select([1.0, 2.0], **how)


ROWS = st.lists(
    st.tuples(
        st.none() | st.integers(-3, 3).map(float) | st.just(math.nan),
        st.none() | st.integers(0, 3),
        st.lists(st.sampled_from("abcd"), max_size=4).map(" ".join),
    ),
    max_size=14,
)
HOW = st.fixed_dictionaries(
    {"lowest": st.booleans()},
    optional={
        "top_k": st.integers(1, 8),
        "threshold": st.integers(-3, 3).map(float),
        "per_group": st.integers(1, 3),
        "spread": st.sampled_from([0.5, 0.7, 1.0]),
    },
)


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, how=HOW, seed=st.randoms(use_true_random=False))
def test_what_holds_for_any_rows(rows, how, seed):
    if len(how) == 1:
        how = {**how, "top_k": 5}
    values, groups, texts = ([row[i] for row in rows] for i in range(3))
    found = select(values, groups=groups, texts=texts, **how)
    sign = 1 if how["lowest"] else -1
    keys = [(sign * values[place], place) for place in found.places]
    assert keys == sorted(set(keys))
    assert len(keys) <= how.get("top_k", len(rows))
    usable = [i for i, value in enumerate(values) if value is not None and not math.isnan(value)]
    assert found.skipped == len(rows) - len(usable)
    members = [groups[place] for place in found.places if groups[place] is not None]
    assert all(members.count(group) <= how.get("per_group", 99) for group in members)
    # Every row that was left out had a reason: all that is better and chosen stood in its way.
    for place in set(usable) - set(found.places):
        key = (sign * values[place], place)
        better = [other for other, known in zip(found.places, keys, strict=True) if known < key]
        beyond = "threshold" in how and sign * values[place] > sign * how["threshold"]
        full = len(better) == how.get("top_k")
        taken = [groups[other] for other in better].count(groups[place])
        crowded = groups[place] is not None and taken == how.get("per_group")
        like = "spread" in how and any(
            texts[other] == texts[place] or rouge_l(texts[other], texts[place]) > how["spread"]
            for other in better
        )
        assert beyond or full or crowded or like
    # Rows of distinct values are chosen alike in any order.
    if len({values[i] for i in usable}) == len(usable):
        order = list(range(len(rows)))
        seed.shuffle(order)
        shuffled = select(
            [values[i] for i in order],
            groups=[groups[i] for i in order],
            texts=[texts[i] for i in order],
            **how,
        )
        assert tuple(order[place] for place in shuffled.places) == found.places
