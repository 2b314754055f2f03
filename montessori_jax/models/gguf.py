"""GGUF files (llama.cpp's format) -> parameters: read, de-quantised, and put in our order."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from gguf.quants import dequantize
from jax.sharding import Mesh

from montessori_jax.errors import UserError
from montessori_jax.models.config import ModelConfig, RopeScaling
from montessori_jax.models.decoder import Model
from montessori_jax.models.families import family_of
from montessori_jax.models.loaded import LoadedModel, fingerprint
from montessori_jax.models.rope import inverse_frequencies
from montessori_jax.models.tokenizer import open_gguf, tokenizer_from_gguf
from montessori_jax.models.weights import stored_shapes, to_params

# GGUF key (after the architecture's name) -> config.json key. None: read here and nowhere else.
SHARED_KEYS: dict[str, str | None] = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.value_length": None,
    "rope.freq_base": "rope_theta",
    "rope.dimension_count": None,
    "rope.scaling.type": None,
    "rope.scaling.factor": None,
    "rope.scaling.finetuned": None,
}
GEMMA3_KEYS: dict[str, str | None] = {
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
ROPE_FACTORS = "rope_freqs.weight"
TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def load_gguf(
    path: str | Path,
    *,
    name: str | None = None,
    dtype: jnp.dtype | type = jnp.float32,
    mesh: Mesh | None = None,
) -> LoadedModel:
    """Read a GGUF file of a supported model with its tokenizer; quantised tensors become floats.

    Quantised tensors are de-quantised by the ``gguf`` package, llama.cpp's own; float16 and
    bfloat16 are widened exactly. The model is tied where the file has no ``output.weight``.

    Args:
        path: the file.
        name: what the model is called afterwards; by default the path.
        dtype: of the parameters in memory.
        mesh: see `to_params`.

    Raises:
        UserError: no such file, not GGUF, another architecture or setting than is supported, or
            tensors that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such GGUF file")
    try:
        reader = open_gguf(path)
    except (IndexError, KeyError, OverflowError, MemoryError) as error:  # cut short or scrambled
        raise UserError(
            f"{path}: not a whole GGUF file ({error}); copy or download it again"
        ) from None
    config = gguf_config(reader, str(path))
    tensors = GgufTensors(reader, config)
    params = to_params(config, tensors, dtype=dtype, origin=str(path), mesh=mesh)
    return LoadedModel(
        name=name or str(path),
        model=Model(config),
        params=params,
        tokenizer=tokenizer_from_gguf(reader),
        generation=_token_ids(reader),
        fingerprint=fingerprint([path]),
    )


def gguf_config(reader: GGUFReader, origin: str) -> ModelConfig:
    """The `ModelConfig` of a GGUF file, by way of the ``config.json`` it stands for."""
    name = _metadata(reader, "general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(
            f"{origin}: GGUF architecture '{name}' is not supported "
            f"({', '.join(ARCHITECTURES)} are)"
        )
    architecture, prefix = ARCHITECTURES[name], f"{name}."
    found = {
        key.removeprefix(prefix): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(prefix)
    }
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    values: dict[str, Any] = {"model_type": architecture.family}
    for key, value in found.items():
        known = architecture.keys.get(key, prefix + key)
        if known is not None:
            values[known] = _shortest(value)
    if "token_embd.weight" in shapes:
        values.setdefault("vocab_size", int(shapes["token_embd.weight"][-1]))
    if found.get("rope.scaling.type", "none") != "none":
        values["rope_scaling"] = {
            "rope_type": found["rope.scaling.type"],
            "factor": _shortest(found.get("rope.scaling.factor")),
        }
    values["tie_word_embeddings"] = "output.weight" not in shapes
    for key, first in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_gate")):
        if f"blk.0.{first}.bias" in shapes:
            values[key] = True
    values |= architecture.unsaid(values)
    for key in ("expert_count", "expert_used_count"):
        if found.get(key):
            raise UserError(f"{origin}: a mixture of experts ({prefix}{key}) is not supported")
        values.pop(prefix + key, None)
    config = family_of(values, origin)
    for key in ("attention.value_length", "rope.dimension_count"):
        if found.get(key, config.head_dim) != config.head_dim:
            raise UserError(
                f"{origin}: {prefix}{key} is {found[key]}, but only {config.head_dim}, "
                "the width of a head, is supported"
            )
    return _with_rope_factors(reader, config, origin)


class GgufTensors(Mapping[str, np.ndarray]):
    """The tensors of a GGUF file under their Hugging Face names, de-quantised when asked for."""

    def __init__(self, reader: GGUFReader, config: ModelConfig):
        name = _metadata(reader, "general.architecture")
        known = next(arch for arch, its in MODEL_ARCH_NAMES.items() if its == name)
        table = get_tensor_name_map(known, config.num_layers)
        theirs = {
            table.get_name(name, try_suffixes=(".weight", ".bias")): name
            for name in (*stored_shapes(config), "lm_head.weight")
        }
        self._config = config
        self._arrange = ARCHITECTURES[name].arrange
        self._tensors = {
            theirs.get(tensor.name, tensor.name): tensor
            for tensor in reader.tensors
            if tensor.name != ROPE_FACTORS
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        array = dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))
        return self._arrange(name, array, self._config)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header (which counts axes the other way round)."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))


def _arrange_llama(name: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Undo llama.cpp's order of query and key rows.

    Its ``llama`` architecture rotates neighbouring features ``(2 i, 2 i + 1)``, Hugging Face's
    the two halves ``(i, i + dim / 2)``: so its converter interleaves each head's rows.
    """
    if ".q_proj." in name:
        heads = config.num_heads
    elif ".k_proj." in name:
        heads = config.num_kv_heads
    else:
        return array
    pairs = array.reshape(heads, config.head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _arrange_gemma(name: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Take away the 1 that llama.cpp's converter adds to Gemma's norms."""
    return array - 1 if name.endswith("norm.weight") else array


def _gemma3_unsaid(values: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp knows of Gemma 3 without being told: scores are scaled by the width of a
    head, in the 27B model of 62 layers by ``hidden_size / num_attention_heads``."""
    scale = values.get("head_dim")
    if values.get("num_hidden_layers") == 62 and values.get("num_attention_heads"):
        scale = values.get("hidden_size", 0) // values["num_attention_heads"]
    return {"query_pre_attn_scalar": scale}


@dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture differs from the Hugging Face family that it stands for.

    ``keys`` are metadata keys as ``config.json`` keys, ``arrange`` undoes what llama.cpp's
    converter does to tensors, ``unsaid`` is what its code assumes.
    """

    family: str
    arrange: Callable[[str, np.ndarray, ModelConfig], np.ndarray]
    keys: dict[str, str | None]
    unsaid: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: {}


ARCHITECTURES = {
    "llama": Architecture("llama", _arrange_llama, SHARED_KEYS),
    "gemma3": Architecture(
        "gemma3_text", _arrange_gemma, SHARED_KEYS | GEMMA3_KEYS, _gemma3_unsaid
    ),
}


def _with_rope_factors(reader: GGUFReader, config: ModelConfig, origin: str) -> ModelConfig:
    """Llama 3.1's RoPE scaling, which GGUF stores as a divisor for each frequency.

    The divisors come from four numbers, of which every published model shares three; the factor
    is the largest divisor. They are computed again and compared.
    """
    stored = next((item for item in reader.tensors if item.name == ROPE_FACTORS), None)
    if stored is None:
        return config
    divisors = dequantize(stored.data, stored.tensor_type).reshape(-1)
    scaled = replace(
        config, rope_scaling=RopeScaling("llama3", float(divisors.max()), 1.0, 4.0, 8192)
    )
    plain = inverse_frequencies(replace(config, rope_scaling=None))
    expected = plain / inverse_frequencies(scaled)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-5):
        raise UserError(
            f"{origin}: {ROPE_FACTORS} is no RoPE scaling of Llama 3.1; "
            "use the model's Hugging Face folder"
        )
    return scaled


def _token_ids(reader: GGUFReader) -> dict[str, Any]:
    ids = {
        ours: _metadata(reader, f"tokenizer.ggml.{theirs}_token_id")
        for ours, theirs in TOKEN_IDS.items()
    }
    return {key: int(value) for key, value in ids.items() if value is not None}


def _metadata(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _shortest(value: Any) -> Any:
    """The shortest decimal that is this float32: 9.999999747378752e-06 was written as 1e-05."""
    if not isinstance(value, float):
        return value
    short = float(str(np.float32(value)))
    return int(short) if short.is_integer() else short
