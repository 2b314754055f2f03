"""Units of `benchmarks.reproduction` as tables: means over seeds, with intervals."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.benefit_summary import interval

# Row of the table -> the unit that has it, and whose data its student learnt from.
ROWS = {
    "Self-Instruct": ("montessori", "untuned"),
    "Montessori-Instruct": ("montessori", "tuned"),
    "DPO on random pairs": ("random", "tuned"),
    "DPO on training loss": ("training_loss", "tuned"),
}
UNTRAINED = "nothing (untrained)"
Units = dict[str, dict[int, dict[str, Any]]]
COLUMNS: dict[str, Callable[[dict[str, Any], str], float]] = {
    "held out, in domain": lambda unit, name: unit["students"][name]["in_domain"],
    "held out, out of domain": lambda unit, name: unit["students"][name]["out_of_domain"],
    "positive influence": lambda unit, name: unit["data"][name]["positive_share"],
    "above zero gradient": lambda unit, name: unit["data"][name]["positive_share_relative"],
    "mean influence": lambda unit, name: unit["data"][name]["mean_influence"],
}


def tables(folder: Path) -> str:
    """Markdown of the units in ``folder``: each row by itself, and against Self-Instruct."""
    units: Units = {}
    for path in sorted(folder.glob("*.json")):
        method, _, seed = path.stem.rpartition("-")
        units.setdefault(method, {})[int(seed)] = json.loads(path.read_text())["result"]
    parts = (_means(units), _differences(units), _judged(units), _costs(units))
    return "\n\n".join("\n".join(part) for part in map(list, parts) if part)


def _head(first: str, *more: str) -> Iterator[str]:
    names = (first, "seeds", *more)
    yield f"| {' | '.join(names)} |"
    yield f"|{' --- |' * len(names)}"


def _means(units: Units) -> Iterator[str]:
    yield "Means over seeds, with 95% intervals by Student's t where there are several:"
    yield ""
    yield from _head("student trained on data of", *COLUMNS)
    base = [unit["students"]["untrained"] for unit in units.get("montessori", {}).values()]
    if base:
        inside, outside = ([one[name] for one in base] for name in ("in_domain", "out_of_domain"))
        yield f"| {UNTRAINED} | {len(base)} | {_cell(inside)} | {_cell(outside)} | | | |"
    for row, (method, name) in ROWS.items():
        found = list(units.get(method, {}).values())
        if found:
            cells = [_cell([column(unit, name) for unit in found]) for column in COLUMNS.values()]
            yield f"| {row} | {len(found)} | {' | '.join(cells)} |"


def _differences(units: Units) -> Iterator[str]:
    yield "The same less Self-Instruct's of the same seed:"
    yield ""
    yield from _head("student trained on data of", *COLUMNS)
    baseline = units.get("montessori", {})
    if baseline:
        gaps = [
            [unit["students"]["untrained"][name] - unit["students"]["untuned"][name]
             for unit in baseline.values()]
            for name in ("in_domain", "out_of_domain")
        ]  # fmt: skip
        inside, outside = (_cell(gap, sign="+") for gap in gaps)
        yield f"| {UNTRAINED} | {len(baseline)} | {inside} | {outside} | | | |"
    for row, (method, name) in list(ROWS.items())[1:]:
        seeds = sorted(units.get(method, {}).keys() & baseline.keys())
        if seeds:
            cells = [
                _cell([
                    column(units[method][seed], name) - column(baseline[seed], "untuned")
                    for seed in seeds
                ], sign="+")
                for column in COLUMNS.values()
            ]  # fmt: skip
            yield f"| {row} | {len(seeds)} | {' | '.join(cells)} |"


def _judged(units: Units) -> Iterator[str]:
    judged = {
        method: [
            unit["head_to_head"]
            for unit in found.values()
            if unit.get("head_to_head", {}).get("win_rate") is not None
        ]
        for method, found in units.items()
    }
    if not any(judged.values()):
        return
    yield "Win rate in percent against Self-Instruct's student of the same seed, ties as half:"
    yield ""
    yield from _head("student trained on data of", "win rate", "prompts", "judge")
    for row, (method, name) in ROWS.items():
        found = judged.get(method, []) if name == "tuned" else []
        for judge, prompts in sorted({(one["judge"], one["prompts"]) for one in found}):
            own = [one for one in found if (one["judge"], one["prompts"]) == (judge, prompts)]
            rates = _cell([one["win_rate"] for one in own])
            yield f"| {row} | {len(own)} | {rates} | {prompts} | {judge} |"


def _costs(units: Units) -> Iterator[str]:
    yield (
        "Rows of each student, and minutes of each unit on two cores, measuring included, without "
        "the stages that it borrowed:"
    )
    yield ""
    yield from _head("unit", "rows", "minutes")
    for method, found in units.items():
        rows = {one.get("rows") for unit in found.values() for one in unit["students"].values()}
        minutes = ", ".join(f"{unit['seconds'] / 60:.0f}" for unit in found.values())
        shown = ", ".join(map(str, sorted(rows - {None})))
        yield f"| {method} | {len(found)} | {shown} | {minutes} |"


def _cell(values: list[float], sign: str = "") -> str:
    found = interval(values)
    text = f"{found['mean']:{sign}.4f}"
    if found["low"] is None:
        return text
    return f"{text} [{found['low']:{sign}.4f}, {found['high']:{sign}.4f}]"
