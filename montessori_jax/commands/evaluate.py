"""`montessori evaluate`."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from montessori_jax.commands.arguments import (
    MODEL,
    ROWS,
    add_profile,
    add_stage_command,
    report_cost,
    row_count,
    rows_wanted,
    run_config,
    stage_mesh,
    stage_section,
    stage_work,
)
from montessori_jax.config import EvaluationConfig, HarnessConfig, as_dict
from montessori_jax.errors import UserError
from montessori_jax.flags import add_settings, settings_from
from montessori_jax.stopping import Stop

# Sections of their own in the YAML; overrides: evaluation.alpaca_eval.KEY=VALUE.
NESTED = ("harness", "alpaca_eval", "mt_bench")


def add_evaluate(commands: Any) -> None:
    """Declare ``evaluate``."""
    parser = add_stage_command(
        commands,
        "evaluate",
        "How good a student is: held-out reference loss and others, by name.",
        _evaluate,
        epilog="Example: montessori evaluate --student runs/student/student --heldout rows.jsonl "
        "--out evaluation.json",
    )
    parser.add_argument("--student", help=MODEL)
    parser.add_argument("--heldout", help=ROWS)
    parser.add_argument(
        "--out",
        help="write the result to this JSON file, a line of metrics beside it, and what an "
        "evaluation keeps (answers, journals to resume from) into a folder of its name; "
        "alpaca_eval and mt_bench need it",
    )
    parser.add_argument(
        "--num-heldout",
        type=row_count,
        help="rows used, the first ones; default the YAML's, or all",
    )
    add_profile(parser)
    add_settings(parser, EvaluationConfig, "evaluation", skip=NESTED)
    add_settings(parser, HarnessConfig, "evaluation lm_harness", prefix="harness-")


def _evaluate(parsed: argparse.Namespace, stop: Stop) -> None:
    from montessori_jax.dtypes import forward_dtype
    from montessori_jax.evaluation import Context
    from montessori_jax.evaluation.requirements import ANSWERED
    from montessori_jax.models.sources import load_model
    from montessori_jax.report.lines import evaluated
    from montessori_jax.stages.evaluate import evaluate

    base = run_config(parsed)
    section = stage_section(parsed, "evaluation")
    harness = settings_from(
        parsed, HarnessConfig, dict(section.get("harness") or {}), prefix="harness-"
    )
    settings = settings_from(
        parsed,
        EvaluationConfig,
        {**section, "harness": as_dict(harness)},
        skip=NESTED,
    )
    out = Path(parsed.out) if parsed.out else None
    if out and not out.suffix:
        raise UserError(f"--out {out}: a file, such as {out}.json")
    judged = [name for name in ANSWERED if name in settings.evaluations]
    if judged and not out:
        raise UserError(
            f"{' and '.join(judged)}: a judge is paid for what --out keeps: give --out FILE.json"
        )
    with tempfile.TemporaryDirectory() as unkept:
        folder = out.with_suffix("") if out else Path(unkept)
        logs = (out or Path("evaluation.json")).parent
        work = stage_work(parsed, stop, folder, "evaluate", logs)
        result = evaluate(
            Context(
                load_model(
                    parsed.student or base.student,
                    dtype=forward_dtype(settings),
                    mesh=stage_mesh(parsed),
                ),
                settings,
                work,
                heldout=parsed.heldout or base.data.heldout,
                num_heldout=rows_wanted(parsed, parsed.num_heldout, "num_heldout"),
                judge=base.judge,
                reference=base.data.reference,
                num_reference=base.data.num_reference,
            )
        )
        if out:
            work.file("evaluation.json").replace(out)
            work.file("metrics.jsonl").replace(out.with_suffix(".metrics.jsonl"))
            if not any(folder.iterdir()):
                folder.rmdir()
    for name in settings.evaluations:
        if skipped := result[name].get("skipped"):
            print(f"{name}: skipped {skipped}")
    print(f"{evaluated(result)}  ({report_cost(work)})")
