"""The loop around a step: programs, metrics, checkpoints, and stopping where asked."""

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from montessori_jax import cluster
from montessori_jax.config import TrainingConfig, as_dict
from montessori_jax.device_memory import fits_in_memory
from montessori_jax.errors import Interrupted, UserError
from montessori_jax.mesh import place_rows, use_mesh
from montessori_jax.pytrees import as_argument
from montessori_jax.runs import value_hash
from montessori_jax.training.checkpoints import Checkpoints
from montessori_jax.training.state import TrainState
from montessori_jax.training.steps import Metrics, Step

# Settings that change how a run is watched and saved, and nothing that it computes.
UNSEEN = ("checkpoint_every", "checkpoints_kept", "keep_every", "log_every")


def nothing(*values: Any) -> None:
    """What is called where no one listens."""


@dataclass(frozen=True)
class Surroundings:
    """What a training run tells and asks the world around it; every part may be left out.

    Attributes:
        checkpoints: where states are saved and resumed from.
        metrics: given one record every ``log_every`` steps.
        progress: given ``(steps done, steps in all)``, at the start and after every step.
        say: given one-line messages for people.
        stop_requested: asked after every step; if true the state is saved and `Interrupted` raised.
        after: given the steps done and the state after each, before it is saved; the next step
            takes the state's memory.
    """

    checkpoints: Checkpoints | None = None
    metrics: Callable[[dict[str, Any]], None] = nothing
    progress: Callable[[int, int], None] = nothing
    say: Callable[[str], None] = nothing
    stop_requested: Callable[[], bool] = lambda: False
    after: Callable[[int, TrainState], None] = nothing


@dataclass(frozen=True)
class Run:
    """One training run, all of it known before its first step.

    Attributes:
        step: the pure step; it is compiled here, once a shape, and donated its state. Arrays that
            it holds as a pytree stay as they are.
        batch: the host arrays of step ``i``.
        tokens: real tokens (not padding) of step ``i``.
        rates: learning rate of step ``i``, for the metrics alone.
        steps: how many there are.
        identity: hash of everything that decides the result; checkpoints are kept apart by it.
        settings: how often to log and to save.
        mesh: the devices that rows are split over; None: one.
        shardings: where the state lies on them (`state_shardings`).
    """

    step: Step
    batch: Callable[[int], Any]
    tokens: Callable[[int], int]
    rates: np.ndarray
    steps: int
    identity: str
    settings: TrainingConfig
    mesh: Mesh | None = None
    shardings: TrainState | None = None


def run_steps(
    begin: Callable[[], TrainState], run: Run, around: Surroundings, release: Any = None
) -> TrainState:
    """Go on from the newest checkpoint, or from ``begin()``, to the last step.

    The state is always a function of ``begin()``, the batches and the step alone: a run that was
    stopped or killed ends with the same bits as one that was not.

    ``release`` are arrays that nobody needs once the state is there; their memory is freed.

    Raises:
        Interrupted: a stop was asked for; the state is saved first, if there are checkpoints.
        UserError: a loss or gradient is not finite, a step does not fit in memory, or a checkpoint
            cannot be written.
    """
    # A save may still be on its way to the disk, however the steps end.
    with around.checkpoints or contextlib.nullcontext():
        return _run_steps(begin, run, around, release)


def _run_steps(
    begin: Callable[[], TrainState], run: Run, around: Surroundings, release: Any
) -> TrainState:
    settings, checkpoints = run.settings, around.checkpoints
    state = None
    with _fits("the state that training starts from", settings):
        if checkpoints is not None:
            state = checkpoints.restore(_like(begin, run.shardings), run.identity)
            if state is not None:
                around.say(f"going on from step {int(state.step)} of {run.steps}")
        state = jax.block_until_ready(begin()) if state is None else state
    for leaf in jax.tree.leaves(release):
        if isinstance(leaf, jax.Array):
            leaf.delete()
    step = as_argument(run.step)
    compiled = step_program(run.mesh, run.shardings)

    def on_device(index: int) -> Any:
        """The batch of step ``index``, of which each process uploads its own rows."""
        return place_rows(run.batch(index), run.mesh, axis=1) if index < run.steps else None

    programs: dict[Any, Callable[[Step, TrainState, Any], tuple[TrainState, Metrics]]] = {}
    tokens, seconds = 0, 0.0
    first = int(state.step)
    around.progress(first, run.steps)
    with _fits("the first batch", settings):
        batch = on_device(first)
    for index in range(first, run.steps):
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        with _fits(f"step {index + 1} of {run.steps}", settings):
            if shapes not in programs:
                with use_mesh(run.mesh):
                    programs[shapes] = compiled.lower(step, state, batch).compile()
            began = time.perf_counter()
            with jax.transfer_guard("disallow"):
                state, results = programs[shapes](step, state, batch)
            # The next batch is packed while the device works on this one.
            batch = on_device(index + 1)
            results = jax.device_get(results)
        tokens, seconds = tokens + run.tokens(index), seconds + time.perf_counter() - began
        done = index + 1
        record = _finite(results, done, run, checkpoints)
        if done % settings.log_every == 0 or done == run.steps:
            around.metrics(
                {
                    "step": done,
                    "steps": run.steps,
                    **record,
                    "learning_rate": float(run.rates[index]),
                    "tokens": tokens,
                    "tokens_per_second": round(tokens / seconds, 2),
                    "programs": len(programs),
                }
            )
            tokens, seconds = 0, 0.0
        around.progress(done, run.steps)
        around.after(done, state)
        stop = done < run.steps and cluster.any_of(around.stop_requested())
        due = done % settings.checkpoint_every == 0 and done < run.steps
        if checkpoints is not None and (stop or due):
            checkpoints.save(state, run.identity)
        if stop:
            if checkpoints is not None:
                checkpoints.finish()
            raise Interrupted(f"stopped after step {done} of {run.steps}")
    return state


def step_program(mesh: Mesh | None, shardings: TrainState | None) -> Any:
    """Any `Step` as a jitted ``(step, state, batch)``, which is donated its state.

    Args:
        mesh: the devices; None: one.
        shardings: where the state lies on them, before and after.
    """
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(_call, donate_argnums=1, out_shardings=(shardings, everywhere))


def _like(begin: Callable[[], TrainState], shardings: TrainState | None) -> TrainState:
    """The state's shapes, and where they belong."""
    shapes = jax.eval_shape(begin)
    if shardings is None:
        return shapes
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        shapes,
        shardings,
    )


def _call(step: Step, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
    return step(state, batch)


def _finite(
    metrics: dict[str, Any], done: int, run: Run, checkpoints: Checkpoints | None
) -> dict[str, float]:
    record = {name: float(value) for name, value in metrics.items()}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(record[name]):
            kept = "" if checkpoints is None else "; the last checkpoint is from before and is kept"
            raise UserError(
                f"step {done} of {run.steps}: {name} is {record[name]}: lower learning_rate (now "
                f"{run.settings.learning_rate}) or max_grad_norm (now "
                f"{run.settings.max_grad_norm}), or set dtype to float32{kept}"
            )
    return record


def _fits(what: str, settings: TrainingConfig) -> AbstractContextManager[None]:
    return fits_in_memory(
        what,
        f"lower micro_batch (now {settings.micro_batch}) or max_length (now "
        f"{settings.max_length}), set remat to full (now {settings.remat}), train an adapter "
        f"(lora_rank, now {settings.lora_rank})",
    )


def identity(
    kind: list[str],
    seed: int,
    settings: TrainingConfig,
    arrays: Sequence[np.ndarray],
    counts: Sequence[int],
) -> str:
    """Hash of a run's data, settings and seed; the same for a run and its resumption."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.int64(len(array)).tobytes() + np.ascontiguousarray(array).tobytes())
    digest.update(np.asarray(counts, np.int64).tobytes())
    seen = {name: value for name, value in as_dict(settings).items() if name not in UNSEEN}
    return value_hash([*kind, seed, seen, digest.hexdigest()])
