"""Attention behind one function for training and one for decoding; plain XLA, any backend.

Both take grouped heads (``heads`` a multiple of ``kv_heads``), compute scores and softmax in
float32 (float64 for float64 inputs), and have reverse- and forward-mode derivatives.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Finite, so that a row without any allowed key gives a uniform average and never NaN.
MASKED = -1e30


def wide(dtype: jnp.dtype | type) -> jnp.dtype:
    """The dtype of sums, softmax and losses: float32, or float64 where that is computed in."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def packed_attention(
    query: Float[Array, "rows length heads dim"],
    key: Float[Array, "rows length kv_heads dim"],
    value: Float[Array, "rows length kv_heads dim"],
    segment_ids: Int[Array, "rows length"],
    branches: Int[Array, "rows length"] | None = None,
) -> Float[Array, "rows length heads dim"]:
    """Causal attention within segments: token ``t`` sees ``s <= t`` of its own segment alone.

    ``softmax(q k^T / sqrt(dim)) v`` with the softmax in float32; the result has ``value``'s dtype.
    With ``branches`` a segment is a tree of depth two: branch 0 is a trunk that all of it sees,
    and branches 1, 2, ... (the responses of one prompt) do not see each other.
    """
    rows, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(rows, length, kv_heads, heads // kv_heads, dim)
    sums = wide(query.dtype)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=sums)
    scores = scores * jnp.asarray(dim**-0.5, sums)
    order = jnp.arange(length)
    allowed = (order[:, None] >= order[None, :])[None] & (
        segment_ids[:, :, None] == segment_ids[:, None, :]
    )
    if branches is not None:
        trunk = branches[:, None, :] == 0
        allowed &= trunk | (branches[:, :, None] == branches[:, None, :])
    scores = jnp.where(allowed[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights, value)
    return mixed.reshape(rows, length, heads, dim)


def decode_attention(
    query: Float[Array, "prompts samples heads dim"],
    prompt_key: Float[Array, "prompts prompt_length kv_heads dim"],
    prompt_value: Float[Array, "prompts prompt_length kv_heads dim"],
    prompt_lengths: Int[Array, " prompts"],
    key: Float[Array, "prompts samples slots kv_heads dim"],
    value: Float[Array, "prompts samples slots kv_heads dim"],
    step: Int[Array, ""],
) -> Float[Array, "prompts samples heads dim"]:
    """One new token a sample, against its prompt (stored once for all samples) and its own past.

    Slots ``0..step`` of ``key`` and ``value`` hold the tokens generated so far, the newest
    included; prompts are right-padded to ``prompt_length``.
    """
    prompts, samples, heads, dim = query.shape
    kv_heads = key.shape[3]
    grouped = query.reshape(prompts, samples, kv_heads, heads // kv_heads, dim)
    sums = wide(query.dtype)
    scale = jnp.asarray(dim**-0.5, sums)
    prompt_scores = scale * jnp.einsum(
        "pnkgd,pskd->pnkgs", grouped, prompt_key, preferred_element_type=sums
    )
    own_scores = scale * jnp.einsum("pnkgd,pntkd->pnkgt", grouped, key, preferred_element_type=sums)
    in_prompt = jnp.arange(prompt_key.shape[1])[None, :] < prompt_lengths[:, None]
    prompt_scores = jnp.where(in_prompt[:, None, None, None, :], prompt_scores, MASKED)
    written = (jnp.arange(key.shape[2]) <= step)[None, None, None, None, :]
    own_scores = jnp.where(written, own_scores, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([prompt_scores, own_scores], axis=-1), axis=-1)
    weights = weights.astype(value.dtype)
    split = prompt_key.shape[1]
    mixed = jnp.einsum("pnkgs,pskd->pnkgd", weights[..., :split], prompt_value)
    mixed = mixed + jnp.einsum("pnkgt,pntkd->pnkgd", weights[..., split:], value)
    return mixed.reshape(prompts, samples, heads, dim)
