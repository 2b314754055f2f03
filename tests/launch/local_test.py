"""The launchers on one host: what they would run and where a signal goes; and what all have."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.started import LAUNCH, environment, has_started, wait_until

# Those that start Python on this machine; the others have a test file each.
LOCAL = [LAUNCH / name for name in ("gpu_single_host.sh", "local.sh", "tpu_host.sh")]
SHELL = sorted(path for end in ("sh", "bash", "sbatch") for path in LAUNCH.glob(f"*.{end}"))
ENTRIES = sorted(
    path
    for path in LAUNCH.iterdir()
    if path.suffix in (".sh", ".sbatch", ".yaml") or path.name == "Dockerfile"
)


@pytest.mark.parametrize("script", LOCAL, ids=lambda path: path.name)
def test_what_it_would_run_and_its_usage(script, clone):
    copy = clone / "launch" / script.name
    dry = subprocess.run(
        [copy, "--dry-run", "my.yaml", "dpo.beta=0.2"], capture_output=True, text=True, check=True
    )
    assert dry.stdout.rstrip().endswith("montessori run my.yaml dpo.beta=0.2")
    bare = subprocess.run([copy], capture_output=True, text=True)
    assert bare.returncode == 2
    assert f"launch/{script.name} CONFIG" in bare.stdout


@pytest.mark.parametrize("script", LOCAL, ids=lambda path: path.name)
def test_sigterm_reaches_the_command(script, clone):
    process = subprocess.Popen(
        [clone / "launch" / script.name, "my.yaml", "seed=1"],
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    wait_until(lambda: has_started(clone))
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


def test_shellcheck_has_nothing_to_say():
    # From the dev extra: beside this Python, whether its environment is activated or not.
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=places)
    assert shellcheck, "pip install -e '.[dev]'"
    found = subprocess.run([shellcheck, *SHELL], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.name)
def test_each_says_what_it_needs_and_costs_and_how_it_is_called(path):
    lines = path.read_text().splitlines()
    if lines[0].startswith("#!"):
        lines = lines[1:]
    head = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    for said in ("Needs:", "Costs:", "Example", f"launch/{path.name}"):
        assert said in head, f"{path.name}: {said}"
    # Configs in examples are there.
    for config in re.findall(r"configs/\S+\.yaml", path.read_text()):
        assert (LAUNCH.parent / config).exists(), f"{path.name}: {config}"
