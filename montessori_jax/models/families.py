"""Model families: what a ``config.json`` means, and which stored tensor is which parameter.

A family is one entry of `FAMILIES`: how its Hugging Face configuration becomes a `ModelConfig`
and back, and one table of tensors that serves both directions. Every field that changes a number
is read or refused; a key that nobody knows is warned of by name.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from montessori_jax.errors import UserError
from montessori_jax.models.config import ModelConfig, RopeScaling
from montessori_jax.models.fields import Fields

# Hugging Face's names of activations -> ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Keys that say nothing about the function computed: bookkeeping, token ids (which the folder's
# loader reads), labels of other heads, and sampling defaults that old files keep in config.json.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention
    architectures bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range
    is_decoder is_encoder_decoder is_llama_config label2id length_penalty max_length min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Transform:
    """How a stored tensor and a parameter differ; ``shape`` maps ours to the stored one."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]


AS_IS = Transform(lambda x: x, lambda x: x, lambda shape: shape)
TRANSPOSED = Transform(lambda x: x.T, lambda x: x.T, lambda shape: shape[::-1])


@dataclass(frozen=True)
class Row:
    """One stored tensor, or one a layer where ``name`` has ``{layer}`` (then stacked on axis 0)."""

    name: str
    path: tuple[str, ...]
    transform: Transform
    present: Callable[[ModelConfig], bool] = lambda config: True


@dataclass(frozen=True)
class Family:
    """One table entry: the names, the configuration both ways, the tensors both ways."""

    model_type: str
    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    rows: tuple[Row, ...]


def _read_rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling from either generation of configuration files.

    transformers 4 writes ``rope_theta`` and ``rope_scaling`` (kind under ``type`` or
    ``rope_type``); transformers 5 puts all of it into ``rope_parameters``.
    """
    old, new = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    if old and new and old != new:
        raise UserError(
            f"{fields.origin}: 'rope_scaling' and 'rope_parameters' differ; keep the right one"
        )
    name = "rope_scaling" if old else "rope_parameters"
    rope = Fields(old or new, fields.origin, name + ".")
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise UserError(f"{fields.origin}: '{name}' differs by layer, which is not supported here")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    for place in (fields, rope):
        place.require("partial_rotary_factor", 1.0)
    length = fields.count("max_position_embeddings", 2048)
    length = rope.count("original_max_position_embeddings", length)
    fields.require("original_max_position_embeddings", length)
    kind = rope.text("rope_type", rope.text("type", "default"))
    scaling = None
    if kind == "linear":
        scaling = RopeScaling(kind, rope.number("factor"))
    elif kind == "llama3":
        scaling = RopeScaling(
            kind,
            rope.number("factor"),
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
            length,
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise UserError(
                f"{fields.origin}: '{name}.high_freq_factor' must be above 'low_freq_factor'"
            )
    elif kind != "default":
        raise UserError(
            f"{fields.origin}: RoPE type '{kind}' is not supported (default, linear, llama3 are)"
        )
    _warn(fields.origin, rope.unread())
    return theta, scaling


def _read_llama(fields: Fields) -> ModelConfig:
    """Llama 2, 3, 3.1+, TinyLlama, SmolLM2; defaults are those of transformers' LlamaConfig."""
    theta, scaling = _read_rope(fields)
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", heads)
    head_dim = fields.count("head_dim", max(1, hidden // heads))
    if heads % kv_heads:
        raise UserError(
            f"{fields.origin}: 'num_attention_heads' ({heads}) is no multiple of "
            f"'num_key_value_heads' ({kv_heads})"
        )
    if fields.values.get("head_dim") is None and hidden % heads:
        raise UserError(
            f"{fields.origin}: 'hidden_size' ({hidden}) is no multiple of "
            f"'num_attention_heads' ({heads}), and there is no 'head_dim'"
        )
    if head_dim % 2:
        raise UserError(f"{fields.origin}: 'head_dim' is {head_dim}; rotary positions need it even")
    activation = fields.text("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(
            f"{fields.origin}: 'hidden_act' is '{activation}', which is not supported ({known} are)"
        )
    fields.require("sliding_window")
    fields.require("use_sliding_window", False)
    fields.require("rope_interleaved", False)
    if set(fields.values.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(f"{fields.origin}: 'layer_types' other than full_attention: not supported")
    fields.known.add("layer_types")
    if fields.values.get("attention_dropout"):
        warnings.warn(
            f"{fields.origin}: 'attention_dropout' is {fields.values['attention_dropout']}; "
            "training here applies no dropout",
            stacklevel=4,
        )
    fields.known.add("attention_dropout")
    return ModelConfig(
        family="llama",
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=fields.count("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.count("max_position_embeddings", 2048),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=fields.switch("tie_word_embeddings", False),
        qkv_bias=fields.switch("attention_bias", False),
        out_bias=fields.switch("attention_bias", False),
        mlp_bias=fields.switch("mlp_bias", False),
        hidden_act=ACTIVATIONS[activation],
        initializer_range=fields.number("initializer_range", 0.02),
    )


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    """The form of transformers 4, which transformers 5 and vLLM read too."""
    scaling: dict[str, Any] | None = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": config.rope_scaling.kind, "factor": config.rope_scaling.factor}
        if config.rope_scaling.kind == "llama3":
            scaling |= {
                "low_freq_factor": config.rope_scaling.low_freq_factor,
                "high_freq_factor": config.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": (
                    config.rope_scaling.original_max_position_embeddings
                ),
            }
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "mlp_bias": config.mlp_bias,
        "hidden_act": config.hidden_act,
        "initializer_range": config.initializer_range,
        "use_cache": True,
    }


def _linear(
    name: str, path: tuple[str, ...], biased: Callable[[ModelConfig], bool]
) -> tuple[Row, Row]:
    """A projection: ``[out, in]`` as stored, ``[in, out]`` here, and its bias if it has one."""
    return (
        Row(f"{name}.weight", (*path, "kernel"), TRANSPOSED),
        Row(f"{name}.bias", (*path, "bias"), AS_IS, biased),
    )


def _attention(part: str, ours: str) -> tuple[Row, Row]:
    name = f"model.layers.{{layer}}.self_attn.{part}"
    return _linear(name, ("layers", "attention", ours), lambda config: config.qkv_bias)


def _mlp(part: str) -> tuple[Row, Row]:
    name = f"model.layers.{{layer}}.mlp.{part}_proj"
    return _linear(name, ("layers", "mlp", part), lambda config: config.mlp_bias)


LLAMA_ROWS = (
    Row("model.embed_tokens.weight", ("embed", "embedding"), AS_IS),
    Row(
        "model.layers.{layer}.input_layernorm.weight", ("layers", "attention_norm", "scale"), AS_IS
    ),
    *_attention("q_proj", "query"),
    *_attention("k_proj", "key"),
    *_attention("v_proj", "value"),
    *_attention("o_proj", "out"),
    Row(
        "model.layers.{layer}.post_attention_layernorm.weight",
        ("layers", "mlp_norm", "scale"),
        AS_IS,
    ),
    *_mlp("gate"),
    *_mlp("up"),
    *_mlp("down"),
    Row("model.norm.weight", ("norm", "scale"), AS_IS),
    Row(
        "lm_head.weight",
        ("head", "kernel"),
        TRANSPOSED,
        lambda config: not config.tie_word_embeddings,
    ),
)

FAMILIES = {
    family.model_type: family
    for family in (Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, LLAMA_ROWS),)
}


def family_of(config_json: Mapping[str, Any], origin: str) -> ModelConfig:
    """The `ModelConfig` that a Hugging Face ``config.json`` describes.

    Args:
        config_json: the parsed file, of transformers 4 or 5.
        origin: what errors and warnings call it, such as the file's path.

    Raises:
        UserError: an unsupported architecture or setting, a missing key or an impossible value.

    Warns:
        UserWarning: keys that are not known to be harmless, by name.
    """
    supported = ", ".join(f"{item.model_type} ({item.architecture})" for item in FAMILIES.values())
    architectures = config_json.get("architectures") or []
    kind = config_json.get("model_type")
    if kind is None:
        kind = next(
            (f.model_type for f in FAMILIES.values() if f.architecture in architectures), ""
        )
    if kind not in FAMILIES:
        shown = f"'{kind}'" if kind else str(architectures or "(none given)")
        raise UserError(f"{origin}: model_type {shown} is not supported; supported: {supported}")
    family = FAMILIES[kind]
    if architectures and family.architecture not in architectures:
        raise UserError(
            f"{origin}: architecture {architectures[0]} is not supported; supported: {supported}"
        )
    fields = Fields(config_json, origin)
    if config_json.get("quantization_config") is not None:
        raise UserError(
            f"{origin}: 'quantization_config' says that the weights are quantised; "
            "use the unquantised folder, or a GGUF file"
        )
    config = family.read(fields)
    _warn(origin, [key for key in fields.unread() if key not in HARMLESS])
    return config


def to_hf_config(
    config: ModelConfig, *, dtype: str = "float32", token_ids: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The ``config.json`` of ``config``: the inverse of `family_of`.

    ``dtype`` names the stored weights' dtype. ``token_ids`` may hold ``bos_token_id``,
    ``eos_token_id`` and ``pad_token_id``; those it lacks are written as null, since transformers
    would otherwise fill in Llama 2's.
    """
    family = FAMILIES[config.family]
    ids = {key: (token_ids or {}).get(key) for key in TOKEN_IDS}
    head = {"architectures": [family.architecture], "model_type": family.model_type}
    return head | family.write(config) | ids | {"torch_dtype": dtype}


def conversion_table(config: ModelConfig) -> tuple[Row, ...]:
    """The tensors that a checkpoint of ``config`` holds, in the order they are written."""
    return tuple(row for row in FAMILIES[config.family].rows if row.present(config))


def _warn(origin: str, keys: list[str]) -> None:
    if keys:
        named = ", ".join(sorted(keys))
        warnings.warn(
            f"{origin}: not read, in case they matter to this model: {named}", stacklevel=3
        )
