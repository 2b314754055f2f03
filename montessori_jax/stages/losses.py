"""Stage: a student's loss on each row. Writes ``scores.parquet``; resumes chunk by chunk."""

from typing import Any

from montessori_jax.config import EvaluationConfig
from montessori_jax.data.chat import ChatFormat
from montessori_jax.data.encode import encode_rows
from montessori_jax.data.own_parts import read_rows_together
from montessori_jax.data.writing import DatasetCard, write_dataset_parts
from montessori_jax.device_memory import fits_in_memory
from montessori_jax.evaluation import reference_loss
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.runs import Journal, value_hash
from montessori_jax.work import Work

CHUNK = 64
"""Rows measured between writes to disk."""
COLUMNS = {
    "id": "the row",
    "loss": "the student's mean loss on its response, in nats a token, the end of turn included",
}


def losses(
    student: LoadedModel,
    rows: str,
    settings: EvaluationConfig,
    work: Work,
    *,
    fingerprint: str,
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure the student's loss on the response of the first ``limit`` usable rows (None: all).

    Args:
        student: the model that is measured.
        rows: a source of rows (`montessori_jax.data.rows.read_rows`).
        settings: numerics, and how many rows are on a device at one time.
        work: where to write.
        fingerprint: changes whenever the student does.
        limit: how many rows.
    """
    chat = ChatFormat.of(student)
    encoded = encode_rows(read_rows_together(rows), chat, settings.max_length, limit=limit)
    key = {
        "student": fingerprint,
        "rows": value_hash([[row.id, row.conversation()] for row in encoded.rows]),
        "settings": [settings.max_length, settings.dtype, settings.attention],
    }
    journal = Journal(work.file("losses.jsonl"), key)
    # Rows of like length together: less padding, fewer shapes to compile.
    order = sorted(range(len(encoded.rows)), key=lambda i: (len(encoded.chats[i].tokens), i))
    found = {i: loss for one in journal.records for i, loss in one["losses"]}
    advice = f"lower evaluation.rows_per_pass (now {settings.rows_per_pass})"
    with (
        fits_in_memory("losses", advice),
        work.bar(len(order), "row", "losses", done=len(found)) as bar,
    ):
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            if all(i in found for i in chunk):
                continue
            chats = [encoded.chats[i] for i in chunk]
            measured = reference_loss(student.model, student.params, chats, settings)
            made = list(zip(chunk, measured.by_sample, strict=True))
            found |= dict(made)
            journal.append({"losses": made})
            tokens = sum(len(chat.tokens) for chat in chats)
            flops = 2.0 * student.model.parameter_count() * tokens
            work.meter.count(scored_tokens=tokens, flops=flops)
            bar.update(len(chunk))
            work.check_stop()
    table = [{"id": row.id, "loss": found[i]} for i, row in enumerate(encoded.rows)]
    card = DatasetCard(
        title="A student's loss on each row",
        description="How well a student predicts the responses, by its mean loss.",
        columns=COLUMNS,
        made=("measured the loss on each response, without any training on it",),
        models={"student": student.name},
    )
    write_dataset_parts(work.folder, {"scores": table}, card)
    values = sorted(found.values())
    return {
        "rows": len(table),
        "skipped": encoded.causes(),
        "lowest": values[0],
        "mean": sum(values) / len(values),
        "highest": values[-1],
    }
