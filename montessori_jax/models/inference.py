"""Decoding with a key-value cache: the same blocks as training, laid out for one token at a time.

Training scans over stacked layers. A decode step does too little work to pay for cutting each
layer's weights out of a stack (on a CPU that copies the whole model every step), so here the
layers are apart, cast once, and every kernel has its outputs first. A prompt's keys and values
are computed once and shared by all its samples.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from montessori_jax.mesh import TENSOR, mesh_of
from montessori_jax.models.attention import soft_capped
from montessori_jax.models.config import ModelConfig
from montessori_jax.models.decoder import (
    Block,
    KeyValue,
    Linear,
    Model,
    Params,
    RmsNorm,
    embedded,
    times_transposed,
)
from montessori_jax.models.rope import rotations

Cache = tuple[KeyValue, ...]
"""One entry a layer. Of a prompt: ``[prompts, kv_heads, length, head_dim]``; of what is generated
(``own``): ``[prompts, samples, kv_heads, slots, head_dim]``."""


def unstack(model: Model, params: Params, dtype: jnp.dtype | type) -> Params:
    """A copy of ``params`` to decode with: layers apart, kernels outputs first, all in ``dtype``.

    Costs as much memory as the model in ``dtype``, less the embedding where that is shared
    (``dtype`` is its own); ``params`` are not needed for decoding after this. On a mesh only
    ``tensor`` splits the copy: a step that had to collect its weights would do little else.
    """
    mesh = mesh_of(params)

    def collected(leaf: Array) -> Array:
        """The leaf without what ``fsdp`` splits."""
        if mesh is None:
            return leaf
        assert isinstance(leaf.sharding, NamedSharding)
        spec = [TENSOR if axis == TENSOR else None for axis in leaf.sharding.spec]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    @jax.jit
    def layer(layers: Params, index: Array) -> Params:
        def take(path: tuple[Any, ...], leaf: Array) -> Array:
            one = jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)
            return (one.T if path[-1].key == "kernel" else one).astype(dtype)

        return jax.tree_util.tree_map_with_path(take, layers)

    def apart(index: int) -> Params:
        return jax.tree.map(collected, layer(params["layers"], np.int32(index)))

    weights = {
        "embedding": collected(params["embed"]["embedding"].astype(dtype)),
        "norm": jax.tree.map(lambda leaf: leaf.astype(dtype), params["norm"]),
        "layers": [apart(i) for i in range(model.config.num_layers)],
    }
    if not model.config.tie_word_embeddings:
        weights["head"] = collected(params["head"]["kernel"].T.astype(dtype))
    return weights


def prefill(
    model: Model,
    weights: Params,
    tokens: Int[Array, "prompts length"],
    lengths: Int[Array, " prompts"],
) -> tuple[Float[Array, "prompts width"], Cache]:
    """Hidden state of each right-padded prompt's last token, and all its keys and values."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    turns = rotations(model.config, positions)
    x = embedded(model.config, weights["embedding"], tokens, weights["embedding"].dtype)
    cache = []
    for block, sliding in zip(_blocks(model, weights), model.config.sliding, strict=True):
        rotation = turns.of(sliding)
        x, (key, value) = block.packed(x, rotation, segments, positions, None, sliding)
        cache.append(KeyValue(key.swapaxes(1, 2), value.swapaxes(1, 2)))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return _normed(model, weights, last), tuple(cache)


def decode(
    model: Model,
    weights: Params,
    tokens: Int[Array, "prompts samples"],
    steps: Int[Array, "#prompts"] | Int[Array, ""],
    prompt: Cache,
    lengths: Int[Array, " prompts"],
    own: Cache,
) -> tuple[Float[Array, "prompts samples width"], Cache]:
    """Hidden states of the ``steps``-th generated tokens (from 0), and ``own`` with them in it.

    ``prompt`` is `prefill`'s cache; ``own`` has its slots below ``steps`` filled, and what is in
    those above does not matter (`empty_cache` makes one).
    """
    steps = jnp.broadcast_to(steps, lengths.shape)
    positions = jnp.broadcast_to((lengths + steps)[:, None], tokens.shape)
    turns = rotations(model.config, positions)
    x = embedded(model.config, weights["embedding"], tokens, weights["embedding"].dtype)
    after = []
    layers = zip(_blocks(model, weights), prompt, own, model.config.sliding, strict=True)
    for block, prompt_layer, own_layer, sliding in layers:
        rotation = turns.of(sliding)
        x, own_layer = block.decode(x, rotation, prompt_layer, lengths, own_layer, steps, sliding)
        after.append(own_layer)
    return _normed(model, weights, x), tuple(after)


def logits(
    model: Model, weights: Params, hidden: Float[Array, "*rows width"]
) -> Float[Array, "*rows vocab"]:
    """Float32 logits of normed hidden states."""
    head = weights["embedding" if model.config.tie_word_embeddings else "head"]
    scores = times_transposed(hidden, head, preferred_element_type=jnp.float32)
    return soft_capped(scores, model.config.logit_soft_cap)


def empty_cache(
    model: Model, prompts: int, samples: int, slots: int, dtype: jnp.dtype | type
) -> Cache:
    """Room for ``slots`` generated tokens of each sample."""
    config = model.config
    shape = (prompts, samples, config.num_kv_heads, slots, config.head_dim)
    return tuple(
        KeyValue(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)
    )


@cache
def _define(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.GraphDef]:
    """The static definitions of a block with its outputs first, and of the final norm."""

    def block() -> Block:
        module = Block(config, nnx.Rngs(0))
        for _, part in nnx.iter_modules(module):
            if isinstance(part, Linear):
                part.outputs_first = True
        return module

    def norm() -> RmsNorm:
        return RmsNorm(config, config.hidden_size)

    return nnx.split(nnx.eval_shape(block))[0], nnx.split(nnx.eval_shape(norm))[0]


def _blocks(model: Model, weights: Params) -> list[Block]:
    graph, _ = _define(model.config)
    return [nnx.merge(graph, layer) for layer in weights["layers"]]


def _normed(model: Model, weights: Params, x: Array) -> Array:
    return nnx.merge(_define(model.config)[1], weights["norm"])(x)
