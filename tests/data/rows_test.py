import json
import math
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from montessori_jax.data.rows import BadRow, Row, RowFile, read_rows
from montessori_jax.errors import UserError

GOOD = {"instruction": "Name a prime.", "response": "Seven."}


def jsonl(folder: Path, *records: object, name: str = "rows.jsonl") -> Path:
    path = folder / name
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def talk(*turns: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def one_line_error(source: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestGoodRows:
    def test_columns_and_defaults(self, tmp_path: Path) -> None:
        path = jsonl(
            tmp_path,
            {"instruction": " Add. ", "input": "1, 2", "output": "3\n", "extra": [1]},
            {"id": "b", "instruction": "Say hi.", "input": None, "response": "Hi.", "output": "x"},
            {"id": 7, "instruction": "Say no.", "input": " \n", "response": None, "output": "No."},
        )
        read = read_rows(path)
        assert read.bad == []
        assert read.source == str(path)
        assert read.rows == [
            Row(0, "1", " Add. ", "1, 2", "3\n"),
            Row(1, "b", "Say hi.", "", "Hi."),
            Row(2, "7", "Say no.", "", "No."),
        ]

    def test_input_follows_its_instruction_after_a_newline(self) -> None:
        row = Row(0, "1", "Add.", "1, 2", "3")
        assert row.prompt() == [{"role": "user", "content": "Add.\n1, 2"}]
        assert row.conversation() == [
            {"role": "user", "content": "Add.\n1, 2"},
            {"role": "assistant", "content": "3"},
        ]

    def test_messages(self, tmp_path: Path) -> None:
        turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?")]
        path = jsonl(tmp_path, {**talk(*turns, ("assistant", "Because.")), "instruction": "x"})
        (row,) = read_rows(path).rows
        assert (row.instruction, row.input, row.response) == ("Why?", "", "Because.")
        assert row.prompt() == talk(*turns)["messages"]
        assert row.conversation() == talk(*turns, ("assistant", "Because."))["messages"]
        row.prompt()[0]["content"] = "changed"
        assert row.prompt()[0]["content"] == "Be brief."

    def test_prompts_alone(self, tmp_path: Path) -> None:
        path = jsonl(
            tmp_path,
            {"instruction": "A"},
            {"instruction": "B", "output": " "},
            talk(("user", "C")),
            talk(("user", "D"), ("assistant", "")),
            talk(("user", "E"), ("assistant", "e")),
        )
        read = read_rows(path, need_response=False)
        assert read.bad == []
        assert [row.instruction for row in read.rows] == list("ABCDE")
        assert [row.response for row in read.rows] == ["", "", "", "", "e"]
        assert [row.prompt()[-1] for row in read.rows] == [
            {"role": "user", "content": text} for text in "ABCDE"
        ]
        with pytest.raises(ValueError, match="row 1 has no response"):
            read.rows[0].conversation()

    def test_lines_end_at_newlines_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        text = '{"instruction": "a\u2028b\u0085c", "output": "d"}'
        path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n" + text.encode())
        read = read_rows(path)
        assert [(row.index, row.id) for row in read.rows] == [(0, "1"), (1, "3")]
        assert [row.instruction for row in read.rows] == ["a\u2028b\u0085c"] * 2

    def test_limit_counts_every_row(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path, "oops", GOOD, GOOD)
        read = read_rows(path, limit=2)
        assert (len(read.rows), len(read.bad), read.total) == (1, 1, 2)
        assert "limit" in one_line_error(path, limit=0)


class TestBadRows:
    @pytest.mark.parametrize(
        ("record", "reason"),
        [
            ('{"instruction": "a", ', "the line is not valid JSON"),
            ("[" * 100_000, "the line is not valid JSON"),
            ('{"instruction": "a", "output": ' + "1" * 5000 + "}", "the line is not valid JSON"),
            ('["instruction"]', "the line is not a JSON object"),
            ({"response": "b"}, "instruction is missing"),
            ('{"instruction": NaN, "response": "b"}', "instruction is missing"),
            ({"instruction": " \n", "response": "b"}, "instruction is empty"),
            ({"instruction": 3, "response": "b"}, "instruction is not text"),
            ({"instruction": "a"}, "response is missing"),
            ({"instruction": "a", "response": None}, "response is missing"),
            ({"instruction": "a", "response": ""}, "response is empty"),
            ({"instruction": "a", "response": " \t\n"}, "response is empty"),
            ({"instruction": "a", "response": ["b"]}, "response is not text"),
            ({"instruction": "a", "output": {"b": 1}}, "output is not text"),
            ({"instruction": "a", "input": 2.5, "output": "b"}, "input is not text"),
            ('{"instruction": "\\ud800", "output": "b"}', "instruction is not valid Unicode"),
            ({**GOOD, "id": [1]}, "id is not a text or a whole number"),
            ({**GOOD, "id": 1.5}, "id is not a text or a whole number"),
            ({**GOOD, "id": True}, "id is not a text or a whole number"),
            ({"messages": "hello"}, "messages is not a list"),
            ({"messages": []}, "messages has no user turn"),
            (talk(("system", "Be kind.")), "messages has no user turn"),
            ({"messages": ["hello"]}, "a turn is not an object with role and content"),
            ({"messages": [{"role": "user"}]}, "a turn lacks its role or content"),
            ({"messages": [{"role": "user", "content": [1]}]}, "content is not text"),
            (talk(("human", "a"), ("gpt", "b")), "unknown role 'human'"),
            (talk(("user", "a")), "the last turn is not the assistant's"),
            (talk(("user", "a"), ("assistant", " ")), "response is empty"),
            (talk(("user", ""), ("assistant", "b")), "a turn is empty"),
            (
                talk(("assistant", "a"), ("user", "b")),
                "turns do not alternate between user and assistant",
            ),
            (
                talk(("user", "a"), ("system", "b"), ("assistant", "c")),
                "turns do not alternate between user and assistant",
            ),
        ],
    )
    def test_reason(self, tmp_path: Path, record: object, reason: str) -> None:
        read = read_rows(jsonl(tmp_path, GOOD, record, GOOD))
        assert [row.index for row in read.rows] == [0, 2]
        assert read.bad == [BadRow(1, "2", reason)]

    def test_bytes_that_are_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b'{"instruction": "\xff", "output": "b"}\n' + json.dumps(GOOD).encode())
        assert read_rows(path).bad == [BadRow(0, "1", "the line is not valid UTF-8")]

    def test_a_bad_row_keeps_its_id(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path, GOOD, {"id": "x9", "instruction": "a", "output": ""})
        assert read_rows(path).bad == [BadRow(1, "x9", "response is empty")]

    def test_causes_and_require(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path, "?", {"instruction": ""}, "?", {"instruction": "", "output": "x"})
        read = read_rows(path)
        assert read.causes() == {"instruction is empty": 2, "the line is not valid JSON": 2}
        with pytest.raises(UserError) as caught:
            read.require(3)
        assert str(caught.value) == (
            f"{path} has 0 usable rows of 4, but 3 are needed: instruction is empty (2), "
            "the line is not valid JSON (2)"
        )
        good = read_rows(jsonl(tmp_path, GOOD))
        assert good.require() == good.rows

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        st.lists(
            st.recursive(
                st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=6),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(
                        st.sampled_from(
                            ["instruction", "input", "output", "messages", "role", "content", "z"]
                        ),
                        inner
                        | st.sampled_from(["user", "assistant", "system"])
                        | st.lists(
                            st.fixed_dictionaries(
                                {"role": st.sampled_from(["user", "assistant"]), "content": inner}
                            ),
                            max_size=3,
                        ),
                        max_size=4,
                    )
                ),
                max_leaves=12,
            ),
            max_size=8,
        )
    )
    def test_no_record_raises(self, records: list[object]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            read = read_rows(jsonl(Path(folder), GOOD, *map(json.dumps, records)))
        assert read.total == 1 + len(records)
        assert sorted(r.index for r in [*read.rows, *read.bad]) == list(range(read.total))
        for row in read.rows:
            assert all(turn["content"].strip() for turn in row.conversation()[-2:])


class TestIds:
    def test_a_repeated_id_is_refused(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path, {**GOOD, "id": "a"}, GOOD, {**GOOD, "id": "a"})
        assert "has the id 'a' in rows 1 and 3" in one_line_error(path)

    def test_a_malformed_row_cannot_repeat_an_id(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path, {**GOOD, "id": "a"}, {"id": "a"})
        assert read_rows(path).bad == [BadRow(1, "a", "instruction is missing")]

    def test_a_line_number_gives_way_to_an_id(self, tmp_path: Path) -> None:
        path = jsonl(
            tmp_path, GOOD, {**GOOD, "id": "1"}, {**GOOD, "id": "line-4"}, GOOD, {**GOOD, "id": 4}
        )
        ids = [row.id for row in read_rows(path).rows]
        assert ids == ["line-1", "1", "line-4", "line-line-4", "4"]


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


def test_total_counts_both() -> None:
    file = RowFile("x", [Row(0, "1", "a", "", "b")], [BadRow(1, "2", "why")])
    assert file.total == 2
