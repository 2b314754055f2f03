r"""The plans of the paper's configs: ``make plans`` writes docs/plans/.

    python -m benchmarks.plans                                   # all: about half an hour
    python -m benchmarks.plans --config tinyllama_1b --target v5e:4x4
    python -m benchmarks.plans --config main/llama3_8b/self_reward_1 --target v5p:2x2x1 --pages

The five students have a page for each target; the tables' rows, the ablations and the figure have a
line in ``rows.md``, and a page with ``--pages``. What the compiler found is kept in ``build/``: the
rows share most programs, and a run that was stopped goes on. Needs montessori-jax[tpu-plan].
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks.plans_known import Known
from benchmarks.record import ROOT, packages
from montessori_jax.config_file import load_run_config
from montessori_jax.errors import UserError
from montessori_jax.plan.estimate import MFU
from montessori_jax.plan.plan import Plan, make_plan
from montessori_jax.plan.report import about, ending, heading, hours
from montessori_jax.plan.targets import GIB, parse_target

PAGES = ROOT / "docs" / "plans"
BUILD = ROOT / "build" / "plans"
PAPER = ROOT / "configs" / "paper"
STUDENTS = sorted(path.stem for path in PAPER.glob("*.yaml"))
NAMED = sorted(str(path.relative_to(PAPER).with_suffix("")) for path in PAPER.rglob("*.yaml"))
# Splits at which there is room: a host's own chips hold a teacher of 8 billion parameters twice, as
# it was loaded and as it decodes, split by mesh.tensor alone.
TARGETS = {
    "v5e:4x4": ["mesh.fsdp=2", "mesh.tensor=4"],
    "v5p:2x2x1": ["mesh.fsdp=4"],
    "v6e:4x4": ["mesh.fsdp=4", "mesh.tensor=4"],
}


def versions() -> dict[str, str]:
    """Of what makes and compiles the programs."""
    known = packages()
    return {name: known[name] for name in ("jax", "libtpu") if name in known}


def file_name(config: str, target: str) -> str:
    """Of a config's page or cell for a target; a config in a folder has its names joined."""
    return f"{config.replace('/', '-')}-{target.replace(':', '-').replace('*', '-by-')}"


def command(config: str, target: str, search: bool = False) -> str:
    """What a user types for the same plan."""
    options = "--largest --quick" if search else "--quick"
    overrides = " ".join(TARGETS[target])
    return f"montessori plan configs/paper/{config}.yaml --target {target} {options} {overrides}"


def plan_of(config: str, target: str, known: Known, search: bool = False) -> Plan:
    """Compile a config's programs for a target, those that are not known; ``search`` is for the
    largest settings too."""
    return make_plan(
        load_run_config(PAPER / f"{config}.yaml", TARGETS[target]),
        parse_target(target),
        quick=True,
        search=search,
        told=lambda one: print(" ", one.program.stage, one.program.name, flush=True),
        known=known,
    )


def page(plan: Plan | UserError, config: str, target: str, search: bool = False) -> str:
    """The whole plan, or what went wrong."""
    lines = [f"error: {plan}"]
    if isinstance(plan, Plan):
        lines = list(heading(plan))
        for one in plan.compiled:
            lines += ["", *about(one, plan, MFU)]
        lines += ["", *ending(plan, MFU, None)]
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    head = [f"# {config} on {target}", "", "```", command(config, target, search), "```", ""]
    return "\n".join(
        [*head, f"Compiled with {made}; nothing ran.", "", "```text", *lines, "```", ""]
    )


def cell(plan: Plan | UserError) -> dict[str, Any]:
    """What a table says of a plan: whether it fits, its fullest program, hours of an iteration."""
    if isinstance(plan, UserError):
        return {"fits": False, "error": str(plan)}
    found: dict[str, Any] = {"fits": not plan.too_large(), "hours": sum(hours(plan, MFU).values())}
    if plan.compiled:
        fullest = max(plan.compiled, key=lambda one: one.needed)
        found["gib"] = fullest.needed / GIB
        found["program"] = f"{fullest.program.stage}, {fullest.program.name}"
    return found


def shown(found: dict[str, Any] | None) -> str:
    """A cell as text."""
    if found is None:
        return ""
    if "error" in found:
        return f"error: {found['error']}"
    full = f", {found['gib']:.1f} GiB ({found['program']})" if "gib" in found else ""
    return f"{'fits' if found['fits'] else '**does not fit**'}{full}, {found['hours']:.2f} h"


def table(names: list[str], cells: dict[tuple[str, str], dict[str, Any]]) -> Iterator[str]:
    """Some configs by the targets; those with a page link to it."""
    yield f"| config | {' | '.join(TARGETS)} |"
    yield f"|{' --- |' * (len(TARGETS) + 1)}"
    for name in names:
        row = []
        for target in TARGETS:
            text, file = shown(cells.get((name, target))), f"{file_name(name, target)}.md"
            row.append(f"[{text}]({file})" if text and (PAGES / file).exists() else text)
        if any(row):
            yield f"| {name} | {' | '.join(row)} |"


def index(cells: dict[tuple[str, str], dict[str, Any]]) -> Iterator[str]:
    """The page that has all of them, a line each."""
    splits = "; ".join(f"{target} by {' '.join(split)}" for target, split in TARGETS.items())
    yield "# Plans"
    yield ""
    yield "What `montessori plan` says of the paper's configs, by `make plans`: compiled by the TPU"
    yield "compiler for chips that were not there. A cell has whether every stage fits, the bytes a"
    yield "chip has to have for the fullest program, and the hours of an iteration by arithmetic:"
    yield "nothing is measured."
    yield f"Meshes: {splits}. A row whose teacher is behind an address has no program for it."
    yield ""
    yield "## The students of the paper"
    yield ""
    yield from table(STUDENTS, cells)
    yield ""
    yield "## Rows of its tables, ablations and figures"
    yield ""
    yield from table([name for name in NAMED if name not in STUDENTS], cells)


def kept_cells() -> dict[tuple[str, str], dict[str, Any]]:
    """Cells that were made by now."""
    file = PAGES / "cells.json"
    made = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    every = [(name, target) for name in NAMED for target in TARGETS]
    return {at: made[file_name(*at)] for at in every if file_name(*at) in made}


def main() -> None:
    """Write what is asked for, and the index."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", nargs="+", choices=NAMED, default=NAMED, metavar="NAME")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=[*TARGETS])
    parser.add_argument("--pages", action="store_true", help="a page for every config, rows too")
    parser.add_argument(
        "--largest", action="store_true", help="search for the largest settings: minutes a page"
    )
    parsed = parser.parse_args()
    PAGES.mkdir(parents=True, exist_ok=True)
    known = Known(BUILD / f"{'-'.join(versions().values())}.jsonl")
    cells = kept_cells()
    # The students first: the rows share their programs.
    for config in sorted(parsed.config, key=lambda name: "/" in name):
        for target in parsed.target:
            print(config, target, flush=True)
            jax.clear_caches()  # a process keeps what it traced: 14 GiB for all of them
            plan: Plan | UserError
            try:
                plan = plan_of(config, target, known, parsed.largest)
            except UserError as error:
                plan = error
            if parsed.pages or config in STUDENTS:
                text = page(plan, config, target, parsed.largest)
                (PAGES / f"{file_name(config, target)}.md").write_text(text, encoding="utf-8")
            cells[config, target] = cell(plan)
            kept = {file_name(*at): found for at, found in cells.items()}
            (PAGES / "cells.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            (PAGES / "index.md").write_text("\n".join([*index(cells), ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
