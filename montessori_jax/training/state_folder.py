"""One training state in a folder, by Orbax: written in the background, exact, checked before use.

Complete once it holds `CONTENT`, the CRC-32 of every other file, which is written last: Orbax
itself does not notice a flipped bit. Where several processes share the state, all of them call
these functions in the same order and see the same folder; the first writes what is not an array.
The folder may be a URL (``gs://``), to which Orbax writes; `CONTENT` has sizes there, as a store
checks what it holds itself.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from montessori_jax.device_memory import is_out_of_memory
from montessori_jax.errors import UserError
from montessori_jax.training import places
from montessori_jax.training.places import Place
from montessori_jax.training.state import TrainState

# Orbax reports each file it opens and each failure at length; what a user needs is said here.
logging.getLogger("absl").setLevel(logging.CRITICAL)
SETTLE_SECONDS = 60
CONTENT = "content.json"
T = TypeVar("T")


class Unusable(Exception):
    """A checkpoint that is incomplete, damaged, or of another structure; says which."""


class Writing:
    """A state on its way to ``folder``, which it replaces; `finish` waits for it.

    The copy off the devices is made here, so the state may be donated to the next step; the disk
    is written behind the caller's back, from a second copy in host memory. It is complete as soon
    as all is on disk, whether or not anyone waits: a process that is killed later has it.

    Raises:
        UserError: there is no room for it, or no permission.
    """

    def __init__(self, folder: Place, state: TrainState, notes: dict[str, Any]):
        self.folder = places.absolute(folder)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            about=ocp.args.JsonSave({**notes, "leaves": _leaves(state)}),
        )
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._or_say(lambda: self._checkpointer.save(self.folder, args=arguments, force=True))
        behind = ThreadPoolExecutor(1)
        self._completion = behind.submit(self._complete)
        behind.shutdown(wait=False)

    def finish(self) -> None:
        """Wait until all is on disk and listed in `CONTENT`.

        Raises:
            UserError: there is no room for it, or no permission.
        """

        def completed() -> None:
            self._or_say(self._completion.result)

        try:
            if jax.process_index() > 0:
                completed()
            by_first_process(completed)
        finally:
            self._checkpointer.close()

    def settle(self) -> None:
        """Give this process's part a minute to be written, whatever the others do."""
        with contextlib.suppress(Exception):  # another failure is being told
            self._completion.result(timeout=SETTLE_SECONDS)

    def _complete(self) -> None:
        self._checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            list_content(self.folder)

    def _or_say(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except (OSError, ValueError) as error:
            reason = _system_error(error) or " ".join(str(error).split())[:200]
            raise UserError(f"{self.folder}: a checkpoint cannot be written: {reason}") from None


def write_state(folder: Place, state: TrainState, notes: dict[str, Any]) -> None:
    """Write a state and JSON-able notes to ``folder``, replacing it, and wait for it.

    Raises:
        UserError: there is no room for it, or no permission.
    """
    Writing(folder, state, notes).finish()


def list_content(folder: Place) -> None:
    """Write `CONTENT` of a folder that is otherwise complete."""
    content = json.dumps(places.contents(folder), indent=0).encode()
    places.write(epath.Path(folder) / CONTENT, content)


def check_files(folder: epath.Path) -> None:
    """Raise `Unusable` unless every file of a checkpoint is there and has its own content."""
    try:
        listed = json.loads(places.read(folder / CONTENT))
    except FileNotFoundError:
        raise Unusable("is incomplete") from None
    except ValueError:
        raise Unusable("is damaged (its list of files)") from None
    try:
        found = places.contents(folder)
    except OSError as error:
        raise Unusable(f"is damaged ({error.strerror or error})") from None
    for name, (size, checksum) in listed.items():
        if name not in found:
            raise Unusable(f"is damaged ({name} is missing)")
        # It may have been written at a URL and be read on a disk, or the other way round.
        known = checksum is not None and found[name][1] is not None
        if found[name][0] != size or (known and found[name][1] != checksum):
            raise Unusable(f"is damaged ({name} has changed)")


def read_notes(folder: Place) -> dict[str, Any]:
    """The notes of a checkpoint, read by this process alone; raises `Unusable`."""
    try:
        # As `ocp.args.JsonSave` names it; Orbax would have all processes read it together.
        return json.loads(places.read(epath.Path(folder) / "about" / "metadata"))
    except (OSError, ValueError) as error:
        raise Unusable(f"cannot be read ({_brief(error)})") from None


def check_structure(folder: Place, like: TrainState) -> None:
    """Raise `Unusable` unless the state has the leaves of ``like``, wherever they lie."""
    # Compared first, as Orbax reports a mismatch only while it is reading.
    saved, wanted = read_notes(folder).get("leaves", {}), _leaves(like)
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise Unusable(
                f"is of another model or optimizer ({name} is {saved.get(name, 'absent')} there, "
                f"{wanted.get(name, 'absent')} here)"
            )


def read_state(folder: Place, like: TrainState) -> TrainState:
    """The state of a checkpoint that was checked, each leaf with the sharding of ``like``'s.

    A leaf without one goes to the first device of this process. The bits are those that were
    saved, whatever the mesh they were saved from. Raises `Unusable`.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or here
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    arguments = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(placed, like)))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        try:
            return checkpointer.restore(places.absolute(folder), args=arguments)["state"]
        except Exception as error:  # Orbax raises many kinds
            if is_out_of_memory(error):
                raise  # the folder is as good as it was
            raise Unusable(f"cannot be read ({_brief(error)})") from None


def by_first_process(action: Callable[[], T]) -> T | None:
    """What ``action`` gives in the first process, None in the others, which wait for it.

    Raises:
        UserError: in every process, where the first raised one.
    """
    if jax.process_count() == 1:
        return action()
    result, failure = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except UserError as error:
            failure = error
    if multihost_utils.broadcast_one_to_all(np.asarray(failure is not None)):
        raise failure or UserError("the first process could not do its part; it says why")
    return result


def _leaves(state: TrainState) -> dict[str, str]:
    """``float32[2, 3]`` for every leaf, by its path in the state."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _system_error(error: Exception) -> str | None:
    """What the system said, which tensorstore has at the end of a long message."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(found[1])) if found else None


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]
