"""Each filter alone, their order, and the counts."""

import json
from dataclasses import asdict
from typing import Any

import pytest

from montessori_jax.config import FilterConfig
from montessori_jax.errors import UserError
from montessori_jax.generation.filters import (
    CAUSES,
    FilterReport,
    FilterSettings,
    InstructionFilter,
    Verdict,
)
from montessori_jax.generation.parsing import Parsed

SEED = "Explain why the sky is blue to a child"
DEFAULT = FilterSettings()


def parsed(text: str) -> Parsed:
    return Parsed(f"raw of {text}", text, None)


def judged(text: str, settings: FilterSettings = DEFAULT) -> Verdict:
    return InstructionFilter(settings, [SEED]).judge(parsed(text))


@pytest.mark.parametrize(
    ("text", "cause", "detail"),
    [
        ("Name birds", "too_short", "2 words"),
        ("Name three birds", None, ""),
        (" ".join(["word"] * 150), None, ""),
        (" ".join(["word"] * 151), "too_long", "151 words"),
        ("Describe this Image in detail", "keyword", "Image"),
        ("Go\n to the nearest shop", "keyword", "Go\n to"),
        ("Imagine a profile of a paragraph-long mapping", None, ""),
        ("List the charted isles; list them all", None, ""),
        ("- name three birds", "punctuation_start", "-"),
        ('"To be or not" is from which play?', "punctuation_start", '"'),
        ("Écris un poème sur la mer", "non_ascii_start", "É"),
        ("3 birds that cannot fly?", None, ""),
        (SEED, "exact_duplicate", ""),
        ("explain  why the sky\nis BLUE to a child", "exact_duplicate", ""),
        # 9 shared tokens of 9 and 10: 2 * 9 / 19 = 0.947.
        (SEED + " again", "near_duplicate", f"ROUGE-L 0.947 with: {SEED}"),
        ("Explain how tides work to a sailor", None, ""),
    ],
)
def test_each_filter(text: str, cause: str | None, detail: str) -> None:
    assert judged(text) == Verdict(text, cause, detail)


def test_parse_failures_keep_their_cause_and_their_raw_text() -> None:
    verdict = InstructionFilter(FilterSettings()).judge(Parsed("the raw text", None, "truncated"))
    assert verdict == Verdict("the raw text", "truncated", "")
    assert not verdict.kept


def test_the_first_filter_that_objects_gives_the_cause() -> None:
    known = InstructionFilter(FilterSettings(), ["- map it", "- draw me the blue sky above"])
    order = [
        ("- map", "too_short"),
        ("- draw me the blue sky above", "keyword"),
        ("- show me the blue sky above", "punctuation_start"),
    ]
    for text, cause in order:
        assert known.judge(parsed(text)).cause == cause


def test_settings_switch_each_filter_off() -> None:
    assert judged("Name birds", FilterSettings(min_words=2)).kept
    assert judged("word " * 151, FilterSettings(max_words=151)).kept
    assert judged("Describe this image", FilterSettings(keywords=())).kept
    assert judged("Say c++ out loud now", FilterSettings(keywords=("c++",))).cause == "keyword"
    assert judged("Say c++11 out loud now", FilterSettings(keywords=("c++",))).kept
    assert judged("- name three birds", FilterSettings(allow_punctuation_start=True)).kept
    assert judged("写一首 关于 秋天 的诗", FilterSettings(allow_non_ascii_start=True)).kept
    assert judged(SEED + " again", FilterSettings(rouge_threshold=1.0)).kept
    assert judged(SEED, FilterSettings(rouge_threshold=1.0)).cause == "exact_duplicate"


def test_texts_without_latin_letters_are_only_compared_exactly() -> None:
    # ROUGE-L's tokenizer sees nothing in them, so their score is 0.
    judge = InstructionFilter(FilterSettings(allow_non_ascii_start=True), ["写一首 关于 秋天 的诗"])
    assert judge.judge(parsed("写一首 关于 秋天 的诗")).cause == "exact_duplicate"
    assert judge.judge(parsed("写一首 关于 秋天 的诗。")).kept


def test_kept_texts_count_against_those_that_follow() -> None:
    judge = InstructionFilter(FilterSettings(), [SEED])
    first = "Describe the life of a honey bee in spring"
    near = "Describe the life of a honey bee in autumn"
    assert judge.judge(parsed(near)).kept
    assert judge.offer(parsed(first)).kept
    assert len(judge) == 2
    verdict = judge.offer(parsed(near))
    # 8 of 9 tokens on both sides: 2 * 8 / 18 = 0.889.
    assert verdict == Verdict(near, "near_duplicate", f"ROUGE-L 0.889 with: {first}")
    assert len(judge) == 2
    rebuilt = InstructionFilter(FilterSettings(), [SEED, first])
    assert rebuilt.judge(parsed(near)) == verdict


def test_settings_carry_over_every_field_of_the_configuration() -> None:
    assert FilterSettings.of(FilterConfig()) == FilterSettings()
    changed: dict[str, Any] = {
        "min_words": 1,
        "max_words": 9,
        "keywords": ("sea",),
        "allow_punctuation_start": True,
        "allow_non_ascii_start": True,
        "rouge_threshold": 0.5,
    }
    assert asdict(FilterSettings.of(FilterConfig(**changed))) == changed
    assert FilterSettings.of(FilterConfig(keywords=())).keywords == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_words": 10, "max_words": 5}, "min_words 10 and max_words 5 leave no length"),
        ({"min_words": -1}, "min_words -1"),
        ({"keywords": ("map", " ")}, "keywords holds an empty string"),
        ({"rouge_threshold": 1.5}, "rouge_threshold is 1.5"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FilterSettings(**settings)


def test_report_counts_by_cause_with_three_examples() -> None:
    verdicts = [Verdict(f"cut {i}", "truncated") for i in range(5)]
    verdicts += [Verdict(f"dup {i}", "exact_duplicate") for i in range(2)]
    verdicts += [Verdict("short", "too_short", "1 words")] * 2
    verdicts += [Verdict("good one here", None)]
    report = FilterReport.of(verdicts)
    assert (report.attempts, report.kept, report.yielded) == (10, 1, 0.1)
    # Most frequent first; of equals, the earlier filter.
    assert report.ordered() == [("truncated", 5), ("too_short", 2), ("exact_duplicate", 2)]
    assert [v.text for v in report.examples["truncated"]] == ["cut 0", "cut 1", "cut 2"]
    assert json.loads(json.dumps(report.to_dict())) == {
        "attempts": 10,
        "kept": 1,
        "yield": 0.1,
        "counts": {"truncated": 5, "too_short": 2, "exact_duplicate": 2},
        "examples": {
            "truncated": [{"text": f"cut {i}", "detail": ""} for i in range(3)],
            "too_short": [{"text": "short", "detail": "1 words"}] * 2,
            "exact_duplicate": [{"text": f"dup {i}", "detail": ""} for i in range(2)],
        },
    }


def test_an_empty_report_has_no_yield() -> None:
    assert (FilterReport().attempts, FilterReport().yielded) == (0, 0.0)


def test_causes_are_listed_in_the_order_of_the_filters() -> None:
    assert list(CAUSES)[-7:] == [
        "too_short",
        "too_long",
        "keyword",
        "punctuation_start",
        "non_ascii_start",
        "exact_duplicate",
        "near_duplicate",
    ]
