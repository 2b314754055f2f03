"""The training states that a run goes on from, and the warmed-up students that influence needs."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from montessori_jax.config import OptimizerConfig
from montessori_jax.config_file import build
from montessori_jax.errors import Interrupted, Passing, UserError
from montessori_jax.models import Model
from montessori_jax.models.sharding import moment_shardings, param_shardings
from montessori_jax.training import places
from montessori_jax.training.optimizer import make_optimizer
from montessori_jax.training.places import Place
from montessori_jax.training.state import TrainState
from montessori_jax.training.state_folder import (
    Unusable,
    Writing,
    by_first_process,
    check_files,
    check_structure,
    read_notes,
    read_state,
    write_state,
)


class Checkpoints:
    """The last ``keep`` states of one training run, each with the run's identity.

    A save is usable only once it is complete, and older ones are removed after that; what a kill
    left half-written is removed when the folder is opened again. Leaving a ``with`` block waits
    for the save that is being written.

    Args:
        folder: created if needed, or a URL; nothing else may live in it. Several processes share
            it.
        keep: complete checkpoints kept; two survive damage to the newest.
        say: told in one line about a checkpoint that cannot be used.
    """

    def __init__(self, folder: Place, keep: int = 2, say: Callable[[str], None] = print):
        self.folder, self.keep, self.say = places.absolute(folder), keep, say
        self._writing: Writing | None = None
        by_first_process(self._open)

    def _open(self) -> None:
        if not places.is_remote(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for name in places.names(self.folder):
            if not name.isdigit():
                places.remove(self.folder / name)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        # What went wrong in the block is what the user hears of.
        with suppress(*([] if kind is None else [UserError])):
            # A stop comes to all processes of a job, another failure to one: it waits for nobody.
            if kind is None or issubclass(kind, Interrupted) or jax.process_count() == 1:
                self.finish()
            elif self._writing is not None:
                self._writing.settle()

    def steps(self) -> list[int]:
        """Steps that a checkpoint is there of, in order."""
        return sorted(int(name) for name in places.names(self.folder) if name.isdigit())

    def save(self, state: TrainState, identity: str) -> None:
        """Begin to write ``state`` under its own step, once the save before is complete.

        The state may be donated as soon as this returns; the writing goes on behind it.

        Raises:
            UserError: there is no room for it or for the one before, or no permission.
        """
        self.finish()
        folder = self.folder / str(int(state.step))
        self._writing = Writing(folder, state, {"identity": identity})

    def finish(self) -> None:
        """Wait until the last save is complete, then remove those that are no longer kept.

        Raises:
            UserError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.finish()
            by_first_process(lambda: self._prune(int(writing.folder.name)))

    def _prune(self, newest: int) -> None:
        for old in [step for step in self.steps() if step != newest][: -self.keep + 1 or None]:
            places.remove(self.folder / str(old))

    def restore(self, like: TrainState, identity: str) -> TrainState | None:
        """The newest usable state of the run ``identity``, or None to start from the beginning.

        Args:
            like: the state's structure, arrays or `jax.ShapeDtypeStruct` leaves; where a leaf has
                a sharding the restored one has it too, on whatever mesh it was saved from.
            identity: hash of all that decides the run; a checkpoint of another run is not used.
        """
        while True:
            newest = _told(by_first_process(lambda: self._newest(like, identity)))
            if newest is None:
                return None
            try:
                return read_state(self.folder / str(newest), like)
            except Unusable as error:
                if jax.process_count() > 1:  # the others may have read it
                    raise Passing(
                        f"{self.folder / str(newest)} {error}: start the job again, and remove "
                        "that folder if it says so twice"
                    ) from None
                self._drop(newest, error)

    def _newest(self, like: TrainState, identity: str) -> int | None:
        for step in reversed(self.steps()):
            folder = self.folder / str(step)
            try:
                check_files(folder)
                if read_notes(folder)["identity"] != identity:
                    raise Unusable("belongs to a run with other data or settings")
                check_structure(folder, like)
                return step
            except Unusable as error:
                self._drop(step, error)
        return None

    def _drop(self, step: int, why: Unusable) -> None:
        self.say(f"{self.folder.name}: the checkpoint of step {step} {why} and is removed")
        places.remove(self.folder / str(step))

    def clear(self) -> None:
        """Remove all of them: the run's result is safe elsewhere."""
        with suppress(UserError):
            self.finish()
        by_first_process(lambda: places.remove(self.folder))


def _told(step: int | None) -> int | None:
    """The first process's step, in every process."""
    if jax.process_count() == 1:
        return step
    told = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if told < 0 else told


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


def save_student(folder: Place, student: Student) -> None:
    """Write a student's parameters, optimizer state and step to ``folder``, replacing it."""
    notes = {
        "settings": {
            item.name: getattr(student.settings, item.name) for item in fields(OptimizerConfig)
        },
        "learning_rate": student.learning_rate,
        "about": student.about,
    }
    write_state(folder, student.state, notes)


def read_about(folder: Place) -> dict[str, Any] | None:
    """All notes beside the student in ``folder``; None if that holds no student checkpoint.

    ``about`` (the caller's own), ``settings``, ``learning_rate``, and ``leaves``, the shape and
    dtype of everything in the state.
    """
    if not places.names(epath.Path(folder) / "about"):
        return None
    return _student_notes(epath.Path(folder))


def load_student(folder: Place, model: Model, mesh: Mesh | None = None) -> Student:
    """Read what `save_student` wrote, onto one device or a mesh, wherever it was saved from.

    Raises:
        UserError: ``folder`` is not such a checkpoint, is damaged, or is of another model; or the
            mesh does not divide the model.
    """
    folder = epath.Path(folder)
    if not places.names(folder):
        raise UserError(f"{folder}: there is no student checkpoint here")
    notes = _student_notes(folder)
    settings = build(OptimizerConfig, notes["settings"], str(folder))
    like = _state_like(model, settings, mesh)
    try:
        check_files(folder)
        check_structure(folder, like)
        state = read_state(folder, like)
    except Unusable as error:
        raise UserError(f"{folder}: this student {error}: warm it up again") from None
    return Student(state, settings, notes["learning_rate"], notes["about"])


def _state_like(model: Model, settings: OptimizerConfig, mesh: Mesh | None) -> TrainState:
    """Shapes, dtypes and, on a mesh, shardings of a state that trains ``model``."""
    tx = make_optimizer(settings, 1)
    shapes = model.shapes()
    like = jax.eval_shape(lambda params: TrainState(params, tx.init(params), jnp.int32(0)), shapes)
    if mesh is None:
        return like

    def lying(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            shardings,
        )

    params = lying(like.params, param_shardings(model, mesh))
    return TrainState(
        params,
        lying(like.opt_state, moment_shardings(tx, params, mesh)),
        lying(like.step, NamedSharding(mesh, PartitionSpec())),
    )


def _student_notes(folder: epath.Path) -> dict[str, Any]:
    try:
        notes = read_notes(folder)
    except Unusable as error:
        raise UserError(f"{folder}: not a student checkpoint: it {error}") from None
    missing = {"settings", "learning_rate", "about"} - notes.keys()
    if missing:
        raise UserError(f"{folder}: not a student checkpoint: it lacks {', '.join(missing)}")
    return notes
