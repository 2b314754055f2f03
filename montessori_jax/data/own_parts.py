"""One source read by all processes of a job: each reads and decodes parts of its own.

What a process has decoded it tells the others, so that all go on with equal records, in order, and
every byte leaves the storage about once. JSON lines are divided by bytes, Parquet files by row
groups; what has neither (a JSON list, the shipped rows, the hub's cache) each reads whole.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from montessori_jax import cluster
from montessori_jax.data.rows import Row, RowFile, read_rows
from montessori_jax.data.sources import (
    Record,
    batch_records,
    in_one_line,
    open_records,
    parse_json_line,
)
from montessori_jax.data.tables import Table, read_table, table_file, with_columns
from montessori_jax.errors import UserError

PIECE = 1 << 20
"""Bytes of JSON lines that a process reads at a time."""

# What reading raises, pyarrow's families included.
READING = (OSError, ValueError, RuntimeError)
# Lines of a part, and its records by their line there, from 0.
Part = tuple[int, list[tuple[int, Record]]]


def read_rows_together(
    source: str | Path,
    *,
    limit: int | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> RowFile:
    """As `read_rows`, called by all processes of a job together; each reads parts of its own.

    Raises:
        UserError: also where the processes do not see one and the same file.
    """
    records = open_records(source)
    if cluster.count() > 1 and records.path is not None:
        items = _by_parts(records.name, records.path, records.read_columns)
        records = replace(records, items=items)
    return read_rows(records, limit=limit, on_row=on_row)


def read_table_together(path: str | Path, columns: tuple[str, ...] = ()) -> Table:
    """As `read_table`, called by all processes of a job together; each reads parts of its own."""
    file = table_file(path)
    if cluster.count() == 1 or not file.is_file():
        return read_table(file, columns)
    rows: Table = []
    for line, record in _by_parts(str(file), file, None):
        if isinstance(record, str):
            raise UserError(f"{file}: line {line}: {record}")
        rows.append(record)
    return with_columns(rows, file, columns)


def _by_parts(name: str, path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, Record]]:
    """The records of a file with their lines; ``columns`` are a Parquet file's that are wanted."""
    size = path.stat().st_size
    if len(set(cluster.exchange(str(size).encode()))) > 1:
        raise UserError(f"{name} has another size on another host: put it where all see one file")
    if path.suffix.lower() == ".jsonl":

        def lines(number: int) -> Part:
            return json_lines(path, number * PIECE, (number + 1) * PIECE)

        return _told(name, -(-size // PIECE), lines)
    import pyarrow.parquet as pq

    def rows(number: int) -> Part:
        return row_group(path, number, columns)

    try:
        groups = pq.read_metadata(path).num_row_groups
    except READING as error:
        raise UserError(f"{name}: cannot be read as Parquet: {in_one_line(error)}") from None
    return _told(name, groups, rows)


def json_lines(path: Path, start: int, stop: int) -> Part:
    """The lines of a file that begin in ``[start, stop)``, however far the last one goes."""
    found: list[tuple[int, Record]] = []
    lines = 0
    with path.open("rb") as file:
        at = start
        if start:  # What is left of a line that began before, or the line break just before.
            file.seek(start - 1)
            at += len(file.readline()) - 1
        while at < stop and (line := file.readline()):
            at += len(line)
            if not start and not lines:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                found.append((lines, parse_json_line(line)))
            lines += 1
    return lines, found


def row_group(path: Path, number: int, columns: Sequence[str] | None) -> Part:
    """The rows of one row group of a Parquet file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        wanted = None if columns is None else list(columns)
        batches = file.iter_batches(batch_size=1024, row_groups=[number], columns=wanted)
        found = [record for batch in batches for record in batch_records(batch)]
    return len(found), list(enumerate(found))


def _told(name: str, parts: int, read: Callable[[int], Part]) -> Iterator[tuple[int, Record]]:
    """The records of all parts, in order; each process reads every ``cluster.count()``-th one."""
    line = 1
    for start in range(0, parts, cluster.count()):
        mine: Any = (0, [])
        number = start + cluster.index()
        if number < parts:
            try:
                mine = read(number)
            except READING as error:
                mine = in_one_line(error)
        # From this very program in the job's other processes.
        for told in map(pickle.loads, cluster.exchange(pickle.dumps(mine))):
            if isinstance(told, str):
                raise UserError(f"{name} cannot be read: {told}")
            lines, found = told
            for at, record in found:
                yield line + at, record
            line += lines
