"""Stage: how good a student is. Writes ``evaluation.json`` and a line of ``metrics.jsonl``."""

from typing import Any

from montessori_jax.config import EvaluationConfig
from montessori_jax.data.chat import ChatFormat
from montessori_jax.data.encode import encode_rows
from montessori_jax.data.rows import read_rows
from montessori_jax.evaluation import EVALUATIONS
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.runs import write_json
from montessori_jax.work import Work


def evaluate(
    student: LoadedModel,
    heldout: str,
    settings: EvaluationConfig,
    work: Work,
    *,
    num_heldout: int | None,
) -> dict[str, Any]:
    """Run ``settings.evaluations`` on the first ``num_heldout`` usable rows (None: all)."""
    chat = ChatFormat.of(student)
    encoded = encode_rows(read_rows(heldout), chat, settings.max_length, limit=num_heldout)
    result: dict[str, Any] = {"student": student.name, "skipped": encoded.causes()}
    for name in settings.evaluations:
        with work.bar(len(encoded.chats), "row", name) as bar:
            outcome = EVALUATIONS[name](
                student.model, student.params, encoded.chats, settings, progress=bar.update
            )
        result[name] = outcome.as_row()
        work.meter.count(
            scored_tokens=encoded.tokens,
            flops=2.0 * student.model.parameter_count() * encoded.tokens,
        )
    write_json(work.file("evaluation.json"), result)
    row: dict[str, Any] = {
        name: {key: value for key, value in result[name].items() if isinstance(value, int | float)}
        for name in settings.evaluations
    }
    with work.metrics() as metrics:
        metrics.write({"step": 0, **row})
    return result
