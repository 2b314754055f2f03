"""How many candidates fit side by side, and what activations weigh."""

import math
from typing import Any

import jax
import numpy as np

from montessori_jax.models.config import ModelConfig

# A lane holds its gradient and its new parameters, which XLA may or may not lay in one place, and
# a leaf's worth of temporaries.
COPIES_PER_LANE = 3
# Beyond this a block gains nothing: the reference pass is bound by its own arithmetic.
LARGEST_BLOCK = 16
# Left free for what the allocator cannot hand out in one piece.
USABLE = 0.8


def activation_bytes(config: ModelConfig, rows: int, length: int) -> int:
    """Bytes that a float32 backward pass keeps of ``rows`` rows of ``length`` tokens.

    Counted from the decoder's parts: norms and residuals, queries, keys and values before and
    after their rotation, the gated layer's four products, and three attention matrices.
    """
    width, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    a_token = (
        6 * width
        + (3 * heads + 4 * kv_heads) * config.head_dim
        + 4 * config.intermediate_size
        + 3 * heads * length
    )
    return 4 * config.num_layers * rows * length * a_token


def block_size(params: Any, activations: int = 0, *, device: jax.Device | None = None) -> int:
    """Candidates to probe side by side (K), from the memory that is free on the device.

    ``K = usable free bytes / (3 x parameter bytes + activations)``, between 1 and 16. On a CPU it
    is 1: there a candidate fills the cores, and more side by side were slower where it was
    measured (docs/log.md, 135M parameters).

    Args:
        params: the student's parameters, on the device already.
        activations: bytes that one lane's forward and backward pass need (`activation_bytes`).
        device: by default the first local one.
    """
    device = device or jax.local_devices()[0]
    stats = device.memory_stats()
    if device.platform == "cpu" or not stats or "bytes_limit" not in stats:
        return 1
    free = USABLE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    weights = sum(map(_bytes_here, jax.tree.leaves(params)))
    return int(np.clip(free // (COPIES_PER_LANE * weights + activations), 1, LARGEST_BLOCK))


def _bytes_here(leaf: Any) -> int:
    """What of an array lies on one device."""
    shape = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else leaf.shape
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize
