"""What a stage is handed besides its inputs: a folder, a seed, a meter, a stop flag, bars."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from montessori_jax.costs import Meter
from montessori_jax.metrics import MetricsFile
from montessori_jax.stopping import Stop
from montessori_jax.trackers import Tracking

# Training states of a stage in progress: a name that no user's folder has.
CHECKPOINTS = ".montessori-checkpoints"
# Where no one watches, a bar is a line every so often.
LINE_SECONDS = 15.0


class Progress:
    """A bar with rate and ETA in a terminal; elsewhere a line now and then."""

    def __init__(self, total: int, unit: str, label: str, done: int, quiet: bool):
        self.n, self.total, self.unit, self.label = done, total, unit, label
        self._first, self._began = done, time.monotonic()
        self._said = self._began
        self._quiet, self._bar = quiet, None
        if sys.stderr.isatty() and not quiet:
            self._bar = tqdm(
                total=total, initial=done, unit=f" {unit}", desc=label, leave=False,
                dynamic_ncols=True,
            )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1) -> None:
        """``count`` more are done."""
        self.reach(self.n + count)

    def reach(self, done: int, total: int | None = None) -> None:
        """``done`` of ``total`` are done, counted from the beginning."""
        step, self.n = done - self.n, done
        self.total = self.total if total is None else total
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.update(step)
            self._bar.refresh()
        elif not self._quiet and time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            print(f"  {self.label}: {self._line()}", file=sys.stderr, flush=True)

    def _line(self) -> str:
        seconds = time.monotonic() - self._began
        rate = (self.n - self._first) / seconds
        left = f", about {(self.total - self.n) / rate:.0f} s left" if rate else ""
        return f"{self.n} of {self.total} {self.unit}s in {seconds:.0f} s{left}"


@dataclass(frozen=True)
class Work:
    """One stage's surroundings; stages read settings and write only inside ``folder``."""

    folder: Path
    seed: int
    meter: Meter
    stop: Stop = field(default_factory=Stop)
    say: Callable[[str], None] = print
    quiet: bool = False
    tracking: Tracking = field(default_factory=Tracking)

    def metrics(self) -> MetricsFile:
        """The stage's ``metrics.jsonl``, whose rows go to the run's tracker too."""
        return MetricsFile(self.file("metrics.jsonl"), self.tracking, self.say)

    def bar(self, total: int, unit: str, label: str, done: int = 0) -> Progress:
        """Progress of one part of the stage."""
        return Progress(total, unit, label, done, self.quiet)

    def file(self, name: str) -> Path:
        """A path inside the stage's folder, which is made if need be."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name
