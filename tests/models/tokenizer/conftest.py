"""A tokenizer trained here, once in each process, and its GGUF file."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from tests.byte_level import train_byte_level
from tests.models.tokenizer.texts import shipped_texts
from tests.models.tokenizer.written import write_gguf


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    cut = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return train_byte_level(shipped_texts(), 600, control, pre_tokenizers.Sequence(cut))


@pytest.fixture(scope="session")
def byte_level_gguf(byte_level: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", byte_level)
