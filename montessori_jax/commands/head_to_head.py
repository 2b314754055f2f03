"""`montessori head-to-head`."""

import argparse
from pathlib import Path
from typing import Any

from montessori_jax.commands.arguments import (
    add_stage_command,
    report_cost,
    run_config,
    stage_mesh,
    stage_work,
)
from montessori_jax.config import AnswerConfig, HeadToHeadConfig, JudgeConfig
from montessori_jax.flags import add_settings, settings_from
from montessori_jax.stopping import Stop


def add_head_to_head(commands: Any) -> None:
    """Declare ``head-to-head``."""
    parser = add_stage_command(
        commands,
        "head-to-head",
        "Win rates between students of runs, models or files of answers, by a judge.",
        _head_to_head,
        epilog="Example: montessori head-to-head --contestants first=runs/a:1 second=runs/a:2 "
        "base=runs/a:1:untuned --judge-base-url http://127.0.0.1:8000/v1 --judge-model judge "
        "--num-prompts 100 --out runs/matrix",
    )
    parser.add_argument(
        "--contestants",
        required=True,
        nargs="+",
        metavar="[NAME=]WHO",
        help="two or more: RUN[:iteration[:tuned|untuned|untrained]], a model, or a file of "
        "answers (.jsonl, .json, .parquet)",
    )
    parser.add_argument(
        "--out", required=True, help="folder for head_to_head.json, its table and the journals"
    )
    add_settings(parser, HeadToHeadConfig, "comparison", skip=("answers",))
    add_settings(parser, AnswerConfig, "answers", prefix="answer-")
    add_settings(parser, JudgeConfig, "judge", prefix="judge-", skip=("prices",))


def _head_to_head(parsed: argparse.Namespace, stop: Stop) -> None:
    from montessori_jax.config import as_dict
    from montessori_jax.evaluation.contestants import distinct
    from montessori_jax.stages.head_to_head import head_to_head, render

    answers = settings_from(parsed, AnswerConfig, {}, prefix="answer-")
    settings = settings_from(
        parsed, HeadToHeadConfig, {"answers": as_dict(answers)}, skip=("answers",)
    )
    judging = settings_from(
        parsed, JudgeConfig, as_dict(run_config(parsed).judge), prefix="judge-", skip=("prices",)
    )
    work = stage_work(parsed, stop, Path(parsed.out), "head-to-head")
    result = head_to_head(
        distinct(parsed.contestants), settings, judging, work, mesh=stage_mesh(parsed)
    )
    print(f"{render(result)}\n{parsed.out}  ({report_cost(work)})")
