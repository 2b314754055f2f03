"""Evaluations of a student, by name: each takes a model and rows and returns a JSON-able row."""

from montessori_jax.evaluation.reference_loss import ReferenceLoss, reference_loss

__all__ = ["ReferenceLoss", "reference_loss"]
