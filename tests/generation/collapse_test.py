"""When a stage stops for want of yield, and what it then tells the user to change."""

from typing import Any

import pytest

from montessori_jax.errors import UserError
from montessori_jax.generation import filters
from montessori_jax.generation.collapse import check_yield
from montessori_jax.generation.filters import FilterReport, Verdict


def report(kept: int, **counts: int) -> FilterReport:
    verdicts = [Verdict("fine", None)] * kept
    for cause, count in counts.items():
        verdicts += [Verdict(f"text of\n{cause}", cause)] * count
    return FilterReport.of(verdicts)


def message(given: FilterReport, **settings: Any) -> str:
    options: dict[str, Any] = {"floor": 0.5, "min_attempts": 8, "style": "turns"} | settings
    with pytest.raises(UserError) as caught:
        check_yield(given, **options)
    return str(caught.value)


def test_no_stop_before_enough_attempts_nor_at_the_floor() -> None:
    check_yield(report(0, no_tags=7), floor=0.5, min_attempts=8, style="chat")
    check_yield(report(4, no_tags=4), floor=0.5, min_attempts=8, style="chat")
    check_yield(FilterReport(), floor=0.5, min_attempts=0, style="chat")
    assert message(report(3, no_tags=5))


def test_the_line_has_counts_an_example_and_a_setting() -> None:
    assert message(report(1, no_tags=28, truncated=2, keyword=1), style="chat") == (
        "the teacher's yield collapsed: 1 of 32 texts kept, 3.1% where 50.0% is the least "
        "(no_tags 28, truncated 2, keyword 1); "
        'for example no_tags: "text of no_tags"; '
        "small models follow examples better than descriptions: "
        "set generation.style to turns instead of chat"
    )


def test_long_examples_are_cut_and_kept_on_one_line() -> None:
    given = FilterReport.of([Verdict('a "b"\n' * 100, "truncated")] * 8)
    line = message(given)
    assert "\n" not in line
    assert "..." in line
    assert len(line) < 400


@pytest.mark.parametrize(
    ("counts", "settings", "advice"),
    [
        # Gibberish under a repetition penalty runs into the length limit, in any style.
        ({"truncated": 32}, {"repetition_penalty": 1.5}, "repetition_penalty from 1.5 to 1"),
        ({"no_tags": 32}, {"repetition_penalty": 1.1, "style": "chat"}, "repetition_penalty from"),
        ({"truncated": 32}, {"max_tokens": 64}, "max_tokens above 64"),
        ({"truncated": 32}, {}, "raise generation.max_tokens"),
        ({"no_closing_tag": 20, "truncated": 12}, {"style": "chat"}, "style to turns"),
        ({"nested_tags": 32}, {"style": "turns"}, "lower generation.temperature"),
        ({"near_duplicate": 30, "no_tags": 2}, {"repetition_penalty": 1.5}, "raise generation.te"),
        # Half of the rejected failed to parse, in several ways: parsing is the problem.
        ({"keyword": 8, "no_tags": 5, "truncated": 3}, {"style": "chat"}, "style to turns"),
    ],
)
def test_the_setting_that_usually_helps(
    counts: dict[str, int], settings: dict[str, Any], advice: str
) -> None:
    assert advice in message(report(0, **counts), **settings)


@pytest.mark.parametrize("cause", list(filters.CAUSES))
def test_every_cause_has_advice_that_names_a_setting(cause: str) -> None:
    line = message(report(0, **{cause: 10}))
    assert f"({cause} 10)" in line
    assert "generation." in line
