"""How many programs XLA compiles: every new shape is one more, and seconds more."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass
class Programs:
    """What was compiled, or read from the cache on disk, so far: how often and in how long."""

    count: int = 0
    seconds: float = 0.0


@contextmanager
def counted_programs() -> Iterator[Programs]:
    """Counts the programs that this process compiles while the block runs."""
    found = Programs()

    def add(event: str, duration_secs: float, **about: Any) -> None:
        if event == COMPILED:
            found.count += 1
            found.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(add)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(add)
