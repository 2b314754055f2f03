"""What the tests of several launchers use."""

import os
import time
from collections.abc import Callable
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent.parent.parent / "launch"


def environment(**more: object) -> dict[str, str]:
    """This process's variables without those that the launchers choose, and ``more``."""
    chosen = ("JAX_", "MONTESSORI_", "XLA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    return kept | {name: str(value) for name, value in more.items()}


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_started(clone: Path) -> bool:
    return (clone / "said").exists() and bool((clone / "said").read_text().strip())
