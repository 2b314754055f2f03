"""Metrics as JSON lines, kept consistent across a resume, and given on to trackers."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from montessori_jax.runs import write_atomic
from montessori_jax.trackers import Sender, Tracking


class MetricsFile:
    """One JSON object a step. A step written again (after a resume) replaces what followed.

    As a context manager it ends the trackers' runs with the block.

    Args:
        path: the file; its folder names the trackers' runs.
        tracking: which trackers get the rows too, each step once.
        say: told in one line if a tracker fails; the file and the others go on.
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
        self._senders = [
            Sender(kind, partial(chosen.open, kind, path.parent), self.last, say)
            for kind in chosen.kinds
        ]

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *error: object) -> None:
        for sender in self._senders:
            sender.close()

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
        for sender in self._senders:
            sender.send(record)

    def read(self) -> list[dict[str, Any]]:
        """All records, in order of their steps."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
