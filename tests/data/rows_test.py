"""What a row must be: good ones, the reason of every bad one, and ids."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from montessori_jax.data.rows import BadRow, Row, RowFile, read_rows
from montessori_jax.errors import UserError
from tests.data.row_files import GOOD, jsonl, one_line_error, talk


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


def test_total_counts_both() -> None:
    file = RowFile("x", [Row(0, "1", "a", "", "b")], [BadRow(1, "2", "why")])
    assert file.total == 2
