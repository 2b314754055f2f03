"""Where rows come from: files, the shipped set and Hugging Face data sets, as raw records.

A record is a dict, or a ``str`` that says why that line is not one. Nothing here looks at what a
record holds; :mod:`montessori_jax.data.rows` does.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from montessori_jax.data.trees import COLUMNS as TREE_COLUMNS
from montessori_jax.data.trees import NEEDED, OPTIONAL, first_turns, is_tree
from montessori_jax.errors import UserError

Record = dict[str, Any] | str

COLUMNS = ("id", "prompt_id", "instruction", "input", "response", "output", "messages")
SHIPPED = ("seeds", "reference", "heldout")
KINDS = (
    "a .jsonl, .json or .parquet file, "
    + ", ".join(f"package:{name}" for name in SHIPPED)
    + " or hf:org/name[:split]"
)


@dataclass(frozen=True)
class Records:
    """The records of one source, in order.

    ``columns`` is None where only reading tells (JSON lines). ``items`` yields
    ``(line, record)``, the line counted from 1 as an editor counts it, or the row where a format
    has no lines. ``path`` is the file, where parts of it can be read alone
    (:mod:`montessori_jax.data.own_parts`), and ``read_columns`` those that are.
    """

    name: str
    columns: tuple[str, ...] | None
    items: Iterator[tuple[int, Record]]
    path: Path | None = None
    read_columns: tuple[str, ...] = ()


def open_records(source: str | Path) -> Records:
    """Opens a source by its name.

    Args:
      source: a ``.jsonl``, ``.json`` or ``.parquet`` file, a folder that holds a
        ``data.parquet`` (what :func:`montessori_jax.data.writing.write_dataset_card` writes),
        ``package:seeds``, ``package:reference``, ``package:heldout``, or ``hf:org/name[:split]``
        (split ``train`` if none is given). A Parquet file and a data set of the Hub may hold
        conversation trees (:mod:`montessori_jax.data.trees`).

    Raises:
      UserError: the source does not exist, cannot be read or is of an unknown kind.
    """
    name = str(source)
    kind, _, rest = name.partition(":")
    if kind == "package":
        return _shipped(name, rest)
    if kind == "hf":
        return _hub(name, rest)

    path = Path(source)
    if path.is_dir() and (path / "data.parquet").is_file():
        path = path / "data.parquet"
    if path.is_dir():
        raise UserError(f"{name} is a folder without a data.parquet; expected {KINDS}")
    if not path.exists():
        looks_hosted = name.count("/") == 1 and not path.suffix
        hint = f"; for a Hugging Face data set write hf:{name}" if looks_hosted else ""
        raise UserError(f"{name} does not exist; expected {KINDS}{hint}")
    readers = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{name} is of an unknown kind ({path.suffix or 'no suffix'}); expected {KINDS}"
        )
    if not os.access(path, os.R_OK):
        raise UserError(f"{name} cannot be read: no permission; check the file's mode and owner")
    return reader(name, path)


def in_one_line(error: BaseException, limit: int = 200) -> str:
    """An exception's kind and text with its line breaks removed, shortened to `limit`."""
    text = " ".join(str(error).split())
    shown = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def parse_json_line(line: bytes) -> Record:
    """One line of a JSONL file as an object, or the reason why it is not one."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "the line is not valid UTF-8"
    except (ValueError, RecursionError):  # also numbers of absurd length and bottomless nesting
        return "the line is not valid JSON"
    return value if isinstance(value, dict) else "the line is not a JSON object"


def _json_lines(name: str, path: Path) -> Records:
    def items() -> Iterator[tuple[int, Record]]:
        # Bytes, because str.splitlines would also break at U+2028 inside a JSON string.
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                    if line.strip():
                        yield number, parse_json_line(line)
        except OSError as error:
            raise UserError(f"{name} cannot be read: {in_one_line(error)}") from error

    return Records(name, None, items(), path)


def _json_list(name: str, path: Path) -> Records:
    expected = "expected a list of objects with `instruction` and `output`"
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{name} cannot be read: {in_one_line(error)}") from error
    except (ValueError, RecursionError) as error:
        hint = " (one object a line belongs in a .jsonl file)" if "Extra data" in str(error) else ""
        raise UserError(
            f"{name} is not valid JSON: {in_one_line(error)}; {expected}{hint}"
        ) from error
    if not isinstance(value, list):
        raise UserError(f"{name} holds one JSON {type(value).__name__}; {expected}")
    records = [
        item if isinstance(item, dict) else "the item is not a JSON object" for item in value
    ]
    return Records(name, None, iter(enumerate(records, start=1)))


def _parquet(name: str, path: Path) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{name} is not a Parquet file that can be read: {in_one_line(error)}"
        ) from error
    columns = tuple(file.schema_arrow.names)
    wanted = _wanted(columns)
    if len(set(wanted)) < len(wanted):
        raise UserError(
            f"{name} has two columns of the same name among {', '.join(wanted)}; rename one of them"
        )

    def items() -> Iterator[tuple[int, Record]]:
        number = 0
        try:
            with file:
                for batch in file.iter_batches(batch_size=1024, columns=wanted):
                    for record in batch_records(batch):
                        number += 1
                        yield number, record
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{name} is damaged after row {number}: {in_one_line(error)}"
            ) from error

    if is_tree(columns):  # a tree may go on in the next row group
        return _rows(name, columns, items())
    return Records(name, columns, items(), path, tuple(wanted))


def _wanted(columns: Sequence[str]) -> list[str]:
    """The columns that are read."""
    known = NEEDED | OPTIONAL if is_tree(columns) else COLUMNS
    return [column for column in columns if column in known]


def _rows(name: str, columns: tuple[str, ...], items: Iterator[tuple[int, Record]]) -> Records:
    """The records as they are, or what conversation trees make of them."""
    if not is_tree(columns):
        return Records(name, columns, items)
    turns = first_turns(record for _, record in items)
    return Records(name, TREE_COLUMNS, enumerate(turns, start=1))


def batch_records(batch: Any) -> list[Record]:
    """The rows of an Arrow batch, those that are not UTF-8 as their reason."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:  # Arrow does not check its strings: find the rows at fault
        if batch.num_rows == 1:
            return ["the row is not valid UTF-8"]
        half = batch.num_rows // 2
        return batch_records(batch.slice(0, half)) + batch_records(batch.slice(half))


def _shipped(name: str, key: str) -> Records:
    if key not in SHIPPED:
        known = ", ".join(f"package:{known}" for known in SHIPPED)
        raise UserError(f"{name} is not in the package; it holds {known}")
    path = resources.files("montessori_jax.data") / "shipped" / f"{key}.jsonl"
    lines = path.read_bytes().splitlines()
    return Records(name, None, ((i, parse_json_line(line)) for i, line in enumerate(lines, 1)))


def _hub(name: str, rest: str) -> Records:
    repository, _, split = rest.partition(":")
    split = split or "train"
    if not repository:
        raise UserError(f"{name} names no data set; write hf:org/name or hf:org/name:split")
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{name} needs the datasets package: pip install datasets, or pass a "
            ".jsonl or .parquet file"
        ) from error
    try:
        table = datasets.load_dataset(repository, split=split)
    # Offline, private, renamed, gated, several configurations, an unknown split: the libraries
    # below raise a dozen types for these, and each means the same to the user.
    except Exception as error:
        raise UserError(
            f"the data set {repository} (split {split}) cannot be loaded from the Hugging Face "
            f"hub: {in_one_line(error)}; check the name, the split and the network, or download "
            "it elsewhere and pass a .jsonl or .parquet file"
        ) from error
    columns = tuple(table.column_names)
    table = table.select_columns(_wanted(columns))
    return _rows(name, columns, ((i, dict(record)) for i, record in enumerate(table, 1)))
