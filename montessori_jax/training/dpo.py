"""Direct preference optimisation: pairs and the reference's log-probs -> a tuned policy."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from montessori_jax.config import DpoConfig
from montessori_jax.errors import UserError
from montessori_jax.mesh import mesh_of, row_ways
from montessori_jax.models import Model, Params
from montessori_jax.training.batches import Shape, plan_steps, stack, step_samples
from montessori_jax.training.checkpoints import Checkpoints
from montessori_jax.training.loop import Run, Surroundings, identity, nothing, run_steps
from montessori_jax.training.optimizer import make_optimizer
from montessori_jax.training.pairs import EncodedPair, PairBatch, fit_pair, pack_pairs
from montessori_jax.training.preference_losses import (
    PairSums,
    means,
    pair_measures,
    reference_divergence,
)
from montessori_jax.training.schedules import rate_table
from montessori_jax.training.state import TrainState, start, state_shardings
from montessori_jax.training.steps import dpo_step


def train_dpo(
    model: Model,
    params: Params,
    pairs: Sequence[EncodedPair],
    settings: DpoConfig,
    *,
    reference: Sequence[np.ndarray],
    seed: int,
    checkpoints: Checkpoints | None = None,
    metrics: Callable[[dict[str, Any]], None] = nothing,
    progress: Callable[[int, int], None] = nothing,
    say: Callable[[str], None] = nothing,
    stop_requested: Callable[[], bool] = lambda: False,
    after: Callable[[int, TrainState], None] = nothing,
    consume: bool = False,
) -> TrainState:
    """Train the policy on ``pairs``; every step takes ``batch_size`` of them, a row each.

    Args:
        model: the decoder.
        params: float32 parameters of policy and reference alike; copied, so they stay valid.
        pairs: encoded pairs; a pair whose prompt leaves no room for a response is left out and
            reported.
        settings: loss, optimizer, batch and numerics.
        reference: `reference_log_probs` of the same pairs under the same settings.
        seed: keys the order of pairs.
        checkpoints: where states are saved and resumed from.
        metrics: given a record every ``log_every`` steps: ``step``, ``loss``, ``reward_chosen``,
            ``reward_rejected``, ``reward_margin``, ``reward_accuracy``, ``kl`` (nats a response
            token, see `reference_divergence`), ``grad_norm``, ``learning_rate``, ``tokens``, ...
        progress: given ``(steps done, steps in all)``.
        say: given one-line messages for people.
        stop_requested: asked after every step.
        after: given the steps done and the state after each; the next step takes its memory.
        consume: free ``params`` once they are copied: the caller does not need them again.

    Returns:
        The state after the last step.

    Raises:
        UserError: nothing to train on, or the loss is no longer finite.
        Interrupted: a stop was asked for.
    """
    kept, log_probs = _matched(pairs, reference, settings)
    if len(kept) < len(pairs):
        say(
            f"{len(pairs) - len(kept)} of {len(pairs)} pairs have a prompt of max_length "
            f"{settings.max_length} tokens or more and are left out"
        )
    if not kept:
        raise UserError("no preference pair to train on: give more pairs, or raise max_length")
    mesh = mesh_of((model, params))
    steps = step_samples(seed, len(kept), settings.batch_size, settings.epochs)
    lengths = [pair.length for pair in kept]
    targets = [pair.targets for pair in kept]
    plans = plan_steps(
        steps, lengths, targets, settings.micro_batch, share_rows=False, ways=row_ways(mesh)
    )
    tx = make_optimizer(settings, len(steps))

    def pack_rows(rows: Sequence[Sequence[int]], shape: Shape) -> PairBatch:
        members = [index for row in rows for index in row]
        return pack_pairs(
            [kept[i] for i in members],
            [log_probs[i] for i in members],
            row_length=shape.row_length,
            slots=shape.slots,
            rows=shape.rows,
        )

    content = [chat.tokens for pair in kept for chat in (pair.chosen, pair.rejected)]
    run = Run(
        step=dpo_step(model, tx, settings),
        batch=lambda index: stack(plans[index], pack_rows),
        tokens=lambda index: sum(lengths[i] for i in steps[index]),
        rates=rate_table(settings, len(steps)),
        steps=len(steps),
        identity=identity(["dpo"], seed, settings, [*content, *log_probs], targets),
        settings=settings,
        mesh=mesh,
        shardings=state_shardings(params, tx, mesh),
    )
    around = Surroundings(checkpoints, metrics, progress, say, stop_requested, after)
    return run_steps(lambda: start(params, tx), run, around, params if consume else None)


def evaluate_dpo(
    pairs: Sequence[EncodedPair],
    policy: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    settings: DpoConfig,
) -> dict[str, float]:
    """Measure a policy on pairs, held out or not, from both models' token log-probs.

    Args:
        pairs: encoded pairs.
        policy: `pair_log_probs` of the policy; the reference's own give the untrained policy.
        reference: `pair_log_probs` (or `reference_log_probs`) of the reference.
        settings: the loss measured.

    Returns:
        ``pairs``, and the means over them of `pair_measures`: ``loss``, ``reward_margin``,
        ``reward_accuracy`` (a tie is a miss), ``kl`` (nats a response token), ...

    Raises:
        UserError: no pair has room for its responses.
    """
    kept, theirs = _matched(pairs, reference, settings)
    _, ours = _matched(pairs, policy, settings)
    if not kept:
        raise UserError("no preference pair to measure: give more pairs, or raise max_length")

    def by_response(values: Sequence[np.ndarray]) -> Array:
        cuts = [len(pair.chosen.tokens) - pair.chosen.prompt_length for pair in kept]
        return jnp.asarray(
            [
                [np.sum(row[:cut], dtype=np.float64), np.sum(row[cut:], dtype=np.float64)]
                for row, cut in zip(values, cuts, strict=True)
            ],
            jnp.float32,
        )

    divergence = [
        np.asarray(reference_divergence(jnp.asarray(a), jnp.asarray(b)))
        for a, b in zip(ours, theirs, strict=True)
    ]
    sums = PairSums(
        policy=by_response(ours),
        reference=by_response(theirs),
        tokens=by_response([np.ones_like(row) for row in ours]),
        divergence=by_response(divergence),
    )
    totals = {name: jnp.sum(values) for name, values in pair_measures(sums, settings).items()}
    found = means(totals, jnp.float32(len(kept)))
    return {"pairs": len(kept), **{name: float(value) for name, value in found.items()}}


def _matched(
    pairs: Sequence[EncodedPair], log_probs: Sequence[np.ndarray], settings: DpoConfig
) -> tuple[list[EncodedPair], list[np.ndarray]]:
    """The pairs that fit, cut, each with its log-probs; checks that the two belong together."""
    kept, values = [], []
    for pair, row in zip(pairs, log_probs, strict=True):
        fitted = fit_pair(pair, settings.max_length)
        if fitted is None:
            continue
        if len(row) != fitted.targets:
            raise ValueError(
                f"pair {pair.id} has {fitted.targets} response tokens and {len(row)} log-probs"
            )
        kept.append(fitted)
        values.append(row)
    return kept, values
