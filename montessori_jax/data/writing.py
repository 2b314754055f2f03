"""Data sets on disk: JSON lines, Parquet, and a Parquet data set with its card.

Every file appears whole or not at all: it is written beside its final name, flushed to the disk
and renamed. The same rows give the same bytes (for one version of pyarrow).
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from montessori_jax.data.sources import in_one_line
from montessori_jax.errors import UserError

GROUP = 1024
"""Rows of a row group: what one process of a job reads (`montessori_jax.data.own_parts`)."""


@dataclass(frozen=True)
class DatasetCard:
    """What a reader of a data set needs to know about it.

    Attributes:
      title: a short name.
      description: what it is, in a sentence or two.
      columns: the meaning of each column, by its name; every column of the rows is described.
      made: how it was made, one step an item.
      counts: numbers of interest (prompts, kept, dropped by cause, ...).
      seed: the seed of the run that made it, or None where chance played no part.
      models: the models that wrote or scored it, by their part (teacher, student, ...).
      license: an SPDX name, if there is one to give.
    """

    title: str
    description: str
    columns: Mapping[str, str]
    made: Sequence[str]
    counts: Mapping[str, int] = field(default_factory=dict)
    seed: int | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    license: str | None = None


@contextmanager
def open_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file for binary writing that takes its name only once it is complete.

    The bytes go to ``.NAME.tmp`` in the same folder (made if absent), which is flushed to the
    disk and renamed when the block ends, and removed if the block fails. A process that is killed
    leaves at most that one file, which the next attempt overwrites. A link is followed: its
    target is replaced, and the link stays.

    Raises:
      UserError: the file cannot be written: no space, no permission, or the name belongs to a
        folder or a device.
    """
    final = Path(os.path.realpath(path))
    if final.exists() and not final.is_file():
        raise UserError(f"cannot write {path}: it is not an ordinary file; choose another name")
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
        _sync_folder(final.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise _cannot_write(path, error) from error
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes one JSON object a line, as UTF-8, keys in their order; returns the number of rows.

    Raises:
      UserError: see :func:`open_atomically`.
      ValueError: a number is NaN or infinite, or a text is not valid Unicode.
      TypeError: a value is of a type that JSON lacks.
    """
    count = 0
    with open_atomically(path) as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False)
            file.write(line.encode("utf-8") + b"\n")
            count += 1
    return count


def write_parquet(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """Writes the rows as one Parquet file; returns their number.

    Columns come in the order of their first appearance; a row that lacks one gets a null.

    Raises:
      UserError: see :func:`open_atomically`.
      ValueError: there are no rows, or a column mixes types that Parquet cannot hold together.
    """
    return _write_table(path, _table(rows))


def _write_table(path: str | Path, table: Any) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_atomically(path) as file:
        try:
            pq.write_table(table, file, compression="zstd", row_group_size=GROUP)
        except pa.ArrowNotImplementedError as error:
            raise ValueError(f"{path} cannot be Parquet: {in_one_line(error)}") from error
    return int(table.num_rows)


def write_dataset_card(
    folder: str | Path, rows: Sequence[Mapping[str, Any]], card: DatasetCard
) -> Path:
    """Writes a data set: ``data.parquet`` and, last, the card as ``README.md``.

    The folder loads with ``datasets.load_dataset(folder)`` and with
    :func:`montessori_jax.data.rows.read_rows`, and can be uploaded to the Hugging Face hub as it
    is. A card without times keeps the bytes equal between equal runs.

    Returns:
      The folder.

    Raises:
      UserError: see :func:`open_atomically`.
      ValueError: there are no rows, a column is not described, or a described one is absent.
    """
    return write_dataset_parts(folder, {"data": rows}, card)


def write_dataset_parts(
    folder: str | Path, parts: Mapping[str, Sequence[Mapping[str, Any]]], card: DatasetCard
) -> Path:
    """As :func:`write_dataset_card`, one ``NAME.parquet`` a part; several parts are splits.

    All parts have all columns, of one type each: what loads data sets wants splits alike.
    """
    folder = Path(folder)
    whole = _table([row for rows in parts.values() for row in rows])
    schema = whole.schema
    if set(schema.names) != set(card.columns):
        differing = sorted(set(schema.names) ^ set(card.columns))
        raise ValueError(f"columns and their descriptions differ in: {', '.join(differing)}")
    types = {name: str(schema.field(name).type) for name in schema.names}
    counts: dict[str, int] = {}
    for name, rows in parts.items():
        part = whole.slice(sum(counts.values()), len(rows))
        counts[name] = _write_table(folder / f"{name}.parquet", part)
    with open_atomically(folder / "README.md") as file:
        file.write(_card_text(card, types, counts).encode("utf-8"))
    return folder


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    import pyarrow as pa

    if not rows:
        raise ValueError("no rows to write")
    # pyarrow's from_pylist takes its columns from the first row alone.
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
            raise ValueError(f"column {name} cannot be Parquet: {in_one_line(error)}") from error
    return pa.table(columns)


def _card_text(card: DatasetCard, types: Mapping[str, str], rows: Mapping[str, int]) -> str:
    head = ["---"]
    if card.license is not None:
        head.append(f"license: {json.dumps(card.license)}")
    head += ["configs:", "- config_name: default"]
    if len(rows) == 1:
        head += [f"  data_files: {name}.parquet" for name in rows]
    else:
        head += ["  data_files:"]
        for name in rows:
            head += [f"  - split: {name}", f"    path: {name}.parquet"]
    head += ["---", ""]
    parts = [*head, f"# {_plain(card.title)}", "", card.description.strip(), "", "## Columns", ""]
    parts += _markdown_table(
        ("column", "type", "meaning"),
        [(f"`{name}`", kind, card.columns[name]) for name, kind in types.items()],
    )
    parts += ["", "## How it was made", ""]
    parts += [f"{number}. {_plain(step)}" for number, step in enumerate(card.made, start=1)]
    parts += ["", f"Seed: {'none used' if card.seed is None else card.seed}", ""]
    if card.models:
        parts += ["## Models", ""]
        parts += [f"- {_plain(part)}: `{_plain(model)}`" for part, model in card.models.items()]
        parts += [""]
    label = "rows" if len(rows) == 1 else "rows of {}"
    counts = {**{label.format(name): count for name, count in rows.items()}, **card.counts}
    parts += ["## Counts", ""]
    parts += _markdown_table(
        ("what", "number"), [(what, f"{number:,}") for what, number in counts.items()]
    )
    return "\n".join(parts) + "\n"


def _markdown_table(head: tuple[str, ...], body: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *body]
    return [
        "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in line) + " |"
        for line in lines
    ]


def _plain(text: str) -> str:
    return " ".join(str(text).split())


def _sync_folder(folder: Path) -> None:
    # Without this a power cut can lose the rename. Some file systems refuse to sync a folder.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cannot_write(path: str | Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"cannot write {path}: the disk is full; free some space and run the same command again"
        )
    what = (error.strerror or in_one_line(error)).lower()
    return UserError(f"cannot write {path}: {what}; check the folder and its permissions")
