"""MT-Bench: 80 questions of two turns, graded from 1 to 10 by a judge, or compared in pairs.

Zheng et al. 2023 (arXiv 2306.05685); temperatures, categories and gradings as in FastChat's
``llm_judge``. Questions and judge prompts are read from FastChat's files, which are not shipped.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from montessori_jax.config import MtBenchConfig
from montessori_jax.data.chat import ChatFormat
from montessori_jax.data.sources import open_records
from montessori_jax.dtypes import forward_dtype
from montessori_jax.errors import UserError
from montessori_jax.evaluation.answers import draw_answers
from montessori_jax.evaluation.contestants import find_contestant
from montessori_jax.evaluation.context import Context, Result
from montessori_jax.evaluation.judge_prompts import JudgePrompt, fill, read_judge_prompts
from montessori_jax.evaluation.pairwise import (
    Compared,
    both_orders,
    mean_with_error,
    read_verdict,
    summarise_pairs,
)
from montessori_jax.evaluation.requirements import check_judged
from montessori_jax.mesh import mesh_of
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.models.sources import load_model
from montessori_jax.runs import value_hash, write_json
from montessori_jax.serving.judge import Judge, Question
from montessori_jax.work import Work

# FastChat's temperatures by category, and 0.7 for any other.
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
    "reasoning": 0.0, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
OTHER_TEMPERATURE = 0.7
# Categories that are graded beside a reference answer.
WITH_REFERENCE = ("math", "reasoning", "coding")
SINGLE = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
PAIR = ("pair-v2", "pair-math-v1", "pair-v2-multi-turn", "pair-math-v1-multi-turn")
TURNS = (1, 2)

# FastChat's two patterns, the second where the first is not found.
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))

Dialogue = tuple[str, str]
"""A model's answers to the two turns of a question."""


@dataclass(frozen=True)
class MtQuestion:
    """One question; ``references`` are "" where there are none."""

    id: str
    category: str
    turns: tuple[str, str]
    references: tuple[str, str]

    @property
    def has_reference(self) -> bool:
        """Whether it is graded beside a reference answer."""
        return self.category in WITH_REFERENCE and any(self.references)


def read_questions(path: str, count: int) -> list[MtQuestion]:
    """The first ``count`` questions of a FastChat ``question.jsonl`` (0: all).

    Raises:
        UserError: the file cannot be read, or a row is no question of two turns.
    """
    made = []
    for number, record in open_records(path).items:
        try:
            assert isinstance(record, dict)
            first, second = record["turns"]
            references = (*(record.get("reference") or ()), "", "")[:2]
            made.append(
                MtQuestion(
                    str(record["question_id"]),
                    str(record["category"]),
                    (str(first), str(second)),
                    (str(references[0]), str(references[1])),
                )
            )
        except (AssertionError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}: row {number} is no question of two turns (question_id, category, turns): "
                "give FastChat's question.jsonl"
            ) from None
    if not made:
        raise UserError(f"{path} has no questions")
    return made[: count or None]


def with_references(questions: Sequence[MtQuestion], path: str) -> list[MtQuestion]:
    """The questions with the reference answers of a FastChat ``reference_answer/MODEL.jsonl``.

    FastChat grades `WITH_REFERENCE` by these, not by the ``reference`` of a question's row.

    Raises:
        UserError: the file cannot be read, a row is no answer in two turns, or a question of
            `WITH_REFERENCE` has none.
    """
    found: dict[str, tuple[str, str]] = {}
    for number, record in open_records(path).items:
        try:
            assert isinstance(record, dict)
            first, second = record["choices"][0]["turns"]
            found[str(record["question_id"])] = (str(first), str(second))
        except (AssertionError, IndexError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}: row {number} is no answer in two turns (question_id, choices[0].turns): "
                "give FastChat's reference_answer/gpt-4.jsonl"
            ) from None
    made = [
        replace(one, references=found.get(one.id, ("", ""))) if one.category in WITH_REFERENCE
        else one
        for one in questions
    ]  # fmt: skip
    missing = [one.id for one in made if one.category in WITH_REFERENCE and one.id not in found]
    if missing:
        raise UserError(f"{path}: no reference answer to question {', '.join(missing)}")
    return made


def mt_bench(context: Context) -> Result:
    """The evaluation ``mt_bench``.

    Returns:
        ``score`` (the mean of all ratings, 1 to 10), its standard error over questions, the same of
        ``turn_1``, ``turn_2`` and each of ``categories``; how many judgements had no rating;
        ``pairwise``, where there is a baseline; and what the judge cost.

    Raises:
        UserError: there is no judge, questions or prompts, or the judge does not answer.
    """
    settings, work = context.settings.mt_bench, context.work
    check_judged(context.settings, context.judge, self_instruct=bool(context.self_instruct))
    judge = Judge.of(context.judge)
    questions = read_questions(settings.questions, settings.num_questions)
    if settings.references:
        questions = with_references(questions, settings.references)
    prompts = read_judge_prompts(
        settings.judge_prompts, SINGLE + (PAIR if settings.baseline else ())
    )
    dialogues, shortened = answer_both_turns(context.student, questions, settings, work, "mt_bench")
    path = work.file("mt_bench_judgements.jsonl")
    options = {"max_tokens": settings.judge_tokens, "temperature": 0.0}
    asked = {
        (number, turn): Question(tuple(grading(prompts, question, dialogue, turn)), options)
        for number, (question, dialogue) in enumerate(zip(questions, dialogues, strict=True))
        for turn in TURNS
    }
    found = judge.ask(list(asked.values()), path, work, label="mt_bench judge")
    ratings = {place: read_rating(found[one.id].text) for place, one in asked.items()}
    result = {**summarise(questions, ratings), "shortened": shortened}
    if settings.baseline:
        other = baseline_dialogues(context, questions)
        pairs = pair_questions(prompts, questions, dialogues, other, options)
        wanted = [one for both in pairs.values() if both for one in both]
        verdicts = judge.ask(wanted, path, work, label="mt_bench pairs")
        found |= verdicts
        compared: dict[tuple[int, int], Compared] = {
            place: both
            and (read_verdict(verdicts[both[0].id].text), read_verdict(verdicts[both[1].id].text))
            for place, both in pairs.items()
        }
        result["pairwise"] = {"baseline": settings.baseline, **summarise_both_turns(compared)}
    write_json(
        work.file("mt_bench_ratings.json"),
        [
            {"question_id": questions[number].id, "turn": turn, "rating": rating}
            for (number, turn), rating in ratings.items()
        ],
    )
    return {**result, "cost": judge.cost(list(found.values()))}


def answer_both_turns(
    student: LoadedModel,
    questions: Sequence[MtQuestion],
    settings: MtBenchConfig,
    work: Work,
    name: str,
) -> tuple[list[Dialogue], int]:
    """Answers to the first turns, then to the second ones after them.

    Where a first answer leaves no room for the second turn and its answer, the student sees only
    as much of its beginning as fits; the judge sees all of it.

    Returns:
        The answers, and how many first answers were shortened.
    """
    chat = ChatFormat.of(student)
    room = student.model.config.max_position_embeddings - settings.answers.max_tokens
    temperatures = [TEMPERATURES.get(one.category, OTHER_TEMPERATURE) for one in questions]

    def draw(asked: list[list[dict[str, str]]], turn: int) -> list[str]:
        return draw_answers(
            student,
            asked,
            settings.answers,
            work.file(f"{name}_answers_{turn}.jsonl"),
            work,
            label=f"{name} turn {turn}",
            temperatures=temperatures,
        )

    first = draw([[{"role": "user", "content": one.turns[0]}] for one in questions], 1)
    later, shortened = [], 0
    for question, answer in zip(questions, first, strict=True):
        kept = answer
        while (excess := len(chat.encode_prompt(_dialogue(question, kept))) - room) > 0 and kept:
            ids = chat.encode_text(kept)
            kept = chat.decode(ids[: max(0, len(ids) - excess)]).rstrip("\ufffd")
        shortened += kept != answer
        later.append(_dialogue(question, kept))
    return list(zip(first, draw(later, 2), strict=True)), shortened


def _dialogue(question: MtQuestion, answer: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": question.turns[0]},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": question.turns[1]},
    ]


def baseline_dialogues(context: Context, questions: Sequence[MtQuestion]) -> list[Dialogue]:
    """The answers of the model to be compared with."""
    settings = context.settings.mt_bench
    other = find_contestant(settings.baseline)
    if other.answers:
        raise UserError(
            f"evaluation.mt_bench.baseline {settings.baseline}: a file has no answers of two "
            "turns: give a model, or RUN[:iteration[:student]]"
        )
    dtype = forward_dtype(settings.answers)
    loaded = load_model(other.model, dtype=dtype, mesh=mesh_of(context.student.params))
    name = f"mt_bench_baseline_{value_hash(loaded.fingerprint)[:8]}"
    return answer_both_turns(loaded, questions, settings, context.work, name)[0]


def _fields(question: MtQuestion, turn: int) -> dict[str, str]:
    """What judge prompts may say of a question at its first, or after its second turn."""
    reference = {"ref_answer_1": question.references[0]}
    if turn == 1:
        return {"question": question.turns[0], **reference}
    turns = {"question_1": question.turns[0], "question_2": question.turns[1]}
    return {**turns, **reference, "ref_answer_2": question.references[1]}


def _prompt(
    prompts: dict[str, JudgePrompt], names: tuple[str, ...], question: MtQuestion, turn: int
) -> JudgePrompt:
    return prompts[names[2 * (turn - 1) + question.has_reference]]


def grading(
    prompts: dict[str, JudgePrompt], question: MtQuestion, answers: Dialogue, turn: int
) -> list[dict[str, str]]:
    """The messages that ask for a rating of the answer to a turn (1 or 2)."""
    given = (
        {"answer": answers[0]} if turn == 1 else {"answer_1": answers[0], "answer_2": answers[1]}
    )
    return fill(_prompt(prompts, SINGLE, question, turn), {**_fields(question, turn), **given})


def pair_questions(
    prompts: dict[str, JudgePrompt],
    questions: Sequence[MtQuestion],
    ours: Sequence[Dialogue],
    theirs: Sequence[Dialogue],
    options: dict[str, Any],
) -> dict[tuple[int, int], tuple[Question, Question] | None]:
    """By question and turn, what is asked in both orders; None where the answers are equal."""

    def sides(answers: Dialogue, turn: int) -> dict[str, str]:
        return {"": answers[0]} if turn == 1 else {"_1": answers[0], "_2": answers[1]}

    made: dict[tuple[int, int], tuple[Question, Question] | None] = {}
    for number, question in enumerate(questions):
        for turn in TURNS:
            if ours[number][:turn] == theirs[number][:turn]:
                made[number, turn] = None
                continue
            first, second = both_orders(
                _prompt(prompts, PAIR, question, turn),
                sides(ours[number], turn),
                sides(theirs[number], turn),
                _fields(question, turn),
            )
            made[number, turn] = (
                Question(tuple(first), options),
                Question(tuple(second), options),
            )
    return made


def read_rating(text: str) -> float | None:
    """The first ``[[5]]``, or else ``[5]``, of a judgement; None without one from 1 to 10."""
    for pattern in _RATINGS:
        if found := pattern.search(text):
            rating = float(found[1])
            return rating if 1 <= rating <= 10 else None
    return None


def summarise(
    questions: Sequence[MtQuestion], ratings: dict[tuple[int, int], float | None]
) -> Result:
    """Scores over all, by turn and by category, with standard errors over questions.

    Args:
        questions: in order.
        ratings: by a question's place and its turn; None for a judgement without one.
    """

    def score(places: list[tuple[int, int]]) -> dict[str, Any]:
        known = {place: value for place in places if (value := ratings[place]) is not None}
        mean, error = mean_with_error(list(known.values()), [number for number, _ in known])
        return {
            "score": mean,
            "standard_error": error,
            "ratings": len(known),
            "unparseable": len(places) - len(known),
        }

    categories = dict.fromkeys(one.category for one in questions)
    return {
        **score(list(ratings)),
        **{f"turn_{turn}": score([one for one in ratings if one[1] == turn]) for turn in TURNS},
        "categories": {
            name: score([one for one in ratings if questions[one[0]].category == name])
            for name in categories
        },
        "questions": len(questions),
        "with_reference": sum(one.has_reference for one in questions),
        "without_reference": sum(
            one.category in WITH_REFERENCE and not one.has_reference for one in questions
        ),
    }


def summarise_both_turns(compared: dict[tuple[int, int], Compared]) -> Result:
    """Win rates over all comparisons, whose turns of a question are one cluster, and by turn."""
    places = list(compared)
    result = summarise_pairs(list(compared.values()), [number for number, _ in places]).as_row()
    for turn in TURNS:
        own = [compared[place] for place in places if place[1] == turn]
        result[f"turn_{turn}"] = summarise_pairs(own).as_row()
    return result
