"""Verdicts, both orders, ties: against numbers derived by hand."""

import math

import pytest

from montessori_jax.errors import UserError
from montessori_jax.evaluation.judge_prompts import JudgePrompt, fill
from montessori_jax.evaluation.pairwise import (
    OWN_PROMPT,
    both_orders,
    mean_with_error,
    outcome,
    read_verdict,
    summarise_pairs,
)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Both are fine. [[A]]", "A"),
        ("[[B]]\nB it is: [[B]]", "B"),
        ("equal\n[[C]]", "tie"),
        ("A is better", None),
        ("[A]", None),
        # What the prompt asked for, repeated: no verdict.
        ('"[[A]]" if A is better, "[[B]]" if B is better, "[[C]]" for a tie', None),
        ("", None),
    ],
)
def test_a_verdict_is_read_only_where_there_is_one(text, verdict):
    assert read_verdict(text) == verdict


def test_an_answer_wins_only_in_both_orders():
    assert outcome("A", "B") == "win"
    assert outcome("B", "A") == "loss"
    # The same place both times, a tie, a win and a tie: no agreement, a tie.
    for pair in [("A", "A"), ("B", "B"), ("tie", "tie"), ("A", "tie"), ("tie", "A")]:
        assert outcome(*pair) == "tie"
    assert outcome(None, "B") is None
    assert outcome("A", None) is None


def test_win_rate_ties_and_the_first_place_by_hand():
    compared = [
        ("A", "B"),  # won
        ("A", "B"),  # won
        ("B", "A"),  # lost
        ("A", "A"),  # the first place both times: a tie
        ("tie", "tie"),  # a tie
        None,  # equal answers: a tie that no one was asked about
        (None, "B"),  # left out
    ]
    found = summarise_pairs(compared)
    # (2 wins + 3 ties / 2) / 6 judged
    assert found.win_rate == pytest.approx(100 * 3.5 / 6)
    assert (found.wins, found.losses, found.ties, found.judged) == (2, 1, 3, 6)
    assert (found.identical, found.inconsistent, found.unparseable) == (1, 1, 1)
    # Verdicts that name a place: A B, A B, B A, A A, and B of the pair left out: 5 A of 9.
    assert found.first_place_rate == pytest.approx(100 * 5 / 9)
    mean = 3.5 / 6
    squares = 2 * (1 - mean) ** 2 + mean**2 + 3 * (0.5 - mean) ** 2
    assert found.standard_error == pytest.approx(100 * math.sqrt(squares / 5 / 6))
    other = found.reversed()
    assert other.win_rate == pytest.approx(100 - found.win_rate)
    assert (other.wins, other.losses, other.ties) == (1, 2, 3)
    swapped = summarise_pairs([pair and (pair[1], pair[0]) for pair in compared])
    assert (swapped.win_rate, swapped.standard_error) == pytest.approx(
        (other.win_rate, other.standard_error)
    )


def test_without_a_verdict_there_is_no_rate():
    found = summarise_pairs([(None, None), ("A", None)])
    assert (found.win_rate, found.standard_error, found.judged) == (None, None, 0)
    assert found.unparseable == 2
    assert found.reversed().win_rate is None
    assert summarise_pairs([("A", "B")]).standard_error is None


def test_an_error_over_clusters_is_that_of_their_means():
    values = [1.0, 3.0, 2.0, 6.0, 5.0, 5.0]
    mean, error = mean_with_error(values, ["x", "x", "y", "y", "z", "z"])
    means = [2.0, 4.0, 5.0]
    average = sum(means) / 3
    spread = sum((one - average) ** 2 for one in means) / 2
    assert mean == pytest.approx(average)
    assert error == pytest.approx(math.sqrt(spread / 3))
    alone = mean_with_error(values)[1]
    assert alone == pytest.approx(mean_with_error(values, range(6))[1])
    assert mean_with_error([]) == (None, None)


def test_both_orders_differ_in_nothing_but_the_places():
    first, second = both_orders(OWN_PROMPT, {"": "mine"}, {"": "yours"}, {"question": "why?"})
    text = first[-1]["content"]
    assert text.index("mine") < text.index("yours")
    swapped = text.replace("mine", "#").replace("yours", "mine").replace("#", "yours")
    assert second[-1]["content"] == swapped
    assert first[0] == second[0]


def test_what_is_filled_in_is_not_filled_in_again():
    prompt = JudgePrompt("p", "", "{question} / {answer}")
    (message,) = fill(prompt, {"question": "{answer}", "answer": "{question} {x} {}"})
    assert message == {"role": "user", "content": "{answer} / {question} {x} {}"}
    with pytest.raises(UserError, match=r"judge prompt p: unknown field \{answer\}"):
        fill(prompt, {"question": "q"})
