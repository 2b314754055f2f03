r"""The plans of the paper's configs, as pages: ``make plans`` writes docs/plans/.

    python -m benchmarks.plans                                   # all: hours of compiling
    python -m benchmarks.plans --config tinyllama_1b --target v5e:4x4
    python -m benchmarks.plans --config main/llama3_8b/self_reward_1 ablations/signal_judge \
        --target v5p:2x2x1                                       # these are made by name alone

A page a config and target; one that is there is made again. Needs montessori-jax[tpu-plan].
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks.record import ROOT, packages
from montessori_jax.config_file import load_run_config
from montessori_jax.errors import UserError
from montessori_jax.plan.estimate import MFU
from montessori_jax.plan.plan import make_plan
from montessori_jax.plan.report import about, ending, heading
from montessori_jax.plan.targets import parse_target

PAGES = ROOT / "docs" / "plans"
PAPER = ROOT / "configs" / "paper"
CONFIGS = sorted(path.stem for path in PAPER.glob("*.yaml"))
NAMED = sorted(str(path.relative_to(PAPER).with_suffix("")) for path in PAPER.rglob("*.yaml"))
# Splits at which there is room: a host's own chips hold a teacher of 8 billion parameters twice, as
# it was loaded and as it decodes, split by mesh.tensor alone.
TARGETS = {
    "v5e:4x4": ["mesh.fsdp=2", "mesh.tensor=4"],
    "v5p:2x2x1": ["mesh.fsdp=4"],
    "v6e:4x4": ["mesh.fsdp=4", "mesh.tensor=4"],
}


def page(config: str, target: str) -> Path:
    """Where the plan of a config for a target is; a config in a folder has its names joined."""
    return PAGES / f"{config.replace('/', '-')}-{target.replace(':', '-').replace('*', '-by-')}.md"


def write(config: str, target: str) -> None:
    """Compile a config for a target, and write its page; what goes wrong is on the page."""
    overrides = TARGETS[target]
    file = f"configs/paper/{config}.yaml"
    command = f"montessori plan {file} --target {target} --quick {' '.join(overrides)}"
    lines = []
    try:
        plan = make_plan(
            load_run_config(ROOT / file, overrides),
            parse_target(target),
            quick=True,
            told=lambda one: print(one.program.stage, one.program.name, one.seconds, flush=True),
        )
        lines += list(heading(plan))
        for one in plan.compiled:
            lines += ["", *about(one, plan, MFU)]
        lines += ["", *ending(plan, MFU, None)]
    except UserError as error:
        lines.append(f"error: {error}")
    known = packages()
    versions = ", ".join(f"{name} {known[name]}" for name in ("jax", "libtpu") if name in known)
    PAGES.mkdir(parents=True, exist_ok=True)
    text = "\n".join(
        [f"# {config} on {target}", "", "```", command, "```", "",
         f"Compiled with {versions}; nothing ran.", "", "```text", *lines, "```", ""]
    )  # fmt: skip
    page(config, target).write_text(text, encoding="utf-8")


def index() -> Iterator[str]:
    """The page that lists the others."""
    yield "# Plans"
    yield ""
    yield "What `montessori plan` says of the paper's configs, by `make plans`: compiled by the TPU"
    yield "compiler for chips that were not there. Times are arithmetic, not measurements."
    yield f"Of {len(NAMED)} configs for {len(TARGETS)} targets, these have been made; `make plans`"
    yield f"makes those of {len(CONFIGS)}; the tables' rows and the ablations are made by name."
    yield ""
    for config in NAMED:
        for target in TARGETS:
            file = page(config, target)
            if file.exists():
                text = file.read_text(encoding="utf-8")
                fits = "does not fit" if "DOES NOT FIT" in text or "error:" in text else "fits"
                yield f"- [{config} on {target}]({file.name}): {fits}"


def main() -> None:
    """Write the pages asked for, and the index."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", nargs="+", choices=NAMED, default=CONFIGS, metavar="NAME")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=[*TARGETS])
    parsed = parser.parse_args()
    for config in parsed.config:
        for target in parsed.target:
            write(config, target)
            (PAGES / "index.md").write_text("\n".join([*index(), ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
