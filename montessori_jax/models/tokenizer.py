"""Tokenizers from Hugging Face folders and from GGUF files, and back to folders. Needs no torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from montessori_jax.errors import UserError
from montessori_jax.models.pieces import SPACE, tokenizer_of_pieces

# How text is cut before byte-pair merging, by the name GGUF files give it. "smollm" splits off each
# digit first: the published tokenizer.json of SmolLM and SmolLM2 says so, and llama.cpp does it too
# (LLAMA_VOCAB_PRE_TYPE_SMOLLM). transformers 5.23 leaves that step out, both for this GGUF file and
# for the published folder, which matters where white space of two characters or more, or a digit
# outside ASCII, meets a number: "\n\n1." has 3 tokens in training and 4 in transformers.
_DIGITS = pre_tokenizers.Digits(individual_digits=True)
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
PRE_TOKENIZERS: dict[str, pre_tokenizers.PreTokenizer] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([_DIGITS, _BYTE_LEVEL]),
}

# Words, digits, runs of spaces, letters that few vocabularies have whole.
_PROBE = "Hello there, what is 12 x  345?\n\n  1. naïve 日本 ½ \t👍 don't"


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Tokenizer of a local Hugging Face folder, never running code that the folder brings.

    A ``tokenizer.json`` is used exactly as it is written. (``AutoTokenizer`` of transformers 5
    rebuilds some from the class named in ``tokenizer_config.json`` and may lose steps.) A folder
    with a sentencepiece ``tokenizer.model`` alone is converted, for Llama's kind of such models.

    Args:
        folder: folder with ``tokenizer.json`` or ``tokenizer.model``, and what goes with them
            (``tokenizer_config.json``, ``chat_template.jinja``).

    Raises:
        UserError: the folder or its tokenizer is missing or cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no model folder at {folder}: give the path of a Hugging Face folder")
    as_written = (folder / "tokenizer.json").is_file()
    if not as_written and not (folder / "tokenizer.model").is_file():
        raise UserError(
            f"no tokenizer in {folder}: it needs a tokenizer.json or a sentencepiece "
            "tokenizer.model; copy it from the model that the weights came from"
        )
    try:
        if as_written:
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return _from_sentencepiece(folder)
    except Exception as error:  # transformers and tokenizers raise bare Exceptions for broken files
        name = "tokenizer.json" if as_written else "tokenizer.model"
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read the tokenizer {folder / name}: {reason}") from error


def _from_sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    """The Llama family's conversion, accepted where it gives the ids of sentencepiece itself.

    (``AutoTokenizer`` of transformers 5.23 drops the space before the first word unless the folder
    names its class.) Models of this kind were trained with a bos token, so one is added unless
    ``tokenizer_config.json`` says otherwise, as transformers 4 and llama.cpp do.
    """
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer  # slow imports, seldom needed

    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    expected = SentencePieceProcessor(str(folder / "tokenizer.model")).encode(_PROBE)
    for prefix in (True, False):
        tokenizer = LlamaTokenizer.from_pretrained(
            folder,
            local_files_only=True,
            add_prefix_space=prefix,
            add_bos_token=config.get("add_bos_token", True),
        )
        if tokenizer.encode(_PROBE, add_special_tokens=False) == expected:
            return tokenizer
    raise ValueError("it is not of Llama's kind; convert it to a tokenizer.json with transformers")


def tokenizer_from_gguf(
    source: GGUFReader | str | Path, *, origin: str | None = None
) -> PreTrainedTokenizerFast:
    """Tokenizer, special tokens and chat template from the metadata of a GGUF file.

    No tensor is read. The keys are those of llama.cpp's ``tokenizer.ggml.*``: tokens, token types
    (control tokens become special tokens), the ids of bos, eos, unk and pad, whether a bos is
    added, and ``tokenizer.chat_template``. Model ``gpt2`` is byte-level BPE, with merges and the
    pre-tokenizer by name (``PRE_TOKENIZERS``); model ``llama`` is sentencepiece's BPE, with scores
    (`montessori_jax.models.pieces`).

    Args:
        source: a path, or an open reader (parsing the metadata takes a second: share it).
        origin: what errors call an open reader.

    Raises:
        UserError: no such file, no tokenizer in it, or one of a kind that is not supported.
    """
    reader = source if isinstance(source, GGUFReader) else open_gguf(source)
    name = origin or ("the GGUF file" if isinstance(source, GGUFReader) else str(source))
    fields = {
        key.removeprefix("tokenizer.ggml."): field
        for key, field in reader.fields.items()
        if key.startswith("tokenizer.ggml.")
    }
    for key in ("model", "tokens", "token_type"):
        if key not in fields:
            raise UserError(f"no tokenizer in {name}: its metadata lacks tokenizer.ggml.{key}")
    kind = fields["model"].contents()
    pre = fields["pre"].contents() if "pre" in fields else "gpt-2"
    in_pieces = kind == "llama" and "scores" in fields
    if not in_pieces and (kind != "gpt2" or pre not in PRE_TOKENIZERS or "merges" not in fields):
        raise UserError(
            f"the tokenizer in {name} is {kind}/{pre}: only gpt2 with merges and one of "
            f"{', '.join(PRE_TOKENIZERS)}, or llama with scores, is read from GGUF; use the "
            "model's Hugging Face folder"
        )
    tokens: list[str] = fields["tokens"].contents()
    types: list[int] = fields["token_type"].contents()
    # Sentencepiece cuts out user-defined pieces where spaces are SPACE already; llama.cpp's
    # converter has written their spaces as such.
    user_spaces = in_pieces and not _content(fields, "add_space_prefix", True)
    if user_spaces:
        tokens = [
            token.replace(" ", SPACE) if given == TokenType.USER_DEFINED else token
            for token, given in zip(tokens, types, strict=True)
        ]
    if in_pieces:
        backend = tokenizer_of_pieces(
            tokens,
            fields["scores"].contents(),
            types,
            unknown=_content(fields, "unknown_token_id", None),
            space_prefix=not user_spaces,
        )
    else:
        backend = Tokenizer(
            models.BPE(
                vocab={token: index for index, token in enumerate(tokens)},
                merges=[tuple(merge.split(" ")) for merge in fields["merges"].contents()],
            )
        )
        backend.pre_tokenizer = PRE_TOKENIZERS[pre]
        backend.decoder = decoders.ByteLevel()
    for wanted in (TokenType.CONTROL, TokenType.USER_DEFINED):
        special = wanted == TokenType.CONTROL
        added = [
            AddedToken(token, normalized=user_spaces and not special, special=special)
            for token, given in zip(tokens, types, strict=True)
            if given == wanted
        ]
        backend.add_special_tokens(added) if special else backend.add_tokens(added)
    options: dict[str, Any] = {}
    for option, key in (
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ):
        if key in fields:
            options[option] = tokens[fields[key].contents()]
    if "add_bos_token" in fields or in_pieces:
        options["add_bos_token"] = bool(_content(fields, "add_bos_token", True))
    template = reader.get_field("tokenizer.chat_template")
    if template is not None:
        options["chat_template"] = template.contents()
    architecture = reader.get_field("general.architecture")
    if architecture is not None:
        length = reader.get_field(f"{architecture.contents()}.context_length")
        if length is not None:
            options["model_max_length"] = int(length.contents())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **options
    )


def _content(fields: dict[str, Any], key: str, absent: Any) -> Any:
    return fields[key].contents() if key in fields else absent


class _PlainReader(GGUFReader):
    """A reader that slices a plain array over the mapped file.

    Slicing a ``numpy.memmap`` costs microseconds, and the vocabulary of a model takes a million
    slices: plain slices parse the metadata in a third of the time. Tensors stay unread either way.
    """

    @property  # type: ignore[override]  # the base has a numpy.memmap here
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = mapped.view(np.ndarray)


def open_gguf(path: str | Path) -> GGUFReader:
    """Reader of a GGUF file's metadata and tensors; tensors are read when they are asked for.

    Raises:
        UserError: no such file, or not a GGUF file.
    """
    try:
        return _PlainReader(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as a GGUF file: {error}") from error


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Write ``tokenizer`` so that transformers' ``AutoTokenizer`` loads it with the same ids.

    ``tokenizer_config.json`` names the generic class, which takes ``tokenizer.json`` as it is
    written; a family's class would rebuild the text splitting from its own defaults. Nothing that
    depends on the machine is written, so equal tokenizers give equal files.

    Args:
        tokenizer: with its special tokens and chat template.
        folder: made if it is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("auto_map", "backend", "is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
