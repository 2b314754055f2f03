import itertools
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from rapidfuzz.distance import LCSseq

from montessori_jax.data.overlap import warn_about_overlaps
from montessori_jax.data.rows import Row, read_rows
from montessori_jax.data.sources import SHIPPED

SETS = {name: read_rows(f"package:{name}") for name in SHIPPED}
ALL = [(name, row) for name, read in SETS.items() for row in read.rows]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_l(a: list[str], b: list[str]) -> float:
    if not a or not b:
        return 0.0
    return 2 * LCSseq.similarity(a, b) / (len(a) + len(b))


def shipped(instruction: str) -> Row:
    (row,) = (row for _, row in ALL if row.instruction.startswith(instruction))
    return row


def test_counts_and_form() -> None:
    assert {name: len(read.rows) for name, read in SETS.items()} == {
        "seeds": 103,
        "reference": 60,
        "heldout": 45,
    }
    assert all(read.bad == [] for read in SETS.values())
    for name, row in ALL:
        prefix = "seed" if name == "seeds" else name
        assert row.id == f"{prefix}-{row.index + 1:03d}"
        for text in (row.instruction, row.input, row.response):
            assert text == text.strip()
            # No character that a tokenizer would take for a control token.
            assert "<|" not in text
    with_input = Counter(name for name, row in ALL if row.input)
    assert with_input == {"seeds": 21, "reference": 8, "heldout": 6}


def test_files_are_plain_json_lines() -> None:
    for name in SHIPPED:
        path = resources.files("montessori_jax.data") / "shipped" / f"{name}.jsonl"
        for line in path.read_text("utf-8").splitlines():
            record = json.loads(line)
            assert list(record) in (
                ["id", "instruction", "output"],
                ["id", "instruction", "input", "output"],
            )
            assert line == json.dumps(record, ensure_ascii=False)


def test_lengths() -> None:
    for name, row in ALL:
        assert 6 <= len(row.instruction.split()) <= 20, row
        assert len(row.input.split()) <= 25, row
        # Measured with SmolLM2's tokenizer: 12 to 37 words are 20 to 55 of its tokens.
        low, high = (4, 41) if name == "seeds" else (12, 37)
        assert low <= len(row.response.split()) <= high, row
    words_of = [len(row.response.split()) for name, row in ALL if name != "seeds"]
    assert 25 < sum(words_of) / len(words_of) < 32


def test_diversity() -> None:
    openings = Counter(words(row.instruction)[0] for _, row in ALL)
    assert len(openings) > 60
    assert openings.most_common(1)[0][1] < len(ALL) / 6
    assert len(Counter(words(row.instruction)[0] for row in SETS["seeds"].rows)) > 50


def test_no_two_instructions_are_alike() -> None:
    tokens = [(row, words(row.instruction)) for _, row in ALL]
    for (one, a), (two, b) in itertools.combinations(tokens, 2):
        assert rouge_l(a, b) < 0.7, (one.instruction, two.instruction)


def test_none_is_a_known_test_prompt() -> None:
    for name, read in SETS.items():
        assert warn_about_overlaps(read.rows, name=name) == []


def public_prompts(folder: Path) -> Iterator[str]:
    for name in (
        "alpaca_eval_gpt4_1106_preview_805.jsonl",
        "alpaca_seed_999.jsonl",
        "self_instruct_seed_tasks_175.jsonl",
        "mt_bench_questions_80.jsonl",
        "gsm8k_test_first_300.jsonl",
        "arc_challenge_first_300.jsonl",
    ):
        for line in (folder / name).read_text("utf-8").splitlines():
            record = json.loads(line)
            yield from record.get("turns", [])
            for column in ("instruction", "question", "query"):
                if column in record:
                    yield record[column]
                    if record.get("input"):
                        yield f"{record[column]}\n{record['input']}"


def test_none_is_like_a_public_prompt(shared_data: Path) -> None:
    public = [(text, words(text)) for text in public_prompts(shared_data)]
    assert len(public) > 805 + 999 + 175 + 160 + 300 + 300
    for _, row in ALL:
        for own in {row.instruction, f"{row.instruction}\n{row.input}"}:
            tokens = words(own)
            for text, other in public:
                # F1 <= 2 shortest / (m + n): most pairs need no alignment.
                if 2 * min(len(tokens), len(other)) < 0.7 * (len(tokens) + len(other)):
                    continue
                assert rouge_l(tokens, other) < 0.7, (own, text)


def code_of(instruction: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(shipped(instruction).response.split("\n\n")[0], names)  # our own text
    return names


class TestAnswersThatCanBeRun:
    def test_python(self) -> None:
        second_largest = code_of("Write a Python function that returns the second")[
            "second_largest"
        ]
        assert second_largest([3, 9, 9, 4]) == 4
        split_seconds = code_of("Write a Python function that splits")["split_seconds"]
        assert split_seconds(135) == (2, 15)
        assert (
            "split_seconds(135) returns (2, 15)"
            in shipped("Write a Python function that splits").response
        )
        unique = code_of("Write a Python function that drops")["unique"]
        assert unique([3, 1, 3, 2, 1]) == [3, 1, 2]

    @pytest.mark.parametrize(
        ("text", "matches"),
        [("09:45", True), ("23:59", True), ("00:00", True), ("24:00", False), ("9:45", False)],
    )
    def test_regular_expression(self, text: str, matches: bool) -> None:
        pattern = shipped("Write a regular expression").response.split("\n")[0]
        assert bool(re.search(pattern, text)) == matches

    def test_sql(self) -> None:
        database = sqlite3.connect(":memory:")
        try:
            database.executescript(
                "CREATE TABLE customers (id INTEGER, name TEXT);"
                "CREATE TABLE orders (id INTEGER, customer_id INTEGER);"
                "INSERT INTO customers VALUES (1, 'Ann'), (2, 'Bo');"
                "INSERT INTO orders VALUES (1, 1);"
                "CREATE TABLE products (category TEXT, price REAL);"
                "INSERT INTO products VALUES ('tea', 2), ('tea', 4), ('cake', 5);"
            )
            none = shipped("Write an SQL query that lists customers").response
            assert database.execute(none).fetchall() == [("Bo",)]
            mean = shipped("Write an SQL statement that finds").response.split("\n\n")[0]
            assert sorted(database.execute(mean).fetchall()) == [("cake", 5.0), ("tea", 3.0)]
        finally:
            database.close()

    @pytest.mark.parametrize(
        ("instruction", "answer", "value"),
        [
            ("Work out how many 250 ml", "1,500 / 250 = {}.", 1500 / 250),
            ("Turn 0.375", "gives {}/8.", 0.375 * 8),
            ("Calculate a 15 percent tip", "which makes {}0 in all", 48 + 48 * 0.15),
            ("Solve the equation 4x", "so x = {}.", (21 + 7) / 4),
            ("Correct the arithmetic mistake", "so 18 \u00d7 5 = {}.", 18 * 5),
            ("How many handshakes", "6 \u00d7 5 / 2 = {}.", 6 * 5 / 2),
            ("What is compound interest?", "£{} after two", 100 * 1.1**2),
            ("How far does light travel", "about {} million km", round(0.299792458 * 60)),
            ("Estimate how long a 3 kW kettle", "roughly {} seconds", round(4.186 * 80 / 3, -1)),
            ("A train covers", "= {} km/h", 180 / 2.5),
            ("Split a 96 pound bill", "each of them pays £{}.", (96 - 6) / 3),
            ("A jacket costs 80", "= {} euros", 80 / 0.8),
            ("If five pens cost", "= £{}0.", 3.5 / 5 * 8),
            ("What is 17 times 6?", "they make {}.", 17 * 6),
        ],
    )
    def test_sums(self, instruction: str, answer: str, value: float) -> None:
        assert answer.format(f"{value:g}") in shipped(instruction).response


def test_readme_gives_the_counts() -> None:
    text = (resources.files("montessori_jax.data") / "shipped" / "README.md").read_text("utf-8")
    for name, read in SETS.items():
        assert f"| `{name}.jsonl` | {len(read.rows)} |" in text
    assert f"(in {sum(bool(row.input) for _, row in ALL)} rows)" in text
