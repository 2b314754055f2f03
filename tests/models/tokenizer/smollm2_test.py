"""SmolLM2's tokenizer from GGUF, held to BPE's definition and to transformers."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
from gguf import GGUFReader, TokenType
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from montessori_jax.models.tokenizer import open_gguf
from tests.models.tokenizer.texts import HARD, shipped_texts

# Where splitting off digits first changes where GPT-2's pattern cuts: white space of two or more
# characters before a number, or any before a number that is no ASCII digit.
NEAR_NUMBER = regex.compile(r"\s\s\p{N}|\s[\p{N}--[0-9]]", regex.V1)


@pytest.fixture(scope="module")
def thousand_texts(shared_data: Path) -> list[str]:
    lines = (shared_data / "alpaca_seed_999.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [row["instruction"] + "\n" + row["input"] + "\n\n" + row["output"] for row in rows]
    assert len(texts + HARD) >= 1000
    return texts + HARD


@pytest.fixture(scope="module")
def transformers_smollm2(smollm2_gguf: Path) -> PreTrainedTokenizerFast:
    pytest.importorskip("torch")  # transformers reads GGUF with it
    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


def python_bpe(reader: GGUFReader) -> Callable[[str], list[int]]:
    """Byte-level BPE written from its definition, cut as llama.cpp's "smollm" cuts.

    llama.cpp applies two patterns in turn: every number character by itself, then GPT-2's.
    """
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    ids = {token: index for index, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    controls = regex.compile("(" + "|".join(map(regex.escape, control)) + ")")
    number = regex.compile(r"\p{N}|[^\p{N}]+")
    word = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    done: dict[str, list[int]] = {}

    def merged(piece: str) -> list[int]:
        if piece not in done:
            parts = [letters[byte] for byte in piece.encode()]
            while True:
                pairs = [(ranks.get(p, len(ranks)), i) for i, p in enumerate(pairwise(parts))]
                rank, i = min(pairs, default=(len(ranks), 0))
                if rank == len(ranks):
                    break
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            done[piece] = [ids[part] for part in parts]
        return done[piece]

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for stretch in controls.split(text):
            if stretch in control:
                found.append(ids[stretch])
                continue
            for part in number.findall(stretch):
                for piece in word.findall(part):
                    found += merged(piece)
        return found

    return encode


def test_smollm2_ids_equal_a_bpe_written_from_its_definition(
    smollm2_tokenizer: PreTrainedTokenizerFast, smollm2_gguf: Path, thousand_texts: list[str]
) -> None:
    encode = python_bpe(open_gguf(smollm2_gguf))
    for text in thousand_texts:
        assert smollm2_tokenizer.encode(text) == encode(text)


def test_smollm2_ids_equal_a_bpe_written_from_its_definition_on_shipped_texts(
    smollm2_tokenizer: PreTrainedTokenizerFast, smollm2_gguf: Path
) -> None:
    encode = python_bpe(open_gguf(smollm2_gguf))
    for text in shipped_texts():
        assert smollm2_tokenizer.encode(text) == encode(text)


def test_smollm2_differs_from_transformers_by_the_digit_step_alone(
    smollm2_tokenizer: PreTrainedTokenizerFast,
    transformers_smollm2: PreTrainedTokenizerFast,
    thousand_texts: list[str],
) -> None:
    theirs = [transformers_smollm2.encode(text) for text in thousand_texts]
    ours = [smollm2_tokenizer.encode(text) for text in thousand_texts]
    unequal = [text for text, a, b in zip(thousand_texts, ours, theirs, strict=True) if a != b]
    assert all(NEAR_NUMBER.search(text) for text in unequal)
    assert smollm2_tokenizer.tokenize("a\n\n1.") == ["a", "ĊĊ", "1", "."]

    # With transformers' own cutting in place of the published one, all of them are equal.
    backend = Tokenizer.from_str(smollm2_tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert [backend.encode(text).ids for text in thousand_texts] == theirs


def test_smollm2_equals_transformers_with_the_published_cutting(
    smollm2_tokenizer: PreTrainedTokenizerFast,
    transformers_smollm2: PreTrainedTokenizerFast,
    thousand_texts: list[str],
    tmp_path: Path,
) -> None:
    """The published tokenizer.json, in transformers: its vocabulary, Digits, then ByteLevel."""
    transformers_smollm2.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {**byte_level, "use_regex": True},
        ],
    }
    path.write_text(json.dumps(spec), encoding="utf-8")
    published = AutoTokenizer.from_pretrained(tmp_path)
    for text in thousand_texts:
        assert smollm2_tokenizer.encode(text) == published.encode(text)
        ids = smollm2_tokenizer.encode(text, split_special_tokens=True)
        assert ids == published.encode(text, split_special_tokens=True)
        assert smollm2_tokenizer.decode(ids) == text


def test_smollm2_special_tokens_and_template_equal_transformers(
    smollm2_tokenizer: PreTrainedTokenizerFast,
    transformers_smollm2: PreTrainedTokenizerFast,
) -> None:
    assert smollm2_tokenizer.special_tokens_map == transformers_smollm2.special_tokens_map
    assert smollm2_tokenizer.added_tokens_decoder == transformers_smollm2.added_tokens_decoder
    assert smollm2_tokenizer.get_vocab() == transformers_smollm2.get_vocab()
    assert smollm2_tokenizer.chat_template == transformers_smollm2.chat_template
    assert (
        smollm2_tokenizer.bos_token_id,
        smollm2_tokenizer.eos_token_id,
        smollm2_tokenizer.pad_token_id,
    ) == (1, 2, 2)
    assert smollm2_tokenizer.model_max_length == 8192


def test_plain_reader_reads_what_the_package_reads(smollm2_gguf: Path) -> None:
    ours, theirs = open_gguf(smollm2_gguf), GGUFReader(smollm2_gguf)
    assert list(ours.fields) == list(theirs.fields)
    for key, field in ours.fields.items():
        assert field.contents() == theirs.fields[key].contents()
    for a, b in zip(ours.tensors, theirs.tensors, strict=True):
        assert (a.name, a.tensor_type, a.data_offset) == (b.name, b.tensor_type, b.data_offset)
        np.testing.assert_array_equal(a.shape, b.shape)
    np.testing.assert_array_equal(ours.tensors[3].data, theirs.tensors[3].data)
