"""The page's sections on what a run took and how it was set: costs, settings, versions."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from montessori_jax.report import plots
from montessori_jax.report.markup import Cell, Column, escape, note, section, table
from montessori_jax.report.run_data import Run
from montessori_jax.report.sections import Draw, gallery

# What a stage's result calls the number of data that it worked on; the first that it has.
DATA = ("rows", "scored", "pairs", "responses", "compared")
# What the result of an evaluation calls it; lm-evaluation-harness's has samples by task.
EVALUATED = {"reference_loss": "samples", "alpaca_eval": "prompts", "mt_bench": "questions"}


def costs(runs: Sequence[Run], draw: Draw) -> str:
    """Seconds, tokens and money by task, in all and for each datum."""
    columns = [
        Column("task"), Column("run"), Column("data", True), Column("seconds", True),
        Column("seconds a datum", True), Column("tokens", True), Column("tokens a datum", True),
        Column("dollars", True), Column("dollars a datum", True), Column("peak memory", True),
        Column("attempts", True),
    ]  # fmt: skip
    rows: list[list[Any]] = []
    seconds = []
    for run in runs:
        tasks = by_task(run)
        seconds.append((run.label, {task: found["seconds"] for task, found in tasks.items()}))
        rows += [[task, run.label, *_cost(found)] for task, found in tasks.items()]
    if not rows:
        return ""
    free = all(row[7].text == "—" for row in rows)
    if free:
        keep = [place for place in range(len(columns)) if place not in (7, 8)]
        columns = [columns[place] for place in keep]
        rows = [[row[place] for place in keep] for row in rows]
    total = "; ".join(f"{name}, {sum(of.values()):,.0f} s" for name, of in seconds)
    remark = (
        f"In all: {total}. Iterations and attempts are added up; memory is the highest so far. A "
        "datum is a row that was written or trained on, a scored sample, a pair, a held-out row, a "
        "benchmark's prompt, question or sample; a dash stands where a task has data of several "
        "kinds, as several evaluations of one student."
    )
    return section(
        "cost", "Cost", note(remark), table("Cost by task", columns, rows),
        gallery([plots.seconds(seconds)], draw),
    )  # fmt: skip


def by_task(run: Run) -> dict[str, dict[str, float]]:
    """Costs of a run's stages over all iterations: ``seconds``, ``tokens``, ``dollars``,
    ``attempts``, ``peak`` bytes and the ``data`` of those that are done."""
    results = {
        f"iteration-{iteration.number}/{stage}": result
        for iteration in run.iterations
        for stage, result in iteration.stages.items()
    }
    tasks: dict[str, dict[str, float]] = {}
    for row in run.summary["costs"]:
        task = re.sub(r"-\d+$", "", row["stage"].rpartition("/")[2])  # a curve's steps together
        total = tasks.setdefault(
            task, dict.fromkeys(("seconds", "tokens", "dollars", "attempts", "peak", "data"), 0.0)
        )
        total["seconds"] += row["seconds"]
        total["tokens"] += sum(n for kind, n in row.items() if kind.endswith("_tokens"))
        total["dollars"] += row.get("dollars", 0.0)
        total["attempts"] += row["attempts"]
        total["peak"] = max(total["peak"], row["peak_memory_bytes"])
        total["data"] += data_count(results.get(row["stage"]) or {})
    return tasks


def data_count(result: Mapping[str, Any]) -> int:
    """How many data a stage worked on, by its result; 0 where that does not say, and where
    several evaluations share the stage's cost, whose data differ."""
    for name in DATA:
        if isinstance(result.get(name), int):
            return int(result[name])
    evaluations = [name for name in (*EVALUATED, "lm_harness") if name in result]
    if len(evaluations) != 1:
        return 0
    found = result[evaluations[0]]
    if evaluations == ["lm_harness"]:
        return sum(task.get("samples") or 0 for task in found["tasks"].values())
    return int(found.get(EVALUATED[evaluations[0]]) or 0)


def _cost(found: Mapping[str, float]) -> list[Cell]:
    data = found["data"]

    def cell(value: float, form: str) -> Cell:
        return Cell(format(value, form), value) if value else Cell("—", 0.0)

    def each(name: str, form: str) -> Cell:
        return cell(found[name] / data, form) if data else Cell("—", 0.0)

    return [
        cell(data, ",.0f"),
        cell(found["seconds"], ",.1f"),
        each("seconds", ".3g"),
        cell(found["tokens"], ",.0f"),
        each("tokens", ",.0f"),
        cell(found["dollars"], ".2f"),
        each("dollars", ".2g"),
        Cell(f"{found['peak'] / 2**30:.1f} GiB", found["peak"]),
        cell(found["attempts"], ".0f"),
    ]


def settings(runs: Sequence[Run]) -> str:
    """All settings, those that differ between the runs first; inputs and versions."""
    parts = []
    names = [run.label for run in runs]
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    rows = [[key, *(run.config.get(key, ABSENT) for run in runs)] for key in keys]
    if len(runs) > 1:
        parts += ["<h3>Differences between the runs</h3>", _compared(rows, names, differing=True)]
    label = f"All {len(rows)} settings"
    parts.append(f"<details><summary>{label}</summary>{_compared(rows, names)}</details>")
    used = list(dict.fromkeys(key for run in runs for key in run.inputs))
    if used:
        inputs = [[key, *(run.inputs.get(key, ABSENT) for run in runs)] for key in used]
        parts += [
            "<details><summary>Inputs, by a hash of their content</summary>",
            _compared(inputs, names, "input"), "</details>",
        ]  # fmt: skip
    packages = list(dict.fromkeys(key for run in runs for one in run.versions for key in one))
    parts.append("<h3>Versions</h3>")
    if packages:
        made = [[key, *(_version(run, key) for run in runs)] for key in packages]
        parts.append(_compared(made, names, "package"))
    unrecorded = [run.label for run in runs if not run.versions]
    if unrecorded:
        parts.append(note(f"Made before versions were recorded: {', '.join(unrecorded)}."))
    return section("settings", "Settings and versions", *parts)


ABSENT = "(absent)"


def _version(run: Run, package: str) -> str:
    """The package's versions in the order in which they worked on the run."""
    seen = dict.fromkeys(one.get(package, ABSENT) for one in run.versions)
    return ", then ".join(seen) or "not recorded"


def _compared(
    rows: Sequence[Sequence[Any]], names: Sequence[str], head: str = "setting",
    *, differing: bool = False,
) -> str:  # fmt: skip
    """A row a key, a column a run; rows whose values differ are marked, by a sign too."""
    marked = []
    for key, *values in rows:
        differs = len({repr(value) for value in values}) > 1
        if differs or not differing:
            kind = "differs" if differs else ""
            marked.append([f"{key} ≠" if differs else key, *(Cell(v, kind=kind) for v in values)])
    if not marked:
        return note("None.")
    caption = {"setting": "Settings", "input": "Inputs", "package": "Versions"}[head]
    columns = [Column(head), *(Column(name) for name in names)]
    return table(caption, columns, marked, sortable=False)


def footer(version: str, figures: str) -> str:
    """What made the page and where its figures are."""
    return f"<footer><p>Made by montessori_jax {escape(version)}. {escape(figures)}</p></footer>"
