"""`montessori run`."""

import argparse
from pathlib import Path
from typing import Any

from montessori_jax.commands.arguments import add_command, add_profile
from montessori_jax.config import as_dict
from montessori_jax.config_file import load_run_config
from montessori_jax.stopping import Stop


def add_run(commands: Any) -> None:
    """Declare ``run``."""
    parser = add_command(
        commands,
        "run",
        "The whole loop from one YAML; the same command resumes it.",
        _run,
        epilog="Example: montessori run configs/quickstart.yaml seed=1 run_dir=runs/second",
    )
    parser.add_argument("config", metavar="YAML", help="settings; see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override a setting"
    )
    parser.add_argument("--run-dir", help="the same as run_dir=... ")
    add_profile(parser)
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved settings and stop"
    )


def _run(parsed: argparse.Namespace, stop: Stop) -> None:
    import yaml

    assignments = list(parsed.overrides)
    if parsed.run_dir:
        assignments.append(f"run_dir={parsed.run_dir}")
    config = load_run_config(parsed.config, assignments)
    if parsed.print_config:
        print(yaml.safe_dump(as_dict(config), sort_keys=False), end="")
        return
    from montessori_jax.pipeline import run

    run(
        config,
        say=lambda text: print(text, flush=True),
        stop=stop,
        quiet=parsed.quiet,
        profile=Path(parsed.profile) if parsed.profile else None,
    )
