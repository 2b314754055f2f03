"""Llama 2, 3, 3.1 and later, TinyLlama, SmolLM2; and Mistral, which is Llama with a window."""

from typing import Any

from montessori_jax.models.config import ModelConfig
from montessori_jax.models.families.settings import (
    read_rope,
    read_sizes,
    read_windows,
    write_rope,
    write_sizes,
)
from montessori_jax.models.families.table import PRE_NORM_ROWS, Family
from montessori_jax.models.fields import Fields


def _read_llama(fields: Fields) -> ModelConfig:
    """Defaults are those of transformers' LlamaConfig."""
    sizes = read_sizes(fields)
    fields.require("sliding_window")
    fields.require("use_sliding_window", False)
    fields.require("rope_interleaved", False)
    bias = fields.switch("attention_bias", False)
    return ModelConfig(
        family="llama",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.switch("mlp_bias", False),
        **sizes,
        **read_rope(fields),
        **read_windows(fields, None, [False] * sizes["num_layers"], listed=False),
    )


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return write_sizes(config) | write_rope(config) | biases


def _read_mistral(fields: Fields) -> ModelConfig:
    """Mistral 7B: every layer slides, or (from version 0.2 on) none."""
    sizes = read_sizes(fields, given=("num_key_value_heads", "max_position_embeddings"))
    window = fields.optional_count("sliding_window", 4096)
    layers = [window is not None] * sizes["num_layers"]
    return ModelConfig(
        family="mistral",
        **sizes,
        **read_rope(fields),
        **read_windows(fields, window, layers, listed=False),
    )


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return write_sizes(config) | write_rope(config) | {"sliding_window": config.sliding_window}


LLAMA = Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, PRE_NORM_ROWS)
MISTRAL = Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral, PRE_NORM_ROWS)
