"""Training states on disk, by Orbax: written atomically, restored exactly, checked before use."""

import json
import logging
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from montessori_jax.config import OptimizerConfig
from montessori_jax.config_file import build
from montessori_jax.data.writing import open_atomically
from montessori_jax.errors import UserError
from montessori_jax.models import Model
from montessori_jax.training.optimizer import make_optimizer
from montessori_jax.training.state import TrainState

# Orbax reports each file it opens; what a user needs to know is said here.
logging.getLogger("absl").setLevel(logging.ERROR)
CONTENT = "content.json"


class Unusable(Exception):
    """A checkpoint that is incomplete, damaged, or of another structure; says which."""


class Checkpoints:
    """The last ``keep`` states of one training run, each with the run's identity.

    A save is usable only once it is complete, and older ones are removed after that; what a kill
    left half-written is removed when the folder is opened again.

    Args:
        folder: created if needed; nothing else may live in it.
        keep: complete checkpoints kept; two survive damage to the newest.
        say: told in one line about a checkpoint that cannot be used.
    """

    def __init__(self, folder: Path, keep: int = 2, say: Callable[[str], None] = print):
        self.folder, self.keep, self.say = Path(folder).absolute(), keep, say
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if not path.name.isdigit():
                shutil.rmtree(path)

    def steps(self) -> list[int]:
        """Steps that a checkpoint is there of, in order."""
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def save(self, state: TrainState, identity: str) -> None:
        """Write ``state`` under its own step.

        Raises:
            UserError: there is no room for it, or no permission.
        """
        step = int(state.step)
        write_state(self.folder / str(step), state, {"identity": identity})
        for old in [other for other in self.steps() if other != step][: -self.keep + 1 or None]:
            shutil.rmtree(self.folder / str(old))

    def restore(self, like: TrainState, identity: str) -> TrainState | None:
        """The newest usable state of the run ``identity``, or None to start from the beginning.

        Args:
            like: the state's structure, arrays or `jax.ShapeDtypeStruct` leaves.
            identity: hash of all that decides the run; a checkpoint of another run is not used.
        """
        for step in reversed(self.steps()):
            folder = self.folder / str(step)
            try:
                check_files(folder)
                if read_notes(folder)["identity"] != identity:
                    raise Unusable("belongs to a run with other data or settings")
                return read_state(folder, like)
            except Unusable as error:
                self.say(
                    f"{self.folder.name}: the checkpoint of step {step} {error} and is removed"
                )
                shutil.rmtree(folder)
        return None

    def clear(self) -> None:
        """Remove all of them: the run's result is safe elsewhere."""
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
    notes = {
        "settings": {
            item.name: getattr(student.settings, item.name) for item in fields(OptimizerConfig)
        },
        "learning_rate": student.learning_rate,
        "about": student.about,
    }
    write_state(folder, student.state, notes)


def read_about(folder: Path) -> dict[str, Any] | None:
    """All notes beside the student in ``folder``; None if that holds no student checkpoint.

    ``about`` (the caller's own), ``settings``, ``learning_rate``, and ``leaves``, the shape and
    dtype of everything in the state.
    """
    if not (Path(folder) / "about").is_dir():
        return None
    return _student_notes(Path(folder))


def load_student(folder: Path, model: Model) -> Student:
    """Read what `save_student` wrote.

    Raises:
        UserError: ``folder`` is not such a checkpoint, is damaged, or is of another model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no student checkpoint here")
    notes = _student_notes(folder)
    settings = build(OptimizerConfig, notes["settings"], str(folder))
    tx = make_optimizer(settings, 1)
    like = jax.eval_shape(
        lambda params: TrainState(params, tx.init(params), jnp.int32(0)), model.shapes()
    )
    try:
        check_files(folder)
        state = read_state(folder, like)
    except Unusable as error:
        raise UserError(f"{folder}: this student {error}: warm it up again") from None
    return Student(state, settings, notes["learning_rate"], notes["about"])


def _student_notes(folder: Path) -> dict[str, Any]:
    try:
        notes = read_notes(folder)
    except Unusable as error:
        raise UserError(f"{folder}: not a student checkpoint: it {error}") from None
    missing = {"settings", "learning_rate", "about"} - notes.keys()
    if missing:
        raise UserError(f"{folder}: not a student checkpoint: it lacks {', '.join(missing)}")
    return notes


def write_state(folder: Path, state: TrainState, notes: dict[str, Any]) -> None:
    """Write a state and JSON-able notes to ``folder``, replacing it.

    Orbax renames the folder into place; `CONTENT`, written last, lists the CRC-32 of every file
    in it, since Orbax itself does not notice a flipped bit. Saved in the foreground: in the
    background it would need a second copy of the state, as the next step overwrites this one.

    Raises:
        UserError: there is no room for it, or no permission.
    """
    folder = Path(folder).absolute()
    arguments = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        about=ocp.args.JsonSave({**notes, "leaves": _leaves(state)}),
    )
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(folder, args=arguments, force=True)
        checksums = {name: _checksum(folder / name) for name in _files(folder)}
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: a checkpoint cannot be written: {reason}") from None
    with open_atomically(folder / CONTENT) as file:
        file.write(json.dumps(checksums, indent=0).encode())


def check_files(folder: Path) -> None:
    """Raise `Unusable` unless every file of a checkpoint is there and has its own content."""
    try:
        checksums = json.loads((folder / CONTENT).read_bytes())
    except FileNotFoundError:
        raise Unusable("is incomplete") from None
    except ValueError:
        raise Unusable("is damaged (its list of files)") from None
    for name, checksum in checksums.items():
        try:
            found = _checksum(folder / name)
        except OSError as error:
            raise Unusable(f"is damaged ({name}: {error.strerror})") from None
        if found != checksum:
            raise Unusable(f"is damaged ({name} has changed)")


def read_notes(folder: Path) -> dict[str, Any]:
    """The notes of a checkpoint; raises `Unusable`."""
    with _checkpointer() as checkpointer:
        try:
            return checkpointer.restore(
                Path(folder).absolute(), args=ocp.args.Composite(about=ocp.args.JsonRestore())
            )["about"]
        except Exception as error:  # Orbax raises many kinds
            raise Unusable(f"cannot be read ({_brief(error)})") from None


def read_state(folder: Path, like: TrainState) -> TrainState:
    """The state of a checkpoint whose files are sound; raises `Unusable` if it is not ``like``."""
    # Compared first, as Orbax reports a mismatch only while it is reading.
    saved, wanted = read_notes(folder).get("leaves", {}), _leaves(like)
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise Unusable(
                f"is of another model or optimizer ({name} is {saved.get(name, 'absent')} there, "
                f"{wanted.get(name, 'absent')} here)"
            )
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or here
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    arguments = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(placed, like)))
    with _checkpointer() as checkpointer:
        try:
            return checkpointer.restore(Path(folder).absolute(), args=arguments)["state"]
        except Exception as error:
            raise Unusable(f"cannot be read ({_brief(error)})") from None


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _leaves(state: TrainState) -> dict[str, str]:
    """``float32[2, 3]`` for every leaf, by its path in the state."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in found)


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]
