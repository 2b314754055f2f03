"""Stopping on request: the first signal finishes the step at hand, the second stops at once."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from montessori_jax.errors import Interrupted


class Stop:
    """Whether a stop was asked for, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def requested(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Raise `Interrupted` if a stop was asked for."""
        if self.requested():
            raise Interrupted("stopped on request")


@contextlib.contextmanager
def on_signals(stop: Stop) -> Iterator[Stop]:
    """SIGINT and SIGTERM set ``stop``; a second one raises `KeyboardInterrupt` where it is."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested():
            raise KeyboardInterrupt
        stop.signal = number
        print("\nstopping after the step at hand (again: at once)", file=sys.stderr, flush=True)

    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, handle) for kind in kinds}
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
