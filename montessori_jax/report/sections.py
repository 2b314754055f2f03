"""The sections of the page, each from the runs; "" where there is nothing to show."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from montessori_jax.report import plots, verbs
from montessori_jax.report.drawing import SERIES, Figure, label
from montessori_jax.report.lengths import MOST, measure_lengths
from montessori_jax.report.main_table import (
    LOSS,
    Student,
    baseline_of,
    measures,
    paired_change,
    students,
)
from montessori_jax.report.markup import Cell, Column, escape, note, section, slug, table
from montessori_jax.report.measured import Measured, Row, win_rates
from montessori_jax.report.run_data import Iteration, Run, iterations_of
from montessori_jax.report.samples import SCORED, scored

Draw = Callable[[Figure], str]
MOST_ITERATIONS = 6
"""Of a run, whose data are shown: parsing one takes some 4 s."""
DATA = {
    "generate": "probing data",
    "synthesise-untuned": "untuned teacher",
    "synthesise-tuned": "tuned teacher",
}


def gallery(figures: Sequence[Figure], draw: Draw) -> str:
    """Figures side by side where there is room."""
    if not figures:
        return ""
    return f'<div class="gallery">{"".join(draw(figure) for figure in figures)}</div>'


def overview(runs: Sequence[Run]) -> str:
    """A card for each run: what it is, its main numbers, and what is not done."""
    cards = []
    for run in runs:
        state = "unfinished" if run.missing else "finished"
        facts = [
            ("method", run.method),
            ("teacher", run.summary["teacher"]),
            ("student", run.summary["student"]),
            ("seed", run.config.get("seed", "")),
        ]
        listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts)
        missing = "".join(f"<li>{escape(text)}</li>" for text in run.missing)
        cards.append(
            f'<article class="card"><h3>{escape(run.label)} '
            f'<span class="state {state}">{state}</span></h3><dl>{listed}</dl>'
            + (f'<p>Not done:</p><ul class="missing">{missing}</ul>' if missing else "")
            + "</article>"
        )
    columns = [Column("run"), Column("iteration", True), *(
        Column(text, True) for text in (
            "teacher's yield", "samples scored", "positive influence", "preference pairs",
            "held-out reward margin", "KL to the teacher before",
        )
    )]  # fmt: skip
    rows = [
        [run.label, iteration.number, *_numbers(iteration)]
        for run in runs
        for iteration in run.iterations
    ]
    return section(
        "overview",
        "Overview",
        f'<div class="cards">{"".join(cards)}</div>',
        table("Iterations at a glance", columns, rows) if rows else note("Nothing has begun."),
    )


def _numbers(iteration: Iteration) -> list[Cell]:
    def result(stage: str) -> dict[str, Any]:  # where responses alone compete, of those
        return iteration.result(stage) or iteration.result(f"{stage}-responses")

    made, scored = iteration.result("generate"), result("influence")
    pairs, tuned = result("preferences"), iteration.result("dpo")
    held = tuned.get("heldout_after") or {}

    def cell(found: dict[str, Any], key: str, form: str) -> Cell:
        value = found.get(key)
        return Cell("—") if value is None else Cell(format(value, form), float(value))

    return [
        cell(made, "yield", ".0%"),
        cell(scored, "scored", ",d"),
        cell(scored, "positive_share", ".0%"),
        cell(pairs, "pairs", ",d"),
        cell(held, "reward_margin", "+.4f"),
        cell(tuned, "kl", ".4f"),
    ]


def results(runs: Sequence[Run], draw: Draw) -> str:
    """The main table, and each measure as a figure."""
    found = students(runs)
    if not found:
        return section("results", "Results", note("No student has been evaluated yet."))
    names = list(dict.fromkeys(name for one in found for name in one.measures))
    columns = [
        Column("run"), Column("method"), Column("iteration", True), Column("student"),
        Column("learned from"), Column("rows", True), *(Column(name, True) for name in names),
    ]  # fmt: skip
    changes = {id(one): _change(one, found) for one in found}
    paired = any(change is not None for change in changes.values())
    if paired:
        columns.append(Column("change of the loss from untrained, paired", True))
    rows: list[list[Any]] = []
    for one in found:
        cells: list[Any] = [
            one.run, one.method, one.iteration, one.model, one.described,
            Cell(f"{one.rows:,}", one.rows),
        ]  # fmt: skip
        for name in names:
            measure = one.measures.get(name)
            cells.append(Cell("—") if measure is None else Cell(measure, measure.value))
        if paired:
            change = changes[id(one)]
            cells.append(Cell("—") if change is None else Cell(_signed(change), change.value))
        rows.append(cells)
    figures = [
        plots.forest(name, name, [
            (_short(one, runs), one.measures[name].value, one.measures[name].error)
            for one in found if name in one.measures
        ])
        for name in names
    ]  # fmt: skip
    small = max((one.rows for one in found), default=0)
    warning = ""
    if 0 < small < 1000:
        warning = note(
            f"The students learned from {small} rows at most, the paper's from 10,000: this shows "
            "that the loop works, and says nothing about the differences between students."
        )
    errors = note("After ± is one standard error. Lower losses are better.")
    main = table("Evaluated students", columns, rows)
    return section("results", "Results", main, errors, warning, gallery(figures, draw))


def _change(student: Student, found: Sequence[Student]) -> Any:
    baseline = baseline_of(student, found)
    return None if baseline is None else paired_change(student, baseline)


def _signed(change: Any) -> str:
    return f"{change.value:+.4f} ± {change.error:.4f}"


def _short(student: Student, runs: Sequence[Run]) -> str:
    parts = [student.run] if len(runs) > 1 else []
    if student.name == "untrained":
        return ", ".join([*parts, "untrained"])
    return ", ".join([*parts, f"iteration {student.iteration}", student.name])


def teachers(measured: Measured, draw: Draw) -> str:
    """Along DPO: yield, influence and evaluations; along the student's training: shares."""
    figures = []
    curves = measured.teacher_curves
    for key, title in (
        ("yield", "Yield of the teacher"),
        ("influence", "Mean influence of its data"),
        ("share", "Share of positive influence of its data"),
        ("student_loss", "Held-out loss of its student"),
    ):
        sets = _having(key, curves)
        if sets:
            name = f"teacher-{key.replace('_', '-')}"
            figures.append(plots.curve(name, title, "DPO step", title.lower(), sets, key))
    spread = _having("influence_quantiles", curves)
    if spread:
        figures.append(plots.quantiles(spread))
    lines: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for name, rows in curves.items():
        for row in rows:
            for metric, one in measures(row.get("evaluation") or {}):
                point = {"step": row["step"], "value": one.value, "value_error": one.error}
                lines[metric][name].append(point)
    lines.pop(LOSS, None)  # it is drawn above
    for metric, found in lines.items():
        title = f"{metric}, of its student"
        figures.append(
            plots.curve(f"teacher-{slug(metric)}", title, "DPO step", metric, found, "value")
        )
    shares: dict[str, list[Row]] = defaultdict(list)
    several = len(measured.influence_curves) > 1
    for name, rows in measured.influence_curves.items():
        for row in rows:
            source = str(row.get("data", "training data"))
            shares[f"{name}: {source}" if several else source].append(row)
    if shares:
        figures.append(
            plots.curve(
                "positive-share",
                "Share of positive influence along training",
                "step of the student",
                "share of positive influence",
                shares,
                "share",
                beside=("share_relative", ", above the zero-gradient step"),
            )
        )
    return section("teacher", "Teacher along training", gallery(figures, draw)) if figures else ""


def _having(key: str, curves: Mapping[str, Sequence[Row]]) -> dict[str, Sequence[Row]]:
    """The curves of which a row has ``key``."""
    return {
        name: rows for name, rows in curves.items() if any(row.get(key) is not None for row in rows)
    }


def comparisons(measured: Measured, draw: Draw) -> str:
    """Win rates of models head to head, and several students on the same data."""
    played = {name: rows for name, rows in measured.matches.items() if win_rates(rows)}
    figures = [plots.matrix(name, rows) for name, rows in played.items()]
    for name, rows in measured.cross_students.items():
        bars: dict[str, list[tuple[str, str, float, float | None]]] = defaultdict(list)
        for row in rows:
            for metric, one in measures(row["evaluation"]):
                bars[metric].append((str(row["student"]), str(row["data"]), one.value, one.error))
        figures += [plots.cross_student(name, metric, of) for metric, of in bars.items()]
    return section("comparisons", "Comparisons", gallery(figures, draw)) if figures else ""


def influence(runs: Sequence[Run], draw: Draw) -> str:
    """Distributions of influence, and the audits of the estimators."""
    sets, partial = {}, []
    for name, _, _, scores in scored(runs):
        sets[name] = (scores.known, scores.offset)
        if not scores.finished:
            partial.append(f"{name}: influence is at work; {len(scores.ids)} scores so far.")
    figures = [plots.influence(sets)] if sets else []
    rows: list[list[Any]] = []
    for _, iteration, place in iterations_of(runs):
        for candidates in SCORED:
            name = place + candidates.added
            for one in iteration.result(candidates.stage).get("audits") or ():
                rows.append([name, one["method"], *_audit(one)])
                figures.append(plots.audit(name, one["method"], one["scores"]))
    if not sets and not rows:
        return ""
    columns = [
        Column("where"), Column("estimator"), Column("audited", True), Column("Spearman", True),
        Column("pairs, Jaccard", True), Column("normalised error", True), Column("verdict"),
    ]  # fmt: skip
    audits = ""
    if rows:
        audits = (
            "<h3>Audit of the estimators</h3>"
            + note(
                "Scores measured again by the definition. In brackets 95% bootstrap intervals; the "
                "error is in standard deviations of the exact scores."
            )
            + table("Estimators held to exact influence", columns, rows)
        )
    return section("influence", "Influence", *map(note, partial), audits, gallery(figures, draw))


def _audit(one: dict[str, Any]) -> list[Any]:
    found, intervals = one["agreement"], one["intervals"]
    pairs = found["pairs"] and found["pairs"]["jaccard"]
    error = found["error"] and found["error"]["total"]

    def cell(value: float | None, name: str) -> Cell:
        if value is None:
            return Cell("not defined")
        between = intervals.get(name)
        span = "" if between is None else f" [{between[0]:.3f}, {between[1]:.3f}]"
        return Cell(f"{value:.3f}{span}", value)

    failures = one.get("failures") or []
    return [
        found["count"],
        cell(found["spearman"], "spearman"),
        cell(pairs, "pairs"),
        cell(error, "error"),
        Cell("; ".join(failures), kind="bad") if failures else "passed",
    ]


def data(runs: Sequence[Run], draw: Draw, *, parse: bool) -> str:
    """Lengths of the texts and, with ``parse``, root verbs of the instructions with their nouns."""
    figures, remarks = [], []
    for run in runs:
        iterations = [one for one in run.iterations if one.datasets]
        shown = _spread(iterations, MOST_ITERATIONS)
        if len(shown) < len(iterations):
            numbers = ", ".join(str(one.number) for one in shown)
            remarks.append(
                f"{run.label}: data of {len(shown)} of its {len(iterations)} iterations, {numbers}."
            )
        sampled = False
        for together in _side_by_side(shown):
            name = f"{run.label}, iteration {' and '.join(str(one.number) for one in together)}"
            files = {
                f"{label(run.label, 18)}:{iteration.number}, {title}": (iteration, file)
                for iteration in together
                for title, file in _datasets(iteration).items()
            }
            measured = {title: measure_lengths(*found) for title, found in files.items()}
            sampled |= any(one.measured < one.rows for one in measured.values())
            figures += [
                plots.lengths(kind, name, measured) for kind in ("instructions", "responses")
            ]
            if parse and verbs.available():
                counted = {title: verbs.root_verbs(file) for title, (_, file) in files.items()}
                if any(one.verbs for one in counted.values()):
                    figures.append(plots.root_verbs(name, counted))
        if sampled:
            remarks.append(f"{run.label}: lengths of at most {MOST:,} rows of each data set.")
    if not figures:
        return ""
    if not verbs.available():
        remarks.append("Root verbs of the instructions: pip install 'montessori-jax[verbs]'.")
    elif not parse:
        remarks.append("Root verbs of the instructions: montessori report RUN parses them.")
    return section("data", "Data", *map(note, remarks), gallery(figures, draw))


def _spread(iterations: Sequence[Iteration], most: int) -> list[Iteration]:
    """At most ``most``, evenly spread: the first and the last among them."""
    places = np.unique(np.linspace(0, len(iterations) - 1, min(len(iterations), most)).round())
    return [iterations[int(place)] for place in places]


def _side_by_side(iterations: Sequence[Iteration]) -> list[list[Iteration]]:
    """Iterations in order, as many in a group as one figure has colours for their data sets."""
    groups: list[list[Iteration]] = []
    room = 0
    for iteration in iterations:
        sets = len(_datasets(iteration))
        if sets > room or not groups:
            groups.append([])
            room = len(SERIES)
        groups[-1].append(iteration)
        room -= sets
    return groups


def _datasets(iteration: Iteration) -> dict[str, Path]:
    """Training data where there are any, else what was probed; by what the figures call them."""
    files = iteration.datasets
    written = {stage: file for stage, file in files.items() if stage.startswith("synthesise")}
    ordered = sorted((written or files).items(), reverse=True)  # untuned before tuned
    return {DATA.get(stage, stage): file for stage, file in ordered}
