"""Experiment trackers: TensorBoard, Weights & Biases and trackio, beside the metrics' JSON lines.

Each stage is one run of the tracker, grouped under the run it belongs to. A resumed stage goes on
in the tracker's run that it began: its name is kept in ``tracker.json`` in the stage's folder.
"""

import contextlib
import importlib.util
import io
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from montessori_jax.errors import UserError

IDENTITY = "tracker.json"


class Tracker(Protocol):
    """Where scalars go; steps only ever grow."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Tracking:
    """Which trackers a stage's metrics go to, and under which names.

    Attributes:
        kinds: keys of `OPENERS`.
        project: what the tracker's service calls the project.
        run: the run's name, which groups its stages.
        stage: the stage's name within the run.
        logs: folder of TensorBoard's event files and of what wandb keeps on the disk.
    """

    kinds: tuple[str, ...] = ()
    project: str = "montessori"
    run: str = ""
    stage: str = ""
    logs: Path = Path()

    def open(self, kind: str, folder: Path) -> Tracker:
        """One tracker's run of the stage that works in ``folder``."""
        return OPENERS[kind](self, _identity(folder))


def check_tracker(kinds: Sequence[str]) -> None:
    """Fail before any work is done where a tracker cannot be used.

    Raises:
        UserError: its package is not installed, or wandb knows no account.
    """
    for kind in kinds:
        if importlib.util.find_spec(kind) is None:
            raise UserError(
                f"tracker '{kind}' needs a package that is not installed: "
                "pip install 'montessori-jax[trackers]', or set tracker: none"
            )
    if "wandb" in kinds and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.api.api_key:
            raise UserError(
                "tracker 'wandb' knows no account: run 'wandb login', or set WANDB_MODE=offline "
                "(wandb sync uploads later)"
            )


def scalars(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record, nested ones as ``outer/inner``; its ``step`` and text left out."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = value
    if not prefix:
        found.pop("step", None)
    return found


class Sender:
    """Gives records to a tracker: each step once, and no failure of it stops the work."""

    def __init__(
        self, name: str, opener: Callable[[], Tracker], last: int, say: Callable[[str], None]
    ):
        """``last`` is the newest step that was given to the tracker before."""
        self._name, self._say, self._last = name, say, last
        self._tracker: Tracker | None = None
        self._try(lambda: setattr(self, "_tracker", opener()))

    def send(self, record: dict[str, Any]) -> None:
        """Log the record's numbers at its ``step``, unless an earlier attempt did so."""
        tracker = self._tracker
        if tracker is not None and record["step"] > self._last:
            self._last = record["step"]
            self._try(lambda: tracker.log(record["step"], scalars(record)))

    def close(self) -> None:
        """Flush and end the tracker's run."""
        tracker = self._tracker
        if tracker is not None:
            self._try(tracker.close)
        self._tracker = None

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # services fail in their own ways; the file has every row
            self._tracker = None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._say(
                f"warning: the tracker {self._name} failed and is left out from here: {reason}"
            )


class _TensorBoard:
    """Event files by TensorBoard's own writer, which needs no TensorFlow."""

    def __init__(self, tracking: Tracking, identity: str):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(tracking.logs / "tensorboard" / tracking.stage))

    def log(self, step: int, values: dict[str, float]) -> None:
        import time

        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(
            value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        )
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()  # or a killed process loses two minutes of it

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases; ``WANDB_MODE`` and the rest of its environment apply."""

    def __init__(self, tracking: Tracking, identity: str):
        import wandb

        tracking.logs.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=tracking.project,
            group=tracking.run,
            name=f"{tracking.run}/{tracking.stage}",
            id=identity,
            resume="allow",
            dir=str(tracking.logs),
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A run of trackio: kept on the disk, or in a Space if ``TRACKIO_SPACE_ID`` names one."""

    def __init__(self, tracking: Tracking, identity: str):
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):  # it greets at some length
            self._run = trackio.init(
                project=tracking.project,
                name=f"{tracking.run}-{tracking.stage}-{identity}".replace("/", "-"),
                group=tracking.run,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


OPENERS: dict[str, Callable[[Tracking, str], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def _identity(folder: Path) -> str:
    """The name of the tracker's run, chosen once a stage folder."""
    place = folder / IDENTITY
    if place.exists():
        return str(json.loads(place.read_text(encoding="utf-8"))["id"])
    identity = uuid.uuid4().hex[:12]
    folder.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"id": identity}) + "\n", encoding="utf-8")
    return identity
