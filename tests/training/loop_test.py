"""The loop around a step, with steps small enough to follow by hand."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from montessori_jax.config import SftConfig
from montessori_jax.errors import Interrupted, UserError
from montessori_jax.training.checkpoints import Checkpoints
from montessori_jax.training.loop import Run, Surroundings, identity, run_steps
from montessori_jax.training.state import TrainState

ROOT = Path(__file__).resolve().parents[2]


def begin() -> TrainState:
    return TrainState({"w": jnp.zeros(2)}, (), jnp.zeros((), jnp.int32))


def running_sum(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
    """``w <- w / 2 + sum(batch)``, so that order matters; the loss is the sum."""
    total = jnp.sum(batch)
    metrics = {"loss": total, "grad_norm": jnp.abs(total)}
    return TrainState({"w": state.params["w"] / 2 + total}, (), state.step + 1), metrics


def run_of(
    values: list[float], *, step: Any = running_sum, sizes: list[int] | None = None, **changes: Any
) -> Run:
    sizes = sizes or [1] * len(values)
    return Run(
        step=step,
        batch=lambda index: np.full(sizes[index], values[index] / sizes[index], np.float32),
        tokens=lambda index: 10 * (index + 1),
        rates=np.arange(len(values), dtype=np.float32),
        steps=len(values),
        identity="run",
        settings=SftConfig(**changes),
    )


def expected(values: list[float]) -> float:
    total = 0.0
    for value in values:
        total = total / 2 + value
    return total


def test_steps_in_order_with_a_line_every_so_often() -> None:
    records: list[dict[str, Any]] = []
    seen: list[tuple[int, int]] = []
    state = run_steps(
        begin,
        run_of([1, 2, 3, 4, 5], log_every=2, sizes=[1, 2, 1, 2, 1]),
        Surroundings(metrics=records.append, progress=lambda *done: seen.append(done)),
    )
    np.testing.assert_allclose(state.params["w"], expected([1, 2, 3, 4, 5]))
    assert seen == [(at, 5) for at in range(6)]
    assert [record["step"] for record in records] == [2, 4, 5]
    assert [record["tokens"] for record in records] == [30, 70, 50]  # since the line before
    assert [record["learning_rate"] for record in records] == [1, 3, 4]
    assert [record["loss"] for record in records] == [2, 4, 5]
    # Two shapes are two programs, both compiled by the second step.
    assert [record["programs"] for record in records] == [2, 2, 2]
    assert all(record["tokens_per_second"] > 0 for record in records)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_stopped_and_resumed_is_as_if_it_had_not_been(tmp_path: Path, every: int) -> None:
    values = [1.0, -2.0, 3.0, 0.1, 5.0, 7.0]
    whole = run_steps(begin, run_of(values), Surroundings())
    said: list[str] = []
    lines: list[int] = []
    for stop_after in (1, 4):
        around = Surroundings(
            checkpoints=Checkpoints(tmp_path, say=said.append),
            metrics=lambda record: lines.append(record["step"]),
            say=said.append,
            stop_requested=lambda at=stop_after: lines[-1] >= at,
        )
        with pytest.raises(Interrupted, match=f"stopped after step {stop_after} of 6"):
            run_steps(begin, run_of(values, checkpoint_every=every), around)
    around = Surroundings(checkpoints=Checkpoints(tmp_path), say=said.append)
    state = run_steps(begin, run_of(values, checkpoint_every=every), around)
    np.testing.assert_array_equal(state.params["w"], whole.params["w"])
    assert lines == [1, 2, 3, 4]  # nothing was done twice
    assert said == ["going on from step 1 of 6", "going on from step 4 of 6"]


KILLED = """
import os, signal, sys, time
from pathlib import Path
from montessori_jax.training.checkpoints import Checkpoints
from montessori_jax.training.loop import Surroundings, run_steps
from montessori_jax.training.state_folder import CONTENT
from tests.training.loop_test import begin, run_of

folder = Path(sys.argv[1])

def metrics(record):
    if record["step"] == 5:  # that of step 3 is on disk, and no other save has begun
        ends = time.monotonic() + 60
        while not (folder / "3" / CONTENT).exists() and time.monotonic() < ends:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

run = run_of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], checkpoint_every=3)
run_steps(begin, run, Surroundings(checkpoints=Checkpoints(folder), metrics=metrics))
"""


def test_a_kill_goes_back_to_the_last_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, tmp_path]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again: list[int] = []
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    around = Surroundings(
        checkpoints=Checkpoints(tmp_path), metrics=lambda record: again.append(record["step"])
    )
    state = run_steps(begin, run_of(values, checkpoint_every=3), around)
    np.testing.assert_allclose(state.params["w"], expected(values))
    assert again == [4, 5, 6]


def test_a_stop_after_the_last_step_is_no_interruption() -> None:
    state = run_steps(begin, run_of([1.0]), Surroundings(stop_requested=lambda: True))
    assert int(state.step) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, bad: float) -> None:
    values = [1.0, 2.0, bad, 4.0]
    around = Surroundings(checkpoints=Checkpoints(tmp_path))
    run = run_of(values, checkpoint_every=1, learning_rate=0.5)
    with pytest.raises(UserError, match=r"^step 3 of 4: loss is (nan|inf): lower learning_rate"):
        run_steps(begin, run, around)
    assert Checkpoints(tmp_path).steps() == [1, 2]  # the last good one is kept
    found = Checkpoints(tmp_path).restore(jax.eval_shape(begin), "run")
    assert found is not None
    np.testing.assert_allclose(found.params["w"], expected([1, 2]))


def test_a_gradient_that_is_not_finite_ends_the_run_too() -> None:
    def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        state, metrics = running_sum(state, batch)
        return state, {**metrics, "grad_norm": jnp.log(-jnp.sum(batch))}

    with pytest.raises(UserError, match=r"^step 1 of 1: grad_norm is nan"):
        run_steps(begin, run_of([1.0], step=step), Surroundings())


def test_too_little_memory_names_what_to_lower() -> None:
    def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 9 bytes")

    run = run_of([1.0], step=step, micro_batch=7, remat="dots")
    with pytest.raises(UserError, match=r"lower micro_batch \(now 7\).*remat to full \(now dots\)"):
        run_steps(begin, run, Surroundings())

    def other(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        run_steps(begin, run_of([1.0], step=other), Surroundings())


def test_identity_is_of_what_decides_the_result() -> None:
    arrays = [np.arange(3), np.arange(4)]

    def of(seed: int = 0, arrays: Any = arrays, counts: Any = (1, 2), **changes: Any) -> str:
        return identity(["sft"], seed, SftConfig(**changes), arrays, counts)

    assert of() == of(checkpoint_every=7, checkpoints_kept=9, log_every=3)
    different = [
        of(seed=1),
        of(arrays=[np.arange(3), np.arange(4)[::-1]]),
        of(arrays=[np.arange(4), np.arange(3)]),
        of(counts=(2, 1)),
        of(learning_rate=1e-3),
        of(micro_batch=1),
    ]
    assert len({of(), *different}) == len(different) + 1
