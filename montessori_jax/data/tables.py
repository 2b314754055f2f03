"""Reading tables with whatever columns they have: the artifacts that pass between stages."""

from pathlib import Path
from typing import Any

from montessori_jax.data.sources import in_one_line, parse_json_line
from montessori_jax.errors import UserError

Table = list[dict[str, Any]]


def read_table(path: str | Path, columns: tuple[str, ...] = ()) -> Table:
    """Rows of a Parquet or JSONL file, or of a folder's ``data.parquet``, every column.

    Raises:
        UserError: the file is missing or damaged, has no rows, or lacks one of ``columns``.
    """
    file = table_file(path)
    rows = _read_jsonl(file) if file.suffix == ".jsonl" else _read_parquet(file)
    return with_columns(rows, file, columns)


def count_rows(path: str | Path) -> int:
    """How many rows `read_table` would give; of a Parquet file nothing is decoded."""
    import pyarrow.parquet as pq

    file = table_file(path)
    if file.suffix == ".jsonl":
        return len(read_table(file))
    try:
        return pq.read_metadata(file).num_rows
    except Exception as error:  # pyarrow raises several families for a damaged file
        raise UserError(f"{file}: cannot be read as Parquet: {in_one_line(error)}") from None


def table_file(path: str | Path) -> Path:
    """The file of a table that may be named by its folder."""
    file = Path(path)
    return file / "data.parquet" if file.is_dir() else file


def with_columns(rows: Table, file: Path, columns: tuple[str, ...]) -> Table:
    """The rows, if there are any and the first one has the columns; else a UserError."""
    if not rows:
        raise UserError(f"{file}: has no rows")
    missing = [name for name in columns if name not in rows[0]]
    if missing:
        raise UserError(f"{file}: no column {', '.join(missing)}; it has {', '.join(rows[0])}")
    return rows


def _read_parquet(file: Path) -> Table:
    import pyarrow.parquet as pq

    try:
        return pq.read_table(file).to_pylist()
    except Exception as error:  # pyarrow raises several families for a damaged file
        raise UserError(f"{file}: cannot be read as Parquet: {in_one_line(error)}") from None


def _read_jsonl(file: Path) -> Table:
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    rows: Table = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = parse_json_line(line)
        if isinstance(row, str):
            raise UserError(f"{file}: line {number}: {row}")
        rows.append(row)
    return rows
