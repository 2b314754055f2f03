"""Stage: scored candidates -> the rows to train on, as they were written, with their scores."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from montessori_jax.data.rows import Row, read_rows
from montessori_jax.data.sources import Record, open_records
from montessori_jax.data.tables import Table, read_table
from montessori_jax.data.writing import write_jsonl, write_parquet
from montessori_jax.errors import UserError
from montessori_jax.influence.selection import bounds, select

# What a score says of its row's place, which the row itself shows.
OF_THE_FILE = ("index", "id", "reason")


def select_rows(
    scores: str,
    candidates: str,
    out: Path,
    *,
    by: str = "influence",
    lower_bound: float | None = None,
    lowest: bool = False,
    top_k: int | None = None,
    top_share: float | None = None,
    threshold: float | None = None,
    per_group: int | None = None,
    group_by: str = "prompt_id",
    spread: float | None = None,
) -> dict[str, Any]:
    """Write the chosen candidates to ``out``, the best first.

    Rows keep every column that they have and gain those of their score (`influence`, `offset`,
    `standard_error`, ...), which replace columns of the same name from an earlier scoring.

    Args:
        scores: rows with ``index`` or ``id`` and the column ``by``, as the influence stage writes
            them; some of the candidates are enough.
        candidates: the rows that were scored; a score's row is found by index, its id compared.
        out: .jsonl or .parquet.
        by: the column to choose by.
        lower_bound: choose by ``by - lower_bound * standard error``; with ``lowest`` by the sum.
        lowest: the smallest instead of the largest.
        top_k: see `montessori_jax.influence.select`, like the next three.
        top_share: a share of the scored rows.
        threshold: a bound on the values.
        per_group: rows of one group at most.
        group_by: the column of the candidates, or of the scores, that names a row's group.
        spread: ROUGE-L F1 of prompt and response above which rows are near-duplicates.

    Returns:
        Counts, the causes of missing values, and the values' range and means.

    Raises:
        UserError: a file or a column is missing, the files do not belong together, nothing says
            how many, or no row is left.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{out}: rows are written as .jsonl or .parquet: give such a name")
    table = read_table(scores, (by,))
    source = read_rows(candidates)
    rows = {row.index: row for row in source.rows}
    names = {index: row.id for index, row in rows.items()}
    scored = _joined(scores, table, candidates, names | {bad.index: bad.id for bad in source.bad})
    values = _numbers(scores, scored, by)
    reasons = Counter(
        str(row.get("reason") or f"no {by}")
        for row, value in zip(scored.values(), values, strict=True)
        if value is None
    )
    if lower_bound is not None:
        column = _error_column(scores, table, by)
        errors = _numbers(scores, scored, column)
        bounded = bounds(values, errors, -lower_bound if lowest else lower_bound)
        missing = sum(
            value is not None and bound is None
            for value, bound in zip(values, bounded, strict=True)
        )
        reasons.update({f"no {column}": missing} if missing else {})
        values = bounded
    for place, index in enumerate(scored):
        if index not in rows and values[place] is not None:
            values[place] = None
            reasons["the row is malformed"] += 1
    if absent := source.total - len(scored):
        reasons["no score"] = absent
    records = _records(candidates)
    chosen = select(
        values,
        top_k=top_k,
        top_share=top_share,
        threshold=threshold,
        lowest=lowest,
        groups=_groups(candidates, records, scored, group_by) if per_group else None,
        per_group=per_group,
        texts=[_text(rows.get(index)) for index in scored] if spread is not None else None,
        spread=spread,
    )
    places = list(scored)
    picked = [places[place] for place in chosen.places]
    if not picked:
        why = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
        raise UserError(
            f"{scores}: none of its {len(scored)} rows is selected"
            + (": no value passes the threshold" if len(values) > chosen.skipped else f": {why}")
        )
    columns = [
        column
        for column in dict.fromkeys(key for index in picked for key in scored[index])
        if column not in OF_THE_FILE
        and any(
            scored[index].get(column) is not None or column in records[index] for index in picked
        )
    ]
    _write(
        out,
        [_with_score(records[index], names[index], scored[index], columns) for index in picked],
    )
    usable = np.array([value for value in values if value is not None])
    best = np.array([values[place] for place in chosen.places])
    return {
        "candidates": source.total,
        "scored": len(usable),
        "not": source.total - len(usable),
        "reasons": dict(reasons),
        "selected": len(picked),
        "alike": chosen.alike,
        "crowded": chosen.crowded,
        "first": float(best[0]),
        "last": float(best[-1]),
        "mean": float(best.mean()),
        "mean_of_all": float(usable.mean()),
    }


def _joined(
    scores: str, table: Table, candidates: str, names: dict[int, str]
) -> dict[int, dict[str, Any]]:
    """Each score under its candidate's index, in the candidates' order."""
    places = {name: index for index, name in names.items()}
    found: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(table, 1):
        index, name = row.get("index"), row.get("id")
        if index is None and name is None:
            raise UserError(f"{scores}: row {number} has neither index nor id to find its row by")
        if index is None:
            index = places.get(str(name))
        known = names.get(index) if isinstance(index, int) else None
        if not isinstance(index, int) or known is None or (name is not None and str(name) != known):
            what = " ".join(
                f"{key} {row[key]!r}" for key in ("index", "id") if row.get(key) is not None
            )
            raise UserError(
                f"{scores}: row {number} ({what}) is no row of {candidates}: give the file that "
                "was scored"
            )
        if index in found:
            raise UserError(f"{scores}: row {number} is a second score of the row {known!r}")
        found[index] = row
    return dict(sorted(found.items()))


def _numbers(scores: str, scored: dict[int, dict[str, Any]], column: str) -> list[float | None]:
    """A column as numbers; None where it is null or not finite."""
    values: list[float | None] = []
    for row in scored.values():
        value = row.get(column)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{scores}: column {column} holds {value!r}, which is no number")
        values.append(None if value is None or not np.isfinite(value) else float(value))
    return values


def _error_column(scores: str, table: Table, by: str) -> str:
    """The column with the standard errors of ``by``."""
    if not by.startswith("influence"):
        raise UserError(f"{by} has no standard error: --lower-bound goes with influence columns")
    column = "standard_error" + by.removeprefix("influence")
    if all(row.get(column) is None for row in table):
        raise UserError(
            f"{scores}: no row has a {column}: score with --method control_variate, or leave out "
            "--lower-bound"
        )
    return column


def _records(candidates: str) -> list[Record]:
    """Every row of the file whole, malformed ones included, so that places are indices."""
    path = Path(candidates)
    if path.is_dir() or path.suffix.lower() == ".parquet":
        return list(read_table(path))
    return [record for _, record in open_records(candidates).items]


def _groups(
    candidates: str,
    records: list[Record],
    scored: dict[int, dict[str, Any]],
    column: str,
) -> list[str | None]:
    """Each scored row's group, from the candidates or else from the scores."""
    own = [records[index] for index in scored]
    rows = [record if isinstance(record, dict) else {} for record in own]
    for known in (rows, list(scored.values())):
        if any(column in row for row in known):
            return [None if row.get(column) is None else str(row[column]) for row in known]
    raise UserError(
        f"{candidates}: no column {column} to group by, and the scores have none: give "
        "--group-by COLUMN"
    )


def _text(row: Row | None) -> str:
    """Prompt and response without the system's turn, which many rows share."""
    if row is None:
        return ""
    return "\n".join(turn["content"] for turn in row.conversation() if turn["role"] != "system")


def _with_score(
    record: Record, name: str, score: dict[str, Any], columns: list[str]
) -> dict[str, Any]:
    """The row as it was, with the score's columns; named as its score is where it has no id."""
    assert isinstance(record, dict)
    own = record if record.get("id") is not None else {**record, "id": name}
    return {**own, **{column: score.get(column) for column in columns}}


def _write(out: Path, rows: Table) -> None:
    try:
        if out.suffix == ".jsonl":
            write_jsonl(out, rows)
        else:
            write_parquet(out, rows)
    except (TypeError, ValueError) as error:
        other = ".parquet" if out.suffix == ".jsonl" else ".jsonl"
        raise UserError(f"{out}: {' '.join(str(error).split())}: try a {other} file") from error
