"""OpenAssistant's trees as single turns, from files and as the Hub's reader gives them."""

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from montessori_jax.data.rows import read_rows
from montessori_jax.data.trees import first_turns, is_tree
from tests.data.row_files import one_line_error


def message(name: str, parent: str | None, text: str, rank: float | None = None, **more) -> dict:
    role = "assistant" if parent else "prompter"
    return {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank,
            "lang": "en", "deleted": False, **more}  # fmt: skip


MESSAGES = [
    message("a", None, "Name a river."),
    message("a1", "a", "Water.", 2.0),
    message("a2", "a", "The Nile.", 0.0),
    message("a3", "a", "Is it wet?", 1.0),
    message("q", "a2", "And another?", role="prompter"),
    message("b", None, "Nombra un río.", lang="es"),
    message("b1", "b", "El Ebro.", 0.0, lang="es"),
    message("c", None, "Nobody replied."),
    message("d", None, "Count to two."),
    message("d1", "d", "One."),
    message("d2", "d", "One, two."),
    message("e", None, "A deleted one.", deleted=True),
]


def test_a_first_prompt_has_its_best_ranked_reply_or_the_first():
    assert list(first_turns(MESSAGES)) == [
        {"id": "a", "instruction": "Name a river.", "response": "The Nile."},
        "the language is not English",
        "the first prompt has no reply",
        {"id": "d", "instruction": "Count to two.", "response": "One."},
    ]


def test_a_parquet_file_of_messages_is_read_as_rows(tmp_path: Path):
    path = tmp_path / "ready.parquet"
    # As in the published files, with columns that nobody reads.
    pq.write_table(pa.Table.from_pylist([{**m, "emojis": [1]} for m in MESSAGES]), path)
    read = read_rows(path)
    assert [(row.id, row.instruction, row.response) for row in read.rows] == [
        ("a", "Name a river.", "The Nile."),
        ("d", "Count to two.", "One."),
    ]
    assert read.causes() == {
        "the first prompt has no reply": 1,
        "the language is not English": 1,
    }
    assert read_rows(path, limit=1).total == 1


def test_a_table_without_replies_column_is_no_tree(tmp_path: Path):
    assert not is_tree(["message_id", "text", "role"])
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"message_id": ["a"], "text": ["b"], "role": ["prompter"]}), path)
    assert "has no usable column" in one_line_error(path)


def test_a_data_set_of_the_hub_is_read_as_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(MESSAGES), tmp_path / "set" / "train.parquet")
    read = read_rows(f"hf:{tmp_path / 'set'}")
    assert [(row.id, row.response) for row in read.rows] == [("a", "The Nile."), ("d", "One.")]
    assert len(read.bad) == 2
