"""Stage: several students trained on the same data, each evaluated; one table.

Writes a folder a data set and student (``DATA/STUDENT/train`` and ``evaluate``, each done once it
holds ``done.json``), and ``cross_student.json`` and ``cross_student.md``. Resumes within training
and within an evaluation. ``cross_student.json`` holds ``rows``: objects with ``data``, ``student``,
``train`` and ``evaluation``, which are the results of the two stages.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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

    def evaluated_on(self, self_instruct: str | None) -> dict[str, Any]:
        """What an evaluation's result depends on beside the student, as a stage's key has it.

        Args:
            self_instruct: what the data of the students' twins say, where there are any.
        """
        depends: dict[str, Any] = {
            "evaluation": as_dict(self.evaluation),
            "heldout": content_hash(read_rows(self.heldout).rows),
            "num_heldout": self.num_heldout,
            "reference": content_hash(read_rows(self.reference, need_response=False).rows),
            "num_reference": self.num_reference,
            "judge": {"base_url": self.judge.base_url, "model": self.judge.model},
        }
        judged = "alpaca_eval" in self.evaluation.evaluations
        if self_instruct and judged and self.evaluation.alpaca_eval.baseline == SELF_INSTRUCT:
            depends["self_instruct"] = self_instruct
        return depends


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
    hashes = {name: content_hash(rows) for name, rows in contents.items()}
    study = _Study(
        replace(settings, sft=replace(settings.sft, rows=budget)),
        hashes,
        settings.evaluated_on(hashes.get(SELF_INSTRUCT)),
        work,
        mesh,
    )
    # The twins first, since the others are compared with them.
    ordered = sorted(data, key=lambda one: one.name != SELF_INSTRUCT)
    rows = [study.row(one, student) for one in ordered for student in students]
    result = {"rows": rows, "training_rows": budget}
    write_json(work.file("cross_student.json"), result)
    write_atomic(work.file("cross_student.md"), render(result))
    return result


@dataclass(frozen=True)
class _Study:
    """All that students are trained and evaluated with.

    Attributes:
        settings: with the budget of rows.
        hashes: what the data sets say, by their names.
        evaluated_on: what an evaluation's result depends on beside the student.
        work: the whole study's.
        mesh: where the students lie.
    """

    settings: Settings
    hashes: Mapping[str, str]
    evaluated_on: Mapping[str, Any]
    work: Work
    mesh: Mesh | None

    def row(self, data: Named, student: Named) -> dict[str, Any]:
        """Train a student on a data set and evaluate it, or read what was made of it before."""
        place = self.work.folder / data.name / student.name
        key = {
            "data": self.hashes[data.name],
            "student": model_fingerprint(student.source),
            "sft": as_dict(self.settings.sft),
            "seed": self.work.seed,
        }

        def train(own: Work) -> dict[str, Any]:
            sft = self.settings.sft
            loaded = load_model(student.source, dtype=sft.held_dtype, mesh=self.mesh)
            return finetune(loaded, data.source, sft, own)

        label = f"{data.name}/{student.name}"
        made = once(place / "train", key, train, self.work, f"{label}: train", trained)
        found = once(
            place / "evaluate",
            {**key, **self.evaluated_on},
            partial(self.evaluated, self.trained(data.name, student), self.twin(student)),
            self.work,
            f"{label}: evaluate",
            evaluated,
        )
        return {"data": data.name, "student": student.name, "train": made, "evaluation": found}

    def trained(self, data: str, student: Named) -> str:
        """Where a student that was trained on a data set is."""
        return str(self.work.folder / data / student.name / "train" / "student")

    def twin(self, student: Named) -> str:
        """Where the same student trained on `SELF_INSTRUCT` is; empty: there is none."""
        return self.trained(SELF_INSTRUCT, student) if SELF_INSTRUCT in self.hashes else ""

    def evaluated(self, student: str, twin: str, own: Work) -> dict[str, Any]:
        """Evaluate a trained student in its own folder."""
        settings = self.settings
        dtype = forward_dtype(settings.evaluation)
        return evaluate(
            Context(
                load_model(student, dtype=dtype, mesh=self.mesh),
                settings.evaluation,
                own,
                heldout=settings.heldout,
                num_heldout=settings.num_heldout,
                judge=settings.judge,
                reference=settings.reference,
                num_reference=settings.num_reference,
                self_instruct=twin,
            )
        )


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
    """A Markdown table: a row a student and data set, a column a number that the report shows."""
    found = [dict(measures(row["evaluation"])) for row in result["rows"]]
    columns = list(dict.fromkeys(name for own in found for name in own))
    lines = [
        "| " + " | ".join(["student", "data", "rows", *columns]) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for row, own in zip(result["rows"], found, strict=True):
        shown = [str(own[name]) if name in own else "" for name in columns]
        cells = [row["student"], row["data"], str(row["train"]["rows"]), *shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
