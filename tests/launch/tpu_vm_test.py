"""A run on a TPU slice: what is asked of gcloud, through preemptions, and what a host then does."""

import json
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.launch.started import environment, has_started, wait_until

# Cloud TPU as far as the launcher uses it: each start of a run takes the next of `outcomes`.
GCLOUD = """#!{python}
import json, os, pathlib, subprocess, sys, time
cloud = pathlib.Path("{cloud}")
kind, verb = sys.argv[3:5]
options = dict(one.split("=", 1) for one in sys.argv if one.startswith("--") and "=" in one)
with open(cloud / "calls", "a") as calls:
    calls.write(json.dumps(sys.argv[3:]) + "\\n")
name = {{"tpu-vm": "slice", "queued-resources": "request"}}[kind]
if (cloud / "broken").exists():
    sys.exit("ERROR: (gcloud) UNAUTHENTICATED")
if verb == "describe":
    if not (cloud / name).exists():
        sys.exit("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found.")
    states = (cloud / name).read_text().split()
    print(states[0])
    (cloud / name).write_text(" ".join(states[1:] or states))
elif verb == "create":
    (cloud / "request").write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    (cloud / "slice").write_text("CREATING READY")
elif verb == "delete":
    for file in ("slice", "request"):
        (cloud / file).unlink(missing_ok=True)
elif verb == "scp":
    (cloud / "copied.tgz").write_bytes(pathlib.Path(sys.argv[5]).read_bytes())
elif verb == "ssh" and " start " in options["--command"]:
    outcomes = (cloud / "outcomes").read_text().split()
    (cloud / "outcomes").write_text(" ".join(outcomes[1:]))
    if outcomes[0].startswith("preempted"):
        status = int(outcomes[0].removeprefix("preempted"))
        # Only after an error does the launcher wait for the state to follow.
        (cloud / "slice").write_text("READY PREEMPTED" if status < 128 else "PREEMPTED")
        (cloud / "request").write_text("SUSPENDING SUSPENDED")
        sys.exit(status)
    if outcomes[0] == "waits":
        while not (cloud / "stopping").exists():
            time.sleep(0.05)
        sys.exit(143)
    sys.exit(int(outcomes[0]))
elif verb == "ssh" and "prepare" in options["--command"] and (cloud / "slowly").exists():
    while not (cloud / "stopping").exists():
        time.sleep(0.05)
elif verb == "ssh" and options["--command"].endswith("stop; fi"):
    (cloud / "stopping").touch()
"""
START = "bash montessori_jax/launch/worker.bash start my.yaml run_dir=gs://bucket/run dpo.beta=0.2 "


@pytest.fixture
def cloud(clone: Path) -> Path:
    """A project without any TPU."""
    cloud = clone / "cloud"
    cloud.mkdir()
    gcloud = clone / "bin" / "gcloud"
    gcloud.parent.mkdir()
    gcloud.write_text(GCLOUD.format(python=sys.executable, cloud=cloud))
    gcloud.chmod(0o755)
    return cloud


def start(cloud: Path, *arguments: str, **settings: object) -> subprocess.Popen[str]:
    settings = {"NAME": "mine", "ZONE": "us-east5-b", "TYPE": "v6e-16", "POLL": 0} | settings
    path = {"PATH": f"{cloud.parent}/bin:/usr/bin:/bin"}
    return subprocess.Popen(
        [cloud.parent / "launch" / "tpu_vm.sh", *arguments],
        env=environment(**(settings | path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


MINE = ("my.yaml", "run_dir=gs://bucket/run", "dpo.beta=0.2")


def launch(cloud: Path, *arguments: str, **settings: object) -> tuple[int, str]:
    """The exit status and what was said; by default of a run of ``MINE``."""
    process = start(cloud, *(arguments or MINE), **settings)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


def done(cloud: Path) -> list[str]:
    """What was asked, without the questions; of ssh, what its command is for."""
    verbs = []
    for line in (cloud / "calls").read_text().splitlines():
        kind, verb, *rest = json.loads(line)
        assert "--zone=us-east5-b" in rest
        if verb == "ssh":
            assert "--worker=all" in rest
            command = next(one for one in rest if one.startswith("--command="))
            verb = (
                "start" if " start " in command else "prepare" if "prepare" in command else "stop"
            )
        if verb != "describe":
            verbs.append(verb if verb in ("start", "prepare", "stop", "scp") else f"{kind} {verb}")
    return verbs


CREATE, DELETE = "queued-resources create", "queued-resources delete"
RUN = ["scp", "prepare", "start"]


@pytest.mark.parametrize("status", [1, 2, 143, 255])  # of whichever host is the first to end
def test_a_preempted_slice_is_made_again_and_the_same_command_goes_on(cloud, status):
    (cloud / "outcomes").write_text(f"preempted{status} 0")
    ended, said = launch(cloud, SPOT=1, DELETE=1)
    assert ended == 0, said
    assert done(cloud) == [CREATE, *RUN, DELETE, CREATE, *RUN, DELETE]
    calls = [json.loads(line) for line in (cloud / "calls").read_text().splitlines()]
    starts = [one for call in calls for one in call if one.startswith("--command=bash")]
    assert starts == [f"--command={START}"] * 2
    creation = next(call for call in calls if call[1] == "create")
    assert creation[2:] == [
        "mine", "--node-id=mine", "--accelerator-type=v6e-16",
        "--runtime-version=v2-alpha-tpuv6e", "--spot", "--zone=us-east5-b",
    ]  # fmt: skip
    assert "waiting: the slice is CREATING" in said
    assert f"(status {status}): again" in said


def test_a_slice_that_is_there_is_used_and_left(cloud):
    (cloud / "slice").write_text("READY")
    (cloud / "outcomes").write_text("0")
    status, said = launch(cloud)
    assert status == 0, said
    assert done(cloud) == RUN
    assert "is paid for until" in said
    assert "gcloud compute tpus queued-resources delete mine --force" in said


def test_what_was_preempted_while_no_one_looked_is_made_again(cloud):
    (cloud / "slice").write_text("PREEMPTED")
    (cloud / "request").write_text("SUSPENDED")
    (cloud / "outcomes").write_text("0")
    assert launch(cloud)[0] == 0
    assert done(cloud) == [DELETE, CREATE, *RUN]


@pytest.mark.parametrize("status", [75, 143, 255])
def test_a_lost_connection_starts_again_on_the_same_slice(cloud, status):
    (cloud / "slice").write_text("READY")
    (cloud / "outcomes").write_text(f"{status} 0")
    assert launch(cloud)[0] == 0
    assert done(cloud) == RUN + RUN


def test_hosts_that_are_never_reached_are_given_up(cloud):
    (cloud / "slice").write_text("READY")
    (cloud / "outcomes").write_text("255 " * 20)
    status, said = launch(cloud)
    assert status == 255
    assert done(cloud) == RUN * 10
    assert "gave up: ten attempts" in said


@pytest.mark.parametrize("status", [1, 2])
def test_an_error_of_the_run_is_not_tried_again(cloud, status):
    (cloud / "slice").write_text("READY")
    (cloud / "outcomes").write_text(f"{status} 0")
    assert launch(cloud, DELETE=1)[0] == status
    assert done(cloud) == RUN


def test_a_request_that_failed_is_left_to_its_owner(cloud):
    (cloud / "request").write_text("FAILED")
    status, said = launch(cloud)
    assert status == 1
    assert done(cloud) == []
    assert "its request FAILED" in said


def test_without_an_answer_nothing_is_made(cloud):
    (cloud / "broken").touch()
    status, said = launch(cloud)
    assert status == 1
    assert done(cloud) == []
    assert "UNAUTHENTICATED" in said


def test_sigterm_is_heard_while_a_slice_is_waited_for(cloud):
    (cloud / "request").write_text("WAITING_FOR_RESOURCES")
    process = start(cloud, *MINE)
    calls = cloud / "calls"
    wait_until(lambda: calls.exists() and calls.read_text().count("describe") > 4)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 143
    assert not set(RUN) & set(done(cloud))
    assert "the same command goes on" in said


def test_sigterm_is_heard_while_hosts_are_prepared(cloud):
    (cloud / "slice").write_text("READY")
    (cloud / "slowly").touch()
    process = start(cloud, *MINE)
    wait_until(lambda: (cloud / "calls").exists() and "prepare" in (cloud / "calls").read_text())
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 143
    assert done(cloud) == ["scp", "prepare", "stop"]
    assert "the same command goes on" in said


def test_sigterm_stops_the_run_on_the_hosts_and_waits_for_it(cloud):
    (cloud / "slice").write_text("READY")
    (cloud / "outcomes").write_text("waits 0")
    process = start(cloud, "my.yaml", "run_dir=gs://bucket/run")
    wait_until(lambda: (cloud / "calls").exists() and " start " in (cloud / "calls").read_text())
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 143
    assert done(cloud) == [*RUN, "stop"]
    assert "the same command goes on" in said


def test_a_run_directory_on_the_hosts_is_refused(cloud):
    status, said = launch(cloud, "my.yaml", "run_dir=runs/mine")
    assert status == 2
    assert "run_dir must be in a bucket" in said
    assert not (cloud / "calls").exists()


def test_dry_run_prints_all_and_calls_nothing(cloud):
    process = start(cloud, "--dry-run", "my.yaml", "run_dir=gs://bucket/run", DELETE=1)
    lines = process.communicate(timeout=20)[0].splitlines()
    assert process.returncode == 0
    assert not (cloud / "calls").exists()
    words = [line.split()[:5] for line in lines]
    assert [two[0] for two in words] == ["tar", *["gcloud"] * 6]
    assert [one[4] for one in words[1:]] == ["create", "describe", "scp", "ssh", "ssh", "delete"]
    assert "start\\ my.yaml\\ run_dir=gs://bucket/run" in lines[5]
    bare = start(cloud, NAME="", ZONE="", TYPE="")
    assert "launch/tpu_vm.sh CONFIG" in bare.communicate(timeout=20)[0]
    assert bare.returncode == 2


def test_a_host_gets_the_tree_and_runs_it_and_stops_on_request(cloud, tmp_path):
    """What `ssh` is given, run here: the words arrive as they were, and a signal at the command."""
    root = cloud.parent
    for file in (".git/HEAD", ".venv-vllm/bin/python", "runs/old.log", "pyproject.toml"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("")
    (root / ".env").write_text("MONTESSORI_SECRET=of-mine\n")
    (cloud / "slice").write_text("READY")
    (cloud / "outcomes").write_text("0")
    assert launch(cloud, "my.yaml", "run_dir=gs://b/r", "tracker=[a, b]")[0] == 0
    with tarfile.open(cloud / "copied.tgz") as copied:
        names = copied.getnames()
    assert {"./launch/worker.bash", "./pyproject.toml", "./.env"} <= set(names)
    assert not [one for one in names if one.split("/")[1:2] in ([".git"], [".venv"], ["runs"])]
    assert "./.venv-vllm" not in names

    host = tmp_path / "host"
    host.mkdir()
    (host / "montessori.tgz").write_bytes((cloud / "copied.tgz").read_bytes())
    # uv brings the command that the clone's fixture has.
    (root / "bin" / "uv").write_text(
        f'#!/usr/bin/env bash\necho "uv $*" >> {host}/uv\n'
        f"mkdir -p .venv/bin && cp {root}/.venv/bin/montessori .venv/bin/\n"
    )
    (root / "bin" / "uv").chmod(0o755)
    calls = [json.loads(line) for line in (cloud / "calls").read_text().splitlines()]
    commands = [one.split("=", 1)[1] for call in calls for one in call if "--command=" in one]
    variables = environment(HOME=host, PATH=f"{root}/bin:/usr/bin:/bin")
    prepared = subprocess.run(["bash", "-c", commands[0]], cwd=host, env=variables)
    assert prepared.returncode == 0
    assert "-e .[tpu,gcs]" in (host / "uv").read_text()
    running = subprocess.Popen(
        ["bash", "-c", commands[1]], cwd=host, env=variables, stdout=subprocess.DEVNULL
    )
    wait_until(lambda: has_started(root))
    assert (root / "variables").read_text().split() == [
        "MONTESSORI_CLUSTER=auto", "MONTESSORI_SECRET=of-mine",
    ]  # fmt: skip
    # As the next attempt does first; twice, when nothing is left to stop.
    for _ in range(2):
        worker = ["bash", "montessori_jax/launch/worker.bash", "stop"]
        assert subprocess.run(worker, cwd=host, env=variables).returncode == 0
    assert running.wait(20) == 143
    assert (root / "said").read_text() == (
        "tpu,cpu: run my.yaml run_dir=gs://b/r tracker=[a, b]\nstopped\n"
    )
