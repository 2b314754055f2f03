"""Supervised fine-tuning: a model, its parameters and encoded chats -> a trained state."""

from collections.abc import Callable, Sequence
from typing import Any

from montessori_jax.config import SftConfig
from montessori_jax.data.chat import EncodedChat, fit
from montessori_jax.data.packing import Batch, count_targets, pack
from montessori_jax.errors import UserError
from montessori_jax.mesh import mesh_of, row_ways
from montessori_jax.models import Model, Params
from montessori_jax.training.batches import Shape, plan_steps, stack, step_samples
from montessori_jax.training.checkpoints import Checkpoints
from montessori_jax.training.loop import Run, Surroundings, identity, nothing, run_steps
from montessori_jax.training.optimizer import make_optimizer
from montessori_jax.training.schedules import rate_table
from montessori_jax.training.state import TrainState, start, state_shardings
from montessori_jax.training.steps import sft_step


def train_sft(
    model: Model,
    params: Params,
    chats: Sequence[EncodedChat],
    settings: SftConfig,
    *,
    seed: int,
    fingerprint: str = "",
    checkpoints: Checkpoints | None = None,
    metrics: Callable[[dict[str, Any]], None] = nothing,
    progress: Callable[[int, int], None] = nothing,
    say: Callable[[str], None] = nothing,
    stop_requested: Callable[[], bool] = lambda: False,
    after: Callable[[int, TrainState], None] = nothing,
    consume: bool = False,
) -> TrainState:
    """Train on ``chats`` with the mean loss over each step's response tokens.

    Every step takes ``batch_size`` samples, in an order keyed by seed and epoch, packed in rows
    and run ``micro_batch`` rows at a time.

    Args:
        model: the decoder.
        params: float32 parameters to start from; copied, so they stay valid.
        chats: encoded samples, of which the first ``settings.rows`` are used; a response is cut at
            ``max_length``, and a sample without room for any of it is left out and reported.
        settings: optimizer, batch and numerics.
        seed: keys the order of samples.
        fingerprint: of ``params``; checkpoints of a run that began elsewhere are not used.
        checkpoints: where states are saved and resumed from.
        metrics: given a record every ``log_every`` steps: ``step``, ``loss`` (nats a response
            token), ``grad_norm``, ``learning_rate``, ``tokens``, ``tokens_per_second``, ...
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
    fitting = [fit(chat, settings.max_length) for chat in chats[: settings.rows]]
    kept = [chat for chat in fitting if chat is not None]
    if len(kept) < len(fitting):
        say(
            f"{len(fitting) - len(kept)} of {len(fitting)} samples have a prompt of max_length "
            f"{settings.max_length} tokens or more and are left out"
        )
    if not kept:
        raise UserError("no sample to train on: give more rows, or raise max_length")
    lengths = [len(chat.tokens) for chat in kept]
    targets = [count_targets(chat) for chat in kept]
    mesh = mesh_of((model, params))
    steps = step_samples(seed, len(kept), settings.batch_size, settings.epochs)
    plans = plan_steps(
        steps, lengths, targets, settings.micro_batch, share_rows=True, ways=row_ways(mesh)
    )
    tx = make_optimizer(settings, len(steps))

    def pack_rows(rows: Sequence[Sequence[int]], shape: Shape) -> Batch:
        return pack(kept, rows, row_length=shape.row_length, slots=shape.slots, rows=shape.rows)

    run = Run(
        step=sft_step(model, tx, settings),
        batch=lambda index: stack(plans[index], pack_rows),
        tokens=lambda index: sum(lengths[i] for i in steps[index]),
        rates=rate_table(settings, len(steps)),
        steps=len(steps),
        identity=identity(
            ["sft", fingerprint], seed, settings, [chat.tokens for chat in kept], targets
        ),
        settings=settings,
        mesh=mesh,
        shardings=state_shardings(params, tx, mesh),
    )
    around = Surroundings(checkpoints, metrics, progress, say, stop_requested, after)
    return run_steps(lambda: start(params, tx), run, around, params if consume else None)
