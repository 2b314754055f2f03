"""Parts of a ``config.json`` that several families share, read into `ModelConfig` and written."""

import warnings
from collections.abc import Sequence
from typing import Any

from montessori_jax.errors import UserError
from montessori_jax.models.config import ModelConfig, RopeScaling
from montessori_jax.models.fields import Fields, warn_unread

# Hugging Face's names of activations -> ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}
FULL, SLIDING = "full_attention", "sliding_attention"


def read_sizes(
    fields: Fields, *, given: Sequence[str] = (), activation: str = "hidden_act", tied: bool = False
) -> dict[str, Any]:
    """Sizes, epsilon, activation and tying.

    Args:
        fields: the file.
        given: keys that must be there, since transformers' default for the family is another
            than what follows from the other keys.
        activation: the key of the activation.
        tied: whether the head is tied where the file does not say.
    """
    for key in given:
        if key not in fields.values:
            raise UserError(f"{fields.origin}: '{key}' is missing")
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
    act = fields.text(activation, "silu" if activation == "hidden_act" else "gelu_pytorch_tanh")
    if act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(
            f"{fields.origin}: '{activation}' is '{act}', which is not supported ({known} are)"
        )
    if fields.values.get("attention_dropout"):
        warnings.warn(
            f"{fields.origin}: 'attention_dropout' is {fields.values['attention_dropout']}; "
            "training here applies no dropout",
            stacklevel=5,
        )
    fields.known.add("attention_dropout")
    return {
        "vocab_size": fields.count("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.count("intermediate_size"),
        "num_layers": fields.count("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": _positions(fields),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": fields.switch("tie_word_embeddings", tied),
        "hidden_act": ACTIVATIONS[act],
        "initializer_range": fields.number("initializer_range", 0.02),
    }


def write_sizes(config: ModelConfig, *, activation: str = "hidden_act") -> dict[str, Any]:
    """The inverse of `read_sizes`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        activation: config.hidden_act,
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "use_cache": True,
    }


def _positions(fields: Fields) -> int:
    return fields.count("max_position_embeddings", 2048)


def read_rope(fields: Fields) -> dict[str, Any]:
    """Base and scaling from either generation of configuration files.

    transformers 4 writes ``rope_theta`` and ``rope_scaling`` (kind under ``type`` or
    ``rope_type``); transformers 5 puts all of it into ``rope_parameters``.
    """
    old, new = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    if old and new and old != new:
        raise UserError(
            f"{fields.origin}: 'rope_scaling' and 'rope_parameters' differ; keep the right one"
        )
    rope = Fields(old or new, fields.origin, "rope_scaling." if old else "rope_parameters.")
    return _one_rope(fields, rope, 10000.0)


def read_rope_by_kind(fields: Fields, theta: float, local_theta: float) -> dict[str, Any]:
    """Likewise where sliding layers have a base of their own, as Gemma 3's do.

    transformers 4 writes that as ``rope_local_base_freq``, transformers 5 has a mapping for each
    kind of layer in ``rope_parameters``.
    """
    old, new = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    parts = Fields(new, fields.origin, "rope_parameters.")
    full, local = (
        parts.mapping(FULL),
        Fields(parts.mapping(SLIDING), fields.origin, f"rope_parameters.{SLIDING}."),
    )
    if old and full and not old.items() <= full.items():
        raise UserError(
            f"{fields.origin}: 'rope_scaling' and 'rope_parameters' differ; keep the right one"
        )
    if parts.unread():
        raise UserError(
            f"{fields.origin}: '{parts.unread()[0]}' is not supported here "
            f"(only mappings '{FULL}' and '{SLIDING}')"
        )
    prefix = f"rope_parameters.{FULL}." if full else "rope_scaling."
    read = _one_rope(fields, Fields(full or old, fields.origin, prefix), theta)
    local.require("rope_type", "default")
    local.require("partial_rotary_factor", 1.0)
    base = local.number("rope_theta", fields.number("rope_local_base_freq", local_theta))
    warn_unread(fields.origin, local.unread())
    return read | {"local_rope_theta": base}


def _one_rope(fields: Fields, rope: Fields, theta: float) -> dict[str, Any]:
    """Base and scaling out of ``rope``, or what ``fields`` has beside it."""
    name = rope.prefix.removesuffix(".")
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise UserError(f"{fields.origin}: '{name}' differs by layer, which is not supported here")
    base = rope.number("rope_theta", fields.number("rope_theta", theta))
    for place in (fields, rope):
        place.require("partial_rotary_factor", 1.0)
    length = rope.count("original_max_position_embeddings", _positions(fields))
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
    warn_unread(fields.origin, rope.unread())
    return {"rope_theta": base, "rope_scaling": scaling}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The form of transformers 4, which transformers 5 and vLLM read too."""
    scaling = config.rope_scaling
    written: dict[str, Any] | None = None
    if scaling is not None:
        written = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            written |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }
    return {"rope_theta": config.rope_theta, "rope_scaling": written}


def read_windows(
    fields: Fields, window: int | None, layers: Sequence[bool], *, listed: bool = True
) -> dict[str, Any]:
    """Which layers slide, by ``layer_types`` if the file has them.

    Args:
        fields: the file.
        window: its window.
        layers: of each layer, whether it slides where the file does not list them.
        listed: whether the family goes by the list; if not, it may say nothing else than
            ``layers``.
    """
    types = [SLIDING if slides else FULL for slides in layers]
    fields.known.add("layer_types")
    found = fields.values.get("layer_types")
    if found is not None:
        wanted = f"a list of {len(types)} with {FULL} and {SLIDING} alone"
        if not isinstance(found, list) or len(found) != len(types) or {*found} - {FULL, SLIDING}:
            raise UserError(f"{fields.origin}: 'layer_types' is not supported; expected {wanted}")
        if not listed and found != types:
            raise UserError(
                f"{fields.origin}: 'layer_types' other than {types[0]} are not supported here"
            )
        types = found
    slides = tuple(kind == SLIDING for kind in types)
    if not any(slides):
        return {}
    if window is None:
        raise UserError(f"{fields.origin}: 'layer_types' has {SLIDING}, but there is no window")
    periods = range(1, len(slides) + 1)
    period = next(p for p in periods if slides[p:] == slides[:-p] or p == len(slides))
    return {"sliding_window": window, "sliding_layers": slides[:period]}


def write_layer_types(config: ModelConfig) -> list[str]:
    """``layer_types``, one a layer."""
    return [SLIDING if slides else FULL for slides in config.sliding]
