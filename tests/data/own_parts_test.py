"""Parts of a file by themselves: together they are what one reader finds, lines and reasons too."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_jax import cluster
from montessori_jax.data import own_parts
from montessori_jax.data.own_parts import (
    json_lines,
    read_rows_together,
    read_table_together,
    row_group,
)
from montessori_jax.data.rows import read_rows
from montessori_jax.data.sources import open_records
from montessori_jax.data.tables import read_table
from montessori_jax.data.writing import GROUP, write_parquet
from montessori_jax.errors import UserError

LINES = st.lists(
    st.one_of(
        st.just(b""),
        st.just(b"  \r"),
        st.just(b"\xff"),
        st.just(b"[1]"),
        st.just(b"\xef\xbb\xbf{}"),
        st.text().map(lambda text: json.dumps({"a": text}, ensure_ascii=False).encode()),
    )
)


def joined(parts):
    """What a reader of all parts has: records by their lines in the file."""
    found, line = [], 1
    for lines, records in parts:
        found += [(line + at, record) for at, record in records]
        line += lines
    return found


@given(lines=LINES, piece=st.integers(1, 60), ends=st.booleans())
def test_each_line_is_of_one_part(tmp_path_factory, lines, piece, ends):
    path = tmp_path_factory.mktemp("parts") / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    size = path.stat().st_size
    parts = [json_lines(path, start, start + piece) for start in range(0, size, piece)]
    assert joined(parts) == list(open_records(path).items)


def test_row_groups_are_the_file(tmp_path):
    path = tmp_path / "data.parquet"
    rows = [{"instruction": f"Do {n}.", "response": str(n)} for n in range(2 * GROUP + 3)]
    write_parquet(path, rows)
    count = pq.read_metadata(path).num_row_groups
    assert count == 3
    parts = [row_group(path, number, ["response"]) for number in range(count)]
    assert [one for one, _ in parts] == [GROUP, GROUP, 3]
    assert joined(parts) == [(n + 1, {"response": str(n)}) for n in range(len(rows))]


@pytest.fixture
def job(monkeypatch):
    """Three processes of a job as threads; returns what each of them makes of a function."""
    mine, meet, given = threading.local(), threading.Barrier(3, timeout=30), [b""] * 3

    def exchange(said):
        given[mine.index] = said
        meet.wait()
        told = list(given)
        meet.wait()
        return told

    monkeypatch.setattr(cluster, "count", lambda: 3)
    monkeypatch.setattr(cluster, "index", lambda: mine.index)
    monkeypatch.setattr(cluster, "exchange", exchange)

    def each(do):
        def one(index):
            mine.index = index
            try:
                return do()
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor(3) as pool:
            return [*pool.map(one, range(3))]

    return each


@pytest.fixture
def rows(tmp_path):
    """A file of each kind with the same 40 rows, of which two are malformed."""
    made = [{"id": f"r{n}", "instruction": f"Do {n}.", "response": f"{n}\n"} for n in range(40)]
    made[7]["instruction"], made[31]["response"] = " ", None
    lines, table = tmp_path / "rows.jsonl", tmp_path / "data.parquet"
    lines.write_text("\n".join(json.dumps(row) for row in made) + "\n")
    pq.write_table(pa.Table.from_pylist(made), table, row_group_size=6)
    return {"lines": lines, "table": table}


@pytest.mark.parametrize("kind", ["lines", "table"])
@pytest.mark.parametrize("limit", [None, 9])
def test_all_have_what_one_reader_has(job, rows, monkeypatch, kind, limit):
    monkeypatch.setattr(own_parts, "PIECE", 100)
    alone = asdict(read_rows(rows[kind], limit=limit))
    assert [asdict(one) for one in job(lambda: read_rows_together(rows[kind], limit=limit))] == [
        alone
    ] * 3
    whole = read_table(rows[kind])
    assert job(lambda: read_table_together(rows[kind], ("id",))) == [whole] * 3


@pytest.mark.parametrize("kind", ["lines", "table"])
def test_each_reads_its_own(job, rows, monkeypatch, kind):
    monkeypatch.setattr(own_parts, "PIECE", 100)
    parts = {"lines": "json_lines", "table": "row_group"}[kind]
    real, read = getattr(own_parts, parts), []

    def counted(path, first, *more):
        read.append((cluster.index(), first))
        return real(path, first, *more)

    monkeypatch.setattr(own_parts, parts, counted)
    monkeypatch.setattr(own_parts, "read_table", None)
    job(lambda: read_rows_together(rows[kind]))
    step = {"lines": 100, "table": 1}[kind]
    assert sorted(first for _, first in read) == [step * n for n in range(len(read))]
    assert all(first // step % 3 == index for index, first in read)
    assert len(read) > 6


def test_what_one_cannot_read_all_are_told(job, rows, monkeypatch):
    def damaged(path, number, columns):
        if cluster.index() == 1:
            raise OSError("the disk is gone")
        return row_group(path, number, columns)

    monkeypatch.setattr(own_parts, "row_group", damaged)
    expected = f"{rows['table']} cannot be read: OSError: the disk is gone"
    assert job(lambda: read_rows_together(rows["table"])) == [expected] * 3


def test_files_that_differ_are_refused_by_all(job, rows):
    places = ["lines", "table", "lines"]
    found = job(lambda: read_rows_together(rows[places[cluster.index()]]))
    assert all("has another size on another host" in one for one in found)


def test_a_line_that_is_none_is_named_to_all(job, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"a": 1}\n\nnonsense\n')
    expected = f"{path}: line 3: the line is not valid JSON"
    assert job(lambda: read_table_together(path)) == [expected] * 3


def test_a_table_that_is_none_is_named(job, tmp_path):
    path = tmp_path / "data.parquet"
    path.write_bytes(b"nonsense")
    for said in job(lambda: read_table_together(path)):
        assert f"{path}: cannot be read as Parquet" in said
