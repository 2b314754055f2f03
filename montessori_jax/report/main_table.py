"""The main table: a row for every evaluated student of every iteration of every run."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from montessori_jax.report.run_data import Run
from montessori_jax.report.table import STUDENTS

# Students of the teachers along DPO, which the curves show.
CURVE = "curve-"
LOSS = "held-out loss, nats a token"


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
    """The main numbers of an evaluation stage's result, by the names of the table's columns.

    A name says all that makes a measure another one: who judged, by which prompt, against whom,
    on how much. Numbers of one name may be compared.

    Args:
        result: what the stage reported.
    """
    for evaluation, found in result.items():
        if evaluation in MEASURES:
            yield from MEASURES[evaluation](found)


def _reference_loss(found: Mapping[str, Any]) -> Iterator[tuple[str, Measure]]:
    yield from _measure(LOSS, found, "loss")


def _alpaca_eval(found: Mapping[str, Any]) -> Iterator[tuple[str, Measure]]:
    """Both rates over all prompts, then over those that are not in the reference set."""
    about = [_against(found.get("baseline")), _judge(found), found.get("annotator")]
    apart = found.get("without_reference_prompts") or {}
    fewer = f"without the {apart.get('left_out')} of the reference set"
    prompts = _count(found, "prompts")
    for rates, of in ((found, [prompts]), (apart, [prompts, fewer])):
        for kind, rate, error in (
            ("length-controlled win rate", "length_controlled_win_rate",
             "length_controlled_standard_error"),
            ("win rate", "win_rate", "standard_error"),
        ):  # fmt: skip
            label = f"AlpacaEval, {kind}, %{_bracketed(*about, *of)}"
            yield from _measure(label, rates, rate, error)


def _against(baseline: str | None) -> str | None:
    # Each iteration, or student of several, has an untuned twin of its own: one name, many models.
    own = "its own " if baseline == "self_instruct" else ""
    return baseline and f"against {own}{baseline}"


def _mt_bench(found: Mapping[str, Any]) -> Iterator[tuple[str, Measure]]:
    general = found.get("without_reference")
    known = found.get("with_reference")
    beside = f"{known} graded beside a reference answer" if known else None
    fewer = f"{general} graded without a reference answer" if general else None
    about = _bracketed(_judge(found), _count(found, "questions"), beside, fewer)
    yield from _measure(f"MT-Bench, score of 10{about}", found, "score")


def _measure(
    label: str, found: Mapping[str, Any], key: str, error: str = "standard_error"
) -> Iterator[tuple[str, Measure]]:
    if found.get(key) is not None:
        yield label, Measure(float(found[key]), found.get(error))


def _judge(found: Mapping[str, Any]) -> str | None:
    return (found.get("cost") or {}).get("judge")


def _count(found: Mapping[str, Any], what: str) -> str | None:
    return f"{found[what]} {what}" if what in found else None


def _bracketed(*parts: str | None) -> str:
    """What is known of it, in brackets."""
    known = [part for part in parts if part]
    return f" ({'; '.join(known)})" if known else ""


def _harness(found: Mapping[str, Any]) -> Iterator[tuple[str, Measure]]:
    """Groups of tasks, and the tasks that are in none of them."""
    limit, longest = found.get("limit"), found.get("max_length")
    settings = (
        f"first {limit} rows" if limit else None,
        "chat template" if found.get("chat_template") else None,
        f"inputs cut to {longest} tokens" if longest else None,
    )
    groups, tasks = found.get("groups") or {}, found.get("tasks") or {}
    children = found.get("group_subtasks") or {}
    members = _members(list(groups), children)
    alone = {name: of for name, of in tasks.items() if name not in members}
    for name, numbers in {**groups, **alone}.items():
        inside = _members([name], children) if name in groups else {name}
        shots = {(tasks.get(one) or {}).get("shots") for one in inside} - {None}
        asked = f"{shots.pop()}-shot" if len(shots) == 1 else None
        for metric, value in numbers.items():
            kind, comma, way = metric.partition(",")
            error = numbers.get(f"{kind}_stderr{comma}{way}")
            if isinstance(value, float) and not kind.endswith("_stderr"):
                label = f"{name}: {kind}{_bracketed(way, asked, *settings)}"
                yield label, Measure(value, error)


def _members(groups: Sequence[str], children: Mapping[str, Sequence[str]]) -> set[str]:
    """All that groups are made of, however deep."""
    found, waiting = set[str](), list(groups)
    while waiting:
        new = [name for name in children.get(waiting.pop(), ()) if name not in found]
        found.update(new)
        waiting += new
    return found


MEASURES: dict[str, Callable[[Mapping[str, Any]], Iterator[tuple[str, Measure]]]] = {
    "reference_loss": _reference_loss,
    "alpaca_eval": _alpaca_eval,
    "mt_bench": _mt_bench,
    "lm_harness": _harness,
}


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
