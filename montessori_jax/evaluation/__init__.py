"""Evaluations of a student, by name.

Each is ``(context) -> result`` with a JSON-able result; a further one is a function, a line in
`EVALUATIONS`, its name in `montessori_jax.config.EvaluationConfig` and what is said of its result
in `montessori_jax.report.lines`. What it needs beyond the package's own dependencies is imported
when it is called.
"""

from collections.abc import Callable

from montessori_jax.evaluation.alpaca_eval import alpaca_eval
from montessori_jax.evaluation.context import Context, Result
from montessori_jax.evaluation.lm_harness import lm_harness
from montessori_jax.evaluation.mt_bench import mt_bench
from montessori_jax.evaluation.reference_loss import ReferenceLoss, heldout_loss, reference_loss

EVALUATIONS: dict[str, Callable[[Context], Result]] = {
    "reference_loss": heldout_loss,
    "lm_harness": lm_harness,
    "alpaca_eval": alpaca_eval,
    "mt_bench": mt_bench,
}

__all__ = [
    "EVALUATIONS",
    "Context",
    "ReferenceLoss",
    "Result",
    "alpaca_eval",
    "heldout_loss",
    "lm_harness",
    "mt_bench",
    "reference_loss",
]
