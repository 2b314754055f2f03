"""Several students on the same data: trained and evaluated once each, in one table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from montessori_jax.config import (
    AlpacaEvalConfig,
    AnswerConfig,
    EvaluationConfig,
    JudgeConfig,
    SftConfig,
)
from montessori_jax.costs import Meter
from montessori_jax.data.rows import read_rows
from montessori_jax.errors import UserError
from montessori_jax.models.folder import load_folder
from montessori_jax.report.main_table import LOSS
from montessori_jax.stages.cross_student import Named, Settings, cross_student, render
from montessori_jax.work import Work
from tests.evaluation.tiny_student import tiny_student

SETTINGS = Settings(
    sft=SftConfig(
        learning_rate=1e-3, final_learning_rate=1e-4, batch_size=4, micro_batch=4, rows=100,
        max_length=64, remat="none",
    ),
    evaluation=EvaluationConfig(max_length=64, rows_per_pass=2),
    judge=JudgeConfig(),
    heldout="package:heldout",
    num_heldout=4,
    reference="package:reference",
    num_reference=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Named], list[Named]]:
    """Eight rows, and two students."""
    place = tmp_path_factory.mktemp("cross")
    rows = [{"instruction": f"Say {number}.", "response": f"so {number}"} for number in range(8)]
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [Named.of(f"few={path}")]
    students = []
    for number in (1, 2):
        tiny_student(place / f"s{number}", seed=number)
        students.append(Named.of(f"s{number}={place / f's{number}'}"))
    return data, students


def test_each_is_trained_and_evaluated_once(world, tmp_path: Path):
    data, students = world
    said: list[str] = []

    def once(**changes):
        work = Work(tmp_path / "out", 0, Meter(None, "cross"), say=said.append, quiet=True)
        return cross_student(data, students, replace(SETTINGS, **changes), work)

    found = once()
    assert [(row["data"], row["student"]) for row in found["rows"]] == [
        ("few", "s1"),
        ("few", "s2"),
    ]
    assert {row["train"]["rows"] for row in found["rows"]} == {8} == {found["training_rows"]}
    losses = [row["evaluation"]["reference_loss"]["loss"] for row in found["rows"]]
    assert losses[0] != losses[1]
    assert load_folder(tmp_path / "out/few/s2/train/student").params
    assert json.loads((tmp_path / "out/cross_student.json").read_text()) == found
    table = (tmp_path / "out/cross_student.md").read_text()
    assert table == render(found)
    assert table.splitlines()[0] == f"| student | data | rows | {LOSS} |"
    assert f"| s1 | few | 8 | {losses[0]:.4f} ± " in table

    # Of a run that was killed within the last evaluation, only that is done again.
    (tmp_path / "out/few/s2/evaluate/done.json").unlink()
    said.clear()
    assert once() == found
    assert ["done before" in line for line in said] == [True, True, True, False]
    # Settings that would mix old and new are refused, and named.
    with pytest.raises(UserError, match=r"sft\.learning_rate: 0\.001 -> 0\.002"):
        once(sft=replace(SETTINGS.sft, learning_rate=2e-3))
    with pytest.raises(UserError, match=r"evaluate holds work .*judge\.base_url: "):
        once(judge=JudgeConfig(base_url="http://127.0.0.1:9/v1"))
    # Rows are told by what they say.
    rows = [{"instruction": f"Ask {number}.", "response": "yes"} for number in range(4)]
    own = tmp_path / "heldout.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("heldout", "reference"):
        with pytest.raises(UserError, match=rf"evaluate holds work .*{kind}: "):
            once(**{kind: str(own)})
        package = read_rows(f"package:{kind}").rows
        same = tmp_path / f"same-{kind}.jsonl"
        asked = [{"instruction": r.instruction, "input": r.input, "response": r.response}
                 for r in package]  # fmt: skip
        same.write_text("".join(json.dumps(row) + "\n" for row in asked))
        assert once(**{kind: str(same)}) == found


def test_names_must_differ(world, tmp_path: Path):
    data, students = world
    work = Work(tmp_path / "out", 0, Meter(None, "cross"), quiet=True)
    with pytest.raises(UserError, match="names repeat among s1, s1"):
        cross_student(data, [students[0], students[0]], SETTINGS, work)


def test_each_student_is_compared_with_its_own_self_instruct(world, tmp_path: Path):
    data, students = world
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"instruction": f"Say {n}."} for n in range(2)]))
    (few,) = data
    sets = [Named("other", few.source), Named("self_instruct", few.source)]
    answers = AnswerConfig(max_tokens=4, prompts_per_batch=2)
    settings = replace(
        SETTINGS,
        evaluation=EvaluationConfig(
            evaluations=("alpaca_eval",),
            alpaca_eval=AlpacaEvalConfig(prompts=str(prompts), answers=answers),
        ),
        # Answers to equal data are equal: no one is asked.
        judge=JudgeConfig(base_url="http://127.0.0.1:9/v1", model="nobody"),
    )

    def once(sets: list[Named]):
        work = Work(tmp_path / "out", 0, Meter(None, "cross"), quiet=True)
        return cross_student(sets, students, settings, work)["rows"]

    rows = once(sets)
    assert [(row["data"], row["student"]) for row in rows] == [
        (name, student) for name in ("self_instruct", "other") for student in ("s1", "s2")
    ]
    for row in rows:
        found = row["evaluation"]["alpaca_eval"]
        assert (found["baseline"], found["win_rate"]) == ("self_instruct", 50.0)
        place = tmp_path / "out" / row["data"] / row["student"] / "evaluate"
        twin = tmp_path / "out/self_instruct" / row["student"] / "evaluate"
        theirs, own = (place / f"alpaca_eval_{kind}answers.jsonl" for kind in ("baseline_", ""))
        assert theirs.read_text() == (twin / own.name).read_text()
    with pytest.raises(UserError, match="there is no such student here"):
        once(sets[:1])


def test_the_table_has_the_reports_columns_for_what_was_evaluated():
    def row(student: str, **evaluation):
        return {"data": "d", "student": student, "train": {"rows": 3}, "evaluation": evaluation}

    alpaca = {"win_rate": 51.25, "standard_error": 1.5, "length_controlled_win_rate": None}
    harness = {"tasks": {"arc": {"acc,none": 0.5, "acc_stderr,none": 0.125}}, "limit": 8}
    bench = {"score": 4.5, "standard_error": None}
    rows = [row("s", alpaca_eval=alpaca, lm_harness=harness), row("t", mt_bench=bench)]
    head, line, *rest = render({"rows": rows}).splitlines()
    assert head == (
        "| student | data | rows | AlpacaEval, win rate, % | arc: acc (none; first 8 rows) | "
        "MT-Bench, score of 10 |"
    )
    assert line == "|---|---|---|---|---|---|"
    assert rest == [
        "| s | d | 3 | 51.25 ± 1.50 | 0.5000 ± 0.1250 |  |",
        "| t | d | 3 |  |  | 4.5000 |",
    ]
