import hashlib
import json
from importlib import resources
from pathlib import Path

import pytest

from montessori_jax.data import overlap
from montessori_jax.data.overlap import (
    benchmark_hashes,
    find_overlaps,
    hash_table,
    main,
    prompt_hash,
    warn_about_overlaps,
)
from montessori_jax.data.rows import Row, read_rows
from montessori_jax.errors import UserError


def row(number: int, instruction: str, text: str = "") -> Row:
    return Row(number, str(number), instruction, text, "x")


@pytest.fixture
def two_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "First": frozenset({prompt_hash("Why is grass green?"), prompt_hash("Add: 1 2")}),
        "Second": frozenset({prompt_hash("Why is grass green?")}),
    }
    monkeypatch.setattr(overlap, "benchmark_hashes", lambda: table)


def test_hash_is_of_the_normalised_text() -> None:
    expected = hashlib.blake2b(b"why is grass green", digest_size=8).hexdigest()
    for text in ("why is grass green", "Why is\n\n grass, GREEN?!", "\uff37hy_is grass\u00a0green"):
        assert prompt_hash(text) == expected
    assert prompt_hash("Why is grass greener?") != expected
    assert prompt_hash("STRASSE") == prompt_hash("Straße")
    assert prompt_hash("1 2") != prompt_hash("12")
    assert prompt_hash(" ?! \n") is None


@pytest.mark.usefixtures("two_benchmarks")
def test_where_a_prompt_may_hide() -> None:
    rows = [
        row(1, "why is grass green"),
        row(2, "Why is the grass green?"),
        row(3, "Add:", "1, 2"),
        row(4, "Add: 1 2", "and 3"),
        row(5, "...", "Why is grass green?"),
        Row(
            6,
            "six",
            "And why?",
            "",
            "x",
            messages=(
                {"role": "system", "content": "Add: 1 2"},
                {"role": "user", "content": "Why is grass green?"},
                {"role": "assistant", "content": "Light."},
                {"role": "user", "content": "And why?"},
                {"role": "assistant", "content": "x"},
            ),
        ),
        row(7, "?!"),
    ]
    # Row 5's words are the benchmark's once its instruction of dots is gone.
    assert find_overlaps(rows) == {
        "First": ["1", "3", "4", "5", "six"],
        "Second": ["1", "5", "six"],
    }
    assert find_overlaps([row(2, "Why is the grass green?")]) == {}


@pytest.mark.usefixtures("two_benchmarks")
def test_warnings_name_the_benchmark_and_the_rows() -> None:
    rows = [row(i, "Why is grass green?" if i % 2 else f"Question {i}") for i in range(9)]
    first, second = warn_about_overlaps(rows, name="the reference set refs.jsonl")
    assert first == (
        "the reference set refs.jsonl shares 4 of its 9 rows with the First prompts (ids 1, 3, 5, "
        "...): a First score of a student steered or trained by them is not a fair test; drop "
        "these rows or do not report that score"
    )
    assert "the Second prompts" in second
    assert warn_about_overlaps(rows[:1]) == []


def test_shipped_hashes() -> None:
    hashes = benchmark_hashes()
    assert {name: len(values) for name, values in hashes.items()} == {
        "AlpacaEval": 805,
        "MT-Bench": 160,
    }
    # Both hold two of Vicuna's questions (81 and 130 of MT-Bench).
    assert len(hashes["AlpacaEval"] & hashes["MT-Bench"]) == 2
    assert all(len(value) == 16 for values in hashes.values() for value in values)


def test_shipped_hashes_are_of_the_public_prompts(shared_data: Path) -> None:
    files = {
        "AlpacaEval": str(shared_data / "alpaca_eval_gpt4_1106_preview_805.jsonl"),
        "MT-Bench": str(shared_data / "mt_bench_questions_80.jsonl"),
    }
    text = (resources.files("montessori_jax.data") / overlap.HASHES).read_text("utf-8")
    assert json.loads(text) == hash_table(files)


def test_the_public_code_s_reference_set_is_found(shared_data: Path) -> None:
    rows = read_rows(shared_data / "alpaca_eval_gpt4_1106_preview_805.jsonl", limit=256).rows
    (message,) = warn_about_overlaps(rows)
    assert "shares 256 of its 256 rows with the AlpacaEval prompts (ids 1, 2, 3, ...)" in message

    turns = []
    for line in (shared_data / "mt_bench_questions_80.jsonl").read_text("utf-8").splitlines():
        turns += json.loads(line)["turns"]
    found = find_overlaps(row(i, turn) for i, turn in enumerate(turns))
    assert found == {"AlpacaEval": ["0", "98"], "MT-Bench": [str(i) for i in range(160)]}


def test_other_tasks_are_not_found(shared_data: Path) -> None:
    rows = read_rows(shared_data / "alpaca_seed_999.jsonl").rows
    assert warn_about_overlaps(rows) == []


def test_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.jsonl"
    one.write_text(json.dumps([{"instruction": "B"}, {"instruction": "A"}, {"instruction": "a!"}]))
    two.write_text('{"turns": ["A", "C"]}\n')
    monkeypatch.setattr(overlap, "__file__", str(tmp_path / "overlap.py"))
    main([f"One={one}", f"Two={two}"])
    assert capsys.readouterr().out == "One: 2 prompts, Two: 2 prompts\n"
    assert json.loads((tmp_path / overlap.HASHES).read_text()) == {
        "One": sorted([prompt_hash("a"), prompt_hash("b")]),
        "Two": sorted([prompt_hash("a"), prompt_hash("c")]),
    }
    with pytest.raises(UserError, match="is not NAME=FILE"):
        main(["one.json"])
    with pytest.raises(UserError, match="nothing to hash"):
        main([])
    two.write_text('{"question": "A"}\n')
    with pytest.raises(UserError, match=r"row 1 of .* has neither `turns` nor `instruction`"):
        main([f"Two={two}"])
