"""One table of tensors a family: which stored tensor is which parameter, for both directions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from montessori_jax.models.config import ModelConfig
from montessori_jax.models.fields import Fields

Present = Callable[[ModelConfig], bool]


@dataclass(frozen=True)
class Transform:
    """How a stored tensor and a parameter differ; ``shape`` maps ours to the stored one."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]


AS_IS = Transform(lambda x: x, lambda x: x, lambda shape: shape)
TRANSPOSED = Transform(lambda x: x.T, lambda x: x.T, lambda shape: shape[::-1])


def always(config: ModelConfig) -> bool:
    """Of tensors that every configuration of a family has."""
    return True


@dataclass(frozen=True)
class Row:
    """One stored tensor, or one a layer where ``name`` has ``{layer}`` (then stacked on axis 0)."""

    name: str
    path: tuple[str, ...]
    transform: Transform
    present: Present = always


@dataclass(frozen=True)
class Family:
    """One family: its names, its configuration both ways, its tensors both ways."""

    model_type: str
    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    rows: tuple[Row, ...]


def layer_norm(name: str, ours: str) -> Row:
    """A layer's norm, stored under ``name``."""
    return Row(f"model.layers.{{layer}}.{name}.weight", ("layers", ours, "scale"), AS_IS)


def _linear(part: str, path: tuple[str, ...], biased: Present) -> tuple[Row, Row]:
    """A projection: ``[out, in]`` as stored, ``[in, out]`` here, and its bias if it has one."""
    name = f"model.layers.{{layer}}.{part}"
    return (
        Row(f"{name}.weight", ("layers", *path, "kernel"), TRANSPOSED),
        Row(f"{name}.bias", ("layers", *path, "bias"), AS_IS, biased),
    )


def _head_norm(part: str, ours: str) -> Row:
    path = ("layers", "attention", ours, "scale")
    name = f"model.layers.{{layer}}.self_attn.{part}.weight"
    return Row(name, path, AS_IS, lambda config: config.qk_norm)


EMBEDDING = Row("model.embed_tokens.weight", ("embed", "embedding"), AS_IS)
ATTENTION = (
    *_linear("self_attn.q_proj", ("attention", "query"), lambda config: config.qkv_bias),
    *_linear("self_attn.k_proj", ("attention", "key"), lambda config: config.qkv_bias),
    *_linear("self_attn.v_proj", ("attention", "value"), lambda config: config.qkv_bias),
    *_linear("self_attn.o_proj", ("attention", "out"), lambda config: config.out_bias),
    _head_norm("q_norm", "query_norm"),
    _head_norm("k_norm", "key_norm"),
)
MLP = (
    *_linear("mlp.gate_proj", ("mlp", "gate"), lambda config: config.mlp_bias),
    *_linear("mlp.up_proj", ("mlp", "up"), lambda config: config.mlp_bias),
    *_linear("mlp.down_proj", ("mlp", "down"), lambda config: config.mlp_bias),
)
END = (
    Row("model.norm.weight", ("norm", "scale"), AS_IS),
    Row(
        "lm_head.weight",
        ("head", "kernel"),
        TRANSPOSED,
        lambda config: not config.tie_word_embeddings,
    ),
)
# What Llama, Mistral and Qwen store; those without biases or head norms leave them out.
PRE_NORM_ROWS = (
    EMBEDDING,
    layer_norm("input_layernorm", "attention_norm"),
    *ATTENTION,
    layer_norm("post_attention_layernorm", "mlp_norm"),
    *MLP,
    *END,
)
