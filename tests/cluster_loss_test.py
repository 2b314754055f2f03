"""Real processes that wait for one that is late, hangs, fails or is gone."""

import signal

import pytest

from montessori_jax import cluster
from montessori_jax.errors import LostProcess, UserError
from tests.cluster_test import run


@pytest.mark.parametrize("kind", ["SIGKILL", "SIGSTOP"], ids=["dies", "hangs"])
def test_a_process_that_is_lost_in_a_collective_is_named(kind):
    # The program of the other waits inside XLA, where no exception of Python's can reach it.
    body = f"me and os.kill(os.getpid(), signal.{kind}); cluster.any_of(True)"
    (status, said), (lost, _) = run(body)
    assert lost == -signal.SIGKILL
    assert status == LostProcess.status, said
    [line] = [one for one in said.splitlines() if "montessori: error" in one or "said:" in one]
    assert "start the job again" in line
    assert "Traceback" not in said


def test_a_process_that_lives_and_never_comes_ends_the_job():
    """Its heart beats: the other waits in a collective for what the main thread will not do."""
    body = (
        "cluster.moved()\n"
        "        if me: time.sleep(60)\n"
        "        for _ in range(5): cluster.moved(); time.sleep(0.2)\n"
        "        cluster.any_of(True)"
    )
    for status, said in run(body, **{cluster.STALL: "6"}):
        assert status == LostProcess.status, said
        assert "nothing has got on for 6 s; process 1 of 2 is behind: look at its log" in said
        assert cluster.STALL in said


def test_a_job_that_gets_on_may_take_longer_than_a_part_of_it():
    body = "for _ in range(8): time.sleep(0.5); cluster.moved()\n        cluster.barrier('end')"
    for status, said in run(body, **{cluster.STALL: "2"}):
        assert status == 0, said


def test_a_barrier_has_its_patience():
    body = "me and time.sleep(6); cluster.barrier('stage one')"
    (status, said), _ = run(body, **{cluster.PATIENCE: "2"})
    assert status == LostProcess.status
    assert "stage one: process 0 of 2 waited 2 s for the others" in said
    assert cluster.PATIENCE in said


def test_a_journal_waits_for_a_process_that_gets_on():
    """Longer than a barrier's patience, and than the job may stand: the late one is at work."""
    body = (
        "journal = SharedJournal(Path(tempfile.mkdtemp()) / 'texts.jsonl', {})\n"
        "        for _ in range(12 * me): time.sleep(0.5); cluster.moved()\n"
        "        journal.append({'text': me}); journal.gather()\n"
        "        print([one['text'] for one in journal.records], flush=True)"
    )
    before = (
        "import tempfile; from pathlib import Path; from montessori_jax.runs import SharedJournal"
    )
    for status, said in run(body, before, **{cluster.PATIENCE: "3", cluster.STALL: "3"}):
        assert status == 0, said
        assert "[0, 1]" in said


def test_a_process_that_fails_while_a_checkpoint_is_written_ends_the_job(tmp_path):
    """It does not wait for the other, which waits for it elsewhere."""
    before = (
        "import jax, numpy as np; from jax.sharding import Mesh, NamedSharding, PartitionSpec\n"
        "from pathlib import Path; from montessori_jax.training import state_folder\n"
        "from montessori_jax.training.checkpoints import Checkpoints\n"
        "from montessori_jax.training.state import TrainState\n"
        "state_folder.SETTLE_SECONDS = 1"
    )
    body = (
        "everywhere = NamedSharding(Mesh(np.array(jax.devices()), ('data',)), PartitionSpec())\n"
        "        def put(x):\n"
        "            return jax.make_array_from_callback(x.shape, everywhere, lambda at: x)\n"
        "        w, step = put(np.ones(8, np.float32)), put(np.ones((), np.int32))\n"
        f"        folder = Path({str(tmp_path)!r}) / 'kept'\n"
        "        with Checkpoints(folder) as kept:\n"
        "            kept.save(TrainState({'w': w}, (), step), 'run')\n"
        "            if me: raise UserError('a row is damaged')\n"
        "            cluster.any_of(True); time.sleep(60)"
    )
    (status, said), (failed, its) = run(body, before)
    assert failed == UserError.status, its
    assert "said: a row is damaged" in its
    assert status == UserError.status, said
    assert "process 1 of 2 failed: a row is damaged" in said
