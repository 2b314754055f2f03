"""How teacher and students fare along their training: figures 3a to 3d of arXiv 2410.14208.

For each teacher that DPO kept (``dpo.keep_every``) data are synthesised, their influence on the
warmed-up student is measured, and a fresh student is trained on them and evaluated, all of them
with equal prompts, draws and numbers of rows. And training data are measured on the states that
their own student went through.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from montessori_jax.config import EvaluationConfig
from montessori_jax.data.tables import count_rows, read_table
from montessori_jax.influence.regime import with_method
from montessori_jax.loop import Loop, Result
from montessori_jax.mesh import make_mesh
from montessori_jax.methods.teaching import evaluate_students, train, write_data
from montessori_jax.report import lines
from montessori_jax.runs import write_json
from montessori_jax.stages.dpo import kept_teachers
from montessori_jax.stages.finetune import kept_states
from montessori_jax.stages.influence import influence
from montessori_jax.work import Work

Row = dict[str, Any]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def curves(loop: Loop, tuned: str, data_of: Mapping[str, str]) -> None:
    """Both curves of an iteration that is otherwise done; nothing where none is asked for.

    Writes ``curve/teacher_curve.json`` and ``curve/influence_curve.json``, as the report reads
    them.

    Args:
        loop: the iteration, whose ``warmup`` and ``dpo`` are done.
        tuned: the tuned teacher.
        data_of: training data by name, on which ``train-NAME`` has trained.
    """
    teachers = along_dpo(loop, tuned) if loop.config.curve.prompts else []
    shares = along_training(loop, data_of) if loop.config.curve.student_states else []

    def write(work: Work) -> Result:
        for name, rows in (("teacher_curve", teachers), ("influence_curve", shares)):
            if rows:
                write_json(work.file(f"{name}.json"), {name: rows})
        return {"teachers": len(teachers), "states": len(shares)}

    if teachers or shares:
        loop.stage("curve", write, lines.curved, alone=True)


def along_dpo(loop: Loop, tuned: str) -> list[Row]:
    """A row for each teacher: its yield, its data's influence, its student's evaluations.

    ``influence_quantiles`` are those of `QUANTILES`; ``evaluation`` is what ``evaluate-curve-STEP``
    reported.
    """
    last = loop.result("dpo")["steps"]
    kept = kept_teachers(Path(loop.folder("dpo")))
    teachers = {0: loop.teacher, **kept, last: tuned}
    measure = Measure(loop)
    found: dict[int, Row] = {}
    places: dict[int, str] = {}
    for step, source in teachers.items():
        name = f"synthesise-curve-{step}"
        writes = write_data(loop, source, loop.config.curve.prompts)
        made = loop.stage(name, writes, lines.generated, draws="synthesise")
        places[step] = loop.folder(name)
        found[step] = {"step": step, "yield": made["yield"]}
    for step, place in places.items():
        name = f"influence-curve-{step}"
        scored = measure(name, loop.states("warmup"), place)
        found[step] |= {
            "influence": scored["mean"],
            "influence_error": scored["spread"] / math.sqrt(scored["scored"]),
            "influence_quantiles": quantiles(loop.folder(f"{name}/scores.parquet")),
            "share": scored["positive_share"],
        }
    rows = min([loop.config.sft.rows, *map(count_rows, places.values())])
    names = {step: f"curve-{step}" for step in teachers}
    students = {name: train(loop, name, places[step], rows) for step, name in names.items()}
    compared = loop.config.compare_self_instruct
    self_instruct = loop.folder("train-untuned/student") if compared else ""
    evaluate_students(loop, students, self_instruct, with_loss(loop.config.evaluation))
    for step, name in names.items():
        evaluation = loop.result(f"evaluate-{name}")
        loss = evaluation["reference_loss"]
        found[step] |= {
            "student_loss": loss["loss"],
            "student_loss_error": loss["standard_error"],
            "evaluation": evaluation,
        }
    return list(found.values())


def quantiles(scores: str) -> list[float]:
    """`QUANTILES` of the influence in a table of scores, of the rows that have one."""
    known = [row["influence"] for row in read_table(scores, ("influence",))]
    found = np.quantile([one for one in known if one is not None], QUANTILES)
    return [float(one) for one in found]


def with_loss(settings: EvaluationConfig) -> EvaluationConfig:
    """The run's evaluations, and the held-out loss, which every curve has."""
    named = dict.fromkeys(("reference_loss", *settings.evaluations))
    return replace(settings, evaluations=tuple(named))


def along_training(loop: Loop, data_of: Mapping[str, str]) -> list[Row]:
    """A row for each data set and state of its student: the share of positive influence."""
    measure, found = Measure(loop), []
    for name, place in data_of.items():
        for step, state in kept_states(loop.states(f"train-{name}")).items():
            scored = measure(f"influence-along-{name}-{step}", state, place)
            found.append({
                "step": step,
                "share": scored["positive_share"],
                "share_relative": scored["positive_share_relative"],
                "data": name,
            })  # fmt: skip
    return found


@dataclass
class Measure:
    """Influence by one estimator along a whole curve: the one that its first point took."""

    loop: Loop
    method: str = ""

    def __call__(self, name: str, student: str, data: str) -> Result:
        """Influence of some rows of ``data`` on ``student``: the stage ``name``."""
        config = self.loop.config
        settings = config.influence
        if self.method:
            settings = with_method(settings, self.method)
        result = self.loop.stage(
            name,
            lambda work: influence(
                student,
                data,
                config.data.reference,
                settings,
                work,
                num_reference=config.data.num_reference,
                num_candidates=config.curve.scored,
                mesh=make_mesh(config.mesh, "influence"),
            ),
            lines.scored,
            draws="influence-curve",
            trains=True,
        )
        self.method = result["method"]
        return result
