"""Stage: several models answer the same prompts and a judge compares each pair of them.

Writes ``head_to_head.json`` and ``head_to_head.md``. Resumes answer by answer, verdict by verdict.
``head_to_head.json`` holds:

- ``contestants``: their names, in the order of the matrix;
- ``win_rate``, ``standard_error``: matrices in percent, ``[row][column]`` of the row's model
  against the column's; null on the diagonal and where no verdict could be read;
- ``pairs``: for each pair ``a``, ``b`` and the columns of
  `montessori_jax.evaluation.pairwise.PairResult`, seen from ``a``;
- ``prompts``, their number; ``judge_prompt``, its name; ``cost`` of the judge.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from montessori_jax.config import HeadToHeadConfig, JudgeConfig
from montessori_jax.data.rows import read_rows
from montessori_jax.dtypes import forward_dtype
from montessori_jax.errors import UserError
from montessori_jax.evaluation.answers import asked_of, draw_answers, kept_answers, read_answers
from montessori_jax.evaluation.contestants import Contestant
from montessori_jax.evaluation.judge_prompts import read_judge_prompts
from montessori_jax.evaluation.pairwise import (
    OWN_PROMPT,
    Compared,
    PairResult,
    both_orders,
    read_verdict,
    summarise_pairs,
)
from montessori_jax.generation.prompts import task_text
from montessori_jax.models.sources import load_model, model_fingerprint
from montessori_jax.runs import write_atomic, write_json
from montessori_jax.serving.judge import Judge, Question
from montessori_jax.work import Work

FASTCHAT_PROMPT = "pair-v2"


def head_to_head(
    contestants: Sequence[Contestant],
    settings: HeadToHeadConfig,
    judging: JudgeConfig,
    work: Work,
    *,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Compare every two of them on the first ``settings.num_prompts`` prompts (0: all).

    Args:
        contestants: two or more, with different names.
        settings: prompts, how answers are drawn, what the judge is asked.
        judging: the judge.
        work: the folder that everything is written to.
        mesh: where models that have to answer are to lie.

    Raises:
        UserError: there are fewer than two, no judge, or no answers to the prompts in a file.
    """
    if len(contestants) < 2:
        raise UserError("head-to-head compares two or more: name another one")
    judge = Judge.of(judging)
    prompt = OWN_PROMPT
    if settings.judge_prompts:
        (prompt,) = read_judge_prompts(settings.judge_prompts, (FASTCHAT_PROMPT,)).values()
    rows = read_rows(settings.prompts, need_response=False).require()[
        : settings.num_prompts or None
    ]
    instructions = [task_text(row.instruction, row.input) for row in rows]
    answers = [answers_of(one, instructions, settings, work, mesh) for one in contestants]
    options = {"max_tokens": settings.judge_tokens, "temperature": 0.0}

    def asked(instruction: str, ours: str, theirs: str) -> tuple[Question, Question] | None:
        if ours == theirs:
            return None
        orders = both_orders(prompt, {"": ours}, {"": theirs}, {"question": instruction})
        first, second = (Question(tuple(messages), options) for messages in orders)
        return first, second

    pairs = list(itertools.combinations(range(len(contestants)), 2))
    questions = {
        (a, b): [
            asked(instruction, ours, theirs)
            for instruction, ours, theirs in zip(instructions, answers[a], answers[b], strict=True)
        ]
        for a, b in pairs
    }
    wanted = [one for own in questions.values() for both in own if both for one in both]
    path = work.file("judgements.jsonl")
    found = judge.ask(wanted, path, work, label="head to head")

    def verdicts(both: tuple[Question, Question] | None) -> Compared:
        return both and (read_verdict(found[both[0].id].text), read_verdict(found[both[1].id].text))

    results = {pair: summarise_pairs([verdicts(b) for b in questions[pair]]) for pair in pairs}
    names = [one.name for one in contestants]
    result = {
        "contestants": names,
        **matrices(len(names), results),
        "pairs": [
            {"a": names[a], "b": names[b], **one.as_row()} for (a, b), one in results.items()
        ],
        "prompts": len(instructions),
        "judge_prompt": prompt.name,
        "cost": judge.cost(list(found.values())),
    }
    write_json(work.file("head_to_head.json"), result)
    write_atomic(work.file("head_to_head.md"), render(result))
    return result


def answers_of(
    one: Contestant,
    instructions: Sequence[str],
    settings: HeadToHeadConfig,
    work: Work,
    mesh: Mesh | None,
) -> list[str]:
    """A contestant's answers: from its file, or drawn and journalled as ``answers-NAME.jsonl``."""
    if one.answers:
        return read_answers(one.answers, instructions)
    asked = asked_of(instructions)
    path = work.file(f"answers-{file_name(one.name)}.jsonl")
    kept = kept_answers(model_fingerprint(one.model), asked, settings.answers, path, work)
    if kept is not None:
        return kept
    loaded = load_model(one.model, dtype=forward_dtype(settings.answers), mesh=mesh)
    return draw_answers(loaded, asked, settings.answers, path, work, label=f"answers {one.name}")


def file_name(name: str) -> str:
    """A name without what cannot be in a file's; different names may become one."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "unnamed"


def matrices(count: int, results: dict[tuple[int, int], PairResult]) -> dict[str, Any]:
    """Win rates of rows against columns, and their standard errors."""
    rates: list[list[float | None]] = [[None] * count for _ in range(count)]
    errors: list[list[float | None]] = [[None] * count for _ in range(count)]
    for (a, b), one in results.items():
        for row, column, seen in ((a, b, one), (b, a, one.reversed())):
            rates[row][column] = seen.win_rate
            errors[row][column] = seen.standard_error
    return {"win_rate": rates, "standard_error": errors}


def render(result: dict[str, Any]) -> str:
    """The matrix as a Markdown table, and what of the judge a reader must know."""
    names = result["contestants"]
    lines = [
        "Win rate in percent of the row against the column, ties as half, ± standard error:",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for row, name in enumerate(names):
        cells = [
            "" if rate is None else f"{rate:.1f}" + ("" if error is None else f" ± {error:.1f}")
            for rate, error in zip(
                result["win_rate"][row], result["standard_error"][row], strict=True
            )
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    cost = result["cost"]
    paid = "" if cost["dollars"] is None else f", ${cost['dollars']:.2f}"
    lines += ["", f"{result['prompts']} prompts, judged by {cost['judge']}{paid}.", ""]
    for one in result["pairs"]:
        first = one["first_place_rate"]
        place = "" if first is None else f", {first:.0f} % of verdicts for the first place"
        lines.append(
            f"- {one['a']} against {one['b']}: {one['wins']} won, {one['losses']} lost, "
            f"{one['ties']} tied ({one['inconsistent']} since the orders disagreed), "
            f"{one['unparseable']} not parsed{place}"
        )
    return "\n".join(lines) + "\n"
