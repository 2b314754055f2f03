"""The loop around a step: programs, metrics, checkpoints, and stopping where asked."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from montessori_jax.config import TrainingConfig, as_dict
from montessori_jax.errors import Interrupted, UserError
from montessori_jax.pytrees import as_argument
from montessori_jax.runs import value_hash
from montessori_jax.training.checkpoints import Checkpoints
from montessori_jax.training.state import TrainState
from montessori_jax.training.steps import Metrics, Step

# Settings that change how a run is watched and saved, and nothing that it computes.
UNSEEN = ("checkpoint_every", "log_every")


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
    """

    checkpoints: Checkpoints | None = None
    metrics: Callable[[dict[str, Any]], None] = nothing
    progress: Callable[[int, int], None] = nothing
    say: Callable[[str], None] = nothing
    stop_requested: Callable[[], bool] = lambda: False


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
    """

    step: Step
    batch: Callable[[int], Any]
    tokens: Callable[[int], int]
    rates: np.ndarray
    steps: int
    identity: str
    settings: TrainingConfig


def run_steps(
    begin: Callable[[], TrainState], run: Run, around: Surroundings, release: Any = None
) -> TrainState:
    """Go on from the newest checkpoint, or from ``begin()``, to the last step.

    The state is always a function of ``begin()``, the batches and the step alone: a run that was
    stopped or killed ends with the same bits as one that was not.

    ``release`` are arrays that nobody needs once the state is there; their memory is freed.

    Raises:
        Interrupted: a stop was asked for; the state is saved first, if there are checkpoints.
        UserError: a loss or gradient is not finite, or a step does not fit in memory.
    """
    settings, checkpoints = run.settings, around.checkpoints
    state = None
    if checkpoints is not None:
        state = checkpoints.restore(jax.eval_shape(begin), run.identity)
        if state is not None:
            around.say(f"going on from step {int(state.step)} of {run.steps}")
    state = jax.block_until_ready(begin()) if state is None else state
    for leaf in jax.tree.leaves(release):
        if isinstance(leaf, jax.Array):
            leaf.delete()
    step = as_argument(run.step)
    compiled = jax.jit(_call, donate_argnums=1)
    programs: dict[Any, Callable[[Step, TrainState, Any], tuple[TrainState, Metrics]]] = {}
    tokens, seconds = 0, 0.0
    first = int(state.step)
    around.progress(first, run.steps)
    batch = jax.device_put(run.batch(first)) if first < run.steps else None
    for index in range(first, run.steps):
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        try:
            if shapes not in programs:
                programs[shapes] = compiled.lower(step, state, batch).compile()
            began = time.perf_counter()
            with jax.transfer_guard("disallow"):
                state, results = programs[shapes](step, state, batch)
            # The next batch is packed while the device works on this one.
            batch = jax.device_put(run.batch(index + 1)) if index + 1 < run.steps else None
            results = jax.device_get(results)
        except jax.errors.JaxRuntimeError as error:
            raise _out_of_memory(error, index + 1, run) from error
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
        stop = done < run.steps and around.stop_requested()
        due = done % settings.checkpoint_every == 0 and done < run.steps
        if checkpoints is not None and (stop or due):
            checkpoints.save(state, run.identity)
        if stop:
            raise Interrupted(f"stopped after step {done} of {run.steps}")
    return state


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


def _out_of_memory(error: jax.errors.JaxRuntimeError, done: int, run: Run) -> Exception:
    if "RESOURCE_EXHAUSTED" not in str(error):
        return error
    settings = run.settings
    return UserError(
        f"step {done} of {run.steps} does not fit in memory: lower micro_batch (now "
        f"{settings.micro_batch}) or max_length (now {settings.max_length}), or set remat to full "
        f"(now {settings.remat})"
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
