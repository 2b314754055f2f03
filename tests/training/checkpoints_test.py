"""Checkpoints: exact, atomic, noticed when damaged."""

import shutil
from dataclasses import fields
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from montessori_jax.config import OptimizerConfig, WarmupConfig
from montessori_jax.errors import UserError
from montessori_jax.models import Model
from montessori_jax.training.checkpoints import (
    CONTENT,
    Checkpoints,
    Student,
    load_student,
    read_about,
    save_student,
)
from montessori_jax.training.optimizer import make_optimizer
from montessori_jax.training.state import TrainState, start
from tests.training import samples


@cache
def state(step: int) -> TrainState:
    """A state with every leaf different, NaN's neighbours and negative zero included."""
    params = {
        "a": jnp.arange(12.0).reshape(3, 4) * step,
        "b": jnp.array([-0.0, jnp.finfo(jnp.float32).tiny, jnp.inf]),
    }
    tx = make_optimizer(OptimizerConfig(), 10)
    _, opt_state = tx.update(jax.tree.map(jnp.cos, params), tx.init(params), params)
    return TrainState(params, opt_state, jnp.asarray(step, jnp.int32))


@pytest.fixture
def said() -> list[str]:
    return []


def open_at(folder: Path, said: list[str], keep: int = 2) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", keep, said.append)


def damage(folder: Path, *, truncate: bool = False) -> None:
    """Flip one bit of, or cut, the largest file with numbers in it."""
    largest = max(folder.rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content[: len(content) // 2] if truncate else content))


def test_the_newest_is_restored_to_the_bit_by_another_process(
    tmp_path: Path, said: list[str]
) -> None:
    first = open_at(tmp_path, said)
    for step in (2, 4, 6):
        first.save(state(step), "run")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    like = jax.eval_shape(lambda: state(1))
    found = open_at(tmp_path, said).restore(like, "run")
    assert samples.equal(found, state(6))
    assert np.signbit(np.asarray(found.params["b"]))[0]
    assert said == []


def test_nothing_saved_is_nothing_restored(tmp_path: Path, said: list[str]) -> None:
    assert open_at(tmp_path, said).restore(state(1), "run") is None
    assert said == []


@pytest.mark.parametrize("truncate", [False, True], ids=["bit", "cut"])
def test_a_damaged_one_falls_back_to_the_one_before(
    tmp_path: Path, said: list[str], truncate: bool
) -> None:
    first = open_at(tmp_path, said)
    first.save(state(2), "run")
    first.save(state(4), "run")
    damage(tmp_path / "checkpoints" / "4" / "state", truncate=truncate)
    found = open_at(tmp_path, said).restore(state(1), "run")
    assert samples.equal(found, state(2))
    assert len(said) == 1
    assert "checkpoint of step 4 is damaged" in said[0]
    assert "\n" not in said[0]
    damage(tmp_path / "checkpoints" / "2" / "state", truncate=truncate)
    assert open_at(tmp_path, said).restore(state(1), "run") is None
    assert "step 2 is damaged" in said[1]


def test_a_step_can_be_saved_again_after_its_damage(tmp_path: Path, said: list[str]) -> None:
    first = open_at(tmp_path, said)
    first.save(state(4), "run")
    damage(tmp_path / "checkpoints" / "4" / "state")
    second = open_at(tmp_path, said)
    assert second.restore(state(1), "run") is None
    second.save(state(4), "run")
    assert samples.equal(open_at(tmp_path, said).restore(state(1), "run"), state(4))


def test_another_runs_checkpoint_is_not_used(tmp_path: Path, said: list[str]) -> None:
    open_at(tmp_path, said).save(state(4), "run")
    assert open_at(tmp_path, said).restore(state(1), "other run") is None
    assert said == [
        "checkpoints: the checkpoint of step 4 belongs to a run with other data or settings "
        "and is removed"
    ]


def test_a_half_written_one_is_cleaned_up(tmp_path: Path, said: list[str]) -> None:
    """A kill in the middle of a save leaves a folder of another name, or one without its list."""
    open_at(tmp_path, said).save(state(2), "run")
    complete = tmp_path / "checkpoints" / "2"
    half = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").write_bytes((complete / "_CHECKPOINT_METADATA").read_bytes())
    later = tmp_path / "checkpoints" / "6"
    shutil.copytree(complete, later)
    (later / CONTENT).unlink()
    found = open_at(tmp_path, said).restore(state(1), "run")
    assert samples.equal(found, state(2))
    assert not half.exists()
    assert said == ["checkpoints: the checkpoint of step 6 is incomplete and is removed"]


def test_clear_removes_the_folder(tmp_path: Path, said: list[str]) -> None:
    checkpoints = open_at(tmp_path, said)
    checkpoints.save(state(2), "run")
    checkpoints.clear()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_student_comes_back_whole(tmp_path: Path, name: str) -> None:
    model, params = samples.student()
    settings = WarmupConfig(optimizer=name, learning_rate=3e-6, weight_decay=0.1)
    tx = make_optimizer(settings, 5)
    begun = start(params, tx)
    updates, opt_state = jax.jit(tx.update)(params, begun.opt_state, params)
    warm = TrainState(updates, opt_state, jnp.asarray(5, jnp.int32))
    about = {"model": "wheel:some", "fingerprint": "abc"}
    for _ in range(2):  # the second replaces the first
        save_student(tmp_path / "state", Student(warm, settings, 3e-6, about))
    found = load_student(tmp_path / "state", model)
    assert samples.equal(found.state, warm)
    assert found.learning_rate == 3e-6
    assert found.about == about
    assert type(found.settings) is OptimizerConfig
    for item in fields(OptimizerConfig):
        assert getattr(found.settings, item.name) == getattr(settings, item.name)
    notes = read_about(tmp_path / "state")
    assert notes is not None
    assert notes["about"] == about


def test_what_is_no_student_is_said(tmp_path: Path) -> None:
    model, params = samples.student()
    assert read_about(tmp_path) is None
    with pytest.raises(UserError, match="there is no student checkpoint here"):
        load_student(tmp_path / "nowhere", model)
    (tmp_path / "about").mkdir()
    with pytest.raises(UserError, match="not a student checkpoint"):
        load_student(tmp_path, model)
    settings = OptimizerConfig(optimizer="sgd")
    begun = start(params, make_optimizer(settings, 1))
    save_student(tmp_path / "state", Student(begun, settings, 1e-6, {}))
    larger = Model(samples.larger_config())
    with pytest.raises(
        UserError,
        match=r"is of another model or optimizer \(\.params.*float32\[2.* there, float32\[3",
    ):
        load_student(tmp_path / "state", larger)
    assert samples.equal(load_student(tmp_path / "state", model).state, begun)
    damage(tmp_path / "state" / "state")
    with pytest.raises(UserError, match="this student is damaged"):
        load_student(tmp_path / "state", model)
