"""What a stage is handed besides its inputs: a folder, a seed, a meter, a stop flag, bars."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etils import epath
from tqdm import tqdm

from montessori_jax import cluster
from montessori_jax.costs import Meter
from montessori_jax.errors import Interrupted
from montessori_jax.metrics import MetricsFile
from montessori_jax.profiling import Profile
from montessori_jax.stopping import Stop
from montessori_jax.trackers import Tracking
from montessori_jax.training import places

# Training states of a stage in progress: a name that no user's folder has.
CHECKPOINTS = ".montessori-checkpoints"
# The warmed-up student in its stage's folder.
STATE = "state"
# States kept along a student's training, in its stage's folder.
STATES = "states"
# Of a training stage, those that are profiled: the first ones compile.
PROFILED_STEPS = (3, 5)
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
        cluster.moved()
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
    """One stage's surroundings; stages read settings and write only inside ``folder``.

    In a job of several processes ``folder`` is the process's own and goes away where it is not the
    leader.

    Attributes:
        traces: where a profile of the stage goes, if one is asked for.
        kept: the stage's folder on this process's disk that stays; None: ``folder``.
        store: where processes that share no disk write training states together.
    """

    folder: Path
    seed: int
    meter: Meter
    stop: Stop = field(default_factory=Stop)
    say: Callable[[str], None] = print
    quiet: bool = False
    tracking: Tracking = field(default_factory=Tracking)
    traces: Path | None = None
    kept: Path | None = None
    store: epath.Path | None = None

    @property
    def journals(self) -> Path:
        """The folder of journals that all processes of a job write."""
        return self.kept or self.folder

    @property
    def states(self) -> epath.Path:
        """The folder of training states, which all processes of a job write and read together."""
        return self.store or epath.Path(self.journals)

    @property
    def checkpoints(self) -> epath.Path:
        """Where the training states of a stage in progress are."""
        return self.states / CHECKPOINTS

    def remove_checkpoints(self) -> None:
        """Remove them, once no process needs them any more: what they led to is written."""
        cluster.barrier("a stage's result")
        if cluster.is_leader():
            places.remove(self.checkpoints)

    def metrics(self) -> MetricsFile:
        """The stage's ``metrics.jsonl``, whose rows go to the run's tracker too."""
        return MetricsFile(self.file("metrics.jsonl"), self.tracking, self.say)

    def bar(self, total: int, unit: str, label: str, done: int = 0) -> Progress:
        """Progress of one part of the stage."""
        return Progress(total, unit, label, done, self.quiet)

    def profile(self, first: int, last: int) -> Profile:
        """A trace of parts ``first`` to ``last`` of the stage, if one is asked for."""
        return Profile(self.traces, first, last)

    def check_stop(self) -> None:
        """Raise `Interrupted` in all processes if any of them was asked to stop."""
        if cluster.count() == 1:
            self.stop.check()
        elif cluster.any_of(self.stop.requested()):
            raise Interrupted("stopped on request")

    def file(self, name: str) -> Path:
        """A path inside the stage's folder, which is made if need be."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name
