"""The Slurm job: its step, what a signal does to it, and when it is queued again."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.started import LAUNCH, environment, has_started, wait_until


@pytest.fixture
def slurm(clone: Path) -> dict[str, str]:
    """The variables of a job, and srun, scancel and scontrol as far as the launcher uses them."""
    commands = clone / "bin"
    commands.mkdir()
    for name, text in {
        # Slurm signals a step's tasks, and srun itself answers SIGTERM by SIGKILL to them.
        "srun": 'while [[ "$1" == -* ]]; do shift; done\n'
        f'"$@" &\necho $! > {clone}/task\ntrap "kill -KILL $!" TERM\n'
        "wait $!\n",
        "scancel": f'kill "$1" "$(cat {clone}/task)"\n',
        "scontrol": "",
    }.items():
        (commands / name).write_text(
            f'#!/usr/bin/env bash\necho "{name} $*" >> {clone}/calls\n'
            + text.replace('kill "$1"', 'kill "-${1#--signal=}"')
        )
        (commands / name).chmod(0o755)
    return environment(
        PATH=f"{commands}:{os.environ['PATH']}",
        SLURM_JOB_ID=77,
        SLURM_SUBMIT_DIR=clone,
        SLURM_GPUS_ON_NODE=4,
        SLURM_CPUS_PER_TASK=32,
    )


def submit(clone: Path, variables: dict[str, str], seconds_left: int) -> subprocess.Popen[bytes]:
    """The job script as Slurm runs it: a copy elsewhere."""
    spool = clone / "spool" / "slurm_script"
    spool.parent.mkdir()
    shutil.copy(clone / "launch" / "slurm.sbatch", spool)
    ends = {"SLURM_JOB_END_TIME": str(int(time.time()) + seconds_left)}
    process = subprocess.Popen(["bash", spool, "my.yaml", "seed=1"], env=variables | ends)
    wait_until(lambda: has_started(clone))
    return process


def test_slurm_prints_its_step_and_its_usage(clone):
    script = clone / "launch" / "slurm.sbatch"
    dry = subprocess.run(
        ["bash", script, "--dry-run", "my.yaml", "dpo.beta=0.2"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert dry.stdout.startswith("srun --ntasks-per-node=1 ")
    assert dry.stdout.rstrip().endswith(f"{clone}/.venv/bin/montessori run my.yaml dpo.beta=0.2")
    bare = subprocess.run(["bash", script], capture_output=True, text=True)
    assert bare.returncode == 2
    assert "launch/slurm.sbatch CONFIG" in bare.stdout
    assert "#" not in bare.stdout


def test_slurm_asks_for_one_task_a_node_a_signal_and_to_be_queued_again():
    asked = re.findall(r"^#SBATCH (\S+)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    assert {"--ntasks-per-node=1", "--requeue", "--open-mode=append"} <= set(asked)
    signals = [one for one in asked if one.startswith("--signal=")]
    assert signals == ["--signal=TERM@600"]  # to the tasks: B: would be the shell alone


def test_slurm_passes_a_signal_to_the_shell_on_to_the_tasks(clone, slurm):
    process = submit(clone, slurm, seconds_left=3600)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert (clone / "said").read_text() == ": run my.yaml seed=1\nstopped\n"
    calls = (clone / "calls").read_text().splitlines()
    assert calls[0].endswith(f"--cpus-per-task=32 {clone}/.venv/bin/montessori run my.yaml seed=1")
    # Not queued again: there was time left, so this was a user's wish.
    assert calls[1:] == ["scancel --signal=TERM 77"]
    # All four GPUs of the node are the one task's.
    assert (clone / "variables").read_text() == "JAX_LOCAL_DEVICE_IDS=0,1,2,3\n"


def test_slurm_queues_again_what_the_limit_stopped(clone, slurm):
    process = submit(clone, slurm, seconds_left=590)
    os.kill(int((clone / "task").read_text()), signal.SIGTERM)  # as --signal does
    assert process.wait(20) == 143
    assert (clone / "said").read_text().endswith("stopped\n")
    assert (clone / "calls").read_text().splitlines()[1:] == ["scontrol requeue 77"]


@pytest.mark.parametrize("status", [0, 2])
def test_slurm_does_not_queue_again_what_ended_by_itself(clone, slurm, status):
    process = submit(clone, slurm, seconds_left=590)
    (clone / "end").write_text(str(status))
    assert process.wait(20) == status
    assert len((clone / "calls").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("status", "restarts", "again"), [(75, 0, True), (75, 20, False), (2, 0, False)]
)
def test_slurm_queues_again_what_may_go_well(clone, slurm, status, restarts, again):
    (clone / "bin" / "srun").write_text(f"#!/usr/bin/env bash\nexit {status}\n")
    script = clone / "launch" / "slurm.sbatch"
    variables = slurm | {"SLURM_RESTART_COUNT": str(restarts)}
    ended = subprocess.run(["bash", script, "my.yaml"], env=variables, capture_output=True)
    assert ended.returncode == status
    calls = clone / "calls"
    asked = calls.read_text() if calls.exists() else ""
    assert ("scontrol requeue 77" in asked) == again
