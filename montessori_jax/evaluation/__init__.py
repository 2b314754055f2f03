"""Evaluations of a student, by name.

Each is ``(model, params, chats, settings, *, progress) -> outcome`` with ``outcome.as_row()``
JSON-able; a further one is a function and a line in `EVALUATIONS`.
"""

from montessori_jax.evaluation.reference_loss import ReferenceLoss, reference_loss

EVALUATIONS = {"reference_loss": reference_loss}

__all__ = ["EVALUATIONS", "ReferenceLoss", "reference_loss"]
