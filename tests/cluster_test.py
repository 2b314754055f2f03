"""Real processes that meet: what they agree on, and what they say when one is lost."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from montessori_jax import cluster
from montessori_jax.errors import LostProcess, UserError
from montessori_jax.runs import Journal

ROOT = Path(__file__).resolve().parents[1]
# What each process does, after it has met the others; `me` is its number.
PROGRAM = """
import os, signal, sys, time
from montessori_jax import cluster
from montessori_jax.errors import UserError
from montessori_jax.stopping import Stop, on_signals
{before}
stop = Stop()
try:
    with on_signals(stop), cluster.joined():
        me = cluster.index()
        {body}
except UserError as error:
    print("said:", error, flush=True)
    os._exit(error.status)
print("done", flush=True)
os._exit(0)
"""


def configured() -> Callable[[int], dict[str, str]]:
    """Two processes by our own variables."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = {cluster.COORDINATOR: address, cluster.PROCESSES: "2"}
    return lambda number: {**both, cluster.PROCESS: str(number)}


def by_slurm(step_tasks: str, **more: str) -> Callable[[int], dict[str, str]]:
    """Two tasks as `srun` starts them on one node; JAX takes the port from the job's number."""
    first = 65535 - 2**12 + 1
    for number in range(2**12):
        with socket.socket() as free:
            if free.connect_ex(("localhost", first + number)):
                break
    job = {
        "SLURM_JOB_ID": str(2**12 + number),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": step_tasks,
    }
    return lambda task: {**job, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), **more}


def run(
    body: str,
    before: str = "",
    silence: int = 5,
    places: Callable[[int], dict[str, str]] | None = None,
    **variables: str,
) -> list[tuple[int, str]]:
    """Status and output of two processes that run ``body``; the second is given up with the first.

    ``places`` are the variables by which each finds the other. A process that ends by SIGKILL or
    hangs has the status -9.
    """
    places = places or configured()
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        cluster.HEARTBEAT: str(silence),
        **variables,
    }
    program = PROGRAM.format(before=before, body=body)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**environment, **places(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [both[0].communicate(timeout=120)[0]]
    finally:
        time.sleep(0.5)
        if both[1].poll() is None and "SIGSTOP" in body:
            both[1].kill()
    said.append(both[1].communicate(timeout=60)[0])
    return [(one.returncode, text) for one, text in zip(both, said, strict=True)]


def test_they_agree_and_part():
    body = (
        "print(cluster.count(), cluster.any_of(me == 1), cluster.any_of(False), flush=True); "
        "cluster.barrier('here')"
    )
    for status, said in run(body):
        assert status == 0, said
        assert "2 True False" in said
        assert said.splitlines()[-1] == "done"


def test_each_is_told_what_all_have():
    body = (
        "size = cluster.EXCHANGED_BYTES; mine = [b'a' * size, b'b' * (size + 1)]; "
        "assert cluster.exchange(mine[me]) == mine; assert cluster.exchange(b'') == [b'', b'']; "
        "assert cluster.exchange(b'x' * me) == [b'', b'x']"
    )
    assert [status for status, _ in run(body)] == [0, 0]


def test_work_is_shared_out_and_all_have_it_in_order():
    body = (
        "count = cluster.TOGETHER + 3; made = []\n"
        "        found = cluster.shared_out(range(count), lambda n: (made.append(n), 2 * n)[1])\n"
        "        assert list(found) == [2 * n for n in range(count)]\n"
        "        print(len(made), flush=True)"
    )
    for (status, said), share in zip(run(body), (130, 129), strict=True):  # of 259
        assert status == 0, said
        assert str(share) in said.splitlines()


def test_each_reads_rows_of_its_own_and_all_have_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"instruction": f"Do {n}.", "response": "é" * 300}) for n in range(20_000)]
    path.write_text("\n".join(lines), encoding="utf-8")
    body = (
        f"path = {str(path)!r}; before = read()\n"
        "        rows = own_parts.read_rows_together(path).rows\n"
        "        print('read', (read() - before) / Path(path).stat().st_size, flush=True)\n"
        "        assert rows == read_rows(path).rows\n"
    )
    before = """
from pathlib import Path
from montessori_jax.data import own_parts
from montessori_jax.data.rows import read_rows
real, parts = own_parts.json_lines, []
own_parts.json_lines = lambda *given: (parts.append(given[1:]), real(*given))[1]
def read():
    return sum(stop - start for start, stop in parts)
"""
    for status, said in run(body, before):
        assert status == 0, said
        [share] = [float(line.split()[1]) for line in said.splitlines() if line[:5] == "read "]
        assert 0.4 < share < 0.65


@pytest.mark.parametrize("place", ["shared", "disk-{me}"])
def test_a_journal_is_told_to_all_on_one_disk_and_on_several(tmp_path, place):
    """An earlier job of three processes was killed before the others had told all of theirs."""
    parts = {"": ["told", "leader's"], "-1": ["told", "first's"], "-2": ["second's"]}
    for number, name in enumerate(parts):
        path = tmp_path / place.format(me=number) / f"texts{name}.jsonl"
        Journal(path, {}).append(*({"text": text} for text in parts[name]))
    body = (
        f"path = Path({str(tmp_path)!r}) / f'{place}' / 'texts.jsonl'\n"
        "        journal = SharedJournal(path, {})\n"
        "        for text in (f'{me} a', f'{me} b', 'both'): journal.append({'text': text})\n"
        "        journal.gather(); journal.append({'text': f'{me} c'}); journal.gather()\n"
        "        print([one['text'] for one in journal.records], flush=True)"
    )
    before = "from pathlib import Path; from montessori_jax.runs import SharedJournal"
    both = run(body, before)
    assert [status for status, _ in both] == [0, 0], both
    seen = "shared" in place  # the second's file, which no process of this job has of its own
    expected = ["told", "leader's", *(["second's"] if seen else []), "first's"]
    expected += ["0 a", "0 b", "both", "1 a", "1 b", "0 c", "1 c"]
    for _, said in both:
        assert str(expected) in said
    leaders = Journal(tmp_path / place.format(me=0) / "texts.jsonl", {})
    assert sorted(one["text"] for one in leaders.records) == sorted(expected)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_of_one_ends_all_and_is_told(failing):
    body = (
        f"if me == {failing}: raise UserError('mesh.fsdp 3 does not divide')\n"
        "        cluster.any_of(True); time.sleep(60)"
    )
    found = run(body)
    assert found[failing][0] == 2, found
    status, said = found[1 - failing]
    assert status == UserError.status, said  # a launcher need not try that again
    assert f"process {failing} of 2 failed: mesh.fsdp 3 does not divide" in said
    assert "start the job again" not in said


def test_other_settings_are_refused_by_name():
    body = "cluster.same_everywhere({'seed': 1, 'sft.rows': 4 + me})"
    for number, (status, said) in enumerate(run(body)):
        assert status == 2, said
        if number == 0:
            assert "process 1 has another sft.rows (5) than process 0 (4)" in said


def test_a_signal_to_one_is_known_to_all_without_a_collective():
    body = (
        "began = time.time()\n"
        "        while not cluster.told_to_stop(me == 1 and time.time() - began > 1):\n"
        "            assert time.time() - began < 20; time.sleep(0.1)"
    )
    for status, said in run(body):
        assert status == 0, said


def test_what_the_leader_knows_all_know():
    body = "print(cluster.from_leader({'me': me}), cluster.smallest(7 - me), flush=True)"
    for status, said in run(body):
        assert status == 0, said
        assert "{'me': 0} 6" in said


def test_other_versions_are_refused_by_name():
    before = (
        "from montessori_jax import versions\n"
        "real = versions.version\n"
        f"if os.environ['{cluster.PROCESS}'] == '1':\n"
        "    versions.version = lambda name: '0.1' if name == 'orbax-checkpoint' else real(name)"
    )
    (status, said), (second, other) = run("cluster.barrier('here')", before)
    assert (status, second) == (2, 2), (said, other)
    assert "orbax-checkpoint 0.1 here and" in other
    assert "install the same on every host; on this one pip install 'orbax-checkpoint==" in said


def test_a_collective_that_loses_another_names_its_settings(monkeypatch):
    monkeypatch.setattr(cluster, "_here", cluster._Place(index=1, count=2))
    monkeypatch.setenv(cluster.HEARTBEAT, "7")
    gone = jax.errors.JaxRuntimeError("UNAVAILABLE: Connection closed by peer")
    with pytest.raises(LostProcess) as caught, cluster.losses_are_errors():
        raise gone
    said = str(caught.value)
    assert "process 1 of 2 lost another one (UNAVAILABLE: Connection closed by peer)" in said
    assert "the last checkpoint (checkpoint_every " in said
    assert f"raise {cluster.HEARTBEAT} (now 7)" in said
    assert "\n" not in said


def test_sigterm_reaches_our_handler():
    # JAX's own preemption service would have taken its place.
    body = "os.kill(os.getpid(), signal.SIGTERM); print('asked', stop.requested(), flush=True)"
    for status, said in run(body):
        assert status == 0, said
        assert "asked True" in said


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({cluster.COORDINATOR: "localhost:1"}, f"{cluster.PROCESSES}, {cluster.PROCESS} not set"),
        (
            {cluster.COORDINATOR: "x:1", cluster.PROCESSES: "two", cluster.PROCESS: "0"},
            f"{cluster.PROCESSES} is 'two': give a whole number",
        ),
    ],
)
def test_half_a_configuration_is_one_line(variables, part, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=part):
        cluster.join()


def test_processes_that_do_not_come():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before="", body="pass")],
        cwd=ROOT,
        env={
            **os.environ,
            cluster.COORDINATOR: address,
            cluster.PROCESSES: "2",
            cluster.PROCESS: "1",
            cluster.PATIENCE: "3",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == LostProcess.status, done.stderr
    assert f"montessori: error: the processes of this job did not meet at {address}" in done.stderr
    assert "stack trace" not in done.stderr


@pytest.mark.parametrize(
    ("tasks", "more"),
    [("2", {}), ("1", {cluster.DETECT: "auto"})],
    ids=["a step of two tasks", "auto"],
)
def test_tasks_of_slurm_find_each_other(tasks, more):
    """Real processes that meet by Slurm's variables alone; Slurm itself is not here."""
    body = "print('met', me, cluster.count(), cluster.any_of(me == 1), flush=True)"
    for number, (status, said) in enumerate(run(body, places=by_slurm(tasks, **more))):
        assert status == 0, said
        assert f"met {number} 2 True" in said


def test_auto_where_there_is_no_cluster():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before="", body="pass")],
        cwd=ROOT,
        env={**os.environ, cluster.DETECT: "auto", cluster.PATIENCE: "20"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == LostProcess.status, done.stderr
    assert "said: the processes of this job did not meet (" in done.stdout
    assert f"{cluster.COORDINATOR}, {cluster.PROCESSES} and {cluster.PROCESS} say" in done.stdout


@pytest.mark.parametrize("shell", [False, True], ids=["nowhere", "the shell of an allocation"])
def test_alone_nothing_is_started(shell, monkeypatch):
    names = (cluster.COORDINATOR, cluster.PROCESSES, cluster.PROCESS, cluster.DETECT)
    for name in (*names, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (by_slurm("1")(0) if shell else {}).items():
        monkeypatch.setenv(name, value)
    with cluster.joined():
        assert not jax.distributed.is_initialized()
        assert cluster.is_leader()
        assert (cluster.index(), cluster.count()) == (0, 1)
        cluster.barrier("nobody")
        assert cluster.any_of(True)
