"""What a stage is handed besides its inputs: a folder, a seed, a meter, a stop flag, bars."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from montessori_jax.costs import Meter
from montessori_jax.stopping import Stop


@dataclass(frozen=True)
class Work:
    """One stage's surroundings; stages read settings and write only inside ``folder``."""

    folder: Path
    seed: int
    meter: Meter
    stop: Stop = field(default_factory=Stop)
    say: Callable[[str], None] = print
    quiet: bool = False

    def bar(self, total: int, unit: str, label: str, done: int = 0) -> "tqdm[Any]":
        """A progress bar with rate and ETA; a line every ten seconds where no one watches."""
        watched = sys.stderr.isatty()
        return tqdm(
            total=total,
            initial=done,
            unit=unit,
            desc=label,
            disable=self.quiet,
            leave=False,
            mininterval=0.5 if watched else 10.0,
            dynamic_ncols=watched,
            ncols=None if watched else 88,
        )

    def file(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name
