"""The main table: a row for every evaluated student of every iteration of every run."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from montessori_jax.report.run_data import Run
from montessori_jax.report.table import STUDENTS

# Students of the teachers along DPO, which the curves show.
CURVE = "curve-"
LOSS = "held-out loss, nats a token"
# Of each evaluation: number, standard error, column.
MEASURES = {
    "reference_loss": [("loss", "standard_error", LOSS)],
    "alpaca_eval": [
        (
            "length_controlled_win_rate",
            "length_controlled_standard_error",
            "AlpacaEval, length-controlled win rate, %",
        ),
        ("win_rate", "standard_error", "AlpacaEval, win rate, %"),
    ],
    "mt_bench": [("score", "standard_error", "MT-Bench, score of 10")],
}


@dataclass(frozen=True)
class Measure:
    """One number of an evaluation and its standard error, where it has one."""

    value: float
    error: float | None

    def __str__(self) -> str:
        digits = 4 if abs(self.value) < 10 else 2
        text = f"{self.value:.{digits}f}"
        return text if self.error is None else f"{text} ± {self.error:.{digits}f}"


@dataclass(frozen=True)
class Student:
    """One evaluated student.

    Attributes:
        run, method, iteration: where it is from.
        name: what it learned from, as the run names it.
        model: what it was before.
        rows: how many rows it was trained on.
        measures: by name.
        by_sample: losses of the held-out rows, in their order.
    """

    run: str
    method: str
    iteration: int
    name: str
    model: str
    rows: int
    measures: Mapping[str, Measure]
    by_sample: Sequence[float] = field(repr=False, default=())

    @property
    def described(self) -> str:
        return STUDENTS.get(self.name, self.name)


def students(runs: Sequence[Run]) -> list[Student]:
    """All students that have been evaluated, those of curves apart."""
    found = []
    for run in runs:
        for iteration in run.iterations:
            for stage, result in iteration.stages.items():
                kind, _, name = stage.partition("-")
                if kind != "evaluate" or result is None or name.startswith(CURVE):
                    continue
                trained = iteration.result(f"train-{name}")
                loss = result.get("reference_loss") or {}
                found.append(
                    Student(
                        run=run.label,
                        method=run.method,
                        iteration=iteration.number,
                        name=name or "student",
                        model=str(run.summary["student"]),
                        rows=int(trained.get("rows", 0)),
                        measures=dict(measures(result)),
                        by_sample=loss.get("by_sample") or (),
                    )
                )
    given, known = [run.label for run in runs], list(STUDENTS)

    def order(one: Student) -> tuple[int, int, int]:
        name = known.index(one.name) if one.name in known else len(known)
        return given.index(one.run), one.iteration, name

    return sorted(found, key=order)


def measures(result: Mapping[str, Any]) -> Iterator[tuple[str, Measure]]:
    """The main numbers of an evaluation stage's result, by the names of the table's columns."""
    for evaluation, found in result.items():
        if evaluation == "lm_harness":
            yield from _harness(found)
        elif evaluation in MEASURES:
            for key, error, label in MEASURES[evaluation]:
                if found.get(key) is not None:
                    yield label, Measure(float(found[key]), found.get(error))


def _harness(found: Mapping[str, Any]) -> Iterator[tuple[str, Measure]]:
    """Groups of tasks, and the tasks that are in none of them."""
    groups, tasks = found.get("groups") or {}, found.get("tasks") or {}
    members = _members(list(groups), found.get("group_subtasks") or {})
    alone = {name: of for name, of in tasks.items() if name not in members}
    for name, numbers in {**groups, **alone}.items():
        for metric, value in numbers.items():
            kind, comma, way = metric.partition(",")
            error = numbers.get(f"{kind}_stderr{comma}{way}")
            if isinstance(value, float) and not kind.endswith("_stderr"):
                yield f"{name}: {kind}{f' ({way})' if way else ''}", Measure(value, error)


def _members(groups: Sequence[str], children: Mapping[str, Sequence[str]]) -> set[str]:
    """All that groups are made of, however deep."""
    found, waiting = set[str](), list(groups)
    while waiting:
        new = [name for name in children.get(waiting.pop(), ()) if name not in found]
        found.update(new)
        waiting += new
    return found


def paired_change(student: Student, baseline: Student) -> Measure | None:
    """Mean difference of the held-out losses, row by row, and its standard error.

    None where the two were not measured on equally many rows, or on one alone.
    """
    if len(student.by_sample) != len(baseline.by_sample) or len(student.by_sample) < 2:
        return None
    change = np.array(student.by_sample) - np.array(baseline.by_sample)
    return Measure(float(change.mean()), float(change.std(ddof=1)) / math.sqrt(len(change)))


def baseline_of(student: Student, among: Sequence[Student]) -> Student | None:
    """The untrained student of the same run, which its first iteration measured."""
    if student.name == "untrained":
        return None
    return next((one for one in among if one.run == student.run and one.name == "untrained"), None)
