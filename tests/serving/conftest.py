"""A real vLLM, and a tiny teacher that it serves."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from montessori_jax.config import VllmConfig
from montessori_jax.generation.teacher import Teacher
from montessori_jax.models.folder import load_folder
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.serving.environment import Environment, find_environment
from montessori_jax.serving.vllm_teachers import VllmTeachers
from montessori_jax.stopping import Stop
from tests.serving.proxy import Proxy
from tests.tiny_world import write_tiny_teacher

# Small and soon started; what a test is about it sets itself.
SETTINGS = VllmConfig(eager=True, kv_cache_gib=1, max_num_seqs=16, startup_seconds=600, retries=3)


def open_vllm(logs: Path, settings: VllmConfig = SETTINGS, lora_rank: int = 0) -> VllmTeachers:
    """Teachers served by vLLM, whose logs go to ``logs``."""
    return VllmTeachers(
        settings, logs, lora_rank, shared=False, jax_fraction=0.9, say=print, stop=Stop()
    )


def serve(model: str, logs: Path) -> Iterator[Teacher]:
    """``model`` behind a vLLM, which ends with the fixture that yields from this."""
    teachers = open_vllm(logs)
    try:
        yield teachers.teacher(model)
    finally:
        teachers.close()


@pytest.fixture(scope="session")
def vllm() -> Environment:
    """The environment with vLLM; skips where there is none."""
    found = find_environment(VllmConfig())
    if found is None:
        pytest.skip("needs vLLM: make vllm, or MONTESSORI_VLLM_PYTHON")
    return found


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher that writes instructions, with heads that vLLM has kernels for."""
    return write_tiny_teacher(tmp_path_factory.mktemp("tiny") / "teacher", head_dim=32)


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedModel:
    """The same teacher, loaded by us."""
    return load_folder(tiny_folder)


@pytest.fixture(scope="session")
def served(
    vllm: Environment, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Teacher]:
    """The same teacher behind a vLLM that all tests of a process share: leave it as it is."""
    yield from serve(str(tiny_folder), tmp_path_factory.mktemp("vllm"))


@pytest.fixture
def proxy(served: Teacher) -> Iterator[Proxy]:
    """A proxy in front of that vLLM."""
    made = Proxy(lambda: served.generator.server.url)
    yield made
    made.close()
