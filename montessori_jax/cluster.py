"""Several processes that compute together, one a host: how they meet, agree and part.

All of them run the same command and the same program. Process 0, the leader, writes what the run
leaves; the others write the same into a folder of their own, which goes away. Alone, nothing here
does anything, and JAX's distributed runtime is not started.
"""

import json
import os
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from montessori_jax.cluster_watch import LOOK_SECONDS, Limits, Watch, brief, end_process
from montessori_jax.errors import Interrupted, LostProcess, UserError, status_of
from montessori_jax.versions import difference, shared_versions

COORDINATOR, PROCESSES, PROCESS = (
    "MONTESSORI_COORDINATOR",
    "MONTESSORI_PROCESSES",
    "MONTESSORI_PROCESS",
)
DETECT, PATIENCE, HEARTBEAT, STALL = (
    "MONTESSORI_CLUSTER",
    "MONTESSORI_BARRIER_SECONDS",
    "MONTESSORI_HEARTBEAT_SECONDS",
    "MONTESSORI_STALL_SECONDS",
)
LONGEST = 14 * 24 * 3600  # seconds; `Watch` ends a wait for what is gone or does nothing
EXCHANGED_BYTES = 1 << 18  # of each process at a time
TOGETHER = 256  # items that processes share out at a time; what is not asked for is not made
S = TypeVar("S")
T = TypeVar("T")
# What a collective operation says when the process at the other end has gone.
GONE = re.compile(
    r"Connection closed by peer|Connection reset|Broken pipe|heartbeat|coordination service|"
    r"Gloo .* failed|DEADLINE_EXCEEDED|UNAVAILABLE",
    re.IGNORECASE,
)


@dataclass
class _Place:
    """This process among those of the job."""

    index: int = 0
    count: int = 1
    barriers: int = 0
    watch: Watch | None = None


_here = _Place()


def index() -> int:
    """This process's number; the leader's is 0."""
    return _here.index


def count() -> int:
    """How many processes compute together; 1 where there is no cluster."""
    return _here.count


def is_leader() -> bool:
    """Whether this process writes what the run leaves."""
    return _here.index == 0


def join() -> None:
    """Meet the other processes, where a cluster is configured or detected.

    Configured: ``MONTESSORI_COORDINATOR`` (``host:port`` of process 0), ``MONTESSORI_PROCESSES``
    and ``MONTESSORI_PROCESS`` (from 0). Detected: inside `srun` with several tasks, or whatever JAX
    finds by itself with ``MONTESSORI_CLUSTER=auto`` (Cloud TPU, GKE, Slurm, Open MPI). To be called
    before JAX computes anything.

    Raises:
        UserError: half of it is configured, or the others run other versions.
        LostProcess: the others do not come.
    """
    given = {name: os.environ.get(name, "") for name in (COORDINATOR, PROCESSES, PROCESS)}
    detect = os.environ.get(DETECT) == "auto" or (
        # Of the step: an allocation for several tasks has a step of one as its shell.
        int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    )
    if any(given.values()):
        missing = [name for name, value in given.items() if not value]
        if missing:
            raise UserError(f"{', '.join(missing)} not set: a job of several processes needs all "
                            f"of {', '.join(given)}")  # fmt: skip
        numbers = _whole(PROCESSES, given[PROCESSES]), _whole(PROCESS, given[PROCESS])
        arguments: dict[str, Any] = {
            "coordinator_address": given[COORDINATOR],
            "num_processes": numbers[0],
            "process_id": numbers[1],
            "cluster_detection_method": "deactivate",
        }
    elif detect:
        arguments = {}
    else:
        return
    if jax.distributed.is_initialized():
        return
    wait = min(patience(), 300)
    # Else JAX ends this process by a stack trace when another one has gone; `Watch` says which.
    jax.config.update("jax_enable_recoverability", True)
    # Its handler of SIGTERM would take the place of ours, which saves and stops.
    jax.config.update("jax_enable_preemption_service", False)
    where = f" at {given[COORDINATOR]}" if given[COORDINATOR] else ""
    advice = (
        f"is the address that of process 0, and does every host run the same command? "
        f"{COORDINATOR}, {PROCESSES} and {PROCESS} say who is where"
    )
    alarm = threading.Timer(
        wait, end_process, [f"the processes of this job did not meet{where} in {wait} s: {advice}"]
    )
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=wait + 60,  # JAX's own end is a stack trace
            heartbeat_timeout_seconds=silence(),
        )
    except (RuntimeError, ValueError) as error:
        raise LostProcess(
            f"the processes of this job did not meet{where} ({brief(error)}): {advice}"
        ) from None
    finally:
        alarm.cancel()
    _here.index, _here.count = jax.process_index(), jax.process_count()
    if _here.count > 1:
        _here.watch = Watch(_here.index, _here.count, _client(), _limits())
        _here.watch.start()
        _compare_versions()


@contextmanager
def joined() -> Iterator[None]:
    """The block is this process's part of a job, if there is one (`join`).

    However it ends, the others get to know: at its end they wait for each other, and a failure here
    ends them too.
    """
    try:
        join()
        with losses_are_errors():
            yield
    except Interrupted:  # all of them agreed to stop
        leave(None)
        raise
    except BaseException as error:
        leave(str(error) or type(error).__name__, status_of(error))
        raise
    leave(None)


def leave(failure: str | None, status: int = 1) -> None:
    """Part from the others: after all is done, or because of ``failure``, which they are told.

    They end with its ``status`` too.

    With a failure this ends the process's part in the job at once: the others, which may be waiting
    for it in the middle of a program, end too.
    """
    if _here.watch is None:
        return
    if failure is None:
        barrier("the end")
        _here.watch.end()
        if _here.index == 0:  # who keeps the runtime that the others are leaving
            time.sleep(2 * LOOK_SECONDS)
    else:
        _here.watch.tell(failure, status)


def patience() -> int:
    """Seconds that a barrier waits for the slowest process (``MONTESSORI_BARRIER_SECONDS``)."""
    return _seconds(PATIENCE, 1800)


def silence() -> int:
    """Seconds after which a silent process is lost (``MONTESSORI_HEARTBEAT_SECONDS``)."""
    return _seconds(HEARTBEAT, 100)


def moved() -> None:
    """A sign that this process gets on; `Watch` ends a job that gives none for too long."""
    if _here.watch is not None:
        _here.watch.moves += 1


def barrier(name: str, *, patient: bool = False) -> None:
    """Wait until all processes are here; each call pairs with the same call in the others.

    With ``patient`` as long as any of them gets on (``MONTESSORI_STALL_SECONDS``), else for
    `patience`.

    Raises:
        LostProcess: one did not come in time: it died, hangs, or is elsewhere in the program.
    """
    if _here.count == 1:
        return
    _here.barriers += 1
    key = f"montessori-{_here.barriers}-{name}"
    client, seconds = _client(), LONGEST if patient else patience()
    try:
        client.wait_at_barrier(key, seconds * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise LostProcess(
            f"{name}: process {_here.index} of {_here.count} waited {seconds} s for the others "
            f"({brief(error)}): look at the log of the one that is missing, end the job and start "
            f"it again, it goes on from what is written; {PATIENCE} is how long to wait"
        ) from None
    if _here.watch is not None:  # in step again, however much each did until here
        _here.watch.moves = _here.barriers << 32


def any_of(flag: bool) -> bool:
    """Whether ``flag`` is true in any process: what all of them then act on."""
    if _here.count == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def told_to_stop(flag: bool) -> bool:
    """Whether any process was asked to stop, as far as this one knows: no two need ask at once.

    ``flag`` is whether this one was. The others know within a second or two; `any_of` is for what
    all of them must do at the same place.
    """
    if _here.watch is None:
        return flag
    if flag and not _here.watch.stopping:
        _here.watch.ask_to_stop()
    return flag or _here.watch.stopping


def same_everywhere(values: Mapping[str, Any]) -> None:
    """Hold all processes to one set of JSON-able values; to be called by all together.

    Raises:
        UserError: in all of them, where one has others; names the first of them and the process.
    """
    if _here.count == 1:
        return
    first, *others = map(json.loads, exchange(json.dumps(values, sort_keys=True).encode()))
    for number, other in enumerate(others, 1):
        different = [name for name in sorted(first | other) if first.get(name) != other.get(name)]
        if different:
            name = different[0]
            raise UserError(
                f"process {number} has another {name} ({other.get(name)}) than process 0 "
                f"({first.get(name)}), {len(different)} such in all: give every host the same "
                "config, overrides, data and models"
            )


def from_leader(value: Any) -> Any:
    """The leader's JSON-able value, in every process; to be called by all together."""
    if _here.count == 1:
        return value
    return json.loads(exchange(json.dumps(value if is_leader() else None).encode())[0])


def smallest(number: int) -> int:
    """The smallest of all processes' numbers; to be called by all together."""
    return number if _here.count == 1 else min(map(int, exchange(str(number).encode())))


def exchange(mine: bytes) -> list[bytes]:
    """What every process gives, in the order of their numbers, in all of them.

    Each call pairs with the same call in the others.
    """
    if _here.count == 1:
        return [mine]
    moved()
    # JAX has no 64 bits here, and a share may have more than 2 GiB.
    told = multihost_utils.process_allgather(np.array(divmod(len(mine), 1 << 30), np.int32))
    sizes = [(int(high) << 30) + int(low) for high, low in told]
    parts: list[list[bytes]] = [[] for _ in sizes]
    # In pieces of one shape: one program, and little of the devices' memory.
    for start in range(0, max(sizes), EXCHANGED_BYTES):
        piece = np.zeros(EXCHANGED_BYTES, np.uint8)
        found = np.frombuffer(mine[start : start + EXCHANGED_BYTES], np.uint8)
        piece[: len(found)] = found
        for part, row in zip(parts, multihost_utils.process_allgather(piece), strict=True):
            part.append(row.tobytes())
    return [b"".join(part)[:size] for part, size in zip(parts, sizes, strict=True)]


def shared_out(items: Sequence[S], make: Callable[[S], T]) -> Iterator[T]:
    """``make`` of every item, in order, in all processes; each makes its share of them.

    To be called by all together, with equal items; what is made is pickled.
    """
    if _here.count == 1:
        yield from map(make, items)
        return
    for start in range(0, len(items), TOGETHER):
        window = items[start : start + TOGETHER]
        mine = [make(item) for item in window[_here.index :: _here.count]]
        # From this very program in the job's other processes.
        shares = [pickle.loads(share) for share in exchange(pickle.dumps(mine))]
        for place in range(len(window)):
            yield shares[place % _here.count][place // _here.count]


@contextmanager
def losses_are_errors() -> Iterator[None]:
    """In the block, a collective that fails because a process has gone is a `LostProcess`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _here.count == 1 or not GONE.search(str(error)):
            raise
        # It may have told why it went: then `Watch` ends this process with that.
        time.sleep(3 * LOOK_SECONDS)
        raise LostProcess(
            f"process {_here.index} of {_here.count} lost another one ({brief(error)}): look at "
            "the logs of the others for the first error, and start the job again: it goes on from "
            "the last checkpoint (checkpoint_every is how many steps lie between two); where all "
            f"live and one was slow, raise {HEARTBEAT} (now {silence()})"
        ) from None


def _limits() -> Limits:
    stall = _seconds(STALL, 7200)
    return Limits(HEARTBEAT, silence(), STALL, stall)


def _compare_versions() -> None:
    client, mine = _client(), shared_versions()
    if _here.index == 0:
        client.key_value_set("montessori-versions", json.dumps(mine))
    theirs = client.blocking_key_value_get("montessori-versions", patience() * 1000)
    if told := difference(mine, json.loads(theirs)):
        raise UserError(f"process {_here.index} has other versions than process 0 {told}")


def _client() -> Any:
    """What the processes say to each other by, beside the programs that they run."""
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()


def _seconds(name: str, default: int) -> int:
    return _whole(name, os.environ.get(name) or str(default))


def _whole(name: str, text: str) -> int:
    if not text.isdigit():
        raise UserError(f"{name} is '{text}': give a whole number")
    return int(text)
