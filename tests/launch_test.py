"""The launchers: what they would run, what they say without arguments, and where a signal goes."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout's launchers with a `montessori` that writes its arguments down and waits."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    command = tmp_path / ".venv" / "bin" / "montessori"
    command.parent.mkdir(parents=True)
    command.write_text(
        "#!/usr/bin/env bash\n"
        f"trap 'echo stopped >> \"{tmp_path}/said\"; exit 143' TERM\n"
        f'echo "$JAX_PLATFORMS: $*" > "{tmp_path}/said"\n'
        "while true; do sleep 0.05; done\n"
    )
    command.chmod(0o755)
    return tmp_path


def environment() -> dict[str, str]:
    """This process's variables without the platform, which the launchers choose."""
    return {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_it_would_run_and_its_usage(script, clone):
    copy = clone / "launch" / script.name
    dry = subprocess.run(
        [copy, "--dry-run", "my.yaml", "dpo.beta=0.2"], capture_output=True, text=True, check=True
    )
    assert dry.stdout.rstrip().endswith("montessori run my.yaml dpo.beta=0.2")
    bare = subprocess.run([copy], capture_output=True, text=True)
    assert bare.returncode == 2
    assert f"launch/{script.name} CONFIG" in bare.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_sigterm_reaches_the_command(script, clone):
    process = subprocess.Popen(
        [clone / "launch" / script.name, "my.yaml", "seed=1"],
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 20
    while not (clone / "said").exists() or not (clone / "said").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    platforms = {"gpu_single_host.sh": "cuda", "tpu_host.sh": "tpu,cpu"}.get(script.name, "")
    assert (clone / "said").read_text() == f"{platforms}: run my.yaml seed=1\nstopped\n"


def test_a_tpu_host_with_vllm_writes_by_it(clone):
    python = clone / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    dry = subprocess.run(
        [clone / "launch" / "tpu_host.sh", "--dry-run", "my.yaml", "seed=1"],
        capture_output=True, text=True, check=True, env=environment(),
    )  # fmt: skip
    assert dry.stdout.rstrip().endswith("montessori run my.yaml generator=vllm seed=1")
    assert "JAX_PLATFORMS=tpu,cpu" in dry.stdout
