"""`montessori select` on files: whatever they are, the rows come out as they were, with scores."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from montessori_jax.cli import run
from montessori_jax.data.rows import read_rows
from montessori_jax.data.sources import open_records
from montessori_jax.errors import UserError
from montessori_jax.stages.select import select_rows

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Greet me."},
    {"role": "assistant", "content": "Good morning!"},
]
# Index 1 is malformed and 5 was never scored; 0 and 4 are near-duplicates (F1 8/9).
ROWS = [
    {"instruction": "Name one colour of the sky", "response": "Blue is one.", "topic": "x"},
    {"instruction": "", "response": "no question", "topic": "x"},
    {"instruction": "Add these.", "input": "2 and 3", "output": "They make 5.", "topic": "y"},
    {"messages": MESSAGES, "id": 7, "topic": "y"},
    {"instruction": "Name one colour of the sea", "response": "Blue is one.", "topic": "x"},
    {"instruction": "Not scored.", "response": "No.", "topic": "z"},
]
EMPTY = "instruction is empty"
SCORES = [
    {"index": 0, "id": "1", "influence": 3e-4, "standard_error": 2e-4, "influence_b": 1.0},
    {"index": 1, "id": "2", "influence": None, "reason": EMPTY},
    {"index": 2, "id": "3", "influence": 2e-4, "standard_error": 0.0, "influence_b": 2.0},
    {"index": 3, "id": "7", "influence": -1e-4, "standard_error": None, "influence_b": 3.0},
    {"index": 4, "id": "5", "influence": 4e-4, "standard_error": 1e-5, "influence_b": None},
]


def lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path) -> tuple[str, str]:
    rows = lines(tmp_path / "rows.jsonl", ROWS)
    return str(lines(tmp_path / "scores.jsonl", SCORES)), str(rows)


def chosen(path: Path) -> list[dict]:
    return [record for _, record in open_records(path).items]


def test_rows_keep_what_they_are_and_gain_their_score(files, tmp_path):
    out = tmp_path / "best.jsonl"
    result = select_rows(*files, out, top_k=2)
    assert chosen(out) == [
        {**ROWS[4], "id": "5", "influence": 4e-4, "standard_error": 1e-5, "influence_b": None},
        {**ROWS[0], "id": "1", "influence": 3e-4, "standard_error": 2e-4, "influence_b": 1.0},
    ]
    assert {key: result[key] for key in ("candidates", "scored", "not", "selected", "reasons")} == {
        "candidates": 6,
        "scored": 4,
        "not": 2,
        "selected": 2,
        "reasons": {EMPTY: 1, "no score": 1},
    }
    assert (result["first"], result["last"]) == (4e-4, 3e-4)
    assert result["mean"] == pytest.approx(3.5e-4)
    assert result["mean_of_all"] == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("how", "ids"),
    [
        ({"top_share": 0.5}, ["5", "1"]),
        ({"threshold": 2e-4}, ["5", "1", "3"]),
        ({"top_k": 1, "lowest": True}, ["7"]),
        ({"by": "influence_b", "top_k": 2}, ["7", "3"]),
        ({"per_group": 1, "group_by": "topic"}, ["5", "3"]),
        ({"top_k": 2, "spread": 0.7}, ["5", "3"]),
        # 4e-4 - 2e-5, 2e-4 - 0, 3e-4 - 4e-4: the first of all by value comes last.
        ({"top_k": 3, "lower_bound": 2.0}, ["5", "3", "1"]),
        # And from the other end 2e-4 + 0, 4e-4 + 2e-5, 3e-4 + 4e-4.
        ({"top_k": 3, "lower_bound": 2.0, "lowest": True}, ["3", "5", "1"]),
    ],
)
def test_what_is_chosen_by_hand(files, tmp_path, how, ids):
    out = tmp_path / "best.jsonl"
    select_rows(*files, out, **how)
    assert [str(row["id"]) for row in chosen(out)] == ids
    # What training reads is what it would have read of the candidates.
    before = {row.id: row.conversation() for row in read_rows(files[1]).rows}
    after = {row.id: row.conversation() for row in read_rows(out).rows}
    assert after == {name: before[name] for name in ids}


def test_what_has_no_error_is_counted(files, tmp_path):
    result = select_rows(*files, tmp_path / "best.jsonl", top_k=9, lower_bound=1.0)
    assert result["reasons"] == {EMPTY: 1, "no standard_error": 1, "no score": 1}
    assert (result["scored"], result["not"]) == (3, 3)


def test_parquet_in_and_out_with_ids_alone_in_any_order(tmp_path):
    rows = [{"id": f"r{i}", "prompt_id": f"p{i // 2}", "messages": MESSAGES[1:]} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    values = [1.0, 2.0, 4.0, 3.0]
    scores = [{"id": f"r{i}", "influence": value} for i, value in enumerate(values)]
    pq.write_table(pa.Table.from_pylist(scores[::-1]), tmp_path / "scores.parquet")
    out = tmp_path / "best.parquet"
    # A folder with a data.parquet is what generate writes; prompt_id is its group.
    select_rows(str(tmp_path / "scores.parquet"), str(tmp_path), out, per_group=1)
    assert pq.read_table(out).to_pylist() == [
        {**rows[2], "influence": 4.0},
        {**rows[1], "influence": 2.0},
    ]
    # Equal values: the earlier row of the candidates, whatever the order of the scores.
    even = [{**score, "influence": 1.0} for score in scores[::-1]]
    pq.write_table(pa.Table.from_pylist(even), tmp_path / "scores.parquet")
    select_rows(str(tmp_path / "scores.parquet"), str(tmp_path), out, top_k=2)
    assert [row["id"] for row in pq.read_table(out).to_pylist()] == ["r0", "r1"]


def test_a_selection_can_be_scored_and_selected_again(files, tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    select_rows(*files, first, top_k=2)
    again = lines(tmp_path / "again.jsonl", [{"index": 1, "id": "1", "influence": 9.0}])
    select_rows(str(again), str(first), second, top_k=1)
    [row] = chosen(second)
    assert (row["id"], row["influence"], row["topic"]) == ("1", 9.0, "x")


@pytest.mark.parametrize(
    ("scores", "how", "words"),
    [
        (SCORES, {"by": "helpfulness"}, "no column helpfulness; it has index, id, influence"),
        (SCORES, {"by": "id"}, "column id holds '1', which is no number"),
        (SCORES, {}, "nothing says how many"),
        (SCORES, {"per_group": 1, "group_by": "prompt_id"}, "no column prompt_id to group by"),
        (SCORES, {"by": "influence_b", "lower_bound": 1.0}, "no row has a standard_error_b"),
        (SCORES, {"by": "index", "lower_bound": 1.0}, "index has no standard error"),
        (SCORES, {"threshold": 1.0}, "none of its 5 rows is selected: no value passes"),
        ([SCORES[1]], {"top_k": 1}, "none of its 1 rows is selected: instruction is empty"),
        ([{**SCORES[0], "id": "one"}], {"top_k": 1}, "row 1 (index 0 id 'one') is no row of"),
        ([{"index": 6, "influence": 1.0}], {"top_k": 1}, "row 1 (index 6) is no row of"),
        ([{"id": "absent", "influence": 1.0}], {"top_k": 1}, "row 1 (id 'absent') is no row of"),
        ([{"influence": 1.0}], {"top_k": 1}, "row 1 has neither index nor id"),
        ([*SCORES, SCORES[2]], {"top_k": 1}, "row 6 is a second score of the row '3'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, scores, how, words):
    files = (lines(tmp_path / "scores.jsonl", scores), lines(tmp_path / "rows.jsonl", ROWS))
    with pytest.raises(UserError) as caught:
        select_rows(*map(str, files), tmp_path / "best.jsonl", **how)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "best.jsonl").exists()


def test_types_that_a_format_lacks_are_one_line(tmp_path):
    rows = [{"instruction": "a", "response": "b", "note": note} for note in (1, "one")]
    scores = [{"index": i, "influence": 1.0} for i in range(2)]
    files = (lines(tmp_path / "scores.jsonl", scores), lines(tmp_path / "rows.jsonl", rows))
    with pytest.raises(UserError, match=r"column note cannot be Parquet.*try a \.jsonl file"):
        select_rows(*map(str, files), tmp_path / "best.parquet", top_k=2)
    with pytest.raises(UserError, match=r"\.jsonl or \.parquet"):
        select_rows(*map(str, files), tmp_path / "best.csv", top_k=2)


def test_the_command_says_what_it_chose(files, tmp_path, capsys):
    scores, rows = files
    out = tmp_path / "best.jsonl"
    arguments = ["select", scores, "--candidates", rows, "--out", str(out)]
    assert run([*arguments, "--top-share", "0.6", "--spread"]) == 0
    said = capsys.readouterr().out
    assert (
        "best.jsonl: 3 of 6 rows (4 scored, 2 not {'instruction is empty': 1, 'no score': 1})"
        in said
    )
    assert "influence +4.000e-04 to -1.000e-04, mean +1.667e-04, of all +2.000e-04" in said
    assert "near-duplicates passed over: 1" in said
    assert [str(row["id"]) for row in chosen(out)] == ["5", "3", "7"]
    grouped = ("--per-group", "1", "--group-by", "topic", "--threshold=-1e-3")
    assert run([*arguments, *grouped]) == 0
    assert "rows above 1 of one topic passed over: 2" in capsys.readouterr().out
    assert run([*arguments, "--top-k", "1", "--by", "absent"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("montessori: error: ")
    assert error.count("\n") == 1


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        run(["select", "--help"])
    assert caught.value.code == 0
    assert "--top-share 0.1 --per-group 2 --spread" in capsys.readouterr().out
