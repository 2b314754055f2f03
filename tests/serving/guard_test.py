"""The guard ends a command and all that it started, however its starter ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from montessori_jax.serving import guard

# Starts a worker in its process group, writes both ids down and waits; STUBBORN ignores SIGTERM.
SERVER = """
import os, signal, subprocess, sys, time
place, stubborn, leave = sys.argv[1], sys.argv[2] == "stubborn", sys.argv[3] == "leave"
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
with open(place + ".part", "w") as file:
    file.write(f"{os.getpid()} {worker.pid}")
os.rename(place + ".part", place)
if leave:
    sys.exit(3)
time.sleep(120)
"""


def start(tmp_path: Path, stubborn: bool = False, leave: bool = False, grace: float = 0.5):
    """A guarded server; its guard's process, and the ids of the server and its worker."""
    place = tmp_path / "ids"
    words = ["stubborn" if stubborn else "meek", "leave" if leave else "stay"]
    process = subprocess.Popen(
        [sys.executable, "-I", guard.__file__, str(grace),
         sys.executable, "-c", SERVER, str(place), *words],
        stdin=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not place.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    return process, [int(one) for one in place.read_text().split()]


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_all_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(running, pids)):
        assert time.monotonic() < deadline, [pid for pid in pids if running(pid)]
        time.sleep(0.05)


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_closed_pipe_ends_the_command_and_its_workers(stubborn, tmp_path):
    process, pids = start(tmp_path, stubborn)
    assert all(map(running, pids))
    process.stdin.close()
    assert process.wait(20) == 128 + (signal.SIGKILL if stubborn else signal.SIGTERM)
    assert_all_end(pids)


def test_a_signal_ends_them_too(tmp_path):
    process, pids = start(tmp_path)
    process.terminate()
    process.wait(20)
    process.stdin.close()
    assert_all_end(pids)


def test_workers_that_a_command_leaves_behind_are_ended(tmp_path):
    process, pids = start(tmp_path, leave=True)
    assert process.wait(20) == 3
    process.stdin.close()
    assert_all_end(pids)


def test_they_end_when_the_starter_is_killed(tmp_path):
    starter = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, time; from pathlib import Path\n"
         "from tests.serving.guard_test import start\n"
         f"process, pids = start(Path({str(tmp_path)!r}))\n"
         "print(process.pid, *pids, flush=True)\ntime.sleep(120)"],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    with starter.stdout:
        pids = [int(one) for one in starter.stdout.readline().split()]
    assert len(pids) == 3
    assert all(map(running, pids))
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait()
    assert_all_end(pids)
