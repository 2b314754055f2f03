"""The optimizer as an optax transformation: ``(grads, opt_state, params) -> (updates, state)``."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from montessori_jax.config import OptimizerConfig
from montessori_jax.training.schedules import wsd


def make_optimizer(settings: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip, AdamW (arXiv 1711.05101) or SGD, and the rate of `wsd` over ``steps`` updates.

    AdamW: ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``,
    ``-lr (m_hat / (sqrt(v_hat) + eps) + weight_decay theta)``; SGD: ``-lr g``. Moments have the
    parameters' dtype: float32 masters get float32 moments; ``moments_dtype: bfloat16`` keeps both
    in bfloat16 between updates (`in_bfloat16`). Clipping scales the gradient to the global norm
    ``max_grad_norm``; 0 leaves it.
    """
    return _chain(settings, wsd(settings, steps), clip=True)


def probe_optimizer(
    settings: OptimizerConfig, learning_rate: float, *, clip: bool = True
) -> optax.GradientTransformation:
    """The same rule at one constant rate, on a state of `make_optimizer`'s structure.

    A warm-up's ``opt_state`` (moments and counts) goes straight into its ``update``, so an
    influence probe continues the warm-up. ``clip=True`` is the actual optimizer, which is what
    the definition of influence applies; ``clip=False`` leaves the gradient whole, so that the
    update is a smooth function of it.
    """
    return _chain(settings, lambda count: jnp.asarray(learning_rate), clip=clip)


def _chain(
    settings: OptimizerConfig, schedule: optax.Schedule, *, clip: bool
) -> optax.GradientTransformation:
    # Parts that are off are identities, whose state is empty like that of what they stand for:
    # the state's structure depends on the optimizer's name alone.
    clipping = optax.clip_by_global_norm(settings.max_grad_norm)
    off = optax.identity()
    parts = [clipping if clip and settings.max_grad_norm > 0 else off]
    if settings.optimizer == "adamw":
        adam = optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon)
        parts.append(in_bfloat16(adam) if settings.moments_dtype == "bfloat16" else adam)
        decay = optax.add_decayed_weights(settings.weight_decay)
        parts.append(decay if settings.weight_decay > 0 else off)
    parts.append(optax.scale_by_learning_rate(schedule))
    return _standard_promotion(optax.chain(*parts))


def in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam whose moments are bfloat16 between updates and float32 within them.

    They are rounded up or down by chance, keyed by the count, so that they are right on average:
    to the nearest the second one would stand still, as ``beta2 = .999`` changes it by less than
    half of bfloat16's last bit (a constant gradient's would end at .22 of its square).
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        state = adam.init(params)
        return state._replace(
            mu=optax.tree.cast(state.mu, jnp.bfloat16), nu=optax.tree.cast(state.nu, jnp.bfloat16)
        )

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide = state._replace(
            mu=optax.tree.cast(state.mu, jnp.float32), nu=optax.tree.cast(state.nu, jnp.float32)
        )
        updates, after = adam.update(grads, wide, params)
        key = jax.random.fold_in(jax.random.key(0), after.count)
        leaves, structure = jax.tree.flatten((after.mu, after.nu))
        narrow = [
            _rounded_by_chance(leaf, jax.random.fold_in(key, number))
            for number, leaf in enumerate(leaves)
        ]
        mu, nu = jax.tree.unflatten(structure, narrow)
        return updates, after._replace(mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def _rounded_by_chance(x: Array, key: Array) -> Array:
    """Float32 -> bfloat16, up with the probability that makes the mean right."""
    chance = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + chance
    cut = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), cut, x.astype(jnp.bfloat16))


def _standard_promotion(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """``tx``, also where the caller asked JAX for strict promotion.

    Adam's bias correction raises a Python float to an integer count, which strict mode refuses.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(grads, state, params)

    return optax.GradientTransformation(tx.init, update)
