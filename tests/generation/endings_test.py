"""Endings of texts: stop strings within and across tokens, ends of turn, cut characters."""

from collections.abc import Sequence

import pytest

from montessori_jax.generation.endings import Ending, find_ending

PIECES = ["<s>", "</s>", "he", "l", "lo", " wor", "ld", "\n", "lo w", "STOP now", "\u00e9"]
END = 1


def decode(tokens: Sequence[int]) -> str:
    return "".join(PIECES[token] for token in tokens if token > END)


def ending(tokens: list[int], *stop: str, limit: int = 99) -> Ending | None:
    return find_ending(tokens, decode, stop_ids={END}, stop=stop, limit=limit)


HELLO = [2, 3, 4, 5, 6, 7]  # he l lo _wor ld \n


def test_a_text_goes_on_until_something_ends_it():
    assert ending(HELLO) is None
    assert ending(HELLO, "zebra", "") is None
    assert ending([]) is None


@pytest.mark.parametrize(
    ("stop", "used", "text"),
    [
        ("\n", 6, "hello world"),  # a token of its own
        ("o w", 4, "hell"),  # its end is in the middle of a token
        ("hello", 3, ""),  # from the very start, over three tokens
        ("l", 2, "he"),  # the first of several
        ("world\n", 6, "hello "),
    ],
)
def test_a_stop_string_and_what_follows_are_left_out(stop: str, used: int, text: str):
    assert ending(HELLO, stop) == Ending(used, text, "stop", stop)
    # However much is written before one looks.
    assert ending(HELLO[:used], stop) == Ending(used, text, "stop", stop)
    assert ending(HELLO[: used - 1], stop) is None


def test_the_stop_string_completed_first_counts():
    # "lo wo" begins before "o" but is complete only a token later.
    assert ending(HELLO, "lo wo", "o") == Ending(3, "hell", "stop", "o")
    assert ending(HELLO, "o", "lo wo") == Ending(3, "hell", "stop", "o")


def test_of_two_completed_by_one_token_the_leftmost_then_the_longest_counts():
    assert ending([2, 9], "now", "STOP") == Ending(2, "he", "stop", "STOP")
    assert ending([2, 9], "ST", "STOP n") == Ending(2, "he", "stop", "STOP n")


def test_the_end_of_the_turn_is_no_text_but_a_token():
    assert ending([2, 3, END, 4, 4]) == Ending(3, "hel", "end")
    assert ending([END]) == Ending(1, "", "end")


def test_what_comes_first_ends_it():
    assert ending([2, END, 9], "STOP") == Ending(2, "he", "end")
    assert ending([9, END, 2], "STOP") == Ending(1, "", "stop", "STOP")


def test_the_limit():
    assert ending(HELLO, limit=6) == Ending(6, "hello world\n", "length")
    assert ending(HELLO, limit=7) is None
    # What comes with the last token is what it is.
    assert ending([*HELLO[:5], END], limit=6) == Ending(6, "hello world", "end")
    assert ending(HELLO, "\n", limit=6) == Ending(6, "hello world", "stop", "\n")


def by_bytes(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def in_bytes(text: str, *stop: str, cut: int = 0, limit: int = 99) -> Ending | None:
    tokens = list(text.encode())[: -cut or None]
    return find_ending(tokens, by_bytes, stop_ids=(), stop=stop, limit=limit)


def test_characters_of_several_tokens():
    assert in_bytes("ab\u20acc", "\u20ac") == Ending(5, "ab", "stop", "\u20ac")
    assert in_bytes("ab\u20ac", "\u20ac", cut=1) is None


def test_a_character_cut_off_by_the_limit_is_left_out():
    assert in_bytes("ab\U0001f600", cut=1, limit=5) == Ending(5, "ab", "length")
    assert in_bytes("ab\U0001f600", limit=6) == Ending(6, "ab\U0001f600", "length")
