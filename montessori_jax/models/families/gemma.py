"""Gemma 2 (arXiv 2408.00118) and the text half of Gemma 3 (arXiv 2503.19786)."""

from typing import Any

from montessori_jax.models.config import ModelConfig
from montessori_jax.models.families.settings import (
    read_rope,
    read_rope_by_kind,
    read_sizes,
    read_windows,
    write_layer_types,
    write_rope,
    write_sizes,
)
from montessori_jax.models.families.table import ATTENTION, EMBEDDING, END, MLP, Family, layer_norm
from montessori_jax.models.fields import Fields

# Gemma 3's bases of layers that see everything, and of those that slide.
THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
ROWS = (
    EMBEDDING,
    layer_norm("input_layernorm", "attention_norm"),
    *ATTENTION,
    layer_norm("post_attention_layernorm", "attention_post_norm"),
    layer_norm("pre_feedforward_layernorm", "mlp_norm"),
    *MLP,
    layer_norm("post_feedforward_layernorm", "mlp_post_norm"),
    *END,
)
GIVEN = ("num_key_value_heads", "head_dim", "max_position_embeddings")
ACTIVATION = "hidden_activation"
WINDOW = 4096  # transformers' default, which it wants even where no layer slides


def _shared(fields: Fields) -> dict[str, Any]:
    fields.known.add("hidden_act")  # published beside hidden_activation; transformers ignores it
    fields.require("use_bidirectional_attention", False)
    bias = fields.switch("attention_bias", False)
    return read_sizes(fields, given=GIVEN, activation=ACTIVATION, tied=True) | {
        "zero_centered_norms": True,
        "post_norms": True,
        "scale_embeddings": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "query_pre_attn_scalar": fields.count("query_pre_attn_scalar", 256),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return (
        write_sizes(config, activation=ACTIVATION)
        | write_rope(config)
        | {
            "attention_bias": config.qkv_bias,
            "query_pre_attn_scalar": config.query_pre_attn_scalar,
            "attn_logit_softcapping": config.attention_soft_cap,
            "final_logit_softcapping": config.logit_soft_cap,
            "sliding_window": config.sliding_window or WINDOW,
            "layer_types": write_layer_types(config),
        }
    )


def _read_gemma2(fields: Fields) -> ModelConfig:
    shared = _shared(fields)
    window = fields.optional_count("sliding_window", WINDOW)
    fields.require("sliding_window_size", window)
    layers = [layer % 2 == 0 for layer in range(shared["num_layers"])]
    return ModelConfig(
        family="gemma2",
        attention_soft_cap=fields.optional_number("attn_logit_softcapping", 50.0),
        logit_soft_cap=fields.optional_number("final_logit_softcapping", 30.0),
        **shared,
        **read_rope(fields),
        **read_windows(fields, window, layers),
    )


def _read_gemma3(fields: Fields) -> ModelConfig:
    """One layer in six sees everything; the others slide, and rotate with a base of their own."""
    shared = _shared(fields)
    fields.require("attn_logit_softcapping")  # transformers' Gemma 3 does not apply it
    period = fields.count("sliding_window_pattern", 6)
    if fields.values.get("layer_types") is not None:
        fields.known.add("_sliding_window_pattern")  # transformers' note of the default
    layers = [(layer + 1) % period != 0 for layer in range(shared["num_layers"])]
    windows = read_windows(fields, fields.optional_count("sliding_window", WINDOW), layers)
    rope = read_rope_by_kind(fields, THETA, LOCAL_THETA)
    if not windows:
        rope["local_rope_theta"] = None
    return ModelConfig(
        family="gemma3_text",
        qk_norm=True,
        logit_soft_cap=fields.optional_number("final_logit_softcapping", None),
        **shared,
        **rope,
        **windows,
    )


def _write_gemma3(config: ModelConfig) -> dict[str, Any]:
    local = {"rope_local_base_freq": config.local_rope_theta or LOCAL_THETA}
    return _write(config) | local | {"attn_logit_softcapping": None}


GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", _read_gemma2, _write, ROWS)
GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", _read_gemma3, _write_gemma3, ROWS)
