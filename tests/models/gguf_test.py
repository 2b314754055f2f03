"""GGUF files against transformers' own reader: tiny ones of every kind, and the real SmolLM2."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from montessori_jax.errors import UserError
from montessori_jax.models import RopeScaling
from montessori_jax.models.families import family_of
from montessori_jax.models.folder import save_folder
from montessori_jax.models.gguf import load_gguf
from montessori_jax.models.loaded import LoadedModel
from montessori_jax.models.rope import inverse_frequencies
from montessori_jax.models.weights import from_params
from tests.models.gguf_sizes import write_sizes
from tests.models.tiny import (
    CONFIG,
    jax_logits,
    relative_error,
    state,
    tokens_for,
    torch_logits,
    torch_model,
)

# Widths of whole blocks of 32, so that every tensor can be quantised.
TINY = CONFIG | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
Kind = gguf.GGMLQuantizationType


def llama_cpp_rows(array: np.ndarray, heads: int) -> np.ndarray:
    """The order that llama.cpp's converter stores query and key rows in."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def write_gguf(
    path: Path,
    config: dict[str, Any],
    kind: Kind = Kind.F32,
    *,
    extra: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
) -> Path:
    """A file as llama.cpp's converter writes it, by its own library."""
    writer = gguf.GGUFWriter(path, architecture)
    write_sizes(writer, config)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(97 + n) if n < 26 else f"<{n}>" for n in range(60)] + ["ab"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 61)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(30)
    writer.add_eos_token_id(31)
    for key, value in (extra or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    model = torch_model(config)
    for name, array in state(model).items():
        if ".q_proj." in name:
            array = llama_cpp_rows(array, config["num_attention_heads"])
        if ".k_proj." in name:
            array = llama_cpp_rows(array, config["num_key_value_heads"])
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        stored = Kind.F32 if array.ndim == 1 else kind
        writer.add_tensor(theirs, quantize(array, stored), raw_dtype=stored)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


VARIATIONS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one kv head": {"num_key_value_heads": 1},
    "all heads": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 32},
    "rope base": {"rope_theta": 100000.0},
    "epsilon": {"rms_norm_eps": 1e-3},
    "attention bias": {"attention_bias": True},
    "both biases": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_float_files_give_back_the_model_they_were_made_from(name: str, tmp_path: Path):
    config = TINY | VARIATIONS[name]
    loaded = load_gguf(write_gguf(tmp_path / "model.gguf", config))
    assert loaded.model.config == family_of(config, "x")
    found = dict(from_params(loaded.model.config, loaded.params))
    expected = state(torch_model(config))
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].tobytes() == array.tobytes(), key
    tokens = tokens_for(config)
    logits = jax_logits(loaded.model, loaded.params, tokens)
    assert relative_error(logits, torch_logits(torch_model(config), tokens)) < 1e-5
    assert loaded.generation == {"bos_token_id": 30, "eos_token_id": 31}
    assert loaded.tokenizer.encode("abc") == [60, 2]


@pytest.mark.parametrize(
    "kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
)
def test_quantised_files_are_what_transformers_reads(kind: Kind, tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf", TINY, kind)
    loaded = load_gguf(path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).eval()
    for name, array in from_params(loaded.model.config, loaded.params):
        assert array.dtype == np.float32
        assert np.array_equal(array, theirs.state_dict()[name].numpy()), name


def test_another_dtype_and_name(tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf", TINY)
    loaded = load_gguf(path, name="wheel:x", dtype=jnp.bfloat16)
    assert loaded.name == "wheel:x"
    assert loaded.params["norm"]["scale"].dtype == jnp.bfloat16


def test_linear_scaling_is_read(tmp_path: Path):
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    loaded = load_gguf(write_gguf(tmp_path / "model.gguf", TINY, extra=extra))
    assert loaded.model.config.rope_scaling == RopeScaling("linear", 2.5)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaling_of_llama_3_1_is_recognised_by_its_divisors(factor: float, tmp_path: Path):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = TINY | {"rope_theta": 500000.0, "rope_scaling": scaling, "head_dim": 64}
    # llama.cpp's converter computes them so, from config.json.
    plain = 1.0 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    wavelength = 2 * np.pi / plain
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    divisors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    path = write_gguf(tmp_path / "model.gguf", config, tensors={"rope_freqs.weight": divisors})
    loaded = load_gguf(path)
    assert loaded.model.config == family_of(config, "x")
    assert np.allclose(inverse_frequencies(loaded.model.config), plain / divisors, rtol=1e-5)


def test_unknown_divisors_are_refused(tmp_path: Path):
    divisors = np.linspace(1, 4, 8).astype(np.float32)
    path = write_gguf(tmp_path / "m.gguf", TINY, tensors={"rope_freqs.weight": divisors})
    with pytest.raises(UserError, match=r"rope_freqs.weight is no RoPE scaling of Llama 3.1"):
        load_gguf(path)


class TestErrors:
    def refused(self, path: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_gguf(path)
        message = str(caught.value)
        assert "\n" not in message
        assert str(path) in message
        return message

    def test_no_file(self, tmp_path: Path):
        assert "no such GGUF file" in self.refused(tmp_path / "no.gguf")

    def test_another_architecture(self, tmp_path: Path):
        path = write_gguf(tmp_path / "m.gguf", TINY, architecture="gemma")
        message = self.refused(path)
        assert "GGUF architecture 'gemma' is not supported (llama, gemma3 are)" in message

    @pytest.mark.parametrize(
        ("extra", "part"),
        [
            ({"llama.rope.scaling.type": "yarn"}, "RoPE type 'yarn'"),
            ({"llama.rope.scaling.type": "linear"}, "'rope_scaling.factor' is missing"),
            ({"llama.expert_count": 8}, "mixture of experts"),
            ({"llama.attention.sliding_window": 512}, "'sliding_window' is 512"),
        ],
    )
    def test_settings(self, tmp_path: Path, extra: dict, part: str):
        assert part in self.refused(write_gguf(tmp_path / "m.gguf", TINY, extra=extra))

    def test_a_setting_that_might_matter_is_warned_of(self, tmp_path: Path):
        path = write_gguf(tmp_path / "m.gguf", TINY, extra={"llama.logit_scale": 0.5})
        with pytest.warns(UserWarning, match=r"llama\.logit_scale"):
            load_gguf(path)

    def test_unknown_tensor(self, tmp_path: Path):
        extra = {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
        path = write_gguf(tmp_path / "m.gguf", TINY, tensors=extra)
        assert "unknown tensors: blk.0.attn_q_norm.weight" in self.refused(path)

    def test_missing_layers(self, tmp_path: Path):
        path = write_gguf(tmp_path / "m.gguf", TINY)
        content = path.read_bytes().replace(b"blk.2.ffn_up", b"blk.2.ffn_xx")
        path.write_bytes(content)
        message = self.refused(path)
        assert "missing tensors: model.layers.2.mlp.up_proj.weight" in message
        assert "unknown tensors: blk.2.ffn_xx.weight" in message

    @pytest.mark.parametrize("keep", [0, 3, 20, 300, 2_000, -100])
    def test_a_file_cut_short(self, tmp_path: Path, keep: int):
        path = write_gguf(tmp_path / "m.gguf", TINY)
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(path)

    def test_not_gguf(self, tmp_path: Path):
        path = tmp_path / "m.gguf"
        path.write_bytes(b"PK" * 500)
        self.refused(path)


TEXT = (
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. In 1779 Jan "
    "Ingenhousz found that plants give off oxygen only in the light.\n\nQ: Why are leaves green?\n"
    "A: Chlorophyll absorbs red and blue light (about 430 and 660 nm) and reflects the rest."
)


class TestSmolLm2:
    """The real weights. transformers' reader needs torch and is the independent side."""

    def test_tensors_are_those_of_transformers(self, smollm2: LoadedModel, smollm2_torch):
        expected = smollm2_torch.state_dict()
        names = []
        for name, array in from_params(smollm2.model.config, smollm2.params):
            assert np.array_equal(array, expected[name].numpy()), name
            names.append(name)
        assert set(names) == set(expected) - {"lm_head.weight"}
        assert smollm2.model.parameter_count() == 134_515_008

    def test_configuration_and_ids(self, smollm2: LoadedModel):
        config = smollm2.model.config
        assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
        assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
        assert (config.rope_theta, config.rms_norm_eps) == (100000.0, 1e-5)
        assert config.tie_word_embeddings
        assert smollm2.generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}

    def test_logits_agree_with_transformers_here_and_after_export(
        self, smollm2: LoadedModel, smollm2_torch, tmp_path: Path
    ):
        ids = np.asarray(smollm2.tokenizer.encode(TEXT))[None]
        assert ids.shape[1] > 60
        expected = torch_logits(smollm2_torch, ids)
        found = jax_logits(smollm2.model, smollm2.params, ids)
        assert relative_error(found, expected) < 1e-4
        assert np.array_equal(found.argmax(-1), expected.argmax(-1))

        out = tmp_path / "out"
        save_folder(out, smollm2.model, smollm2.params, smollm2.tokenizer, smollm2.generation)
        exported = AutoModelForCausalLM.from_pretrained(out).eval()
        # The same software on the same tensors; threads may sum in another order.
        assert relative_error(torch_logits(exported, ids), expected) < 1e-6
        assert AutoTokenizer.from_pretrained(out).encode(TEXT) == ids[0].tolist()

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_loading_takes_under_two_gigabytes_and_no_torch(self, smollm2_gguf: Path):
        program = (
            "import sys\n"
            "from montessori_jax.models.sources import load_model\n"
            f"load_model({str(smollm2_gguf)!r})\n"
            "assert 'torch' not in sys.modules\n"
            "print(open('/proc/self/status').read())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        # VmHWM: getrusage's figure would count the process that this one was forked from.
        peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
        assert int(peak[1]) * 1024 < 2e9
