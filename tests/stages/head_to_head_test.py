"""Models that answer, the matrix, and its table. What a judge says is in tests/serving."""

import json
from dataclasses import replace
from pathlib import Path

from montessori_jax.config import AnswerConfig, HeadToHeadConfig, JudgeConfig
from montessori_jax.costs import Meter
from montessori_jax.evaluation.answers import asked_of, draw_answers, kept_answers
from montessori_jax.evaluation.contestants import distinct
from montessori_jax.evaluation.pairwise import summarise_pairs
from montessori_jax.stages.head_to_head import file_name, head_to_head, matrices, render
from montessori_jax.work import Work
from tests.evaluation.tiny_student import tiny_student

# No one is asked: the answers are equal.
NOBODY = JudgeConfig(base_url="http://127.0.0.1:9/v1", model="nobody")


def test_models_answer_once_and_are_compared(tmp_path: Path):
    student = tiny_student(tmp_path / "student")
    prompts = tmp_path / "prompts.json"
    asked = [f"Name {count} rivers." for count in ("two", "six", "ten")]
    prompts.write_text(json.dumps([{"instruction": one} for one in asked]))
    answers = AnswerConfig(temperature=1.0, max_tokens=8, prompts_per_batch=2)
    settings = HeadToHeadConfig(prompts=str(prompts), num_prompts=2, answers=answers)

    def once() -> tuple[dict, Work]:
        work = Work(tmp_path / "out", 3, Meter(None, "head-to-head"), quiet=True)
        contestants = distinct([f"{name}={tmp_path / 'student'}" for name in ("x", "y+z")])
        return head_to_head(contestants, settings, NOBODY, work), work

    found, work = once()
    assert found["win_rate"] == [[None, 50.0], [50.0, None]]
    assert found["standard_error"] == [[None, 0.0], [0.0, None]]
    (pair,) = found["pairs"]
    assert (pair["a"], pair["b"], pair["identical"], pair["ties"]) == ("x", "y+z", 2, 2)
    assert found["cost"] == {
        "judge": "nobody", "judgements": 0, "prompt_tokens": 0, "generated_tokens": 0, "refused": 0,
        "dollars": None,
    }  # fmt: skip
    assert work.meter.counts["generated_tokens"] > 0
    assert (tmp_path / "out/answers-y-z.jsonl").exists()
    again, work = once()
    assert again == found
    assert work.meter.counts == {}

    # Cut off after one answer, the other is the same; another student's journal is not taken.
    path = tmp_path / "out/answers-x.jsonl"
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:2]))
    work = replace(work, quiet=True)
    few = asked_of(asked[:2])
    fingerprint = student.fingerprint
    assert kept_answers(fingerprint, few, answers, path, work) is None
    drawn = draw_answers(student, few, answers, path, work, label="x")
    assert path.read_text() == whole
    other = tmp_path / "other.jsonl"
    assert kept_answers("another", few, answers, other, work, elsewhere=[path]) is None
    assert not other.exists()
    assert kept_answers(fingerprint, few, answers, other, work, elsewhere=[path]) == drawn
    assert other.read_text() == whole


def test_the_matrix_and_its_table_by_hand():
    results = {
        (0, 1): summarise_pairs([("A", "B"), ("A", "B"), ("A", "A"), ("B", "A")]),
        (0, 2): summarise_pairs([(None, "A")]),
        (1, 2): summarise_pairs([("A", "B")]),
    }
    made = matrices(3, results)
    assert made["win_rate"] == [[None, 62.5, None], [37.5, None, 100.0], [None, 0.0, None]]
    assert made["standard_error"][0][1] == made["standard_error"][1][0]
    assert made["standard_error"][1][2] is None
    names = ["a", "b", "c"]
    pairs = [{"a": names[a], "b": names[b], **one.as_row()} for (a, b), one in results.items()]
    cost = {"judge": "j", "dollars": 1.5}
    text = render({"contestants": names, **made, "pairs": pairs, "prompts": 4, "cost": cost})
    assert "| a |  | 62.5 ± 23.9 |  |" in text
    assert "| c |  | 0.0 |  |" in text
    assert "4 prompts, judged by j, $1.50." in text
    assert (
        "- a against b: 2 won, 1 lost, 1 tied (1 since the orders disagreed), 0 not parsed, "
        "62 % of verdicts for the first place" in text
    )
    assert "- a against c: 0 won, 0 lost, 0 tied" in text


def test_names_become_file_names():
    assert file_name("runs/a:1") == "runs-a-1"
    assert file_name("../..") == "unnamed"
