"""Sentencepiece tokenizers out of GGUF against sentencepiece itself, on a model trained here."""

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from gguf import GGUFWriter, TokenType
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from montessori_jax.errors import UserError
from montessori_jax.models.tokenizer import save_tokenizer, tokenizer_from_gguf
from tests.models.tokenizer.texts import HARD, shipped_texts
from tests.sentencepieces import train_sentencepiece

USER_DEFINED = ["\n", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581", "<b>", "</b>", "e\u2581t"]
MORE = [
    "a  b   c    d     e",
    "  two before, two after  ",
    "\n\n\n\n  x\n \n",
    "<b>bold</b> is <b >not</b>",
    "the tea tree  the  tree",
    "\u2581written like a space\u2581\u2581",
]


def train(folder: Path, *, space_prefix: bool) -> Path:
    """A tokenizer.model as Gemma's is, with pieces given by hand and text as it stands; or as
    Llama 2's is, with a space before the text."""
    return train_sentencepiece(
        folder,
        shipped_texts(),
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=space_prefix,
        character_coverage=0.999,
        user_defined_symbols=[] if space_prefix else USER_DEFINED,
        control_symbols=["<start_of_turn>"],
    )


def write_gguf(path: Path, model: Path, *, scores: bool = True, **switches: bool) -> Path:
    """Its pieces as llama.cpp's converter writes them."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    writer = GGUFWriter(path, "gemma3")
    writer.add_context_length(512)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    hand = [piece.type == TokenType.USER_DEFINED for piece in proto.pieces]
    writer.add_token_list(
        [
            piece.piece.replace("\u2581", " ") if given else piece.piece
            for piece, given in zip(proto.pieces, hand, strict=True)
        ]
    )
    if scores:
        writer.add_token_scores(
            [
                -1000.0 if given else piece.score
                for piece, given in zip(proto.pieces, hand, strict=True)
            ]
        )
    writer.add_token_types([piece.type for piece in proto.pieces])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in switches.items():
        {"add_bos": writer.add_add_bos_token, "space_prefix": writer.add_add_space_prefix}[key](
            value
        )
    writer.add_tensor("token_embd.weight", np.zeros((len(proto.pieces), 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["as it stands", "space before"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("pieces")
    return request.param, train(folder, space_prefix=request.param)


def test_ids_and_texts_are_sentencepieces(trained: tuple[bool, Path], tmp_path: Path) -> None:
    prefix, model = trained
    # Missing keys mean what llama.cpp takes them for: a bos, and a space before the text.
    switches = {} if prefix else {"space_prefix": False}
    loaded = tokenizer_from_gguf(write_gguf(tmp_path / "m.gguf", model, **switches))
    reference = sentencepiece.SentencePieceProcessor(str(model))
    for text in [*shipped_texts(), *MORE]:
        ids = reference.encode(text)
        assert loaded.encode(text, add_special_tokens=False) == ids
        assert loaded.encode(text) == [1, *ids]
        assert loaded.decode(ids) == reference.decode(ids)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (1, 2, 0)
    assert loaded.model_max_length == 512


def test_control_pieces_are_special_tokens(trained: tuple[bool, Path], tmp_path: Path) -> None:
    prefix, model = trained
    path = write_gguf(tmp_path / "m.gguf", model, space_prefix=prefix, add_bos=False)
    loaded = tokenizer_from_gguf(path)
    reference = sentencepiece.SentencePieceProcessor(str(model))
    [turn] = [loaded.convert_tokens_to_ids("<start_of_turn>")]
    assert turn == reference.piece_to_id("<start_of_turn>")
    assert loaded.encode("<start_of_turn>user  x") == [turn, *reference.encode("user  x")]
    assert loaded.decode([turn, *reference.encode("x")], skip_special_tokens=True) == "x"


def test_an_exported_folder_has_the_same_ids(trained: tuple[bool, Path], tmp_path: Path) -> None:
    prefix, model = trained
    loaded = tokenizer_from_gguf(write_gguf(tmp_path / "m.gguf", model, space_prefix=prefix))
    save_tokenizer(loaded, tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*HARD, *MORE]:
        assert again.encode(text) == loaded.encode(text)


def test_without_scores_it_is_refused(trained: tuple[bool, Path], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", trained[1], scores=False)
    with pytest.raises(UserError, match=r"llama/default.*llama with scores"):
        tokenizer_from_gguf(path)
