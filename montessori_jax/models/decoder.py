"""One decoder for every family: Flax NNX modules, layers stacked and scanned.

A `Model` splits the module once into a static definition and a parameter pytree (plain nested
dict of arrays, layers stacked on axis 0). Everything that computes is then a pure function of
``params``: it can be differentiated, vmapped over stacks of parameters, or handed a probe step's
new parameters without copying anything back.
"""

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from montessori_jax.models.attention import decode_attention, packed_attention, wide
from montessori_jax.models.config import ModelConfig
from montessori_jax.models.rope import rotate, rotation

Params = dict[str, Any]
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class KeyValue(NamedTuple):
    """Keys and values of every layer: ``[layers, ..., kv_heads, head_dim]`` each."""

    key: Array
    value: Array


class RmsNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * scale``, the statistics in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        scale = self.scale[...]
        wide_x = x.astype(wide(x.dtype))
        mean_square = jnp.mean(jnp.square(wide_x), axis=-1, keepdims=True)
        normed = (wide_x * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
        return normed * scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + scale.shape)


class Linear(nnx.Module):
    """``x @ kernel (+ bias)`` in ``x``'s dtype."""

    def __init__(self, inputs: int, outputs: int, bias: bool, scale: float, rngs: nnx.Rngs):
        init = nnx.initializers.normal(scale)
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None

    def __call__(self, x: Array) -> Array:
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(x.dtype)
        return y + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        width, dim = config.hidden_size, config.head_dim

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, config.attention_bias, config.initializer_range, rngs)

        self.query = linear(width, config.num_heads * dim)
        self.key = linear(width, config.num_kv_heads * dim)
        self.value = linear(width, config.num_kv_heads * dim)
        self.out = linear(config.num_heads * dim, width)

    def project(self, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values by head, the first two rotated: ``[..., heads, head_dim]``."""
        dim = self.config.head_dim
        query = self.query(x).reshape(*x.shape[:-1], self.config.num_heads, dim)
        key = self.key(x).reshape(*x.shape[:-1], self.config.num_kv_heads, dim)
        value = self.value(x).reshape(*x.shape[:-1], self.config.num_kv_heads, dim)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def merge(self, mixed: Array) -> Array:
        """Heads back to the model's width."""
        return self.out(mixed.reshape(*mixed.shape[:-2], -1))


class Mlp(nnx.Module):
    """Gated feed-forward: ``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, config.mlp_bias, config.initializer_range, rngs)

        self.activation = ACTIVATIONS[config.hidden_act]
        self.gate = linear(width, inner)
        self.up = linear(width, inner)
        self.down = linear(inner, width)

    def __call__(self, x: Array) -> Array:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One pre-norm layer. What differs between uses is how keys and values are attended to."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config, rngs)

    def packed(
        self, x: Array, cos: Array, sin: Array, segment_ids: Array, branches: Array | None
    ) -> tuple[Array, KeyValue]:
        """Whole rows; returns ``x`` after the layer and its (key, value)."""
        query, key, value = self.attention.project(self.attention_norm(x), cos, sin)
        x = x + self.attention.merge(packed_attention(query, key, value, segment_ids, branches))
        return x + self.mlp(self.mlp_norm(x)), KeyValue(key, value)

    def decode(
        self,
        x: Array,
        cos: Array,
        sin: Array,
        prompt: KeyValue,
        lengths: Array,
        own: KeyValue,
        step: Array,
    ) -> tuple[Array, KeyValue]:
        """One token a sample; returns ``x`` after the layer and the token's (key, value)."""
        query, key, value = self.attention.project(self.attention_norm(x), cos, sin)
        insert = jax.lax.dynamic_update_index_in_dim
        keys = insert(own.key, key.astype(own.key.dtype), step, axis=2)
        values = insert(own.value, value.astype(own.value.dtype), step, axis=2)
        mixed = decode_attention(query, prompt.key, prompt.value, lengths, keys, values, step)
        x = x + self.attention.merge(mixed)
        return x + self.mlp(self.mlp_norm(x)), KeyValue(key, value)


class Decoder(nnx.Module):
    """Embedding, ``num_layers`` blocks, final norm and, unless tied, a head of its own."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(config.initializer_range)
        self.embed = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=init, rngs=rngs
        )

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(layer_rngs: nnx.Rngs) -> Block:
            return Block(config, layer_rngs)

        self.layers = stack(rngs)
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = Linear(
                config.hidden_size, config.vocab_size, False, config.initializer_range, rngs
            )


@cache
def _define(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The static definition and the parameters' shapes; nothing is allocated."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))


@partial(jax.jit, static_argnums=0)
def _create(config: ModelConfig, key: Array) -> Params:
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(key))))


@dataclass(frozen=True)
class Model:
    """The static half of a decoder; every method is a pure function of ``params``.

    Hashable by its configuration, so it can be a static argument of jit or closed over.
    """

    config: ModelConfig

    def shapes(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct` leaves (float32)."""
        return nnx.to_pure_dict(_define(self.config)[1])

    def parameter_count(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes()))

    def init(self, key: Array) -> Params:
        """Random float32 parameters (normal, ``config.initializer_range``; norms one)."""
        return _create(self.config, key)

    def bind(self, params: Params) -> Decoder:
        """The NNX module holding ``params``."""
        return nnx.merge(_define(self.config)[0], params)

    def head(self, params: Params) -> Float[Array, "width vocab"]:
        """The output projection; the embedding's transpose where the two are tied."""
        if self.config.tie_word_embeddings:
            return params["embed"]["embedding"].T
        return params["head"]["kernel"]

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "rows length"],
        segment_ids: Int[Array, "rows length"],
        positions: Int[Array, "rows length"],
        *,
        branches: Int[Array, "rows length"] | None = None,
        dtype: jnp.dtype | type = jnp.float32,
        remat: str = "none",
    ) -> Float[Array, "rows length width"]:
        """Normed hidden states of packed rows; ``logits = hidden @ head(params)``.

        Args:
            params: the parameter tree; cast to ``dtype`` layer by layer, never as a whole.
            tokens: token ids, int32.
            segment_ids: which sample each token belongs to; none is attended across samples.
            positions: position within the sample.
            branches: where several responses share one prompt, see `packed_attention`.
            dtype: compute dtype of products and activations.
            remat: ``none``, ``full`` (recompute each layer in the backward pass) or ``dots``
                (keep the products with weights, recompute the rest).
        """
        x, _ = self._run_packed(
            params, tokens, segment_ids, positions, branches, dtype, remat, False
        )
        return x

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "prompts length"],
        lengths: Int[Array, " prompts"],
        *,
        dtype: jnp.dtype | type = jnp.float32,
    ) -> tuple[Float[Array, "prompts width"], KeyValue]:
        """Hidden state of each right-padded prompt's last token, and all its keys and values."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        x, cache = self._run_packed(params, tokens, segments, positions, None, dtype, "none", True)
        assert cache is not None  # it was asked for
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return last, cache

    def decode(
        self,
        params: Params,
        tokens: Int[Array, "prompts samples"],
        step: Int[Array, ""],
        prompt: KeyValue,
        lengths: Int[Array, " prompts"],
        own: KeyValue,
        *,
        dtype: jnp.dtype | type = jnp.float32,
    ) -> tuple[Float[Array, "prompts samples width"], KeyValue]:
        """Hidden states of the ``step``-th generated tokens and their keys and values.

        ``prompt`` is `prefill`'s cache (one copy for all samples of a prompt); ``own`` has
        ``[layers, prompts, samples, slots, kv_heads, head_dim]`` with slots below ``step`` filled.
        The caller writes the returned ``[layers, prompts, samples, kv_heads, head_dim]`` at slot
        ``step``.
        """
        decoder = self.bind(params)
        positions = jnp.broadcast_to((lengths + step)[:, None], tokens.shape)
        cos, sin = rotation(self.config, positions)
        graph, layers = nnx.split(decoder.layers)

        def body(x: Array, layer: tuple) -> tuple[Array, KeyValue]:
            state, prompt_layer, own_layer = layer
            block = nnx.merge(graph, _cast(state, dtype))
            return block.decode(x, cos, sin, prompt_layer, lengths, own_layer, step)

        x = self._embed(decoder, tokens, dtype)
        x, new = jax.lax.scan(body, x, (layers, prompt, own))
        return decoder.norm(x), new

    def _run_packed(
        self,
        params: Params,
        tokens: Array,
        segment_ids: Array,
        positions: Array,
        branches: Array | None,
        dtype: jnp.dtype | type,
        remat: str,
        keep_cache: bool,
    ) -> tuple[Array, KeyValue | None]:
        decoder = self.bind(params)
        cos, sin = rotation(self.config, positions)
        graph, layers = nnx.split(decoder.layers)

        def body(x: Array, state: nnx.State) -> tuple[Array, KeyValue | None]:
            block = nnx.merge(graph, _cast(state, dtype))
            x, cache = block.packed(x, cos, sin, segment_ids, branches)
            return x, cache if keep_cache else None

        if remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
        x = self._embed(decoder, tokens, dtype)
        x, cache = jax.lax.scan(body, x, layers)
        return decoder.norm(x), cache

    @staticmethod
    def _embed(decoder: Decoder, tokens: Array, dtype: jnp.dtype | type) -> Array:
        return jnp.take(decoder.embed.embedding[...], tokens, axis=0).astype(dtype)


def _cast(state: Any, dtype: jnp.dtype | type) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), state)
