"""Metrics as JSON lines, kept consistent across a resume."""

import json
from pathlib import Path
from typing import Any

from montessori_jax.runs import write_atomic


class MetricsFile:
    """One JSON object a step. A step written again (after a resume) replaces what followed."""

    def __init__(self, path: Path):
        self.path = path
        self.last = -1
        if path.exists():
            whole = path.read_text(encoding="utf-8").split("\n")[:-1]
            write_atomic(path, "".join(line + "\n" for line in whole))
            if whole:
                self.last = json.loads(whole[-1])["step"]

    def write(self, record: dict[str, Any]) -> None:
        """Append a record that has a ``step``."""
        step = record["step"]
        if step <= self.last:
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] < step]
            write_atomic(self.path, "".join(line + "\n" for line in kept))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.last = step

    def read(self) -> list[dict[str, Any]]:
        """All records, in order of their steps."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
