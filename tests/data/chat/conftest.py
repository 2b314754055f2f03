"""Tokenizers for the chat tests, trained once in each process."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from montessori_jax.models.tokenizer import load_tokenizer
from tests.data.chat.tokenizers import CHATML, LLAMA2, LLAMA3, PHI3, ZEPHYR, byte_level, texts
from tests.sentencepieces import train_sentencepiece


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return byte_level(names, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML)


@pytest.fixture(scope="session")
def llama3() -> PreTrainedTokenizerFast:
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    return byte_level(
        [*names, "<|eot_id|>"],
        # Llama 3 keeps line breaks together, whatever follows.
        split=r"\p{L}+|\p{N}{1,3}|\s*[\r\n]+|\s+(?!\S)|\s?[^\s\p{L}\p{N}]+|\s+",
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        add_bos_token=True,
        chat_template=LLAMA3,
    )


@pytest.fixture(scope="session")
def phi3() -> PreTrainedTokenizerFast:
    names = ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    return byte_level(names, eos_token="<|endoftext|>", chat_template=PHI3)


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    train_sentencepiece(folder, texts())
    return folder


@pytest.fixture(scope="session")
def zephyr(sentencepiece_folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(sentencepiece_folder)
    tokenizer.chat_template = ZEPHYR
    return tokenizer


@pytest.fixture(scope="session")
def llama2(sentencepiece_folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(sentencepiece_folder)
    tokenizer.chat_template = LLAMA2
    return tokenizer


@pytest.fixture(scope="session")
def tinyllama(sentencepiece_folder: Path) -> PreTrainedTokenizerFast:
    """As published TinyLlama and Llama 2 folders have it: a prefix for every stretch of text."""
    backend = load_tokenizer(sentencepiece_folder).backend_tokenizer
    spec = json.loads(backend.to_str())
    spec["pre_tokenizer"] = None
    spec["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        chat_template=ZEPHYR,
    )


@pytest.fixture(scope="session")
def bare(sentencepiece_folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(sentencepiece_folder)


@pytest.fixture
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """The tokenizer whose fixture the test's parameter names (``indirect``)."""
    return request.getfixturevalue(request.param)
