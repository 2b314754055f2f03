"""Stage: how good a student is. Writes ``evaluation.json`` and a line of ``metrics.jsonl``."""

from typing import Any

from montessori_jax.evaluation import EVALUATIONS, Context
from montessori_jax.runs import write_json


def evaluate(context: Context) -> dict[str, Any]:
    """Run ``settings.evaluations``, one after the other; the result of each under its name."""
    work = context.work
    results: dict[str, Any] = {}
    for name in context.settings.evaluations:
        work.check_stop()
        results[name] = EVALUATIONS[name](context)
    result = {"student": context.student.name, **results}
    write_json(work.file("evaluation.json"), result)
    with work.metrics() as metrics:
        metrics.write({"step": 0, **_numbers(results)})
    return result


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """What of a result is a number, at any depth."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, int | float):
            found[key] = value
        elif isinstance(value, dict) and (inner := _numbers(value)):
            found[key] = inner
    return found
