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
FEW_ROWS = 32  # of `times_transposed`; measured with 2 cores of an EPYC, AVX2
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
    """Keys and values of one layer, or of a stack of layers."""

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


def times_transposed(
    x: Float[Array, "*rows inputs"], kernel: Float[Array, "outputs inputs"], **options: Any
) -> Float[Array, "*rows outputs"]:
    """``x @ kernel.T``, whichever way round is the faster for this number of rows.

    With few rows the product is computed as ``kernel @ x.T``: on a CPU 1.5 times faster for 16
    rows or fewer, no slower up to 32. The barrier keeps XLA from turning it back.
    """
    flat = x.reshape(-1, x.shape[-1])
    contract = (((1,), (1,)), ((), ()))
    if flat.shape[0] > FEW_ROWS:
        y = jax.lax.dot_general(flat, kernel, contract, **options)
    else:
        y = jax.lax.optimization_barrier(jax.lax.dot_general(kernel, flat, contract, **options)).T
    return y.reshape(*x.shape[:-1], kernel.shape[0])


class Linear(nnx.Module):
    """``x @ kernel (+ bias)`` in ``x``'s dtype; ``x @ kernel.T`` where outputs come first."""

    def __init__(self, inputs: int, outputs: int, bias: bool, scale: float, rngs: nnx.Rngs):
        self.outputs_first = False
        init = nnx.initializers.normal(scale)
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(x.dtype)
        y = times_transposed(x, kernel) if self.outputs_first else x @ kernel
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
        """One token a sample; returns ``x`` after the layer, and ``own`` with the token in it."""
        query, key, value = self.attention.project(self.attention_norm(x), cos, sin)
        insert = jax.lax.dynamic_update_index_in_dim
        own = KeyValue(insert(own.key, key, step, axis=3), insert(own.value, value, step, axis=3))
        mixed = decode_attention(query, *prompt, lengths, *own, step)
        x = x + self.attention.merge(mixed)
        return x + self.mlp(self.mlp_norm(x)), own


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
        decoder = self.bind(params)
        cos, sin = rotation(self.config, positions)
        graph, layers = nnx.split(decoder.layers)

        def body(x: Array, state: nnx.State) -> tuple[Array, None]:
            block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(dtype), state))
            return block.packed(x, cos, sin, segment_ids, branches)[0], None

        if remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
        x = jnp.take(decoder.embed.embedding[...], tokens, axis=0).astype(dtype)
        x, _ = jax.lax.scan(body, x, layers)
        return decoder.norm(x)
