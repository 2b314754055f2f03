"""Two real processes with four devices each: one process's run, and the same after a kill.

On a disk that both see, and each on a disk of its own with a URL between them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from montessori_jax.cluster import COORDINATOR, HEARTBEAT, PROCESS, PROCESSES
from montessori_jax.errors import LostProcess
from montessori_jax.models.sources import load_model
from montessori_jax.work import CHECKPOINTS
from tests.end_to_end.resume_test import CONFIG, ROOT
from tests.tiny_world import write_tiny_teacher

# The first axis that is not 1 goes across processes: candidates in the one, weights in the other.
MESH = {"candidate": 2, "data": 2, "fsdp": 2, "tensor": 1}
WEIGHTS_ACROSS = ("mesh.candidate=1", "mesh.data=1", "mesh.fsdp=8")
# On two devices each: the teacher that writes is split over both processes too.
ALL_ACROSS = ("mesh.candidate=1", "mesh.data=1", "mesh.fsdp=4", "mesh.sampler=4")
ITERATION = "iteration-1"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A trained tiny teacher, a config on eight devices, and a cache of compiled programs."""
    folder = tmp_path_factory.mktemp("processes")
    teacher = str(write_tiny_teacher(folder / "teacher"))
    values = {**CONFIG, "mesh": MESH, "teacher": teacher, "student": teacher}
    # Plain descent: Adam makes a whole step of what rounding leaves of a zero gradient.
    for section in ("warmup", "sft"):
        values[section] = {**CONFIG[section], "optimizer": "sgd", "learning_rate": 0.1}
    values["influence"] = {**CONFIG["influence"], "optimizer": "sgd", "method": "exact", "audit": 0}
    values["compare_self_instruct"] = False
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder


def start(
    world: Path, run: str | Path, devices: int, *overrides: str, **variables: str
) -> subprocess.Popen:
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(world / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of it
        **variables,
    }
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "montessori_jax.cli", "run", world / "tiny.yaml"),
            *(f"run_dir={run}", *overrides),
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_two(
    world: Path,
    run: str | Path,
    *disks: Path,
    overrides: tuple[str, ...] = (),
    devices: int = 4,
) -> list[subprocess.Popen]:
    """Both, on ``disks`` of their own if they are given."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    job = {COORDINATOR: address, PROCESSES: "2", HEARTBEAT: "15"}
    own = [[f"local_dir={disk}"] for disk in disks] or [[], []]
    return [
        start(world, run, devices, *own[me], *overrides, **job, **{PROCESS: str(me)})
        for me in range(2)
    ]


def finish(*processes: subprocess.Popen) -> list[str]:
    said = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return said


@pytest.fixture(scope="module")
def one_process(world):
    run = world / "one"
    finish(start(world, run, 8))
    return run


def table(run: Path, name: str) -> list[dict]:
    return pq.read_table(run / ITERATION / name).to_pylist()


def weights(run: Path, name: str) -> list[np.ndarray]:
    import jax

    return jax.tree.leaves(load_model(str(run / ITERATION / name)).params)


def assert_same(run: Path, other: Path) -> None:
    """The same texts; scores and weights that differ by rounding alone."""
    for name in ("generate/data.parquet", "split/warmup.parquet", "synthesise-tuned/data.parquet"):
        assert table(run, name) == table(other, name), name
    scores, wanted = (
        np.array([row["influence"] for row in table(one, "influence/scores.parquet")])
        for one in (run, other)
    )
    assert np.abs(scores - wanted).max() < 1e-3 * wanted.std()
    for name in ("dpo/teacher", "train-tuned/student"):
        for found, expected in zip(weights(run, name), weights(other, name), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def two_processes(world):
    run = world / "two"
    said = finish(*start_two(world, run))
    return run, said


def test_two_processes_make_one_processes_run(one_process, two_processes):
    run, (leader, other) = two_processes
    assert_same(run, one_process)
    for stage in ("generate", "warmup", "influence", "dpo", "train-tuned", "evaluate-tuned"):
        assert f"iteration-1/{stage}: " in leader
    assert "iteration-1" not in other  # the leader alone speaks
    # Both wrote texts, each its own.
    shares = [
        run / ITERATION / "generate" / name for name in ("responses.jsonl", "responses-1.jsonl")
    ]
    assert all(share.read_text().count("\n") > 2 for share in shares)
    assert (run / "costs.jsonl").read_text().count('"iteration-1/warmup"') == 1


def test_a_killed_process_ends_the_job_and_the_next_goes_on(world, two_processes):
    undisturbed, _ = two_processes
    run = world / "killed"
    leader, other = start_two(world, run)
    journal = run / ITERATION / "influence" / "chunks.jsonl"
    deadline = time.monotonic() + 600
    while not journal.exists() or journal.read_text().count("\n") < 2:
        assert leader.poll() is None, leader.communicate()[0]
        assert other.poll() is None, other.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    other.send_signal(signal.SIGKILL)
    said, _ = leader.communicate(timeout=120)
    assert leader.returncode == LostProcess.status, said
    assert "start the job again" in said.splitlines()[-1]
    other.communicate()
    assert not (run / ITERATION / "influence" / "done.json").exists()
    finish(*start_two(world, run))
    assert_same(run, undisturbed)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_processes_that_share_a_url_alone_make_the_same_run(world, one_process):
    store, disks = world / "store" / "run", [world / f"disk-{number}" for number in range(2)]
    url = f"file://{store}"
    finish(*start_two(world, url, *disks, overrides=WEIGHTS_ACROSS))
    assert_same(store, one_process)
    kept = [{name for name in files(place) if name.startswith(ITERATION)} for place in disks]
    own = {f"{ITERATION}/{stage}/done.json" for stage in ("generate", "warmup", "influence")}
    assert own <= kept[0] == kept[1]
    # States are where both write them; a process's part of a journal is in the leader's by then.
    states = {name for name in files(store) if name.startswith(f"{ITERATION}/warmup/state/")}
    assert f"{ITERATION}/warmup/state/content.json" in states
    assert files(store) - states >= kept[0]
    assert not any(
        "state/" in name or CHECKPOINTS in name or "-1.jsonl" in name for name in kept[0]
    )


@pytest.mark.slow
def test_a_teacher_split_over_both_processes_makes_the_same_run(world, one_process):
    run = world / "across"
    finish(*start_two(world, run, overrides=ALL_ACROSS, devices=2))
    assert_same(run, one_process)
    texts = run / ITERATION / "generate"
    assert (texts / "responses.jsonl").read_text() == (texts / "responses-1.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stopped_by", [signal.SIGKILL, signal.SIGTERM])
def test_texts_that_both_write_together_outlive_a_process(world, one_process, stopped_by):
    run = world / f"across-{stopped_by.name}"
    leader, other = start_two(world, run, overrides=ALL_ACROSS, devices=2)
    texts = run / ITERATION / "generate" / "responses.jsonl"
    deadline = time.monotonic() + 600
    while not texts.exists() or texts.read_text().count("\n") < 3:
        assert [leader.poll(), other.poll()] == [None, None], leader.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    other.send_signal(stopped_by)
    said, _ = leader.communicate(timeout=120)
    other.communicate()
    if stopped_by == signal.SIGKILL:
        assert leader.returncode == LostProcess.status, said
    else:
        assert leader.returncode > 128, said
        assert "stopped; the same command goes on from here" in said
    assert not (run / ITERATION / "generate" / "done.json").exists()
    kept = texts.read_text()
    finish(*start_two(world, run, overrides=ALL_ACROSS, devices=2))
    assert texts.read_text().startswith(kept)
    assert_same(run, one_process)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_the_step_of_both(world):
    run = world / "stopped"
    sparse = (*WEIGHTS_ACROSS, "warmup.checkpoint_every=1000", "warmup.epochs=40")
    leader, other = start_two(world, run, overrides=sparse)
    metrics = run / ITERATION / "warmup" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not metrics.exists() or not metrics.read_text():
        assert [leader.poll(), other.poll()] == [None, None], leader.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    other.send_signal(signal.SIGTERM)
    said = [one.communicate(timeout=120)[0] for one in (leader, other)]
    assert min(leader.returncode, other.returncode) > 128, said
    assert "stopped; the same command goes on from here" in said[0]
    [state] = (run / ITERATION / "warmup" / CHECKPOINTS).glob("*/content.json")
    done = state.parent.name
    assert int(done) > 0
    said = finish(*start_two(world, run, overrides=sparse))
    assert f"going on from step {done} of " in said[0]
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert rows[-1]["steps"] > int(done)
    assert [row["step"] for row in rows] == list(range(1, rows[-1]["steps"] + 1))


@pytest.mark.slow
def test_a_killed_job_goes_on_from_the_url_alone(world, one_process):
    store = world / "store" / "killed"
    both = start_two(world, f"file://{store}", world / "first-0", world / "first-1")
    deadline = time.monotonic() + 600
    while not list(store.glob(f"{ITERATION}/warmup/{CHECKPOINTS}/*/content.json")):
        assert time.monotonic() < deadline
        assert [one.poll() for one in both] == [None, None], both[0].communicate()[0]
        time.sleep(0.02)
    for one in both:
        one.send_signal(signal.SIGKILL)
        one.communicate()
    assert not (store / ITERATION / "warmup" / "done.json").exists()
    said, _ = finish(*start_two(world, f"file://{store}", world / "second-0", world / "second-1"))
    assert f"fetching file://{store}" in said
    assert "generate: done before" in said
    assert "going on from step" in said
    assert_same(store, one_process)
