"""`montessori report`."""

import argparse
from typing import Any

from montessori_jax.commands.arguments import add_command
from montessori_jax.stopping import Stop


def add_report(commands: Any) -> None:
    """Declare ``report``."""
    parser = add_command(commands, "report", "The table of a run, finished or not.", _report)
    parser.add_argument("run_dir", nargs="+", metavar="RUN", help="run directories")


def _report(parsed: argparse.Namespace, stop: Stop) -> None:
    from montessori_jax.report.summary import summarise
    from montessori_jax.report.table import render
    from montessori_jax.runs import RunDirectory

    for path in parsed.run_dir:
        print(render(summarise(RunDirectory.existing(path))))
