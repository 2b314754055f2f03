"""A run directory: stage folders, markers written last, and a refusal to mix old with new.

Layout: ``config.yaml`` (resolved), ``inputs.json`` (what was read, by content), ``costs.jsonl``
(seconds and tokens of every attempt) and a folder a stage, done when it holds ``done.json``.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from etils import epath

from montessori_jax import cluster
from montessori_jax.config import RunConfig, as_dict
from montessori_jax.config_file import read_yaml
from montessori_jax.data.writing import open_atomically
from montessori_jax.errors import UserError
from montessori_jax.versions import NAME as VERSIONS
from montessori_jax.versions import recorded_versions, versions

MARKER = "done.json"
# May differ between the runs that share a directory: where it is, how far to go, how often to
# save, on how many devices, who is told. Everything else decides what the artifacts hold.
FREE_KEYS = frozenset(
    ["run_dir", "local_dir", "iterations", "tracker", "tracker_project", "push_to_hub",
     "push_private", "stage_processes", "jax_memory_fraction"]
)  # fmt: skip
FREE_LEAVES = ("checkpoint_every", "checkpoints_kept")
# How much an evaluation does at one time.
FREE_AT_ONCE = ("rows_per_pass", "tokens_per_pass", "prompts_per_batch")
# How servers are run; what they compute in, and which model is asked, is not free.
FREE_SECTIONS = ("vllm.", "url.", "judge.", "mesh.")
BOUND = ("vllm.dtype", "url.model", "judge.model", "judge.base_url")
# Sections that decide one stage (and those after it) may change until that stage is done.
STAGE_OF = {
    "warmup": ("warmup",),
    "influence": ("influence",),
    "judge": ("judge", "evaluate"),
    "judging": ("judge",),
    "preferences": ("preferences", "helpful"),
    "dpo": ("dpo",),
    "bootstrap": ("bootstrap",),
    "sft": ("train",),
    "evaluation": ("evaluate", "losses"),
}


def write_atomic(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees all of it or none, whatever dies when."""
    with open_atomically(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Atomic, indented, in the order given."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def value_hash(value: Any) -> str:
    """Hash of a JSON-able value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(
    old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any] | None = None
) -> list[str]:
    """``key: old -> new`` for every leaf that differs, free ones left out.

    ``defaults`` stand for what ``old`` lacks: settings that came after it was written.
    """
    before, after = flatten(old), flatten(new)
    later = {key: value for key, value in flatten(defaults or {}).items() if key in after}
    before = later | before
    return [
        f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _is_free(key)
    ]


def _is_free(key: str) -> bool:
    leaf = key.rsplit(".", 1)[-1]
    at_once = key.startswith("evaluation.") and leaf in FREE_AT_ONCE
    section = key.startswith(FREE_SECTIONS) and key not in BOUND
    return key in FREE_KEYS or leaf in FREE_LEAVES or at_once or section


def _reopen(run: Path, change: str) -> bool:
    """Whether a changed setting belongs to a stage that is not done; what it began is removed."""
    stages = STAGE_OF.get(change.partition(".")[0])
    if stages is None:
        return False
    places = [place for stage in stages for place in run.glob(f"iteration-*/{stage}*")]
    begun = [place for place in places if place.is_dir()]
    if any((place / MARKER).exists() for place in begun):
        return False
    for place in begun:
        remove_tree(place)
    return True


@dataclass(frozen=True)
class StageFolder:
    """One stage's folder; it is done once its marker is there."""

    path: Path

    def result(self) -> dict[str, Any] | None:
        """What the stage reported when it ended, or None while it has not."""
        marker = self.path / MARKER
        if not marker.exists():
            return None
        return json.loads(marker.read_text(encoding="utf-8"))

    def finish(self, result: dict[str, Any]) -> None:
        """Write the marker: after this the stage is never run again."""
        write_json(self.path / MARKER, result)


@dataclass(frozen=True)
class RunDirectory:
    """Where one run lives. Open it with `RunDirectory.create`.

    ``send`` is called when something is finished that other machines should see, ``share`` by all
    processes before the others need what the leader made; ``store`` is where they write training
    states if they share no disk (`montessori_jax.storage.Kept`).
    """

    path: Path
    send: Callable[[], None] = lambda: None
    share: Callable[[], None] = lambda: None
    store: epath.Path | None = None

    @classmethod
    def create(
        cls,
        config: RunConfig,
        inputs: dict[str, str],
        path: Path | None = None,
    ) -> "RunDirectory":
        """A new directory, or the same run's again.

        Args:
            config: the resolved settings, compared with those of an earlier run here.
            inputs: name -> content hash of every file and model that is read.
            path: the folder, where ``config.run_dir`` is a URL.

        Raises:
            UserError: settings or inputs differ from the earlier run's; the message lists them.
        """
        path = _made(Path(config.run_dir) if path is None else path)
        resolved = as_dict(config)
        config_file, inputs_file = path / "config.yaml", path / "inputs.json"
        if config_file.exists():
            changed = differences(read_yaml(config_file), resolved, as_dict(RunConfig()))
            if inputs_file.exists():
                changed += differences(json.loads(inputs_file.read_text()), inputs)
            changed = [one for one in changed if not _reopen(path, one)]
            if changed:
                raise UserError(
                    f"{path} holds a run with other settings ({'; '.join(changed)}): "
                    "set them back, or give another run_dir"
                )
        write_json(inputs_file, inputs)
        write_atomic(config_file, yaml.safe_dump(resolved, sort_keys=False))
        earlier, now = recorded_versions(path), versions()
        if now not in earlier[-1:]:
            write_json(path / VERSIONS, [*earlier, now])
        return cls(path)

    @classmethod
    def existing(cls, path: str | Path) -> "RunDirectory":
        """An earlier run's directory; `UserError` where there is none."""
        if not (Path(path) / "config.yaml").is_file():
            raise UserError(f"{path}: no run here (no config.yaml): give a run_dir")
        return cls(Path(path))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory: two processes at once would tear each other's files."""
        with open(_made(self.path) / ".lock", "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"{self.path} is in use by another montessori process: wait for it, or give "
                    "another run_dir"
                ) from None
            yield

    def stage(self, name: str) -> StageFolder:
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return StageFolder(folder)


def _made(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be created: {error.strerror}") from None
    return path


class Journal:
    """Append-only JSON lines that survive a kill: what is finished is never done again.

    The first line holds ``key``, which describes what the lines belong to. Opening an existing
    journal drops a torn last line and refuses one whose key differs.
    """

    def __init__(self, path: Path, key: dict[str, Any]):
        self.path = path
        self.records: list[dict[str, Any]] = []
        header = {"journal": value_hash(key), "key": key}
        if path.exists():
            lines = path.read_bytes().split(b"\n")
            whole = [line for line in lines[:-1] if line]
            found = [_record(path, number, line) for number, line in enumerate(whole, 1)]
            if found:
                if found[0].get("journal") != header["journal"]:
                    changed = differences(found[0].get("key", {}), key)
                    raise UserError(
                        f"{path} holds work done with other settings ({'; '.join(changed)}): "
                        "set them back, or remove that file to start again"
                    )
                self.records = found[1:]
            if lines[-1] or not found:
                text = "".join(line.decode() + "\n" for line in whole)
                write_atomic(path, text or _line(header))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, _line(header))

    def append(self, *records: dict[str, Any]) -> None:
        """Write records and wait until they are on disk."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(_line(record) for record in records))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written: {error.strerror}; what is in it is kept, and "
                "the same command goes on from there"
            ) from None
        self.records.extend(records)


class SharedJournal(Journal):
    """A journal that the processes of a job write together, each into a file of its own.

    `gather` tells all of them what each has appended; it is then in the leader's file too. All
    processes open it, and gather, together. What those of an earlier job, more or fewer, had not
    told yet is read from their files and told first, where a process of this job sees them.

    Args:
        path: the leader's file; the others' names end in their number. All processes may see the
            folder, or each have its own.
        key: as of `Journal`.
    """

    def __init__(self, path: Path, key: dict[str, Any]):
        mine = cluster.index()
        super().__init__(path if mine == 0 else _part(path, mine), key)
        self._name = path.name
        self._gathered, self._known = 0, set[str]()
        unread = (
            part
            for part in sorted(path.parent.glob(f"{path.stem}-[0-9]*{path.suffix}"))
            # One process reads it where all see it.
            if (number := _number(path, part)) != mine and number % cluster.count() == mine
        )
        self._gather([one for part in unread for one in Journal(part, key).records])

    def gather(self) -> None:
        """Wait for all processes, then have the records of all, in the same order in each."""
        self._gather([])

    def _gather(self, found: list[dict[str, Any]]) -> None:
        if cluster.count() == 1 and not found:
            return
        # What a process that was replaced has to do again may take it hours.
        cluster.barrier(self._name, patient=True)
        own = self.records[self._gathered :]
        told = cluster.exchange("".join(_line(one) for one in [*own, *found]).encode())
        everything = [json.loads(line) for part in told for line in part.split(b"\n") if line]
        new = {value_hash(one): one for one in everything}
        new = {name: one for name, one in new.items() if name not in self._known}
        together = [*self.records[: self._gathered], *new.values()]
        if cluster.is_leader():
            written = {value_hash(one) for one in own}
            self.append(*(one for name, one in new.items() if name not in written))
        self.records, self._gathered = together, len(together)
        self._known |= new.keys()


def _part(path: Path, number: int) -> Path:
    """The file of one process of a journal's, not the leader's."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _number(path: Path, part: Path) -> int:
    return int(part.name[len(path.stem) + 1 : -len(path.suffix)])


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        raise UserError(
            f"{path}: line {number} is damaged: remove that line, or the file to start again"
        ) from None


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def remove_tree(path: Path) -> None:
    """Remove a folder of intermediate files, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
