"""`montessori`: one command, a subcommand a stage, each useful alone on the user's own files."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from montessori_jax import __version__
from montessori_jax.commands.cross_student import add_cross_student
from montessori_jax.commands.dpo import add_dpo
from montessori_jax.commands.evaluate import add_evaluate
from montessori_jax.commands.generate import add_generate
from montessori_jax.commands.head_to_head import add_head_to_head
from montessori_jax.commands.influence import add_influence
from montessori_jax.commands.plan import add_plan
from montessori_jax.commands.preferences import add_preferences
from montessori_jax.commands.report import add_report
from montessori_jax.commands.run import add_run
from montessori_jax.commands.select import add_select
from montessori_jax.commands.serve import add_serve
from montessori_jax.commands.sft import add_sft
from montessori_jax.errors import Interrupted, UserError, status_of
from montessori_jax.stopping import Stop, on_signals

# In the order in which --help lists them.
COMMANDS = (
    add_run,
    add_plan,
    add_generate,
    add_sft,
    add_influence,
    add_select,
    add_preferences,
    add_dpo,
    add_evaluate,
    add_head_to_head,
    add_cross_student,
    add_report,
    add_serve,
)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an argument; the usage is for ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help shows what it takes\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exits with 0, a `UserError`'s status (2, 75), 130 (Ctrl-C) or 143 (SIGTERM)."""
    status = run(sys.argv[1:] if arguments is None else arguments)
    if "montessori_jax.cluster" in sys.modules:
        from montessori_jax import cluster

        if cluster.count() > 1:
            # All have parted; JAX's exit handler would wait for those that are gone, or die.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Parse and run; the exit status."""
    _quiet_libraries()
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    # Overrides may follow flags, where argparse no longer looks for them.
    if any(one.startswith("-") or "=" not in one for one in rest) or (
        rest and not hasattr(parsed, "overrides")
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    stop = Stop()
    try:
        from montessori_jax import cluster
        from montessori_jax.devices import cache_programs

        cache_programs()
        with on_signals(stop), cluster.joined():
            parsed.command(parsed, stop)
    except UserError as error:
        print(f"montessori: error: {error}", file=sys.stderr)
        return error.status
    except (Interrupted, KeyboardInterrupt):
        print("montessori: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + (stop.signal or signal.SIGINT)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"montessori: error: {where}{error.strerror or error}", file=sys.stderr)
        return status_of(error)
    return 0


def _quiet_libraries() -> None:
    # Said once by a library at import, and of no use here: PyTorch is for tests alone.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="montessori",
        description="Synthetic instruction data made for your student model "
        "(Montessori-Instruct, arXiv 2410.14208).",
        epilog="montessori COMMAND --help tells what a command takes.",
    )
    parser.add_argument("--version", action="version", version=f"montessori {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return parser


if __name__ == "__main__":
    main()
