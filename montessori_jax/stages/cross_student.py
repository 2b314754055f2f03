"""Stage: several students trained on the same data, each evaluated; one table.

Writes a folder a data set and student (``DATA/STUDENT/train`` and ``evaluate``, each done once it
holds ``done.json``), and ``cross_student.json`` and ``cross_student.md``. Resumes within training
and within an evaluation. ``cross_student.json`` holds ``rows``: objects with ``data``, ``student``,
``train`` and ``evaluation``, which are the results of the two stages.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from montessori_jax.config import EvaluationConfig, JudgeConfig, SftConfig, as_dict
from montessori_jax.data.rows import Row, read_rows
from montessori_jax.dtypes import forward_dtype
from montessori_jax.errors import UserError
from montessori_jax.evaluation import Context
from montessori_jax.evaluation.requirements import check_evaluations
from montessori_jax.host_memory import return_freed_memory
from montessori_jax.models.sources import load_model, model_fingerprint
from montessori_jax.report.lines import evaluated, trained
from montessori_jax.report.main_table import measures
from montessori_jax.runs import StageFolder, differences, value_hash, write_atomic, write_json
from montessori_jax.seeding import derive_seed
from montessori_jax.stages.evaluate import evaluate
from montessori_jax.stages.finetune import finetune
from montessori_jax.stages.head_to_head import file_name
from montessori_jax.work import Work

KEY = "inputs.json"
SELF_INSTRUCT = "self_instruct"
"""The data set whose students are the baseline of that name: each student's own twin."""


@dataclass(frozen=True)
class Named:
    """A data set or a student, by a name that becomes a folder's."""

    name: str
    source: str

    @classmethod
    def of(cls, text: str) -> "Named":
        """Read ``[NAME=]SOURCE``; without a name, one is made of the source."""
        name, named, source = text.partition("=")
        return cls(file_name(name), source if named else text)


@dataclass(frozen=True)
class Settings:
    """What is the same for all students.

    ``heldout`` and ``num_heldout`` are the rows that they are evaluated on, ``reference`` those
    that influence was measured on.
    """

    sft: SftConfig
    evaluation: EvaluationConfig
    judge: JudgeConfig
    heldout: str
    num_heldout: int | None
    reference: str
    num_reference: int | None


def cross_student(
    data: Sequence[Named],
    students: Sequence[Named],
    settings: Settings,
    work: Work,
    *,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Train every student on every data set, with the same budget of rows, and evaluate it.

    The budget counts rows with a response, whichever student reads them. A student leaves out those
    whose prompt is longer than ``sft.max_length`` by its own tokenizer.

    Args:
        data: rows with responses; for example a run's ``synthesise-tuned`` folder. Where one is
            called `SELF_INSTRUCT`, the student trained on it is what ``alpaca_eval`` compares the
            same student on the other data with.
        students: models. Each is trained from the same draws on all data sets.
        settings: of training and evaluation.
        work: the folder that everything is written to.
        mesh: where the students are to lie.

    Raises:
        UserError: names repeat, an evaluation lacks something, or the folder holds work done with
            other settings.
    """
    for group in (data, students):
        names = [one.name for one in group]
        if len(set(names)) < len(names):
            raise UserError(f"names repeat among {', '.join(names)}: write NAME=... for them")
    twins = any(one.name == SELF_INSTRUCT for one in data)
    check_evaluations(settings.evaluation, settings.judge, self_instruct=twins)
    contents = {one.name: read_rows(one.source).require() for one in data}
    budget = min(settings.sft.rows, *(len(rows) for rows in contents.values()))
    sft = replace(settings.sft, rows=budget)
    evaluated_on = {
        "evaluation": as_dict(settings.evaluation),
        "heldout": content_hash(read_rows(settings.heldout).rows),
        "num_heldout": settings.num_heldout,
        "reference": content_hash(read_rows(settings.reference, need_response=False).rows),
        "num_reference": settings.num_reference,
        "judge": {"base_url": settings.judge.base_url, "model": settings.judge.model},
    }
    asked = settings.evaluation
    if twins and "alpaca_eval" in asked.evaluations and asked.alpaca_eval.baseline == SELF_INSTRUCT:
        evaluated_on["self_instruct"] = content_hash(contents[SELF_INSTRUCT])
    rows = []
    # The twins first, since the others are compared with them.
    for one in sorted(data, key=lambda one: one.name != SELF_INSTRUCT):
        content = content_hash(contents[one.name])
        for student in students:
            place = work.folder / one.name / student.name
            twin = work.folder / SELF_INSTRUCT / student.name / "train" / "student"
            key = {
                "data": content,
                "student": model_fingerprint(student.source),
                "sft": as_dict(sft),
                "seed": work.seed,
            }

            def train(own: Work, student: Named = student, one: Named = one) -> dict[str, Any]:
                loaded = load_model(student.source, dtype=sft.held_dtype, mesh=mesh)
                return finetune(loaded, one.source, sft, own)

            def judge(own: Work, place: Path = place, twin: Path = twin) -> dict[str, Any]:
                dtype = forward_dtype(settings.evaluation)
                loaded = load_model(str(place / "train" / "student"), dtype=dtype, mesh=mesh)
                return evaluate(
                    Context(
                        loaded,
                        settings.evaluation,
                        own,
                        heldout=settings.heldout,
                        num_heldout=settings.num_heldout,
                        judge=settings.judge,
                        reference=settings.reference,
                        num_reference=settings.num_reference,
                        self_instruct=str(twin) if twins else "",
                    )
                )

            label = f"{one.name}/{student.name}"
            made = once(place / "train", key, train, work, f"{label}: train", trained)
            own_key = {**key, **evaluated_on}
            found = once(place / "evaluate", own_key, judge, work, f"{label}: evaluate", evaluated)
            rows.append(
                {"data": one.name, "student": student.name, "train": made, "evaluation": found}
            )
    result = {"rows": rows, "training_rows": budget}
    write_json(work.file("cross_student.json"), result)
    write_atomic(work.file("cross_student.md"), render(result))
    return result


def content_hash(rows: Sequence[Row]) -> str:
    """What rows say, wherever they lie."""
    return value_hash([[row.prompt(), row.response] for row in rows])


def once(
    path: Path,
    key: dict[str, Any],
    body: Callable[[Work], dict[str, Any]],
    work: Work,
    label: str,
    line: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Run a stage in its folder, or give its result if it is done.

    The draws are keyed by what kind of stage it is, so that students differ in nothing else.

    Raises:
        UserError: the folder holds work that belongs to another ``key``.
    """
    path.mkdir(parents=True, exist_ok=True)
    folder, inputs = StageFolder(path), path / KEY
    if inputs.exists():
        before = json.loads(inputs.read_text(encoding="utf-8"))
        if changed := differences(before, key):
            raise UserError(
                f"{path} holds work done with other settings ({'; '.join(changed)}): set them "
                "back, or give another --out"
            )
    write_json(inputs, key)
    done = folder.result()
    if done is not None:
        work.say(f"{label}: done before: {line(done)}")
        return done
    seed = derive_seed(work.seed, path.name)
    result = body(replace(work, folder=path, seed=seed))
    folder.finish(result)
    return_freed_memory()
    work.say(f"{label}: {line(result)}")
    return result


def render(result: dict[str, Any]) -> str:
    """A Markdown table: a row a student and data set, a column a number of each evaluation."""
    columns = {
        "held-out loss": ("reference_loss", "loss", "standard_error", 4),
        "AlpacaEval win rate, %": ("alpaca_eval", "win_rate", "standard_error", 1),
        "length-controlled, %": (
            "alpaca_eval",
            "length_controlled_win_rate",
            "length_controlled_standard_error",
            1,
        ),
        "MT-Bench": ("mt_bench", "score", "standard_error", 2),
    }
    shown = {
        title: about
        for title, about in columns.items()
        if any(about[0] in row["evaluation"] for row in result["rows"])
    }
    tasks = [_tasks(row) for row in result["rows"]]
    named = list(dict.fromkeys(name for own in tasks for name in own))
    lines = [
        "| " + " | ".join(["student", "data", "rows", *shown, *named]) + " |",
        "|---|---|---|" + "---|" * (len(shown) + len(named)),
    ]
    for row, own in zip(result["rows"], tasks, strict=True):
        cells = [row["student"], row["data"], str(row["train"]["rows"])]
        for name, value, error, digits in shown.values():
            found = row["evaluation"][name]
            cells.append(_with_error(found[value], found[error], digits))
        cells += [own.get(name, "") for name in named]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _tasks(row: dict[str, Any]) -> dict[str, str]:
    """What the report shows of a row's lm-evaluation-harness, by its names there."""
    found = {name: one for name, one in row["evaluation"].items() if name == "lm_harness"}
    return {name: str(measure) for name, measure in measures(found)}


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
