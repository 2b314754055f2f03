"""Run a command in a process group of its own, and end the group when whoever started us is gone.

    python guard.py GRACE_SECONDS COMMAND [ARGUMENT ...]

Our standard input is a pipe that the starter holds open and never writes to. The system closes it
however the starter ends, by SIGKILL too, and that is when the group is ended: SIGTERM, then, after
the grace, SIGKILL. The group is ended as well when the command exits by itself, since a server's
workers may outlive it. Imports nothing but the standard library, so that it starts at once.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

LOOK_SECONDS = 0.25


def end_group(child: subprocess.Popen, grace: float) -> None:
    """End the child's process group, politely first."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS / 5)
    # What is left of it: workers, and a server that did not listen.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def main(grace: float, command: list[str]) -> int:
    """The command's exit status; negative signal numbers become 128 and the number."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked.append(number))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while child.poll() is None and not asked:
            readable, _, _ = select.select([0], [], [], LOOK_SECONDS)
            if readable and not os.read(0, 1024):
                break
    finally:
        end_group(child, grace)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
