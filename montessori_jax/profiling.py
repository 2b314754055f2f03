"""Traces of a few steps for TensorBoard or Perfetto: what ``--profile DIR`` asks for."""

from collections.abc import Callable
from pathlib import Path

import jax


class Profile:
    """Traces parts ``first`` to ``last`` of some work, or its last ones where it has fewer.

    Used as a context manager around the work: `begin` before its first part, `passed` after each.
    The first parts are left out since they compile.

    Args:
        folder: where the trace goes (``plugins/profile/TIME/*.xplane.pb``); None traces nothing.
        first: the first part that is traced, from 1.
        last: the last one.
    """

    def __init__(self, folder: Path | None, first: int, last: int):
        self.folder, self.first, self.last = folder, first, last
        self._done: int | None = None
        self._tracing = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: object) -> None:
        self._trace(False)

    def begin(self, parts: int) -> None:
        """So many parts are ahead."""
        self._done = 0
        self.first = min(self.first, parts)
        self._trace(self.first == 1)

    def passed(self) -> None:
        """One more part is done, on the device as well."""
        assert self._done is not None, "begin comes first"
        self._done += 1
        if self._done == self.last:
            self._trace(False)
        elif self._done == self.first - 1:
            self._trace(True)

    def along(self, reach: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """``reach(steps done, steps in all)``, whose first call is before the first step."""

        def both(done: int, total: int) -> None:
            reach(done, total)
            if self._done is None:
                self.begin(total - done)
            else:
                self.passed()

        return both

    def _trace(self, on: bool) -> None:
        if self.folder is None or on == self._tracing:
            return
        if on:
            jax.profiler.start_trace(self.folder)
        else:
            jax.profiler.stop_trace()
        self._tracing = on
