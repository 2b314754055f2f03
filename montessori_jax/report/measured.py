"""Measurements that span checkpoints, models or students: JSON files of the formats below.

- ``{"teacher_curve": [{"step", "yield", "influence", "influence_error", "influence_quantiles",
  "share", "student_loss", "student_loss_error", "evaluation"}]}``: one tuned teacher a row, by its
  DPO step (the paper's figures 3a-c), ``evaluation`` as an evaluation stage reports it;
- ``{"influence_curve": [{"step", "share", "share_relative", "data"}]}``: the share of positive
  influence of training data along the student's training (3d), and of influence above that of the
  zero-gradient step;
- ``{"pairs": [{"a", "b", "wins", "losses", "ties", "standard_error"}]}``: head to head, wins and
  losses being ``a``'s, the error that of its win rate in percent (figure 4): what the stage
  head_to_head writes;
- ``{"rows": [{"student", "data", "evaluation"}]}``: several students on the data of one teacher,
  ``evaluation`` as an evaluation stage reports it (figure 5): what the stage cross_student writes.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from montessori_jax.errors import UserError

Row = dict[str, Any]
NEEDED = {
    "teacher_curve": ("step",),
    "influence_curve": ("step", "share"),
    "pairs": ("a", "b", "wins", "losses", "ties"),
    "rows": ("student", "data", "evaluation"),
}
QUANTILES = 5
"""Of influence, in a row of a teacher curve: at 0.05, 0.25, 0.5, 0.75 and 0.95."""
# Where a run keeps them: its folder, an iteration's, a stage's.
PLACES = ("*.json", "iteration-*/*.json", "iteration-*/*/*.json")
NAMES = ("teacher_curve", "influence_curve", "head_to_head", "cross_student")


@dataclass
class Measured:
    """What was found, each with the name of where it is from."""

    teacher_curves: dict[str, list[Row]] = field(default_factory=dict)
    influence_curves: dict[str, list[Row]] = field(default_factory=dict)
    matches: dict[str, list[Row]] = field(default_factory=dict)
    cross_students: dict[str, list[Row]] = field(default_factory=dict)


def in_run(path: Path) -> list[Path]:
    """The measurement files in a run's folder, by their names."""
    return [
        file
        for pattern in PLACES
        for file in sorted(path.glob(pattern))
        if file.stem.startswith(NAMES)
    ]


def read_measured(files: Iterable[tuple[str, Path]]) -> Measured:
    """Read files, each with the name that the page gives it.

    Raises:
        UserError: a file is missing, is no JSON, or has none of the formats.
    """
    found = Measured()
    kept = {
        "teacher_curve": found.teacher_curves,
        "influence_curve": found.influence_curves,
        "pairs": found.matches,
        "rows": found.cross_students,
    }
    for name, file in files:
        content = _read(file)
        kind = next((kind for kind in kept if kind in content), None)
        if kind is None:
            raise UserError(f"{file}: holds none of {', '.join(kept)}: docs/report.md has the form")
        rows = content[kind]
        for number, row in enumerate(rows, 1):
            absent = [key for key in NEEDED[kind] if key not in row]
            if absent:
                raise UserError(f"{file}: row {number} of {kind} has no {', '.join(absent)}")
            quantiles = row.get("influence_quantiles")
            if quantiles is not None and len(quantiles) != QUANTILES:
                raise UserError(
                    f"{file}: row {number} of {kind}: influence_quantiles are not {QUANTILES}"
                )
        if name in kept[kind]:
            name = f"{name}, {_within(file)}"
        if rows:
            kept[kind][name] = rows
    return found


def _within(file: Path) -> str:
    """A measurement's place in its run: from the iteration's folder on, or its own folder."""
    folders = file.parts[:-1]
    starts = [n for n, folder in enumerate(folders) if folder.startswith("iteration-")]
    return "/".join([*folders[starts[-1] if starts else -1 :], file.stem])


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{file}: is no JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: is no JSON object")
    return content


@dataclass(frozen=True)
class WinRate:
    """A player's share of ``games`` against another, ties as half, and its standard error."""

    rate: float
    games: int
    error: float | None


def win_rates(rows: Sequence[Row]) -> dict[tuple[str, str], WinRate]:
    """For each ordered pair of players, in order of appearance, how the first did.

    Games of a pair that is listed more than once are added up, which leaves no error.
    """
    points: dict[tuple[str, str], float] = {}
    games: dict[tuple[str, str], int] = {}
    errors: dict[tuple[str, str], float | None] = {}
    for row in rows:
        a, b, ties = str(row["a"]), str(row["b"]), row["ties"]
        count = row["wins"] + row["losses"] + ties
        error = row.get("standard_error")
        for pair, won in (((a, b), row["wins"]), ((b, a), row["losses"])):
            errors[pair] = None if pair in games or error is None else error / 100
            points[pair] = points.get(pair, 0.0) + won + ties / 2
            games[pair] = games.get(pair, 0) + count
    return {
        pair: WinRate(points[pair] / count, count, errors[pair])
        for pair, count in games.items()
        if count
    }
