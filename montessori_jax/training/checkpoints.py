"""Training states on disk, by Orbax: written atomically, restored exactly, checked by content."""

import logging
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from montessori_jax.config import OptimizerConfig, build
from montessori_jax.errors import UserError
from montessori_jax.models import Model
from montessori_jax.training.optimizer import make_optimizer
from montessori_jax.training.state import TrainState

# Orbax reports each file it opens; what a user needs to know is said here.
logging.getLogger("absl").setLevel(logging.ERROR)


class _Damaged(Exception):
    """A checkpoint whose content is not what was saved."""


class Checkpoints:
    """The last ``keep`` states of one training run, each with the run's identity.

    A save is visible only once it is complete, and the older ones are removed after that; what a
    kill left half-written is cleaned up when the folder is opened again. Each leaf's CRC-32 is
    saved too, as Orbax itself does not notice a flipped bit.

    Args:
        folder: created if needed; nothing else may live in it.
        keep: complete checkpoints kept; two survive damage to the newest.
        say: told in one line about a checkpoint that cannot be used.
    """

    def __init__(self, folder: Path, keep: int = 2, say: Callable[[str], None] = print):
        self.folder, self.say = Path(folder).absolute(), say
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                # Saving in the background needs a second copy of the state, as the next step
                # overwrites this one.
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, state: TrainState, identity: str) -> None:
        """Write ``state`` under its own step."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        arguments = _save_arguments(state, {"identity": identity, "step": step})
        try:
            self._manager.save(step, args=arguments, force=True)
        except OSError as error:
            raise UserError(f"{self.folder}: a checkpoint cannot be written: {error}") from None

    def restore(self, like: TrainState, identity: str) -> TrainState | None:
        """The newest usable state of the run ``identity``, or None to start from the beginning.

        Args:
            like: the state's structure, arrays or `jax.ShapeDtypeStruct` leaves.
            identity: hash of all that decides the run; a checkpoint of another run is not used.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._manager.restore(step, args=_restore_arguments(like))
                state, about = _checked(found)
            except Exception as error:  # Orbax raises many kinds for a damaged file
                self._drop(step, f"is damaged ({_brief(error)})")
                continue
            if about["identity"] == identity:
                return state
            self._drop(step, "belongs to a run with other data or settings")
        return None

    def _drop(self, step: int, why: str) -> None:
        self.say(f"{self.folder.name}: the checkpoint of step {step} {why} and is removed")
        self._manager.delete(step)

    def clear(self) -> None:
        """Remove all of them: the run's result is safe elsewhere."""
        self._manager.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Student:
    """A warmed-up student as saved: where influence starts.

    ``settings`` are the warm-up's, ``learning_rate`` the rate its next update would have had,
    ``about`` whatever the caller noted (the model's name, its data, ...).
    """

    state: TrainState
    settings: OptimizerConfig
    learning_rate: float
    about: dict[str, Any]


def save_student(folder: Path, student: Student) -> None:
    """Write a student's parameters, optimizer state and step to ``folder``, replacing it."""
    folder = Path(folder).absolute()
    about = {
        "settings": {
            item.name: getattr(student.settings, item.name) for item in fields(OptimizerConfig)
        },
        "learning_rate": student.learning_rate,
        "about": student.about,
    }
    with _checkpointer() as checkpointer:
        checkpointer.save(folder, args=_save_arguments(student.state, about), force=True)


def read_about(folder: Path) -> dict[str, Any] | None:
    """All notes beside the student in ``folder``; None if that holds no student checkpoint.

    ``about`` (the caller's own), ``settings``, ``learning_rate``, and ``crc32`` of every leaf.
    """
    folder = Path(folder).absolute()
    if not (folder / "about").is_dir():
        return None
    with _checkpointer() as checkpointer:
        return _read_notes(checkpointer, folder)


def load_student(folder: Path, model: Model) -> Student:
    """Read what `save_student` wrote.

    Raises:
        UserError: ``folder`` is not such a checkpoint, is damaged, or is of another model.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no student checkpoint here")
    with _checkpointer() as checkpointer:
        about = _read_notes(checkpointer, folder)
        settings = build(OptimizerConfig, about["settings"], str(folder))
        tx = make_optimizer(settings, 1)
        like = jax.eval_shape(
            lambda params: TrainState(params, tx.init(params), jnp.int32(0)), model.shapes()
        )
        try:
            state, _ = _checked(checkpointer.restore(folder, args=_restore_arguments(like)))
        except Exception as error:
            raise UserError(
                f"{folder}: this student cannot be read (damaged, or of another model than "
                f"{model.config.family} with {model.parameter_count():,} parameters): "
                f"{_brief(error)}"
            ) from None
    return Student(state, settings, about["learning_rate"], about["about"])


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _read_notes(checkpointer: ocp.Checkpointer, folder: Path) -> dict[str, Any]:
    try:
        notes = checkpointer.restore(folder, args=ocp.args.Composite(about=ocp.args.JsonRestore()))[
            "about"
        ]
        if not {"settings", "learning_rate", "about"} <= notes.keys():
            raise ValueError("its notes lack an entry")
        return notes
    except Exception as error:  # Orbax raises many kinds
        raise UserError(f"{folder}: not a student checkpoint: {_brief(error)}") from None


def _save_arguments(state: TrainState, about: dict[str, Any]) -> ocp.args.Composite:
    return ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        about=ocp.args.JsonSave({**about, "crc32": _checksums(state)}),
    )


def _restore_arguments(like: TrainState) -> ocp.args.Composite:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or here
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return ocp.args.Composite(
        state=ocp.args.StandardRestore(jax.tree.map(placed, like)),
        about=ocp.args.JsonRestore(),
    )


def _checked(found: Any) -> tuple[TrainState, dict[str, Any]]:
    """The restored state and notes; raises `_Damaged` where a leaf's content has changed."""
    state, about = found["state"], found["about"]
    for name, checksum in _checksums(state).items():
        if about["crc32"].get(name) != checksum:
            raise _Damaged(f"the content of {name} has changed")
    return state, about


def _checksums(state: TrainState) -> dict[str, int]:
    """CRC-32 of every leaf's bytes (3 GB/s), by its path in the state."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)).data)
        for path, leaf in leaves
    }


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]
