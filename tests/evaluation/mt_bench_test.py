"""MT-Bench: prompts by category and turn, ratings, scores by hand, and answers of two turns."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from montessori_jax.config import AnswerConfig, EvaluationConfig, JudgeConfig, MtBenchConfig
from montessori_jax.costs import Meter
from montessori_jax.errors import UserError
from montessori_jax.evaluation.context import Context
from montessori_jax.evaluation.judge_prompts import JudgePrompt, read_judge_prompts
from montessori_jax.evaluation.mt_bench import (
    PAIR,
    SINGLE,
    WITH_REFERENCE,
    MtQuestion,
    answer_both_turns,
    grading,
    mt_bench,
    pair_questions,
    read_questions,
    read_rating,
    summarise,
    summarise_both_turns,
    with_references,
)
from montessori_jax.evaluation.requirements import check_evaluations
from montessori_jax.report import lines
from montessori_jax.work import Work
from tests.evaluation.judge_server import JudgeServer
from tests.evaluation.tiny_student import tiny_student

# One prompt a name, which shows the fields that FastChat's has.
FIELDS = {
    "single-v1": "{question}|{answer}",
    "single-math-v1": "{question}|{ref_answer_1}|{answer}",
    "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
    "single-math-v1-multi-turn": "{ref_answer_1}|{ref_answer_2}|{question_1}|{answer_1}|"
    "{question_2}|{answer_2}",
    "pair-v2": "{question}|{answer_a}|{answer_b}",
    "pair-math-v1": "{ref_answer_1}|{question}|{answer_a}|{answer_b}",
    "pair-v2-multi-turn": "{question_1}|{question_2}|{answer_a_1}|{answer_a_2}|{answer_b_1}|"
    "{answer_b_2}",
    "pair-math-v1-multi-turn": "{ref_answer_1}|{ref_answer_2}|{question_1}|{question_2}|"
    "{answer_a_1}|{answer_a_2}|{answer_b_1}|{answer_b_2}",
}
PROMPTS = {name: JudgePrompt(name, "s", text) for name, text in FIELDS.items()}
WRITING = MtQuestion("81", "writing", ("q1", "q2"), ("r1", "r2"))
MATH = MtQuestion("111", "math", ("q1", "q2"), ("r1", ""))
BARE = MtQuestion("123", "coding", ("q1", "q2"), ("", ""))


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[7]]", 7.0),
        ("Rating: [[7.5]] and [[3]]", 7.5),
        ("Rating: [8]", 8.0),
        ("[2] then [[9]]", 9.0),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[rating]]", None),
        ("7/10", None),
    ],
)
def test_a_rating_is_read_as_fastchat_reads_it(text, rating):
    assert read_rating(text) == rating


def test_the_prompt_goes_by_category_turn_and_reference():
    def asked(question, turn):
        return grading(PROMPTS, question, ("a1", "a2"), turn)[-1]["content"]

    assert asked(WRITING, 1) == "q1|a1"
    assert asked(WRITING, 2) == "q1|a1|q2|a2"
    assert asked(MATH, 1) == "q1|r1|a1"
    assert asked(MATH, 2) == "r1||q1|a1|q2|a2"
    assert asked(BARE, 1) == "q1|a1"  # its file has no reference answer


def test_pairs_are_asked_in_both_orders_and_equal_ones_not_at_all():
    ours, theirs = [("a1", "a2"), ("x", "y")], [("a1", "b2"), ("u", "v")]
    made = pair_questions(PROMPTS, [WRITING, MATH], ours, theirs, {"max_tokens": 1})
    assert made[0, 1] is None
    contents = {
        place: [one.messages[-1]["content"] for one in both]
        for place, both in made.items()
        if both is not None
    }
    assert contents == {
        (0, 2): ["q1|q2|a1|a2|a1|b2", "q1|q2|a1|b2|a1|a2"],
        (1, 1): ["r1|q1|x|u", "r1|q1|u|x"],
        (1, 2): ["r1||q1|q2|x|y|u|v", "r1||q1|q2|u|v|x|y"],
    }


def test_scores_by_hand():
    questions = [WRITING, MATH, MATH]
    ratings = {(0, 1): 8.0, (0, 2): 6.0, (1, 1): 3.0, (1, 2): None, (2, 1): 5.0, (2, 2): 1.0}
    found = summarise(questions, ratings)
    mean = 23 / 5
    assert found["score"] == pytest.approx(mean)
    assert (found["ratings"], found["unparseable"]) == (5, 1)
    # Residual sums by question: 14 - 2 m, 3 - m, 6 - 2 m; three clusters, five ratings.
    squares = (14 - 2 * mean) ** 2 + (3 - mean) ** 2 + (6 - 2 * mean) ** 2
    assert found["standard_error"] == pytest.approx(math.sqrt(3 / 2 * squares) / 5)
    assert found["turn_1"]["score"] == pytest.approx(16 / 3)
    assert found["turn_2"] == {
        "score": 3.5,
        "standard_error": pytest.approx(2.5),
        "ratings": 2,
        "unparseable": 1,
    }
    assert found["categories"]["writing"]["score"] == 7.0
    assert found["categories"]["writing"]["standard_error"] is None
    assert found["categories"]["math"]["score"] == 3.0
    assert found["questions"] == 3
    nothing = summarise([WRITING], {(0, 1): None, (0, 2): None})
    assert (nothing["score"], nothing["unparseable"]) == (None, 2)


def test_the_line_says_what_was_not_rated():
    known = {"score": 5.25, "standard_error": 0.5, "unparseable": 0}
    assert lines.mt_bench(known) == "MT-Bench 5.25 ± 0.50 of 10"
    assert lines.mt_bench({**known, "unparseable": 3}).endswith(", 3 not parsed")
    nothing = {"score": None, "standard_error": None, "unparseable": 4}
    assert lines.mt_bench(nothing) == "MT-Bench: no rating in 4 judgements"


def test_pairs_of_both_turns_by_hand():
    compared = {(0, 1): ("A", "B"), (0, 2): ("A", "A"), (1, 1): None, (1, 2): ("B", "A")}
    found = summarise_both_turns(compared)
    assert found["win_rate"] == pytest.approx(100 * (1 + 0.5 + 0.5 + 0) / 4)
    # Residual sums of the two questions: +0.5 and -0.5.
    assert found["standard_error"] == pytest.approx(100 * math.sqrt(2 * 0.5) / 4)
    assert found["turn_1"]["win_rate"] == pytest.approx(75)
    assert found["turn_2"]["win_rate"] == pytest.approx(25)


def test_the_published_files_are_read(shared_data):
    questions = read_questions(str(shared_data / "mt_bench_questions_80.jsonl"), 0)
    assert len(questions) == 80
    assert sum(one.has_reference for one in questions) == 29  # question 123 has none
    prompts = read_judge_prompts(str(shared_data / "mt_bench_judge_prompts_8.jsonl"), SINGLE + PAIR)
    for question in questions:
        for turn in (1, 2):
            content = grading(prompts, question, ("first answer", "second answer"), turn)[-1]
            assert question.turns[0] in content["content"]
            assert ("second answer" in content["content"]) == (turn == 2)
    made = pair_questions(prompts, questions, [("a", "b")] * 80, [("c", "d")] * 80, {})
    assert len(made) == 160


def test_files_of_another_kind_are_one_line(tmp_path: Path):
    file = tmp_path / "question.jsonl"
    file.write_text(json.dumps({"question_id": 1, "category": "math", "turns": ["one"]}) + "\n")
    with pytest.raises(UserError, match="row 1 is no question of two turns"):
        read_questions(str(file), 0)
    with pytest.raises(UserError, match="row 1 has no name, system_prompt"):
        read_judge_prompts(str(file), SINGLE)
    prompt = {"name": "other", "system_prompt": "", "prompt_template": "x"}
    file.write_text(json.dumps(prompt) + "\n")
    with pytest.raises(UserError, match=r"no prompt called single-v1, .*; it has other"):
        read_judge_prompts(str(file), SINGLE)


def test_the_reference_answers_of_a_file_are_graded_by(shared_data, tmp_path: Path):
    questions = read_questions(str(shared_data / "mt_bench_questions_80.jsonl"), 0)
    graded = [one for one in questions if one.category in WITH_REFERENCE]
    rows = [
        {"question_id": int(one.id), "answer_id": "x", "model_id": "gpt-4", "tstamp": 1.0,
         "choices": [{"index": 0, "turns": [f"first of {one.id}", f"second of {one.id}"]}]}
        for one in graded
    ]  # fmt: skip
    file = tmp_path / "gpt-4.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = with_references(questions, str(file))
    assert sum(one.has_reference for one in found) == len(graded) == 30
    assert [one for one in found if one.category not in WITH_REFERENCE] == [
        one for one in questions if one.category not in WITH_REFERENCE
    ]
    (coding,) = [one for one in found if one.id == "123"]  # has none in the questions' file
    asked = [grading(PROMPTS, coding, ("a1", "a2"), turn)[-1]["content"] for turn in (1, 2)]
    assert asked[0] == f"{coding.turns[0]}|first of 123|a1"
    assert asked[1].startswith("first of 123|second of 123|")
    assert summarise(found[:1], {(0, 1): 5.0, (0, 2): 5.0})["without_reference"] == 0
    file.write_text("".join(json.dumps(row) + "\n" for row in rows if row["question_id"] != 123))
    with pytest.raises(UserError, match=r"gpt-4\.jsonl: no reference answer to question 123$"):
        with_references(questions, str(file))
    file.write_text(json.dumps({"question_id": 1, "choices": [{"turns": ["one"]}]}) + "\n")
    with pytest.raises(UserError, match="row 1 is no answer in two turns"):
        with_references(questions, str(file))


def test_the_evaluation_reads_the_file_of_references(shared_data, tmp_path: Path):
    question = {"question_id": 111, "category": "math", "turns": ["1 + 1?", "2 + 2?"]}
    answer = {"question_id": 111, "choices": [{"turns": ["It is two.", "It is four."]}]}
    for name, row in (("question", question), ("gpt-4", answer)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    settings = EvaluationConfig(
        evaluations=("mt_bench",),
        mt_bench=MtBenchConfig(
            questions=str(tmp_path / "question.jsonl"),
            judge_prompts=str(shared_data / "mt_bench_judge_prompts_8.jsonl"),
            references=str(tmp_path / "gpt-4.jsonl"),
            answers=AnswerConfig(max_tokens=4),
        ),
    )
    student = tiny_student(tmp_path / "student")
    server = JudgeServer(lambda content: "[[7]]" if "It is two." in content else "[[1]]")
    judge = JudgeConfig(base_url=server.url, model="m", api_key_env="")
    work = Work(tmp_path / "out", 0, Meter(None, "evaluate"), quiet=True)
    try:
        found = mt_bench(Context(student, settings, work, "", judge=judge))
    finally:
        server.close()
    assert (found["score"], found["without_reference"]) == (7.0, 0)
    assert sum("It is four." in one["messages"][-1]["content"] for one in server.asked) == 1
    lost = replace(settings.mt_bench, references="no.jsonl")
    with pytest.raises(UserError, match=r"evaluation\.mt_bench\.references: no\.jsonl does not"):
        check_evaluations(replace(settings, mt_bench=lost), judge, self_instruct=False)


def test_both_turns_are_answered_once_and_fit_the_student(tmp_path: Path):
    student = tiny_student(tmp_path / "student", positions=64)
    questions = [
        MtQuestion("1", "math", ("Name a river.", "Another?"), ("", "")),
        MtQuestion("2", "writing", ("Name a town.", "Another one?"), ("", "")),
    ]
    settings = MtBenchConfig(answers=AnswerConfig(max_tokens=16, prompts_per_batch=2))

    def answers(name: str, seed: int = 0):
        work = Work(tmp_path / name, seed, Meter(None, "evaluate"), quiet=True)
        return answer_both_turns(student, questions, settings, work, "mt_bench"), work

    (first, shortened), work = answers("a")
    assert len(first) == 2
    assert shortened > 0  # 64 positions: a whole first answer leaves no room
    assert work.meter.counts["generated_tokens"] > 0
    # Again: nothing is drawn.
    (again, _), work = answers("a")
    assert again == first
    assert work.meter.counts == {}
    # Greedy for math, drawn for writing: another seed changes the second alone.
    (other, _), _ = answers("b", seed=1)
    assert other[0][0] == first[0][0]
    assert other[1][0] != first[1][0]
