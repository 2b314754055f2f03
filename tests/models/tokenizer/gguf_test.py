"""A tokenizer trained here, written to GGUF and read back; files without a usable one."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from montessori_jax.errors import UserError
from montessori_jax.models.tokenizer import open_gguf, tokenizer_from_gguf
from tests.models.tokenizer.texts import shipped_texts
from tests.models.tokenizer.written import write_gguf


def test_gguf_gives_back_the_tokenizer_it_was_written_from(
    byte_level: Tokenizer, byte_level_gguf: Path
) -> None:
    loaded = tokenizer_from_gguf(byte_level_gguf)
    for text in shipped_texts():
        ids = loaded.encode(text, add_special_tokens=False)
        assert ids == byte_level.encode(text).ids
        assert loaded.encode(text) == [1, *ids]
    assert loaded.encode("a<think>b", add_special_tokens=False, split_special_tokens=True) == [
        *byte_level.encode("a").ids,
        byte_level.get_vocab_size(),
        *byte_level.encode("b").ids,
    ]
    assert loaded.pad_token is None
    assert loaded.model_max_length == 512


def test_gguf_agrees_with_transformers_where_it_knows_the_cutting(
    byte_level: Tokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    path = write_gguf(tmp_path / "gpt2.gguf", byte_level, pre="gpt-2")
    ours = tokenizer_from_gguf(path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.added_tokens_decoder == theirs.added_tokens_decoder
    assert ours.chat_template == theirs.chat_template
    for text in [*shipped_texts(), "<think>no</think>"]:
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "tokenizer.ggml.model"),
        ({"tokens": None}, "tokenizer.ggml.tokens"),
        ({"types": None}, "tokenizer.ggml.token_type"),
        ({"merges": None}, "only gpt2 with merges"),
        ({"pre": "llama-bpe"}, "gpt2/llama-bpe"),
        ({"model": "llama"}, "llama/smollm"),
    ],
)
def test_gguf_without_a_usable_tokenizer_is_refused(
    changes: dict[str, object], message: str, byte_level: Tokenizer, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "odd.gguf", byte_level, **changes)
    with pytest.raises(UserError, match=message) as caught:
        tokenizer_from_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"my model.*{message}|{message}.*my model"):
        tokenizer_from_gguf(open_gguf(path), origin="my model")


def test_gguf_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.gguf"):
        open_gguf(tmp_path / "absent.gguf")
    path = tmp_path / "text.gguf"
    path.write_text("not this" * 20)
    with pytest.raises(UserError, match=r"text\.gguf"):
        tokenizer_from_gguf(path)
