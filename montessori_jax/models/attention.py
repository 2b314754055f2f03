"""Attention behind one function for training and one for decoding.

Plain XLA runs on any backend and has reverse- and forward-mode derivatives; `packed_attention` may
use a fused kernel instead. Both take grouped heads (``heads`` a multiple of ``kv_heads``), and
compute scores and softmax in float32 (float64 for float64 inputs).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from montessori_jax.models.attention_kernels import by_dot_product, by_splash, choose

# Finite, so that a row without any allowed key gives a uniform average and never NaN.
MASKED = -1e30
# Generated tokens that are attended to at a time; see `decode_attention`.
OWN_BLOCK = 128


def wide(dtype: jnp.dtype | type) -> jnp.dtype:
    """The dtype of sums, softmax and losses: float32, or float64 where that is computed in."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def soft_capped(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """``cap tanh(x / cap)``, which keeps numbers between ``-cap`` and ``cap`` (Gemma 2,
    arXiv 2408.00118); ``x`` itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def packed_attention(
    query: Float[Array, "rows length heads dim"],
    key: Float[Array, "rows length kv_heads dim"],
    value: Float[Array, "rows length kv_heads dim"],
    segment_ids: Int[Array, "rows length"],
    branches: Int[Array, "rows length"] | None = None,
    *,
    positions: Int[Array, "rows length"] | None = None,
    window: int | None = None,
    sliding: bool | Bool[Array, ""] = True,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str = "xla",
) -> Float[Array, "rows length heads dim"]:
    """Causal attention within segments: token ``t`` sees ``s <= t`` of its own segment alone.

    ``softmax(cap(scale q k^T)) v`` with the softmax in float32; the result has ``value``'s dtype.

    Args:
        query: rotated queries.
        key: rotated keys, a head for each group of query heads.
        value: values.
        segment_ids: which sample each token belongs to.
        branches: makes a segment a tree of depth two: branch 0 is a trunk that all of it sees, and
            branches 1, 2, ... (the responses of one prompt) do not see each other.
        positions: position within the sample, by which windows are measured (the branches of one
            trunk have equal ones); by default the place in the row, which is as far without
            branches.
        window: a token sees those less than this many positions before it; None: all.
        sliding: whether ``window`` holds, where only a traced value tells.
        scale: by default ``1 / sqrt(dim)``.
        soft_cap: see `soft_capped`.
        implementation: ``xla`` (plain; the only one with forward mode), ``cudnn``, ``splash``, or
            ``auto``, the backend's fastest that is exact here.

    Raises:
        UserError: the kernel that was named cannot compute this, see `attention_kernels.choose`.
    """
    rows, length, heads, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    chosen = choose(implementation, query, branches=branches is not None, soft_cap=soft_cap)
    if chosen == "splash":
        return by_splash(
            query, key, value, segment_ids,
            window=window, sliding=sliding, scale=scale, soft_cap=soft_cap,
        )  # fmt: skip
    allowed = visible(segment_ids, branches, positions, window, sliding)
    if chosen == "cudnn":
        return by_dot_product(query, key, value, allowed, scale)
    kv_heads = key.shape[2]
    grouped = query.reshape(rows, length, kv_heads, heads // kv_heads, dim)
    sums = wide(query.dtype)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=sums)
    scores = soft_capped(scores * jnp.asarray(scale, sums), soft_cap)
    scores = jnp.where(allowed[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights, value)
    return mixed.reshape(rows, length, heads, dim)


def visible(
    segment_ids: Int[Array, "rows length"],
    branches: Int[Array, "rows length"] | None,
    positions: Int[Array, "rows length"] | None,
    window: int | None,
    sliding: bool | Bool[Array, ""],
) -> Bool[Array, "rows length length"]:
    """Whether a token (axis 1) sees another (axis 2), as `packed_attention` says."""
    order = jnp.arange(segment_ids.shape[1])
    allowed = (order[:, None] >= order[None, :])[None] & (
        segment_ids[:, :, None] == segment_ids[:, None, :]
    )
    if branches is not None:
        trunk = branches[:, None, :] == 0
        allowed &= trunk | (branches[:, :, None] == branches[:, None, :])
    if window is not None:
        places = order[None] if positions is None else positions
        near = places[:, :, None] - places[:, None, :] < window
        allowed &= near | ~jnp.asarray(sliding)
    return allowed


def decode_attention(
    query: Float[Array, "prompts samples heads dim"],
    prompt_key: Float[Array, "prompts kv_heads prompt_length dim"],
    prompt_value: Float[Array, "prompts kv_heads prompt_length dim"],
    prompt_lengths: Int[Array, " prompts"],
    key: Float[Array, "prompts samples kv_heads slots dim"],
    value: Float[Array, "prompts samples kv_heads slots dim"],
    steps: Int[Array, " prompts"],
    *,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "prompts samples heads dim"]:
    """One new token a sample, against its prompt (stored once for all samples) and its own past.

    Slots ``0..steps`` of ``key`` and ``value`` hold the tokens generated so far, the newest
    included; prompts are right-padded to ``prompt_length``. Caches have their heads before their
    positions: so both are batches of plain matrix products, and nothing is transposed each step
    (4 times faster than positions first on a CPU). ``window``, ``scale`` and ``soft_cap`` as in
    `packed_attention`.

    Slots are attended to in blocks of `OWN_BLOCK`, as many as the longest text needs. Blocks beyond
    a text's end add exact zeros, so its numbers are the same to the bit beside a longer one.
    """
    prompts, samples, heads, dim = query.shape
    kv_heads, prompt_length = prompt_key.shape[1:3]
    group = heads // kv_heads
    sums = wide(query.dtype)
    factor = jnp.asarray(dim**-0.5 if scale is None else scale, sums)
    grouped = query.reshape(prompts, samples, kv_heads, group, dim)

    def together(x: Array) -> Array:
        """All samples' queries of a prompt as rows of one product."""
        return x.swapaxes(1, 2).reshape(prompts, kv_heads, samples * group, -1)

    def apart(x: Array) -> Array:
        return x.reshape(prompts, kv_heads, samples, group, -1).swapaxes(1, 2)

    prompt_scores = factor * jnp.einsum(
        "pkmd,pksd->pkms", together(grouped), prompt_key, preferred_element_type=sums
    )
    places = jnp.arange(prompt_length)[None, :]
    in_prompt = places < prompt_lengths[:, None]
    if window is not None:
        in_prompt &= (prompt_lengths + steps)[:, None] - places < window
    prompt_scores = soft_capped(prompt_scores, soft_cap)
    prompt_scores = apart(jnp.where(in_prompt[:, None, None, :], prompt_scores, MASKED))
    slots = key.shape[3]
    size = slots if slots % OWN_BLOCK else OWN_BLOCK

    # One softmax over several arrays: the largest score, the weights' sum and that of weighted
    # values so far. The newest token is always seen, so the sum is never zero in the end.
    def further(block: Array, sofar: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        before, total, mixed = sofar
        block_key, block_value = key, value
        if size < slots:
            block_key = jax.lax.dynamic_slice_in_dim(key, block * size, size, axis=3)
            block_value = jax.lax.dynamic_slice_in_dim(value, block * size, size, axis=3)
        own_scores = factor * jnp.einsum(
            "pnkgd,pnktd->pnkgt", grouped, block_key, preferred_element_type=sums
        )
        at = (block * size + jnp.arange(size))[None, :]
        written = at <= steps[:, None]
        if window is not None:
            written &= steps[:, None] - at < window
        own_scores = soft_capped(own_scores, soft_cap)
        own_scores = jnp.where(written[:, None, None, None, :], own_scores, MASKED)
        largest = jnp.maximum(before, jnp.max(own_scores, axis=-1, keepdims=True))
        shrunk, own_weights = jnp.exp(before - largest), jnp.exp(own_scores - largest)
        own_mixed = jnp.einsum(
            "pnkgt,pnktd->pnkgd",
            own_weights.astype(value.dtype),
            block_value,
            preferred_element_type=sums,
        )
        total = total * shrunk + jnp.sum(own_weights, axis=-1, keepdims=True)
        return largest, total, mixed * shrunk + own_mixed

    largest = jnp.max(prompt_scores, axis=-1, keepdims=True)
    prompt_weights = jnp.exp(prompt_scores - largest)
    prompt_mixed = jnp.einsum(
        "pkms,pksd->pkmd",
        together(prompt_weights.astype(value.dtype)),
        prompt_value,
        preferred_element_type=sums,
    )
    sofar = largest, jnp.sum(prompt_weights, axis=-1, keepdims=True), apart(prompt_mixed)
    if size == slots:
        _, total, mixed = further(jnp.int32(0), sofar)
    else:
        _, total, mixed = jax.lax.fori_loop(0, jnp.max(steps) // size + 1, further, sofar)
    return (mixed / total).astype(value.dtype).reshape(prompts, samples, heads, dim)
