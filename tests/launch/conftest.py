"""A checkout whose `montessori` is a stand-in."""

import shutil
from pathlib import Path

import pytest

from tests.launch.started import LAUNCH


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout's launchers with a `montessori` that writes its arguments down and waits."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    command = tmp_path / ".venv" / "bin" / "montessori"
    command.parent.mkdir(parents=True)
    command.write_text(
        "#!/usr/bin/env bash\n"
        f"trap 'echo stopped >> \"{tmp_path}/said\"; exit 143' TERM\n"
        f"env | grep -E '^(MONTESSORI|JAX_LOCAL)_' | sort > \"{tmp_path}/variables\"\n"
        f'echo "$JAX_PLATFORMS: $*" > "{tmp_path}/said"\n'
        f'while [ ! -e "{tmp_path}/end" ]; do sleep 0.05; done\n'
        f'exit "$(cat "{tmp_path}/end")"\n'
    )
    command.chmod(0o755)
    return tmp_path
