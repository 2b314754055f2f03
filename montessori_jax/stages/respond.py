"""Stage: a teacher answers each instruction several times, so that its responses can compete.

Writes ``data.parquet`` with its card and ``prompts.jsonl``. Resumes instruction by instruction.
"""

from typing import Any

from montessori_jax.config import ResponseConfig, as_dict
from montessori_jax.data.tables import read_table
from montessori_jax.data.writing import DatasetCard, write_dataset_card, write_jsonl
from montessori_jax.errors import UserError
from montessori_jax.generation.prompts import build_response_prompt
from montessori_jax.generation.responses import finished_part
from montessori_jax.generation.teacher import Teacher
from montessori_jax.runs import SharedJournal, value_hash
from montessori_jax.seeding import derive_seed
from montessori_jax.stages.sample import as_request, sample
from montessori_jax.work import Work

COLUMNS = {
    "id": "response: the instruction's candidate and the response's number",
    "prompt_id": "the instruction's candidate; its responses compete with each other",
    "instruction": "what the teacher was asked",
    "response": "what the teacher answered",
    "raw": "the same",
}


def respond(
    teacher: Teacher, candidates: str, settings: ResponseConfig, work: Work, *, responses: int
) -> dict[str, Any]:
    """Have ``responses`` responses to each instruction, the one that it came with among them.

    Args:
        teacher: writes the others.
        candidates: rows with ``id``, ``instruction`` and ``response`` (the generate stage's).
        settings: how responses are drawn.
        work: where to write.
        responses: how many, 2 or more; empty ones are left out.

    Raises:
        UserError: no instruction has two different responses.
    """
    rows = read_table(candidates, ("id", "instruction", "response"))
    prompts = {row["id"]: build_response_prompt(row["instruction"]) for row in rows}
    key = {
        "generator": teacher.back_end,
        "teacher": teacher.fingerprint,
        "instructions": value_hash([[row["id"], row["instruction"]] for row in rows]),
        "responses": as_dict(settings),
        "samples": responses - 1,
        "seed": work.seed,
        "dtype": teacher.computes_in(settings.dtype),
    }
    texts = sample(
        teacher,
        [
            as_request(teacher, name, prompt, derive_seed(0, name))
            for name, prompt in prompts.items()
        ],
        settings,
        SharedJournal(work.journals / "responses.jsonl", key),
        work,
        samples=responses - 1,
        stop=(),
        seed=derive_seed(work.seed, "responses"),
        label="responses",
        total=len(rows) * (responses - 1),
    )
    made, empty = [], 0
    for row in rows:
        others = [
            finished_part(one["text"], one["finish"], settings.unfinished)
            for one in texts[row["id"]]
        ]
        for number, text in enumerate([row["response"], *others]):
            if not text:
                empty += 1
                continue
            made.append(
                {
                    "id": f"{row['id']}/{number}",
                    "prompt_id": row["id"],
                    "instruction": row["instruction"],
                    "response": text,
                    "raw": text,
                }
            )
    different = len({(one["prompt_id"], one["response"]) for one in made})
    if different == len(rows):
        raise UserError(
            f"all {responses} responses to each of {len(rows)} instructions are alike: raise "
            "responses.temperature or competing_responses"
        )
    asked = [
        {"prompt_id": name, "prompt": prompt.messages, "prefill": prompt.prefill}
        for name, prompt in prompts.items()
    ]
    write_jsonl(work.file("prompts.jsonl"), asked)
    card = DatasetCard(
        title="Several responses to each instruction",
        description="Responses that one teacher wrote to the same instructions, to be compared "
        "with each other.",
        columns=COLUMNS,
        made=(f"asked the teacher {responses} times for a response to each instruction",),
        counts={"instructions": len(rows), "empty responses": empty},
        seed=work.seed,
        models={"teacher": teacher.name},
    )
    write_dataset_card(work.folder, made, card)
    return {
        "instructions": len(rows),
        "responses": len(made),
        "different": different,
        "empty": empty,
        "generator": teacher.back_end,
        "seeded": teacher.seeded,
    }
