"""What the page reads of a run's folder, finished or not."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from montessori_jax.config_file import read_yaml
from montessori_jax.report.measured import NAMES as MEASURED
from montessori_jax.report.summary import Summary, summarise
from montessori_jax.runs import MARKER, RunDirectory, flatten
from montessori_jax.versions import NAME as VERSIONS
from montessori_jax.versions import recorded_versions

READ = frozenset(
    ["config.yaml", "costs.jsonl", "inputs.json", VERSIONS, MARKER, "scores.parquet",
     "chunks.jsonl", "probing.parquet", "data.parquet", "prompts.jsonl", "tokenizer.json"]
)  # fmt: skip


def is_read(name: str) -> bool:
    """Whether the page reads the files of a run that are called so."""
    return name in READ or name.startswith(MEASURED)


@dataclass(frozen=True)
class Iteration:
    """One time round the loop: its folder, and the result of each stage, None while not done."""

    number: int
    path: Path
    stages: dict[str, dict[str, Any] | None]

    def result(self, stage: str) -> dict[str, Any]:
        """What a stage reported; {} where it has not."""
        return self.stages.get(stage) or {}

    @property
    def datasets(self) -> dict[str, Path]:
        """Data sets of instructions and responses by stage, those of curves apart."""
        main = (stage for stage in self.stages if "-curve-" not in stage)
        files = {stage: self.path / stage / "data.parquet" for stage in main}
        return {stage: file for stage, file in files.items() if _has_texts(file)}


def _has_texts(file: Path) -> bool:
    import pyarrow.parquet as pq

    return file.exists() and {"instruction", "response"} <= set(pq.read_schema(file).names)


@dataclass(frozen=True)
class Run:
    """A run as the page shows it; ``label`` tells it from the others on the page."""

    label: str
    path: Path
    summary: Summary
    config: dict[str, Any]
    inputs: dict[str, str]
    versions: list[dict[str, str]]
    iterations: tuple[Iteration, ...]

    @property
    def method(self) -> str:
        """With what sets it apart from the method as it is."""
        return str(self.summary["described"])

    @property
    def missing(self) -> list[str]:
        """What is not done, begun or not, in words; of every method alike."""
        found = []
        for iteration in self.iterations:
            place, stages = f"iteration {iteration.number}", iteration.stages
            found += [f"{place}: {stage} is not done" for stage, of in stages.items() if of is None]
            if not any(stage.startswith("evaluate") for stage in stages):
                found.append(f"{place}: no student is evaluated yet")
                continue
            students = [stage.partition("-")[2] for stage in stages if stage.startswith("train-")]
            wanted = [f"evaluate-{name}" for name in students]
            found += [f"{place}: {one} has not begun" for one in wanted if one not in stages]
        if (self.path / "summary.json").exists():  # it has ended; some methods do not go round
            return found
        asked = int(self.config.get("iterations") or len(self.iterations))
        numbers = {iteration.number for iteration in self.iterations}
        later = [n for n in range(1, asked + 1) if n not in numbers]
        return found + [f"iteration {number} has not begun" for number in later]


def read_run(path: Path, label: str) -> Run:
    """Everything but the large tables of a run.

    Raises:
        UserError: no run there.
    """
    directory = RunDirectory.existing(path)
    summary = summarise(directory)
    inputs = path / "inputs.json"
    iterations = tuple(
        Iteration(one["iteration"], path / f"iteration-{one['iteration']}", one["stages"])
        for one in summary["iterations"]
    )
    return Run(
        label=label,
        path=path,
        summary=summary,
        config=flatten(read_yaml(path / "config.yaml")),
        inputs=json.loads(inputs.read_text(encoding="utf-8")) if inputs.exists() else {},
        versions=recorded_versions(path),
        iterations=iterations,
    )


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    length = 1
    while len({one[-length:] for one in parts}) < len(set(parts)):
        length += 1
    return ["/".join(one[-length:]) for one in parts]


def iterations_of(runs: Sequence[Run]) -> Iterator[tuple[Run, Iteration, str]]:
    """Every iteration with the name that figures give it."""
    several = len(runs) > 1
    for run in runs:
        for iteration in run.iterations:
            name = f"iteration {iteration.number}"
            yield run, iteration, f"{run.label}, {name}" if several else name
