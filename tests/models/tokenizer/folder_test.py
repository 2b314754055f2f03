"""Tokenizers from folders and back, held to transformers and to sentencepiece."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from montessori_jax.errors import UserError
from montessori_jax.models.tokenizer import load_tokenizer, save_tokenizer, tokenizer_from_gguf
from tests.models.tokenizer.texts import shipped_texts


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


@pytest.mark.parametrize("real", [False, True])
def test_exported_folder_loads_in_transformers(
    real: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    name = "smollm2_tokenizer" if real else "byte_level_gguf"
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
    name: str, byte_level_gguf: Path, sentencepiece_folder: Path, tmp_path: Path
) -> None:
    if name == "tokenizer.json":
        save_tokenizer(tokenizer_from_gguf(byte_level_gguf), tmp_path)
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
        expected = tokenizer_from_gguf(byte_level_gguf)
    else:
        expected = load_tokenizer(sentencepiece_folder)
    assert load_tokenizer(tmp_path).encode("Hello 12") == expected.encode("Hello 12")
    assert not (tmp_path / "ran").exists()


def test_no_torch_is_needed(
    byte_level_gguf: Path, sentencepiece_folder: Path, tmp_path: Path
) -> None:
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
        [sys.executable, "-c", program, byte_level_gguf, sentencepiece_folder, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "1", "True", "1", "True", "1"]
