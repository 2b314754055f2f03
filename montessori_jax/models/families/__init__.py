"""Model families: what a ``config.json`` means, and which stored tensor is which parameter.

A family is one entry of `FAMILIES`: how its Hugging Face configuration becomes a `ModelConfig`
and back, and one table of tensors that serves both directions. Every field that changes a number
is read or refused; a key that nobody knows is warned of by name.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from montessori_jax.errors import UserError
from montessori_jax.models.config import ModelConfig
from montessori_jax.models.families.gemma import GEMMA2, GEMMA3
from montessori_jax.models.families.llama import LLAMA, MISTRAL
from montessori_jax.models.families.qwen import QWEN2, QWEN3
from montessori_jax.models.families.table import Family, Row
from montessori_jax.models.fields import Fields, warn_unread

__all__ = ["FAMILIES", "HARMLESS", "TOKEN_IDS", "Family", "Row", "conversion_table", "family_of",
           "to_hf_config"]  # fmt: skip

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3)}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Keys that say nothing about the function computed: bookkeeping, token ids (which the folder's
# loader reads), labels of other heads, and sampling defaults that old files keep in config.json.
HARMLESS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)


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
    if config_json.get("quantization_config") is not None:
        raise UserError(
            f"{origin}: 'quantization_config' says that the weights are quantised; "
            "use the unquantised folder, or a GGUF file"
        )
    found = Fields(config_json, origin)
    config = family.read(found)
    warn_unread(origin, [key for key in found.unread() if key not in HARMLESS])
    return config


def to_hf_config(
    config: ModelConfig, *, dtype: str = "float32", token_ids: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The ``config.json`` of ``config``: the inverse of `family_of`.

    ``dtype`` names the stored weights' dtype. ``token_ids`` may hold ``bos_token_id``,
    ``eos_token_id`` and ``pad_token_id``; those it lacks are written as null, since transformers
    would otherwise fill in the family's own.

    Raises `ValueError` where the family has no words for ``config``, naming the fields: a file
    that means another model must not be written.
    """
    family = FAMILIES[config.family]
    ids = {key: (token_ids or {}).get(key) for key in TOKEN_IDS}
    head = {"architectures": [family.architecture], "model_type": family.model_type}
    written = head | family.write(config) | ids | {"torch_dtype": dtype}
    meant = family.read(Fields(written, "config.json"))
    pairs = [
        (one.name, getattr(meant, one.name), getattr(config, one.name))
        for one in fields(ModelConfig)
        if one.name != "sliding_layers"
    ]
    pairs.append(("sliding_layers", meant.sliding, config.sliding))
    lost = [name for name, theirs, ours in pairs if theirs != ours]
    if lost:
        raise ValueError(f"a config.json of {config.family} cannot express {', '.join(lost)}")
    return written


def conversion_table(config: ModelConfig) -> tuple[Row, ...]:
    """The tensors that a checkpoint of ``config`` holds, in the order they are written."""
    return tuple(row for row in FAMILIES[config.family].rows if row.present(config))
