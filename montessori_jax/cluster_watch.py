"""A thread that says that this process of a job lives, and ends it where the job no longer does."""

import contextlib
import json
import os
import sys
import threading
import time
from typing import Any, NamedTuple

import jax

from montessori_jax.errors import LostProcess

STOP = "montessori-stop"
LOOK_SECONDS = 1.0  # between two looks at the others
AGAIN = "start the job again: it goes on from the last checkpoint"


class Limits(NamedTuple):
    """How long to wait, in seconds, and the variables that say so."""

    heartbeat: str
    silence: int
    stall: str
    stalled: int


class Watch(threading.Thread):
    """Ends this process with one line where another one is gone, or where nothing gets on.

    A collective operation with a process that is gone, or that never comes to it, may wait for
    ever: nothing else ends it.

    Attributes:
        stopping: whether any process was asked to stop.
        moves: how often this process has got on; whoever works counts it up.
    """

    def __init__(self, index: int, count: int, client: Any, limits: Limits):
        super().__init__(daemon=True, name="cluster-watch")
        self.stopping, self.moves = False, 0
        self._index, self._count, self._client, self._limits = index, count, client, limits
        self._over = threading.Event()
        self._others = [one for one in range(count) if one != index]

    def end(self) -> None:
        """Stop watching: this process has done its part."""
        self._over.set()

    def ask_to_stop(self) -> None:
        """Have all processes know that one was asked to stop."""
        self.stopping = True
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(STOP, "1", allow_overwrite=True)

    def tell(self, failure: str, status: int) -> None:
        """Have the others end too, and wait until they have seen it."""
        self._over.set()
        with contextlib.suppress(Exception):  # they may have gone first
            told = json.dumps([failure, status])
            self._client.key_value_set(f"montessori-failed-{self._index}", told)
            if self._index == 0:  # who keeps what was told
                time.sleep(3 * LOOK_SECONDS)

    def run(self) -> None:
        """Look every so often until the end."""
        beats: dict[int, tuple[str, float]] = {}
        moves: dict[int, int] = {}
        beat, last, since = 0, dict[int, int](), time.monotonic()
        while not self._over.wait(LOOK_SECONDS):
            beat += 1
            mine = self.moves
            try:
                self._client.key_value_set(
                    f"montessori-alive-{self._index}", f"{beat} {mine}", allow_overwrite=True
                )
                for one in self._others:
                    told = self._read(f"montessori-failed-{one}")
                    if told is not None:
                        failure, status = json.loads(told)
                        self._leave(f"process {one} of {self._count} failed: {failure}", status)
                    self.stopping = self.stopping or self._read(STOP) is not None
                    alive = self._read(f"montessori-alive-{one}") or "0 0"
                    moves[one] = int(alive.split()[1])
                    known, heard = beats.setdefault(one, (alive, time.monotonic()))
                    if alive != known:
                        beats[one] = alive, time.monotonic()
                    elif time.monotonic() - heard > self._limits.silence:
                        self._leave(
                            f"process {one} of {self._count} has said nothing for "
                            f"{self._limits.silence} s: its host died or hangs"
                        )
            except jax.errors.JaxRuntimeError as error:
                self._leave(f"process 0 of {self._count} has gone ({brief(error)})")
            moves[self._index] = mine
            # One that waits for another gets on by what that one does.
            if moves != last:
                last, since = dict(moves), time.monotonic()
            if 0 < self._limits.stalled < time.monotonic() - since:
                self._stalled(moves)

    def _stalled(self, moves: dict[int, int]) -> None:
        """Say which process keeps the others waiting, by what each has done."""
        least = min(moves.values())
        behind = [str(one) for one, made in sorted(moves.items()) if made == least]
        which = (
            "all of them stand at the same place"
            if len(behind) == len(moves)
            else f"process {' and '.join(behind)} of {self._count} is behind: look at its log"
        )
        why = (
            f"nothing has got on for {self._limits.stalled} s; {which} "
            f"({self._limits.stall}, 0 for ever, is how long one part of a stage may take)"
        )
        if not self._over.is_set():
            self.tell(why, LostProcess.status)
            end_process(f"{why}; {AGAIN}")

    def _read(self, key: str) -> str | None:
        try:
            return self._client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None

    def _leave(self, why: str, status: int = LostProcess.status) -> None:
        if self._over.is_set():
            return
        if status == LostProcess.status:
            why += f"; {AGAIN} ({self._limits.heartbeat} is how long to wait for a silent host)"
        end_process(why, status)


def end_process(why: str, status: int = LostProcess.status) -> None:
    """End this process at once: its main thread may be inside what never ends."""
    print(f"montessori: error: {why}", file=sys.stderr, flush=True)
    os._exit(status)


def brief(error: Exception) -> str:
    """The first line of an error, and no more than is read."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
