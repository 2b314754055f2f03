"""Metrics as JSON lines, kept consistent across a resume, and given on to a tracker."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from montessori_jax.runs import write_atomic
from montessori_jax.trackers import Sender, Tracking


class MetricsFile:
    """One JSON object a step. A step written again (after a resume) replaces what followed.

    As a context manager it ends the tracker's run with the block.

    Args:
        path: the file; its folder names the tracker's run.
        tracking: which tracker gets the rows too, each step once.
        say: told in one line if the tracker fails; the file goes on.
    """

    def __init__(
        self, path: Path, tracking: Tracking | None = None, say: Callable[[str], None] = print
    ):
        self.path = path
        self.last = -1
        if path.exists():
            whole = path.read_text(encoding="utf-8").split("\n")[:-1]
            write_atomic(path, "".join(line + "\n" for line in whole))
            if whole:
                self.last = json.loads(whole[-1])["step"]
        chosen = tracking or Tracking()
        self._sender = Sender(lambda: chosen.open(path.parent), self.last, say)

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._sender.close()

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
        self._sender.send(record)

    def read(self) -> list[dict[str, Any]]:
        """All records, in order of their steps."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
