"""Stage: a judge scores responses from 0 to 5. Writes ``scores.parquet``; resumes row by row."""

from typing import Any

from montessori_jax.config import JudgingConfig, as_dict
from montessori_jax.data.tables import read_table
from montessori_jax.data.writing import DatasetCard, write_dataset_parts
from montessori_jax.errors import UserError
from montessori_jax.generation.judging import build_judge_prompt, read_score
from montessori_jax.generation.teacher import Teacher
from montessori_jax.runs import SharedJournal, value_hash
from montessori_jax.seeding import derive_seed
from montessori_jax.stages.sample import as_request, sample
from montessori_jax.work import Work

COLUMNS = {
    "id": "the judged row",
    "score": "mean of the judgements that gave a score, from 0 to 5; null where none did",
    "judgements": "how many gave a score",
    "unparsed": "how many did not",
}


def judge(by: Teacher, rows: str, settings: JudgingConfig, work: Work) -> dict[str, Any]:
    """Have every response judged ``settings.samples`` times.

    Args:
        by: the judge.
        rows: with ``id``, ``instruction`` and ``response``.
        settings: how judgements are drawn.
        work: where to write. The judgements themselves stay in ``judgements.jsonl``.

    Returns:
        Counts: ``rows``, ``scored``, ``judgements``, ``unparsed`` (judgements without a score) and
        the ``mean`` score.

    Raises:
        UserError: no judgement had a score.
    """
    table = read_table(rows, ("id", "instruction", "response"))
    asked = [[str(row["id"]), row["instruction"], row["response"]] for row in table]
    key = {
        "generator": by.back_end,
        "judge": by.fingerprint,
        "rows": value_hash(asked),
        "settings": as_dict(settings),
        "seed": work.seed,
        "dtype": by.computes_in(settings.dtype),
    }
    texts = sample(
        by,
        [
            as_request(by, name, build_judge_prompt(instruction, response), derive_seed(0, name))
            for name, instruction, response in asked
        ],
        settings,
        SharedJournal(work.journals / "judgements.jsonl", key),
        work,
        samples=settings.samples,
        stop=(),
        seed=derive_seed(work.seed, "judgements"),
        label="judgements",
        total=len(asked) * settings.samples,
    )
    scored: list[dict[str, Any]] = []
    for name, _, _ in asked:
        found = [read_score(one["text"]) for one in texts[name]]
        scores = [one for one in found if one is not None]
        scored.append(
            {
                "id": name,
                "score": sum(scores) / len(scores) if scores else None,
                "judgements": len(scores),
                "unparsed": len(found) - len(scores),
            }
        )
    means = [row["score"] for row in scored if row["score"] is not None]
    unparsed = sum(row["unparsed"] for row in scored)
    if not means:
        raise UserError(
            f"none of {unparsed} judgements of {by.name} ends with 'Score: N': it is too small a "
            "judge, or judging.max_tokens is too low; its texts are in judgements.jsonl"
        )
    card = DatasetCard(
        title="Scores by a judge",
        description="How well responses serve whoever gave the instruction, from 0 to 5, by a "
        "language model that adds up five points.",
        columns=COLUMNS,
        made=(f"asked the judge {settings.samples} times about each response",),
        counts={"judgements without a score": unparsed},
        seed=work.seed,
        models={"judge": by.name},
    )
    write_dataset_parts(work.folder, {"scores": scored}, card)
    return {
        "judge": by.name,
        "rows": len(scored),
        "scored": len(means),
        "judgements": sum(row["judgements"] for row in scored),
        "unparsed": unparsed,
        "mean": sum(means) / len(means),
    }
