"""Optimizer steps as pure functions ``(state, batch) -> (state, metrics)``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from montessori_jax.config import DpoConfig, TrainingConfig
from montessori_jax.data.packing import Batch
from montessori_jax.models import Model, Params
from montessori_jax.training.losses import sum_by_sample, token_losses
from montessori_jax.training.pairs import PairBatch
from montessori_jax.training.preference_losses import (
    PairSums,
    means,
    pair_losses,
    pair_measures,
    reference_divergence,
)
from montessori_jax.training.state import TrainState

Metrics = dict[str, Array]
# A `jax.tree_util.Partial`: whatever arrays the model holds (LoRA's base) are its leaves, so that
# they can be arguments of the compiled program and not constants in it.
Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
# (params, micro-batch) -> (sum of losses, sums by name); neither is divided by anything.
Objective = Callable[[Params, Any], tuple[Array, Metrics]]


def accumulate(
    objective: Objective, params: Params, batch: Any, used: Array
) -> tuple[Params, Metrics]:
    """Gradient of the summed loss, and the objective's sums, over ``used`` micro-batches.

    Sums alone, so that the caller divides once by the whole step's count: the result is that of
    one large batch however unequal the micro-batches are. ``batch`` has a leading axis of
    micro-batches; those from ``used`` on are fillers and cost nothing.
    """
    at = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
    sums = jax.eval_shape(lambda p, b: objective(p, b)[1], params, at)

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

    def add(index: Array, carry: tuple[Params, Metrics]) -> tuple[Params, Metrics]:
        micro = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), batch
        )
        gradient, new = jax.grad(objective, has_aux=True)(params, micro)
        return jax.tree.map(jnp.add, carry, (gradient, new))

    return jax.lax.fori_loop(0, used, add, (zeros(params), zeros(sums)))


def used_micro_batches(weights: Array) -> Array:
    """How many micro-batches have a target; fillers have none and come last."""
    return jnp.sum(jnp.any(weights > 0, axis=(1, 2)).astype(jnp.int32))


def apply_gradient(
    state: TrainState, gradient: Params, tx: optax.GradientTransformation
) -> TrainState:
    """One update: ``theta + tx.update(gradient, opt_state, theta)``."""
    updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)


def sft_step(model: Model, tx: optax.GradientTransformation, settings: TrainingConfig) -> Step:
    """A step on a `Batch` with a leading axis of micro-batches: mean loss over its targets.

    Metrics: ``loss`` (nats a target token), ``grad_norm`` (before clipping), ``targets``.
    """

    dtype = jnp.dtype(settings.dtype)

    def step(model: Model, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def objective(params: Params, batch: Batch) -> tuple[Array, Metrics]:
            losses = token_losses(
                model,
                params,
                batch,
                dtype=dtype,
                remat=settings.remat,
                attention=settings.attention,
            )
            weights = batch.target_weights.astype(losses.dtype)
            total = jnp.sum(losses * weights)
            return total, {"loss": total, "targets": jnp.sum(weights)}

        used = used_micro_batches(batch.target_weights)
        gradient, sums = accumulate(objective, state.params, batch, used)
        count = jnp.maximum(sums["targets"], 1)
        gradient = jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), gradient)
        return apply_gradient(state, gradient, tx), {
            "loss": sums["loss"] / count,
            "grad_norm": optax.tree.norm(gradient),
            "targets": sums["targets"],
        }

    return jax.tree_util.Partial(step, model)


def pair_sums(
    model: Model,
    params: Params,
    pairs: PairBatch,
    *,
    dtype: str,
    remat: str = "none",
    attention: str = "xla",
) -> PairSums:
    """Log-probs of each pair's responses under ``params``, with the reference's beside them."""
    rows = pairs.batch.tokens.shape[0]
    policy = -token_losses(
        model, params, pairs.batch, dtype=jnp.dtype(dtype), remat=remat, attention=attention
    )
    reference = pairs.reference.astype(policy.dtype)

    def by_response(values: Array) -> Array:
        return sum_by_sample(values, pairs.batch, 2 * rows).total.reshape(rows, 2)

    return PairSums(
        policy=by_response(policy),
        reference=by_response(reference),
        tokens=by_response(jnp.ones_like(policy)),
        divergence=by_response(reference_divergence(policy, reference)),
    )


def dpo_step(model: Model, tx: optax.GradientTransformation, settings: DpoConfig) -> Step:
    """A step on a `PairBatch` with a leading axis of micro-batches: mean loss over its pairs.

    Metrics: those of `pair_measures` averaged by `means`, and ``grad_norm`` (before clipping).
    """

    def step(model: Model, state: TrainState, pairs: PairBatch) -> tuple[TrainState, Metrics]:
        def objective(params: Params, pairs: PairBatch) -> tuple[Array, Metrics]:
            sums = pair_sums(
                model,
                params,
                pairs,
                dtype=settings.dtype,
                remat=settings.remat,
                attention=settings.attention,
            )
            real = jnp.any(pairs.batch.target_weights > 0, axis=1).astype(sums.policy.dtype)
            measures = pair_measures(jax.lax.stop_gradient(sums), settings)
            totals = {name: jnp.sum(values * real) for name, values in measures.items()}
            return jnp.sum(pair_losses(sums, settings) * real), {**totals, "pairs": jnp.sum(real)}

        used = used_micro_batches(pairs.batch.target_weights)
        gradient, totals = accumulate(objective, state.params, pairs, used)
        count = jnp.maximum(totals.pop("pairs"), 1)
        gradient = jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), gradient)
        metrics = means(totals, count)
        return apply_gradient(state, gradient, tx), {
            **metrics,
            "grad_norm": optax.tree.norm(gradient),
        }

    return jax.tree_util.Partial(step, model)
