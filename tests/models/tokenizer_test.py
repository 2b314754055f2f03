"""Tokenizers from GGUF, from folders and back, held to independent implementations."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import sentencepiece
from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from montessori_jax.errors import UserError
from montessori_jax.models.tokenizer import (
    load_tokenizer,
    open_gguf,
    save_tokenizer,
    tokenizer_from_gguf,
)

SHIPPED = Path(__file__).parents[2] / "montessori_jax" / "data" / "shipped"
HARD = [
    "",
    " ",
    "\n\n1. Go\n\n2. Stop\n   10 steps",
    "x   12 y  3",
    "½ cup, 10² m, ١٢٣ and Ⅷ, price $5, the 90's, 3.14",
    "don't I'll we've THEY'RE",
    "tabs\t\tand \r\n returns   ",
    "naïve façade, 日本語のテキスト, 한국어, Россия, עברית",
    "emoji 👍🏽 🇺🇸 ❤️, zero\u200bwidth, nbsp\xa0here",
    "def f(x):\n    return x ** 2  # comment\n\n\n\nprint(f(12))",
    "<|im_start|>user\nhi<|im_end|>\n<repo_name>x <|endoftext|>",
]
# Where splitting off digits first changes where GPT-2's pattern cuts: white space of two or more
# characters before a number, or any before a number that is no ASCII digit.
NEAR_NUMBER = regex.compile(r"\s\s\p{N}|\s[\p{N}--[0-9]]", regex.V1)


def shipped_texts() -> list[str]:
    rows = [
        json.loads(line)
        for name in ("seeds", "reference", "heldout")
        for line in (SHIPPED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return HARD + [text for row in rows for text in (row["instruction"], row["output"])]


@pytest.fixture(scope="module")
def thousand_texts(shared_data: Path) -> list[str]:
    lines = (shared_data / "alpaca_seed_999.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [row["instruction"] + "\n" + row["input"] + "\n\n" + row["output"] for row in rows]
    assert len(texts + HARD) >= 1000
    return texts + HARD


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_gguf: Path) -> PreTrainedTokenizerFast:
    return tokenizer_from_gguf(smollm2_gguf)


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


@pytest.mark.parametrize("real", [False, True])
def test_exported_folder_loads_in_transformers(
    real: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    name = "smollm2_tokenizer" if real else "trained_gguf"
    found = request.getfixturevalue(name)
    tokenizer = found if real else tokenizer_from_gguf(found)
    folder = tmp_path / "made" / "model"
    save_tokenizer(tokenizer, folder)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    for loaded in (AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)):
        assert loaded.special_tokens_map == tokenizer.special_tokens_map
        assert loaded.added_tokens_decoder == tokenizer.added_tokens_decoder
        assert loaded.chat_template == tokenizer.chat_template
        assert loaded.model_max_length == tokenizer.model_max_length
        for text in shipped_texts():
            assert loaded.encode(text) == tokenizer.encode(text)
            ids = tokenizer.encode(text, split_special_tokens=True)
            assert loaded.encode(text, split_special_tokens=True) == ids
    again = tmp_path / "again"
    save_tokenizer(load_tokenizer(folder), again)
    for path in again.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
        assert str(tmp_path) not in path.read_text(encoding="utf-8")


# Without the real model: a byte-level tokenizer trained here, written to GGUF, read back.


def train_byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(shipped_texts(), trainer)
    return tokenizer


def write_gguf(path: Path, tokenizer: Tokenizer, **changes: object) -> Path:
    spec = json.loads(tokenizer.to_str())["model"]
    ordered = sorted(spec["vocab"], key=spec["vocab"].__getitem__)
    values: dict[str, object] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": [*ordered, "<think>"],
        "types": [TokenType.CONTROL] * 3
        + [TokenType.NORMAL] * (len(ordered) - 3)
        + [TokenType.USER_DEFINED],
        "merges": [" ".join(merge) for merge in spec["merges"]],
        "bos": 1,
        "add_bos": True,
        "template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    } | changes
    writer = GGUFWriter(path, "llama")
    for add, number in (
        (writer.add_context_length, 512),
        (writer.add_embedding_length, 8),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 16),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_eos_token_id, 2),
    ):
        add(number)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, write in (
        ("model", writer.add_tokenizer_model),
        ("pre", writer.add_tokenizer_pre),
        ("tokens", writer.add_token_list),
        ("types", writer.add_token_types),
        ("merges", writer.add_token_merges),
        ("bos", writer.add_bos_token_id),
        ("add_bos", writer.add_add_bos_token),
        ("template", writer.add_chat_template),
    ):
        if values[key] is not None:
            write(values[key])
    writer.add_tensor("token_embd.weight", np.zeros((len(ordered) + 1, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_byte_level()


@pytest.fixture(scope="module")
def trained_gguf(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", trained)


def test_gguf_gives_back_the_tokenizer_it_was_written_from(
    trained: Tokenizer, trained_gguf: Path
) -> None:
    loaded = tokenizer_from_gguf(trained_gguf)
    for text in shipped_texts():
        ids = loaded.encode(text, add_special_tokens=False)
        assert ids == trained.encode(text).ids
        assert loaded.encode(text) == [1, *ids]
    assert loaded.encode("a<think>b", add_special_tokens=False, split_special_tokens=True) == [
        *trained.encode("a").ids,
        trained.get_vocab_size(),
        *trained.encode("b").ids,
    ]
    assert loaded.pad_token is None
    assert loaded.model_max_length == 512


def test_gguf_agrees_with_transformers_where_it_knows_the_cutting(
    trained: Tokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    path = write_gguf(tmp_path / "gpt2.gguf", trained, pre="gpt-2")
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
    changes: dict[str, object], message: str, trained: Tokenizer, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "odd.gguf", trained, **changes)
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


# Folders.


def train_sentencepiece(folder: Path, **changes: object) -> None:
    """Write a tokenizer.model, trained with the options that Llama 2's was."""
    options = {
        "model_type": "bpe",
        "vocab_size": 900,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.999,
        "minloglevel": 2,
    } | changes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(shipped_texts()).split("\n")),
        model_prefix=str(folder / "tokenizer"),
        **options,
    )
    (folder / "tokenizer.vocab").unlink()


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    train_sentencepiece(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "bos"),
    [
        (None, [1]),
        ({}, [1]),
        ({"add_bos_token": False}, []),
        ({"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}, [1]),
    ],
)
def test_sentencepiece_alone_gives_sentencepiece_ids(
    config: dict[str, object] | None,
    bos: list[int],
    sentencepiece_folder: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sentencepiece_folder, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    reference = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    # transformers adds no prefix to a text that begins with a space, sentencepiece does.
    texts = [text for text in shipped_texts() if not text.startswith(" ")]
    assert len(texts) > 300
    for text in texts:
        ids = reference.encode(text)
        assert loaded.encode(text) == bos + ids
        assert loaded.decode(ids) == text
    assert (loaded.bos_token_id, loaded.eos_token_id) == (reference.bos_id(), reference.eos_id())
    if config and "tokenizer_class" in config:
        theirs = AutoTokenizer.from_pretrained(folder)
        assert all(theirs.encode(text) == loaded.encode(text) for text in shipped_texts())

    save_tokenizer(loaded, tmp_path / "exported")
    shutil.copy(folder / "config.json", tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    for text in shipped_texts():
        assert exported.encode(text) == loaded.encode(text)
        assert exported.decode(exported.encode(text)) == loaded.decode(loaded.encode(text))


def test_sentencepiece_of_another_kind_is_refused(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path, model_type="unigram", vocab_size=400)
    with pytest.raises(UserError, match=r"tokenizer\.model: .*not of Llama's kind"):
        load_tokenizer(tmp_path)


def test_missing_and_broken_tokenizers_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model folder at .*absent"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no tokenizer in .*tokenizer\.json.*tokenizer\.model"):
        load_tokenizer(tmp_path)
    for name, content in (("tokenizer.model", b"\x00\x01junk"), ("tokenizer.json", b"{broken")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_code_in_a_folder_never_runs(
    name: str, trained_gguf: Path, sentencepiece_folder: Path, tmp_path: Path
) -> None:
    if name == "tokenizer.json":
        save_tokenizer(tokenizer_from_gguf(trained_gguf), tmp_path)
    else:
        shutil.copy(sentencepiece_folder / name, tmp_path)
        (tmp_path / "tokenizer_config.json").write_text("{}")
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "tokenizer_class": "Evil",
    }
    path.write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Evil(PreTrainedTokenizerFast):\n    pass\n"
    )
    if name == "tokenizer.json":
        expected = tokenizer_from_gguf(trained_gguf)
    else:
        expected = load_tokenizer(sentencepiece_folder)
    assert load_tokenizer(tmp_path).encode("Hello 12") == expected.encode("Hello 12")
    assert not (tmp_path / "ran").exists()


def test_no_torch_is_needed(trained_gguf: Path, sentencepiece_folder: Path, tmp_path: Path) -> None:
    program = """
import sys

sys.modules["torch"] = None  # as if it were not installed
gguf, model, out = sys.argv[1:]
from montessori_jax.data.chat import ChatFormat
from montessori_jax.models.tokenizer import load_tokenizer, save_tokenizer, tokenizer_from_gguf
tokenizer = tokenizer_from_gguf(gguf)
save_tokenizer(tokenizer, out)
talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<|im_end|>"}]
for loaded in (tokenizer, load_tokenizer(out), load_tokenizer(model)):
    chat = ChatFormat(loaded)
    print(len(chat.encode(talk).tokens) > 2, len(chat.stop_ids))
assert sys.modules["torch"] is None
"""
    done = subprocess.run(
        [sys.executable, "-c", program, trained_gguf, sentencepiece_folder, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "1", "True", "1", "True", "1"]
