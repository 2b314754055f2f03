"""`montessori evaluate`."""

import argparse
import shutil
import tempfile
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
    stage_section,
    stage_work,
)
from montessori_jax.config import EvaluationConfig
from montessori_jax.flags import add_settings, settings_from
from montessori_jax.stopping import Stop


def add_evaluate(commands: Any) -> None:
    """Declare ``evaluate``."""
    parser = add_stage_command(
        commands,
        "evaluate",
        "Held-out reference loss of a student.",
        _evaluate,
        epilog="Example: montessori evaluate --student runs/student/student --heldout rows.jsonl "
        "--out evaluation.json",
    )
    parser.add_argument("--student", help=MODEL)
    parser.add_argument("--heldout", help=ROWS)
    parser.add_argument(
        "--out",
        help="write the result as JSON to this file as well, and a line of metrics beside it",
    )
    parser.add_argument(
        "--num-heldout",
        type=row_count,
        help="rows used, the first ones; default the YAML's, or all",
    )
    add_settings(parser, EvaluationConfig, "evaluation")


def _evaluate(parsed: argparse.Namespace, stop: Stop) -> None:
    from montessori_jax.dtypes import forward_dtype
    from montessori_jax.models.sources import load_model
    from montessori_jax.report.lines import with_error
    from montessori_jax.runs import write_json
    from montessori_jax.stages.evaluate import evaluate

    base = run_config(parsed)
    settings = settings_from(parsed, EvaluationConfig, stage_section(parsed, "evaluation"))
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(parsed.out or "evaluation.json").parent
        work = stage_work(parsed, stop, Path(folder), "evaluate", logs)
        result = evaluate(
            load_model(parsed.student or base.student, dtype=forward_dtype(settings)),
            parsed.heldout or base.data.heldout,
            settings,
            work,
            num_heldout=rows_wanted(parsed, parsed.num_heldout, "num_heldout"),
        )
        if parsed.out:
            write_json(Path(parsed.out), result)
            beside = Path(parsed.out).with_suffix(".metrics.jsonl")
            shutil.copyfile(work.file("metrics.jsonl"), beside)
    loss = result["reference_loss"]
    print(
        f"held-out reference loss {with_error(loss, 5)} on "
        f"{loss['samples']} rows, {loss['tokens']} tokens; skipped: {result['skipped']}  "
        f"({report_cost(work)})"
    )
