"""Qwen1.5, Qwen2 and Qwen2.5 (one architecture, with biases on q, k and v), and Qwen3."""

from typing import Any

from montessori_jax.models.config import ModelConfig
from montessori_jax.models.families.settings import (
    read_rope,
    read_sizes,
    read_windows,
    write_layer_types,
    write_rope,
    write_sizes,
)
from montessori_jax.models.families.table import PRE_NORM_ROWS, Family
from montessori_jax.models.fields import Fields

GIVEN = ("num_key_value_heads", "max_position_embeddings")


def _shared(fields: Fields, given: tuple[str, ...]) -> dict[str, Any]:
    """What both have; layers from ``max_window_layers`` on slide, where sliding is used at all."""
    sizes = read_sizes(fields, given=given)
    fields.require("use_mrope", False)
    window, first = fields.optional_count("sliding_window", 4096), 0
    if fields.switch("use_sliding_window", False):
        first = fields.whole("max_window_layers", 28)
    else:
        window = None
        fields.known.add("max_window_layers")
    layers = [window is not None and layer >= first for layer in range(sizes["num_layers"])]
    return sizes | read_rope(fields) | read_windows(fields, window, layers)


def _write(config: ModelConfig) -> dict[str, Any]:
    full = config.sliding.index(True) if any(config.sliding) else config.num_layers
    return (
        write_sizes(config)
        | write_rope(config)
        | {
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "max_window_layers": full,
            "layer_types": write_layer_types(config),
        }
    )


def _read_qwen2(fields: Fields) -> ModelConfig:
    return ModelConfig(family="qwen2", qkv_bias=True, **_shared(fields, GIVEN))


def _read_qwen3(fields: Fields) -> ModelConfig:
    bias = fields.switch("attention_bias", False)
    shared = _shared(fields, (*GIVEN, "head_dim"))
    return ModelConfig(family="qwen3", qk_norm=True, qkv_bias=bias, out_bias=bias, **shared)


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return _write(config) | {"attention_bias": config.qkv_bias}


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write, PRE_NORM_ROWS)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3, PRE_NORM_ROWS)
