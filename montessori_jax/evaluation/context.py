"""What an evaluation is given."""

from dataclasses import dataclass, field
from typing import Any

from montessori_jax.config import EvaluationConfig, JudgeConfig
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.work import Work

Result = dict[str, Any]
"""JSON-able. Its numbers, those in dicts within it included, become the stage's metrics."""


@dataclass(frozen=True)
class Context:
    """A student and all that it may be evaluated on.

    Attributes:
        student: the model, its tokenizer and its identity.
        settings: the section of all evaluations.
        work: bars, the meter, the stage's folder, the seed. Journals lie in ``work.folder`` itself,
            as ``*.jsonl``, and are found there again after a kill.
        heldout: rows with responses, for the evaluations that need some.
        num_heldout: how many of them are used, the first usable ones; None: all.
        judge: the model that judges, for the evaluations that need one.
        reference: the rows that influence was measured on; "" where that is not known.
        num_reference: how many of them, the first of the file; None: all.
        self_instruct: the model that a run's student is compared with, trained on data of the
            untuned teacher; "" where there is none.
    """

    student: LoadedModel
    settings: EvaluationConfig
    work: Work
    heldout: str
    num_heldout: int | None = None
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reference: str = ""
    num_reference: int | None = None
    self_instruct: str = ""
