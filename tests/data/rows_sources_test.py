"""Where rows come from: JSON, Parquet, folders, the package and the Hub."""

import json
import math
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from montessori_jax.data.rows import BadRow, Row, read_rows
from tests.data.row_files import GOOD, jsonl, one_line_error, talk


class TestFiles:
    def test_alpaca_json(self, tmp_path: Path) -> None:
        path = tmp_path / "alpaca.json"
        path.write_text(json.dumps([{"instruction": "A", "input": "", "output": "B"}, 3]))
        read = read_rows(path)
        assert read.rows == [Row(0, "1", "A", "", "B")]
        assert read.bad == [BadRow(1, "2", "the item is not a JSON object")]

    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ('{"instruction": "A"}', "holds one JSON dict; expected a list of objects"),
            ('{"a": 1}\n{"a": 2}', "one object a line belongs in a .jsonl file"),
            ("[1,", "is not valid JSON"),
            ("[]", "has no rows"),
        ],
    )
    def test_other_json(self, tmp_path: Path, text: str, part: str) -> None:
        path = tmp_path / "rows.json"
        path.write_text(text)
        assert part in one_line_error(path)

    def test_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.parquet"
        table = {
            "id": [1.0, math.nan, 3.0],
            "instruction": ["a", "b", None],
            "response": ["x", None, "z"],
            "embedding": [[0.5], [0.5], [0.5]],
        }
        pq.write_table(pa.table(table), path, row_group_size=1)
        read = read_rows(path)
        assert read.rows == [Row(0, "1", "a", "", "x")]
        assert read.bad == [
            BadRow(1, "2", "response is missing"),
            BadRow(2, "3", "instruction is missing"),
        ]
        assert read_rows(path, limit=1).total == 1

    def test_parquet_messages(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.parquet"
        rows = [talk(("user", "a"), ("assistant", "b")), {"messages": None}]
        pq.write_table(pa.Table.from_pylist(rows), path)
        read = read_rows(path)
        assert [row.response for row in read.rows] == ["b"]
        assert [bad.reason for bad in read.bad] == ["instruction is missing"]

    def test_parquet_strings_that_are_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.parquet"
        # Arrow takes binary for text without a look when it is only viewed as such.
        texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"instruction": texts, "output": ["x", "y", "z"]}), path)
        read = read_rows(path)
        assert [row.id for row in read.rows] == ["1", "3"]
        assert read.bad == [BadRow(1, "2", "the row is not valid UTF-8")]

    def test_damaged_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.parquet"
        path.write_bytes(b"PAR1 nothing")
        assert "is not a Parquet file that can be read" in one_line_error(path)
        pq.write_table(pa.table({"instruction": ["abc"] * 5000}), path, use_dictionary=False)
        data = bytearray(path.read_bytes())
        data[4:60] = b"\xff" * 56
        path.write_bytes(data)
        assert "is damaged after row 0" in one_line_error(path, need_response=False)

    def test_folder_of_a_data_set(self, tmp_path: Path) -> None:
        assert "folder without a data.parquet" in one_line_error(tmp_path)
        pq.write_table(pa.Table.from_pylist([GOOD]), tmp_path / "data.parquet")
        assert read_rows(tmp_path).rows[0].response == "Seven."

    def test_missing_and_unknown_files(self, tmp_path: Path) -> None:
        message = one_line_error(tmp_path / "absent.jsonl")
        assert "absent.jsonl does not exist; expected a .jsonl, .json or .parquet file" in message
        assert "write hf:org/name" in one_line_error("org/name")
        table = tmp_path / "rows.csv"
        table.write_text("instruction,output\na,b\n")
        assert "rows.csv is of an unknown kind (.csv)" in one_line_error(table)

    def test_no_rows(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path, "", "  ")
        assert one_line_error(path) == f"{path} has no rows; expected at least one"
        empty = tmp_path / "rows.parquet"
        schema = pa.schema([("instruction", pa.string()), ("output", pa.string())])
        pq.write_table(schema.empty_table(), empty)
        assert one_line_error(empty) == f"{empty} has no rows; expected at least one"

    def test_no_usable_column(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path, {"text": "a"}, {"prompt": "b", "completion": "c"})
        assert one_line_error(path) == (
            f"{path} has no usable column (it has: text, prompt, completion); expected "
            "`instruction` with `response` or `output`, or `messages`"
        )
        path = jsonl(tmp_path, {"instruction": "a", "completion": "c"})
        assert "has no responses (its columns: instruction, completion)" in one_line_error(path)
        assert read_rows(path, need_response=False).rows[0].instruction == "a"
        binary = tmp_path / "model.jsonl"
        binary.write_bytes(bytes(range(256)))
        assert "has no usable row: the line is not valid" in one_line_error(binary)
        other = tmp_path / "rows.parquet"
        pq.write_table(pa.table({"text": ["a"]}), other)
        assert "has no usable column (it has: text)" in one_line_error(other)


class TestNamedSources:
    def test_shipped(self) -> None:
        read = read_rows("package:seeds", limit=3)
        assert [row.id for row in read.rows] == ["seed-001", "seed-002", "seed-003"]
        message = one_line_error("package:tests")
        assert message == (
            "package:tests is not in the package; it holds package:seeds, package:reference, "
            "package:heldout"
        )

    def test_hub_offline(self) -> None:
        message = one_line_error("hf:montessori-jax/no-such-set:test")
        assert "data set montessori-jax/no-such-set (split test) cannot be loaded" in message
        assert "pass a .jsonl or .parquet file" in message
        assert "names no data set" in one_line_error("hf:")

    def test_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        asked = []

        def load_dataset(name: str, *, split: str) -> datasets.Dataset:
            asked.append((name, split))
            table = {"instruction": ["a", "b"], "output": ["x", None], "other": [b"1", b"2"]}
            return datasets.Dataset.from_dict(table)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        read = read_rows("hf:org/name")
        assert read.rows == [Row(0, "1", "a", "", "x")]
        assert read.bad == [BadRow(1, "2", "response is missing")]
        read_rows("hf:org/name:train[:5]", limit=1)
        assert asked == [("org/name", "train"), ("org/name", "train[:5]")]

    def test_hub_through_the_real_library(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        folder = tmp_path / "set"
        folder.mkdir()
        jsonl(folder, {"id": "a", **GOOD}, {"id": "b", "instruction": "x"}, name="train.jsonl")
        jsonl(folder, {"id": "c", **GOOD}, name="test.jsonl")
        read = read_rows(f"hf:{folder}")
        assert [row.id for row in read.rows] == ["a"]
        assert read.bad == [BadRow(1, "b", "response is missing")]
        assert [row.id for row in read_rows(f"hf:{folder}:test").rows] == ["c"]
        assert "(split none) cannot be loaded" in one_line_error(f"hf:{folder}:none")

    def test_hub_without_its_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert "needs the datasets package: pip install datasets" in one_line_error("hf:org/name")

    def test_reading_files_imports_no_heavy_library(self, tmp_path: Path) -> None:
        import subprocess

        code = (
            "import sys; from montessori_jax.data.rows import read_rows; "
            f"read_rows({str(jsonl(tmp_path, GOOD))!r}); "
            "print(sorted({'jax', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
        )
        out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        assert out.stdout.decode().strip() == "[]"


def test_public_data_reads_whole(shared_data: Path) -> None:
    alpaca = read_rows(shared_data / "alpaca_seed_999.jsonl")
    assert (len(alpaca.rows), alpaca.bad) == (999, [])
    evaluation = read_rows(shared_data / "alpaca_eval_gpt4_1106_preview_805.jsonl")
    assert (len(evaluation.rows), evaluation.bad) == (805, [])
