"""Comparing two run directories byte for byte, apart from times."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from montessori_jax.models.sources import load_model
from montessori_jax.training.checkpoints import load_student, read_about

# Seconds, attempts and what is made of them (figures too); the lock; Orbax's own files, compared by
# content.
TIMES = {"costs.jsonl", "summary.json", "report.md", "report.html", ".lock"}
TIMED_KEYS = {"tokens_per_second", "programs", "steps_run"}


def artifacts(run: Path, *places: Path) -> dict[str, bytes]:
    """Every file of a run but its times, by its name within the run.

    ``places`` are other folders that the run was in before.
    """
    found = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run)
        if path.is_dir() or path.name in TIMES or {"state", "figures"} & set(name.parts[:-1]):
            continue
        content = path.read_bytes()
        if path.name == "metrics.jsonl":
            content = json.dumps([_untimed(json.loads(line)) for line in content.splitlines()])
            content = content.encode()
        # Two runs differ in their own path, wherever it is written down.
        for place in (run, *places):
            content = content.replace(str(place).encode(), b"RUN")
        found[str(name)] = content
    return found


def _untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMED_KEYS}


def assert_same_students(first: Path, second: Path) -> None:
    """The warm students of two runs are equal to the bit."""
    states = []
    for run in (first, second):
        folder = run / "iteration-1" / "warmup" / "state"
        notes = read_about(folder)
        assert notes is not None
        model = load_model(notes["about"]["model"]).model
        states.append(load_student(folder, model).state)
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, other)


def assert_same_runs(first: Path, second: Path) -> None:
    """Both runs left the same files with the same bytes."""
    one, other = artifacts(first), artifacts(second)
    assert one.keys() == other.keys()
    differing = [name for name in one if one[name] != other[name]]
    assert differing == []
    assert_same_students(first, second)
