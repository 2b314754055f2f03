"""Stage: a teacher writes more of what a student finds hard, from seeds alone.

LLM2LLM (Lee et al. 2024, arXiv 2403.15042): the seeds with the student's highest losses are
expanded, never rows that a teacher wrote, so that its errors do not add up. Writes what the
generate stage writes.
"""

import math
from collections.abc import Sequence
from typing import Any

from montessori_jax.config import GenerationConfig, ResponseConfig
from montessori_jax.data.rows import Row, read_rows
from montessori_jax.data.tables import read_table
from montessori_jax.errors import UserError
from montessori_jax.generation.prompts import Prompt, build_expansion_prompt, task_text
from montessori_jax.generation.teacher import Teacher
from montessori_jax.runs import value_hash
from montessori_jax.stages.generate import short_enough, write_data
from montessori_jax.work import Work


def hardest(rows: Sequence[Row], losses: str, share: float) -> list[Row]:
    """The share of the measured rows (at least one) with the highest losses, the highest first."""
    measured = {str(one["id"]): one["loss"] for one in read_table(losses, ("id", "loss"))}
    known = [row for row in rows if row.id in measured]
    known.sort(key=lambda row: (-measured[row.id], row.index))
    return known[: max(1, math.ceil(share * len(known)))]


def expand(
    teacher: Teacher,
    seeds: str,
    losses: str,
    settings: GenerationConfig,
    responses: ResponseConfig,
    work: Work,
    *,
    prompts: int,
    share: float,
) -> dict[str, Any]:
    """Ask ``prompts`` times for more like a hard seed, the hard seeds in turn.

    Args:
        teacher: writes.
        seeds: seed rows.
        losses: rows with the ``id`` of a seed and the student's ``loss`` on it.
        settings: how instructions are drawn and filtered.
        responses: how responses are drawn.
        work: where to write.
        prompts: how many prompts there are.
        share: of the measured seeds, how many are expanded: those with the highest losses.

    Returns:
        The counts of the generate stage, and ``expanded``, how many seeds were shown.

    Raises:
        UserError: all hard seeds are too long to be shown, or too little of what is written is
            kept.
    """
    rows = read_rows(seeds).require()
    hard = [task_text(row.instruction, row.input) for row in hardest(rows, losses, share)]
    shown = short_enough(hard, teacher, settings, work, exemplars=1)
    if not shown:
        raise UserError(
            f"all {len(hard)} hard seeds are too long for the teacher: raise llm2llm.hard_share, "
            "or lower generation.max_tokens"
        )

    def question(index: int, earlier: Sequence[str]) -> Prompt:
        return build_expansion_prompt(settings.style, shown[index % len(shown)])

    result = write_data(
        teacher,
        [task_text(row.instruction, row.input) for row in rows],
        question,
        settings,
        responses,
        work,
        prompts=prompts,
        of="seeds that a student finds hard",
        about={"expanded": value_hash(shown)},
    )
    return {**result, "expanded": min(len(shown), prompts)}
