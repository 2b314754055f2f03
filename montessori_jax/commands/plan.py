"""`montessori plan`."""

import argparse
import json
from pathlib import Path
from typing import Any

from montessori_jax.commands.arguments import add_command
from montessori_jax.config_file import load_run_config
from montessori_jax.errors import UserError
from montessori_jax.stopping import Stop


def add_plan(commands: Any) -> None:
    """Declare ``plan``."""
    parser = add_command(
        commands,
        "plan",
        "Compile every stage of a YAML for chips that are not there: what fits, what they say to "
        "each other, how long it takes. Exits with 1 where a stage does not fit.",
        _plan,
        epilog="Example: montessori plan configs/paper/tinyllama_1b.yaml --target v5e:4x4 "
        "mesh.fsdp=4",
    )
    parser.add_argument("config", metavar="YAML", help="settings; see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override a setting"
    )
    parser.add_argument(
        "--target",
        required=True,
        metavar="CHIPS",
        help="v5e:4x4, v5p:2x2x1, v6e:4x4, v5e:4x4*2 (two slices), by the TPU compiler "
        "(montessori-jax[tpu-plan]); h100:8, h200:8, a100-80:8, rtx4090:1, by counting alone",
    )
    parser.add_argument(
        "--stage",
        action="append",
        metavar="NAME",
        help="only this one; again for several: generation, judging, warmup, losses, influence, "
        "dpo, bootstrap, sft, evaluation",
    )
    parser.add_argument(
        "--largest",
        action="store_true",
        help="search for the largest micro-batches, block and length: up to seven programs each",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="have the compiler try less hard: a fifth of the time, memory a few percent off",
    )
    parser.add_argument(
        "--mfu", type=_share, default=0.3, help="assumed share of the published FLOP/s (0.3)"
    )
    parser.add_argument(
        "--price", type=float, metavar="DOLLARS", help="of one chip for an hour: none is assumed"
    )
    parser.add_argument("--json", metavar="FILE", help="write all of it there")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share above 0 and up to 1")
    return value


def _plan(parsed: argparse.Namespace, stop: Stop) -> None:
    from montessori_jax.plan.plan import Plan, make_plan
    from montessori_jax.plan.report import about, as_json, ending, heading, mend
    from montessori_jax.plan.stages import GROUPS
    from montessori_jax.plan.targets import parse_target

    config = load_run_config(parsed.config, parsed.overrides)
    target = parse_target(parsed.target)

    def show(one: Any) -> None:
        print("\n".join(about(one, Plan(config, target), parsed.mfu)), flush=True)
        stop.check()

    plan = make_plan(
        config,
        target,
        stages=parsed.stage or GROUPS,
        search=parsed.largest,
        quick=parsed.quick,
        told=show,
    )
    print("\n".join([*heading(plan), *ending(plan, parsed.mfu, parsed.price)]))
    if parsed.json:
        text = json.dumps(as_json(plan, parsed.mfu, parsed.price), indent=1)
        Path(parsed.json).write_text(text + "\n", encoding="utf-8")
    large = plan.too_large()
    if large:
        more = f" (and {len(large) - 1} more above)" if len(large) > 1 else ""
        raise DoesNotFit(
            f"{target.name}: {mend(large[0], target.chip.memory, target.chips > 1)}{more}"
        )


class DoesNotFit(UserError):
    """A stage is too large for the chips that were planned for."""

    status = 1
