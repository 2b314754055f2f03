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

from montessori_jax.mesh import collected, split_rows
from montessori_jax.models.attention import decode_attention, packed_attention, soft_capped, wide
from montessori_jax.models.config import ModelConfig
from montessori_jax.models.rope import Rotation, rotate, rotations

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
    """``x / sqrt(mean(x^2) + eps) * scale``, the statistics in float32 (arXiv 1910.07467).

    Zero-centred norms multiply by ``1 + scale``, in float32 too.
    """

    def __init__(self, config: ModelConfig, width: int):
        self.epsilon, self.zero_centered = config.rms_norm_eps, config.zero_centered_norms
        start = jnp.zeros if self.zero_centered else jnp.ones
        self.scale = nnx.Param(start((width,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        wide_x = x.astype(wide(x.dtype))
        mean_square = jnp.mean(jnp.square(wide_x), axis=-1, keepdims=True)
        normed = wide_x * jax.lax.rsqrt(mean_square + self.epsilon)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + self.scale.shape)
        if self.zero_centered:
            return (normed * (1 + scale.astype(normed.dtype))).astype(x.dtype)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


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

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, bias, config.initializer_range, rngs)

        self.query = linear(width, config.num_heads * dim, config.qkv_bias)
        self.key = linear(width, config.num_kv_heads * dim, config.qkv_bias)
        self.value = linear(width, config.num_kv_heads * dim, config.qkv_bias)
        self.out = linear(config.num_heads * dim, width, config.out_bias)
        if config.qk_norm:
            self.query_norm, self.key_norm = RmsNorm(config, dim), RmsNorm(config, dim)

    def project(self, x: Array, rotation: Rotation) -> tuple[Array, Array, Array]:
        """Queries, keys and values by head, the first two rotated: ``[..., heads, head_dim]``."""
        dim = self.config.head_dim
        query = self.query(x).reshape(*x.shape[:-1], self.config.num_heads, dim)
        key = self.key(x).reshape(*x.shape[:-1], self.config.num_kv_heads, dim)
        value = self.value(x).reshape(*x.shape[:-1], self.config.num_kv_heads, dim)
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, *rotation), rotate(key, *rotation), value

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
        self.config = config
        self.attention_norm = RmsNorm(config, config.hidden_size)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RmsNorm(config, config.hidden_size)
        self.mlp = Mlp(config, rngs)
        if config.post_norms:
            self.attention_post_norm = RmsNorm(config, config.hidden_size)
            self.mlp_post_norm = RmsNorm(config, config.hidden_size)

    def packed(
        self,
        x: Array,
        rotation: Rotation,
        segment_ids: Array,
        positions: Array,
        branches: Array | None,
        sliding: bool | Array,
        attention: str = "xla",
    ) -> tuple[Array, KeyValue]:
        """Whole rows; returns ``x`` after the layer and its (key, value)."""
        query, key, value = self.attention.project(self.attention_norm(x), rotation)
        mixed = packed_attention(
            query,
            key,
            value,
            segment_ids,
            branches,
            positions=positions,
            window=None if sliding is False else self.config.sliding_window,
            sliding=sliding,
            scale=self.config.attention_scale,
            soft_cap=self.config.attention_soft_cap,
            implementation=attention,
        )
        return self._rest(x, mixed), KeyValue(key, value)

    def decode(
        self,
        x: Array,
        rotation: Rotation,
        prompt: KeyValue,
        lengths: Array,
        own: KeyValue,
        steps: Array,
        sliding: bool,
    ) -> tuple[Array, KeyValue]:
        """One token a sample; returns ``x`` after the layer, and ``own`` with the token in it."""
        query, key, value = self.attention.project(self.attention_norm(x), rotation)
        insert = jax.vmap(partial(jax.lax.dynamic_update_index_in_dim, axis=2))
        own = KeyValue(insert(own.key, key, steps), insert(own.value, value, steps))
        mixed = decode_attention(
            query,
            *prompt,
            lengths,
            *own,
            steps,
            window=self.config.sliding_window if sliding else None,
            scale=self.config.attention_scale,
            soft_cap=self.config.attention_soft_cap,
        )
        return self._rest(x, mixed), own

    def _rest(self, x: Array, mixed: Array) -> Array:
        """The layer after its attention."""
        attended = self.attention.merge(mixed)
        x = x + (self.attention_post_norm(attended) if self.config.post_norms else attended)
        fed = self.mlp(self.mlp_norm(x))
        return x + (self.mlp_post_norm(fed) if self.config.post_norms else fed)


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
        self.norm = RmsNorm(config, config.hidden_size)
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


@jax.tree_util.register_static
@dataclass(frozen=True)
class Model:
    """The static half of a decoder; every method is a pure function of ``params``.

    Hashable by its configuration, so it can be a static argument of jit or closed over; also a
    pytree without leaves, so it can be an ordinary one.
    """

    config: ModelConfig

    def shapes(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct` leaves (float32)."""
        return nnx.to_pure_dict(_define(self.config)[1])

    def parameter_count(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes()))

    def init(self, key: Array) -> Params:
        """Random float32 parameters (normal, ``config.initializer_range``); norms do nothing."""
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
        attention: str = "xla",
    ) -> Float[Array, "rows length width"]:
        """Normed hidden states of packed rows; `logits` turns them into logits.

        Args:
            params: the parameter tree; cast to ``dtype`` layer by layer, never as a whole.
            tokens: token ids, int32.
            segment_ids: which sample each token belongs to; none is attended across samples.
            positions: position within the sample, consecutive but for branches.
            branches: where several responses share one prompt, see `packed_attention`.
            dtype: compute dtype of products and activations.
            remat: ``none``, ``full`` (recompute each layer in the backward pass) or ``dots``
                (keep the products with weights, recompute the rest).
            attention: ``implementation`` of `packed_attention`; `jax.jvp` needs ``xla``.
        """
        config, decoder = self.config, self.bind(params)
        turns = rotations(config, positions)
        graph, layers = nnx.split(decoder.layers)
        # Where layers differ, each learns its kind as it is scanned.
        alike = len(set(config.sliding)) == 1
        kinds = None if alike else jnp.asarray(config.sliding)

        def body(x: Array, layer: tuple[nnx.State, Array | None]) -> tuple[Array, None]:
            state, kind = layer
            sliding = config.sliding[0] if kind is None else kind
            block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(dtype), state))
            turn = turns.of(sliding)
            x, _ = block.packed(x, turn, segment_ids, positions, branches, sliding, attention)
            return split_rows(x), None

        if remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
        x = split_rows(embedded(config, decoder.embed.embedding[...], tokens, dtype))
        x, _ = jax.lax.scan(body, x, (layers, kinds))
        return decoder.norm(x)

    def logits(
        self, params: Params, hidden: Float[Array, "*rows width"]
    ) -> Float[Array, "*rows vocab"]:
        """Logits in float32 of normed hidden states: the head, then the soft cap if there is one.

        For many tokens use `montessori_jax.training.losses.cross_entropy`, which never holds all.
        """
        head = self.head(params).astype(hidden.dtype)
        scores = jnp.dot(hidden, head, preferred_element_type=wide(hidden.dtype))
        return soft_capped(scores, self.config.logit_soft_cap)


def embedded(
    config: ModelConfig,
    embedding: Float[Array, "vocab width"],
    tokens: Int[Array, "*rows"],
    dtype: jnp.dtype | type,
) -> Float[Array, "*rows width"]:
    """What the first layer sees: each token's embedding, scaled where the family does so."""
    x = jnp.take(collected(embedding), tokens, axis=0).astype(dtype)
    return x * jnp.asarray(math.sqrt(config.hidden_size), dtype) if config.scale_embeddings else x
