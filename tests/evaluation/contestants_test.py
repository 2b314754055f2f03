"""Who is compared, by a short name."""

import json
from pathlib import Path

import pytest

from montessori_jax.errors import UserError
from montessori_jax.evaluation.answers import read_answers
from montessori_jax.evaluation.contestants import Contestant, distinct, find_contestant


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose second iteration is in the middle of training."""
    place = tmp_path / "run"
    for number, done in ((1, True), (2, True), (3, False)):
        for kind in ("tuned", "untuned"):
            folder = place / f"iteration-{number}" / f"train-{kind}"
            (folder / "student").mkdir(parents=True)
            if done:
                (folder / "done.json").write_text("{}")
    (place / "config.yaml").write_text("student: hf:org/base\n")
    return place


def test_a_runs_student_is_found_by_iteration_and_name(run):
    def student(number: int, kind: str) -> str:
        return str(run / f"iteration-{number}" / f"train-{kind}" / "student")

    assert find_contestant(str(run)) == Contestant(str(run), model=student(2, "tuned"))
    assert find_contestant(f"{run}:1").model == student(1, "tuned")
    assert find_contestant(f"a={run}:1:untuned") == Contestant("a", model=student(1, "untuned"))
    assert find_contestant(f"{run}::untuned").model == student(2, "untuned")
    assert find_contestant(f"{run}:1:untrained").model == "hf:org/base"
    with pytest.raises(UserError, match=r"iteration 3 has no trained student tuned \(has: 1, 2\)"):
        find_contestant(f"{run}:3")
    with pytest.raises(UserError, match=r"iteration 1 has no trained student best \(has: none"):
        find_contestant(f"{run}:1:best")
    with pytest.raises(UserError, match="expected RUN"):
        find_contestant(f"{run}:last")


def test_files_and_models_are_told_apart(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text("{}\n")
    assert find_contestant(f"x={file}") == Contestant("x", answers=str(file))
    assert find_contestant("hf:org/m") == Contestant("hf:org/m", model="hf:org/m")
    odd = tmp_path / "rate=1"
    odd.mkdir()
    odd_file = file.rename(odd / "answers.jsonl")
    assert find_contestant(f"x={odd_file}") == Contestant("x", answers=str(odd_file))
    assert find_contestant(str(odd_file)) == Contestant(str(odd_file), answers=str(odd_file))
    assert find_contestant(f"{odd}/student").model == f"{odd}/student"
    file = odd_file.rename(file)
    with pytest.raises(UserError, match="does not exist"):
        find_contestant(str(tmp_path / "no.jsonl"))
    with pytest.raises(UserError, match="two of them are called x"):
        distinct([f"x={file}", "x=hf:org/m"])


def test_answers_are_found_by_their_instructions(tmp_path):
    file = tmp_path / "answers.json"
    rows = [
        {"instruction": "b", "output": "B"},
        {"instruction": "a", "input": "1", "output": "A"},
        {"instruction": "c", "output": "C"},
    ]
    file.write_text(json.dumps(rows))
    assert read_answers(str(file), ["a\n1", "b"]) == ["A", "B"]
    with pytest.raises(UserError, match="no answer to 1 of the 2 prompts, such as 'd'"):
        read_answers(str(file), ["a\n1", "d"])
    file.write_text(json.dumps([*rows, {"instruction": "b", "output": "other"}]))
    with pytest.raises(UserError, match="two answers to 'b'"):
        read_answers(str(file), ["b"])
