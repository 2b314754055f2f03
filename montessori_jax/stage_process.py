"""One stage in a process of its own, so that the accelerator's memory comes back when it ends."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from montessori_jax.errors import Interrupted, UserError
from montessori_jax.stopping import Stop, on_signals

LOOK_SECONDS = 0.5
PR_SET_PDEATHSIG = 1  # of Linux's prctl: a signal for a process whose parent dies


def in_own_process(
    body: Callable[..., None],
    arguments: tuple[Any, ...],
    *,
    stop: Stop,
    environment: dict[str, str],
) -> None:
    """Run ``body(*arguments, stop)`` in a fresh Python and wait for it.

    Args:
        body: a module's function; it writes what it makes to disk.
        arguments: handed over by pickling.
        stop: a signal that asks us to stop is passed on.
        environment: variables that the process has besides ours.

    Raises:
        UserError, Interrupted: what ``body`` raised; a process that was killed is a `UserError`.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        process = context.Process(target=_run, args=(body, arguments, theirs, os.getpid()))
        process.start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    theirs.close()
    told = False
    try:
        while process.is_alive():
            process.join(LOOK_SECONDS)
            if stop.requested() and not told and process.is_alive():
                told = True
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid or 0, stop.signal or signal.SIGTERM)
    except BaseException:
        process.kill()
        process.join()
        raise
    _raise_failure(ours, process.exitcode, told)


def _raise_failure(ours: Connection, status: int | None, told: bool) -> None:
    try:
        kind, message = ours.recv() if ours.poll() else ("", "")
    except EOFError:
        kind, message = "", ""
    if kind == "user":
        raise UserError(message)
    if kind == "stopped":
        raise Interrupted(message)
    if told and status:  # before it could take the signal for a request
        raise Interrupted("stopped while a stage's process started")
    if status == -signal.SIGKILL:
        raise UserError(
            "a stage's process was killed, as a system that runs out of memory does: lower "
            "micro_batch or rows_per_pass; what it had written is kept, and the same command goes "
            "on from there"
        )
    if status:
        raise UserError(f"a stage's process ended with status {status}; what it printed says why")


def _run(
    body: Callable[..., None], arguments: tuple[Any, ...], theirs: Connection, parent: int
) -> None:
    if sys.platform == "linux":
        # However the parent dies, we stop too, and release its accelerator.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
    # A terminal's Ctrl-C goes to its whole group: it must reach us once, by our parent.
    os.setpgrp()
    stop = Stop()
    try:
        with on_signals(stop):
            body(*arguments, stop)
    except UserError as error:
        theirs.send(("user", str(error)))
    except (Interrupted, KeyboardInterrupt) as error:
        theirs.send(("stopped", str(error)))
