"""ROUGE-L decisions against the rouge-score package, and the speed the index exists for."""

import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import scoring, tokenize
from rouge_score.rouge_scorer import RougeScorer

from montessori_jax.errors import UserError
from montessori_jax.generation import dedupe
from montessori_jax.generation.dedupe import Match, NearDuplicateIndex

SCORER = RougeScorer(["rougeL"], use_stemmer=False)
PHRASES = (
    "write a short story about the history of science explain how to list three good reasons "
    "for your next trip in one sentence with examples from daily life and what it means"
)
WORDS = PHRASES.split()
# Texts at the edges of the tokenizer: no token at all, case folding that grows or falls into
# ASCII (dotted capital I, Kelvin sign), other scripts, digits, separators, control characters.
ODD_TEXTS = (
    "",
    "   ",
    "?!...",
    "写一首关于秋天的诗",
    "İstanbul İ",
    "i stanbul i",
    "273 \u212a and 10 \u212b",
    "273 k and 10 a",
    "naïve café, naive cafe",
    "x_y-z.w",
    "x y z w",
    "\uff11\uff12\uff13 ² ½ 3",
    "tab\tnewline\nreturn\rnull\0end",
    "ß ẞ SS ss",
)
texts = st.one_of(
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=30),
    st.text(alphabet="aAbB c1é\n.", max_size=30),
    st.lists(st.sampled_from(WORDS[:8]), max_size=14).map(" ".join),
)


def reference(a: str, b: str) -> float:
    return SCORER.score(a, b)["rougeL"].fmeasure


def brute_force(kept: Sequence[str], text: str, threshold: float) -> Match | None:
    """The definition: score everything, the best above the threshold, the earliest of equals."""
    scores = [reference(target, text) for target in kept]
    best = max(scores, default=0.0)
    if not best > threshold:
        return None
    return Match(scores.index(best), kept[scores.index(best)], best)


def edited(words: Sequence[str], edits: int, rng: random.Random) -> list[str]:
    """The words after some insertions, deletions, replacements and moves."""
    out = list(words)
    for _ in range(edits):
        place = rng.randrange(len(out) + 1)
        kind = rng.choice(("insert", "delete", "replace", "move"))
        if kind == "insert" or not out:
            out.insert(place, rng.choice(WORDS))
        elif kind == "delete":
            del out[place % len(out)]
        elif kind == "replace":
            out[place % len(out)] = rng.choice(WORDS)
        else:
            out.insert(place, out.pop(rng.randrange(len(out))))
    return out


def near_threshold_pairs(count: int) -> list[tuple[str, str]]:
    """Pairs whose number of edits is drawn around what F1 = 0.7 takes: 0 to 60% of the words."""
    rng = random.Random(0)
    pairs = []
    for _ in range(count):
        words = [rng.choice(WORDS) for _ in range(rng.randint(1, 30))]
        other = edited(words, rng.randint(0, 1 + 6 * len(words) // 10), rng)
        pairs.append((" ".join(words), " ".join(other)))
    return pairs


def test_f1_is_bit_equal_to_the_reference_arithmetic() -> None:
    on_the_line = set()
    for m in range(1, 41):
        for n in range(1, 41):
            for common in range(min(m, n) + 1):
                score = dedupe.f1(common, m, n)
                assert score == scoring.fmeasure(common / n, common / m)
                if 20 * common == 7 * (m + n):  # exactly 0.7 in real numbers
                    on_the_line.add(score > 0.7)
    assert on_the_line == {True, False}  # rounding decides there, so it has to be the same


def test_scores_worked_by_hand() -> None:
    # "the cat sat" (3) and "the cat on the mat sat" (6) share "the cat sat": 2 * 3 / 9.
    assert dedupe.rouge_l("The cat sat.", "the cat on the mat SAT") == pytest.approx(2 / 3)
    assert dedupe.rouge_l("a b c d", "d c b a") == pytest.approx(1 / 4)
    assert dedupe.rouge_l("a b", "a b") == 1.0
    assert dedupe.rouge_l("", "") == 0.0
    assert dedupe.rouge_l("!!!", "!!!") == 0.0


def test_near_threshold_pairs_are_decided_as_by_the_reference() -> None:
    pairs = near_threshold_pairs(3000)
    close = decided = 0
    for kept, text in pairs:
        score = reference(kept, text)
        match = NearDuplicateIndex([kept]).query(text)
        assert dedupe.rouge_l(kept, text) == score
        assert (match is not None) == (score > 0.7)
        if match is not None:
            assert match == Match(0, kept, score)
            decided += 1
        close += abs(score - 0.7) < 0.1
    # The pairs do lie on both sides of the line and near it.
    assert 500 < decided < 2500
    assert close > 500


def test_real_instructions_and_their_edits(shared_data: Path) -> None:
    lines = (shared_data / "alpaca_seed_999.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rng = random.Random(1)
    instructions = [f"{row['instruction']} {row['input']}".strip()[:200] for row in rows]
    matches = 0
    for text in rng.sample(instructions, 400):
        words = text.split(" ")
        for edits in (0, len(words) // 4, len(words) // 3):
            other = " ".join(edited(words, edits, rng))
            score = reference(text, other)
            match = NearDuplicateIndex([text]).query(other)
            assert (match is not None) == (score > 0.7)
            assert match is None or match.score == score
            matches += match is not None
    assert 400 <= matches < 1200


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 0.95])
def test_best_match_among_many_equals_brute_force(threshold: float) -> None:
    rng = random.Random(2)
    kept: list[str] = list(ODD_TEXTS)
    for _ in range(40):
        words = [rng.choice(WORDS) for _ in range(rng.randint(1, 12))]
        kept.append(" ".join(words))
        kept.append(" ".join(edited(words, rng.randint(0, 4), rng)))
    index = NearDuplicateIndex(kept, threshold=threshold)
    queries = [" ".join(edited(text.split(), 2, rng)) for text in kept] + list(ODD_TEXTS)
    for text in queries:
        assert index.query(text) == brute_force(kept, text, threshold)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_tokens_are_those_of_the_reference(text: str) -> None:
    assert dedupe.tokenize(text) == tokenize.tokenize(text, stemmer=None)


@settings(max_examples=300, deadline=None)
@given(st.lists(texts, max_size=6), texts, st.sampled_from([0.0, 0.4, 0.5, 2 / 3, 0.7, 0.9, 1.0]))
def test_any_query_equals_brute_force(kept: list[str], text: str, threshold: float) -> None:
    index = NearDuplicateIndex(kept, threshold=threshold)
    assert index.query(text) == brute_force(kept, text, threshold)


def test_adding_one_by_one_equals_rebuilding() -> None:
    kept = [" ".join(pair) for pair in near_threshold_pairs(60)]
    grown = NearDuplicateIndex()
    for place, text in enumerate(kept):
        # Queries in between must not hold on to memory that add() has to grow.
        grown.query(text)
        assert grown.add(text) == place
    rebuilt = NearDuplicateIndex(grown.texts)
    assert len(grown) == len(rebuilt) == 60
    for text in kept:
        assert grown.query(text) == rebuilt.query(text)


def test_ties_go_to_the_earliest_and_one_matches_nothing() -> None:
    kept = ["red green blue", "write a poem", "write a poem"]
    assert NearDuplicateIndex(kept).query("Write a poem!") == Match(1, "write a poem", 1.0)
    assert NearDuplicateIndex(kept, threshold=1.0).query("write a poem") is None


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_impossible_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        NearDuplicateIndex(threshold=threshold)


def test_fifty_thousand_kept_stay_under_twenty_milliseconds() -> None:
    rng = random.Random(3)
    vocabulary = [f"w{i}" for i in range(20_000)]
    weights = [1 / (rank + 2) for rank in range(len(vocabulary))]  # Zipf, as words are
    stream = iter(rng.choices(vocabulary, weights, k=50_200 * 30))
    made = [" ".join(next(stream) for _ in range(rng.randint(5, 30))) for _ in range(50_200)]
    index = NearDuplicateIndex(made[:50_000])
    seconds = []
    for number, fresh in enumerate(made[50_000:]):
        near = " ".join(edited(made[number].split(), 1, rng))
        for text in (fresh, near):
            start = time.perf_counter()
            index.query(text)
            seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 0.020
