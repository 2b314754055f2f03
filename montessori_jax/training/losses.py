"""Losses: arrays in, per-token or per-example values out, reduced once by the caller."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from montessori_jax.data.packing import Batch
from montessori_jax.mesh import row_groups
from montessori_jax.models import Model, Params
from montessori_jax.models.attention import soft_capped, wide

# Tokens whose logits exist at one time; 256 x 128K vocabulary x 4 bytes is 131 MB.
CHUNK = 256


def cross_entropy(
    hidden: Float[Array, "tokens width"],
    head: Float[Array, "width vocab"],
    targets: Int[Array, " tokens"],
    *,
    soft_cap: float | None = None,
    chunk: int = CHUNK,
    groups: int = 1,
) -> Float[Array, " tokens"]:
    """Negative log-likelihood of each target in nats, never ``[tokens, vocab]`` at once.

    ``logsumexp(z) - z[target]``, logits ``z = cap(h W)``, in chunks of tokens that are computed
    again in the backward pass.
    Made of plain differentiable pieces, so that `jax.jvp` and `jax.grad` both pass through.

    Args:
        hidden: in the compute dtype; the products are taken in it and summed in float32.
        head: output projection; its gradient has its own dtype, float32 for master weights.
        targets: token ids below ``vocab``.
        soft_cap: of the logits, see `soft_capped`; None for families without one.
        chunk: tokens of a group whose logits exist at one time.
        groups: into how many equal runs the mesh splits ``tokens``; each device goes through its
            own.

    Returns:
        float32; float64 where ``hidden`` is.
    """
    tokens, width = hidden.shape
    each = tokens // groups
    chunk = min(chunk, each)
    padding = ((0, 0), (0, -each % chunk))
    hidden = jnp.pad(hidden.reshape(groups, each, width), (*padding, (0, 0)))
    hidden = hidden.reshape(groups, -1, chunk, width).swapaxes(0, 1)
    padded = jnp.pad(targets.reshape(groups, each), padding)
    padded = padded.reshape(groups, -1, chunk).swapaxes(0, 1)

    @jax.checkpoint
    def one(inputs: tuple[Array, Array]) -> Array:
        states, labels = inputs
        # Cast in here, so that the head's gradient is summed over chunks in the head's own dtype.
        kernel = head.astype(states.dtype)
        logits = jnp.dot(states, kernel, preferred_element_type=wide(states.dtype))
        logits = soft_capped(logits, soft_cap)
        return jax.nn.logsumexp(logits, axis=-1) - picked(logits, labels)

    losses = jax.lax.map(one, (hidden, padded)).swapaxes(0, 1)
    return losses.reshape(groups, -1)[:, :each].reshape(tokens)


def picked(
    logits: Float[Array, "*shape vocab"], labels: Int[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Each label's logit.

    On a mesh, which may split the vocabulary, as a sum with zeros elsewhere, to the same bits:
    every device sums its part. As a gather there libtpu 0.0.42.1 ends the process by a failed check
    of its partitioner.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    places = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    return jnp.sum(jnp.where(places == labels[..., None], logits, 0), axis=-1)


def target_states(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    dtype: jnp.dtype | type,
    remat: str = "none",
    attention: str = "xla",
) -> Float[Array, "rows slots width"]:
    """The hidden states that a batch's targets are predicted from."""
    hidden = model.hidden(
        params,
        batch.tokens,
        batch.segment_ids,
        batch.positions,
        branches=batch.branches,
        dtype=dtype,
        remat=remat,
        attention=attention,
    )
    return jnp.take_along_axis(hidden, batch.target_positions[..., None], axis=1)


def token_losses(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    dtype: jnp.dtype | type = jnp.float32,
    remat: str = "none",
    attention: str = "xla",
) -> Float[Array, "rows slots"]:
    """Negative log-likelihood in nats of each target of a batch; the head sees targets alone."""
    states = target_states(model, params, batch, dtype=dtype, remat=remat, attention=attention)
    flat = cross_entropy(
        states.reshape(-1, states.shape[-1]),
        model.head(params),
        batch.targets.reshape(-1),
        soft_cap=model.config.logit_soft_cap,
        groups=row_groups(states.shape[0]),
    )
    return flat.reshape(batch.targets.shape)


class SampleSums(NamedTuple):
    """Loss sums in nats and numbers of targets, by sample."""

    total: Float[Array, " samples"]
    targets: Float[Array, " samples"]


def sum_by_sample(losses: Float[Array, "rows slots"], batch: Batch, samples: int) -> SampleSums:
    """Add up token losses by sample; ``samples`` is static. Means are ``total / targets``."""

    def add(values: Array) -> Array:
        return jax.ops.segment_sum(
            values.reshape(-1), batch.target_samples.reshape(-1), num_segments=samples
        )

    weights = batch.target_weights.astype(losses.dtype)
    return SampleSums(add(losses * weights), add(weights))
