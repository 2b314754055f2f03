"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split layout of Llama."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from montessori_jax.models.attention import wide
from montessori_jax.models.config import ModelConfig


class Rotation(NamedTuple):
    """Cosine and sine of the angles at each position: ``[*batch, head_dim / 2]``, float32."""

    cos: Array
    sin: Array


class Rotations(NamedTuple):
    """The rotations of a model's layers; ``local`` where sliding layers have one of their own."""

    usual: Rotation
    local: Rotation | None

    def of(self, sliding: bool | Array) -> Rotation:
        """A layer's rotation; whether it slides may be known at run time only."""
        if self.local is None:
            return self.usual
        if isinstance(sliding, bool):
            return self.local if sliding else self.usual
        return Rotation(
            *(jnp.where(sliding, *pair) for pair in zip(self.local, self.usual, strict=True))
        )


def inverse_frequencies(config: ModelConfig, *, local: bool = False) -> np.ndarray:
    """Angular frequencies in radians a position, float32 ``[head_dim / 2]``.

    ``theta ** (-2 i / head_dim)``, then the scaling of ``config.rope_scaling``. For ``llama3``
    wavelengths above ``original / low_freq_factor`` are divided by ``factor``, those below
    ``original / high_freq_factor`` are kept, and a linear ramp in ``original / wavelength`` joins
    the two (the rule that Llama 3.1 published with its weights). ``local`` asks for those of
    sliding layers: another base, where the configuration has one, and then no scaling.

    Rounded to float32 after each operation, as the models were trained: at position 8,192 the last
    bit of a frequency is worth 5e-4 radians. The power alone is computed in float64, since
    float32 powers differ in that bit from one machine to the next.
    """
    theta, scaling = config.rope_theta, config.rope_scaling
    if local and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    power = np.power(np.float64(np.float32(theta)), exponent.astype(np.float64))
    frequency = np.float32(1.0) / power.astype(np.float32)
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return (frequency / scaling.factor).astype(np.float32)
    original = scaling.original_max_position_embeddings
    # Products with a reciprocal, as PyTorch divides a number by a tensor.
    one = np.float32(1.0)
    wavelength = 2 * np.pi * (one / frequency)
    ramp = (original * (one / wavelength) - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept = np.clip(ramp, 0.0, 1.0)
    scaled = (1 - kept) * frequency / scaling.factor + kept * frequency
    return scaled.astype(np.float32)


def rotations(config: ModelConfig, positions: Int[Array, "*batch"]) -> Rotations:
    """Every rotation that the layers of ``config`` need at ``positions``."""
    separate = config.local_rope_theta is not None and any(config.sliding)
    return Rotations(
        rotation(config, positions), rotation(config, positions, local=True) if separate else None
    )


def rotation(
    config: ModelConfig, positions: Int[Array, "*batch"], *, local: bool = False
) -> Rotation:
    """Cosine and sine of the rotation at each position, float32 whatever the compute dtype."""
    frequencies = inverse_frequencies(config, local=local).reshape((1,) * positions.ndim + (-1,))
    angle = positions[..., None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(
    heads: Float[Array, "*batch heads dim"],
    cos: Float[Array, "*batch half"],
    sin: Float[Array, "*batch half"],
) -> Float[Array, "*batch heads dim"]:
    """Rotate each head's feature pairs ``(i, i + dim/2)`` by its position's angle.

    Computed in float32 and cast back, as bf16 angles lose whole turns at long positions.
    """
    first, second = jnp.split(heads.astype(wide(heads.dtype)), 2, axis=-1)
    cos, sin = (part[..., None, :].astype(first.dtype) for part in (cos, sin))
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(heads.dtype)
