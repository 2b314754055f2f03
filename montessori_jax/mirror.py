"""A local folder and its copy in object storage, kept alike through any fsspec file system.

Object stores have no rename and no append. So whole files are sent, those that say that others
are complete (a stage's ``done.json``, a checkpoint's list) after the others, and `MANIFEST` last.
What a machine that vanished had begun to send is then like what a killed process leaves on a disk.
"""

import json
import os
import re
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from montessori_jax.errors import Passing, UserError
from montessori_jax.runs import MARKER, write_json
from montessori_jax.training.state_folder import CONTENT
from montessori_jax.work import CHECKPOINTS, STATE, STATES

T = TypeVar("T")
MANIFEST = "mirror.json"
OWN = ".mirror.json"
EVERY_SECONDS = 30.0
TRIES = 6
# Larger files do not change once they have their name, and are sent from the disk.
WHOLE_BYTES = 64 << 20
# One process's part of a shared journal.
PART = re.compile(r".+-\d+\.jsonl")


@dataclass
class Known:
    """What this machine last sent or fetched, kept in `OWN`.

    Attributes:
        push: id of the last push that was made or fetched from here.
        next: id of the push that is being made.
        files: name -> ``[size, CRC-32]`` at the URL.
        seen: name -> ``[size, mtime in ns]`` of the local file that these were.
        direct: training states went to the URL past the folder.
    """

    push: str = ""
    next: str = ""
    files: dict[str, list[int]] = field(default_factory=dict)
    seen: dict[str, list[int]] = field(default_factory=dict)
    direct: bool = False


class Mirror:
    """Keeps ``url`` like ``folder``.

    Entering it fetches what another machine has made, and sends what changes from then on, every
    `EVERY_SECONDS` in the background and whenever `push` is called; leaving it sends the rest.
    One machine at a time goes on with a run: the last one that entered.

    Args:
        url: of any fsspec file system.
        folder: the local folder, which nothing else may hold.
        say: told in one line what is fetched, and of a push that failed and is tried again.
        pause: seconds before the second try of `TRIES`; each further one takes twice as long.
        every: seconds between pushes in the background.
        direct: training states are at the URL alone, where the processes of a job write them
            together: they are neither sent, fetched nor removed.

    Raises:
        UserError: no such file system, or one whose package is not installed.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        say: Callable[[str], None],
        *,
        pause: float = 1.0,
        every: float = EVERY_SECONDS,
        direct: bool = False,
    ):
        self.url, self.folder, self.say, self.direct = url, folder, say, direct
        self._pause, self._every = pause, every
        self._system, self._root = _open_system(url)
        self._known = Known()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._push_now_and_then, daemon=True)

    def __enter__(self) -> "Mirror":
        self.pull()
        self._commit()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self.push()
        except UserError as failure:
            if kind is None:
                raise
            self.say(f"warning: {failure}")

    def _push_now_and_then(self) -> None:
        while not self._ended.wait(self._every):
            try:
                self.push()
            except UserError as error:
                self.say(f"warning: {error}")

    def pull(self) -> None:
        """Make the folder what the URL holds, unless what is there came from here.

        Raises:
            UserError: the URL cannot be read, or the folder not be written.
        """
        self._check_ours()
        own = self.folder / OWN
        self._known = Known(**json.loads(own.read_bytes())) if own.exists() else Known()
        manifest = self._read_manifest()
        if manifest and manifest["push"] in (self._known.push, self._known.next):
            self._known.push = manifest["push"]
            self._take_over_states()
            return
        self._known = Known(direct=self.direct)
        there = {name: size for name, size in self.remote_files() if self._is_kept(name)}
        if not there or (manifest is None and (self.folder / "config.yaml").exists()):
            return  # the first push from here did not get to its end
        self.say(f"fetching {self.url} to {self.folder}")
        files = manifest["files"] if manifest else {}
        for name in sorted(_without_unfinished(there)):
            size = there[name]
            if [size, _checksum(self.folder / name)] != files.get(name):
                self.download(name)
        for path in list(self._local_files()):
            if str(path.relative_to(self.folder)) not in there:
                path.unlink()
        self._known.push = manifest["push"] if manifest else ""
        for path in self._local_files():
            name = str(path.relative_to(self.folder))
            self._known.seen[name] = _seen(path)
            self._known.files[name] = [path.stat().st_size, _checksum(path)]
        self._keep_known()

    def _take_over_states(self) -> None:
        """Fetch what an earlier job's processes wrote past this folder, if this one's do not."""
        if self._known.direct and not self.direct:
            states = {name: 0 for name, _ in self.remote_files() if _is_state(name)}
            for name in _without_unfinished(states):
                self.download(name)
        self._known.direct = self.direct

    def follow(self) -> None:
        """Make the folder what was last sent, by whomever; nothing is ever sent from here.

        What this process has written of a stage's shared journal stays until the stage is done.

        Raises:
            UserError: the URL cannot be read, or the folder not be written.
        """

        def read() -> dict[str, list[int]]:
            return json.loads(self._system.cat_file(self._remote(MANIFEST)))["files"]

        self._check_ours()
        files, known = self._retried(read), self._known
        for name, about in sorted(files.items()):
            path = self.folder / name
            if PART.fullmatch(path.name) and path.exists():
                continue  # an earlier job sent it, and there may be more in it now
            if known.files.get(name) != about or known.seen.get(name) != _seen(path):
                if [_size(path), _checksum(path)] != about:
                    self.download(name)
                known.files[name], known.seen[name] = about, _seen(path)
        for path in list(self._local_files()):
            place = path.relative_to(self.folder)
            done = str(place.parent / MARKER) in files
            if str(place) not in files and (done or not PART.fullmatch(place.name)):
                path.unlink()
        self._keep_known()

    def _check_ours(self) -> None:
        """Refuse a folder with other things in it: what the URL does not hold is removed there."""
        if (self.folder / OWN).exists() or (self.folder / "config.yaml").exists():
            return
        present = self.folder.iterdir() if self.folder.is_dir() else iter(())
        strange = next((path.name for path in present if not path.name.startswith(".")), None)
        if strange is not None:
            raise UserError(
                f"{self.folder} holds '{strange}', which is no part of this run, and would be made "
                f"like {self.url}: give a local_dir that is empty"
            )

    def push(self) -> None:
        """Send what has changed; returns when it is there.

        Raises:
            UserError: it cannot be sent, or another machine has gone on with this run.
        """
        with self._lock:
            # Listed first: what these say to be complete is then among the files listed below.
            markers = {str(path.relative_to(self.folder)) for path in self._markers()}
            paths = {str(path.relative_to(self.folder)): path for path in self._local_files()}
            seen = {name: about for name, path in paths.items() if (about := _seen(path))}
            kept = {name: seen[name] for name in seen if name in markers or not _is_marker(name)}
            kept = {name: kept[name] for name in _without_unfinished(kept)}
            changed = [name for name, stat in kept.items() if self._known.seen.get(name) != stat]
            gone = self._known.files.keys() - seen.keys()
            for name in [name for name in gone if not self._is_kept(name)]:
                gone.remove(name)
                del self._known.files[name], self._known.seen[name]
            if not changed and not gone:
                return
            self._check_owner()
            for name in sorted(changed, key=lambda name: (_is_marker(name), name)):
                sent = self._upload(name)
                if sent is not None:
                    self._known.files[name], self._known.seen[name] = sent, kept[name]
            for name in sorted(gone, key=lambda name: (not _is_marker(name), name)):
                self._remove(name)
                del self._known.files[name], self._known.seen[name]
            self._commit()

    def _commit(self) -> None:
        """Say at the URL what it holds now, and that it came from here."""
        self._known.next = uuid.uuid4().hex
        self._keep_known()
        content = json.dumps({"push": self._known.next, "files": self._known.files}).encode()
        self._retried(lambda: self._system.pipe_file(self._remote(MANIFEST), content))
        self._known.push = self._known.next
        self._keep_known()

    def _check_owner(self) -> None:
        manifest = self._read_manifest()
        if manifest and manifest["push"] not in (self._known.push, self._known.next):
            raise UserError(
                f"{self.url}: another machine has gone on with this run: what is in {self.folder} "
                "is kept but no longer sent; stop one of the two"
            )

    def _keep_known(self) -> None:
        write_json(self.folder / OWN, vars(self._known))

    def _local_files(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = Path(folder) / name
                about = path.relative_to(self.folder)
                if _is_sent(about) and self._is_kept(str(about)):
                    yield path

    def _is_kept(self, name: str) -> bool:
        """Whether a file is alike here and there."""
        return not (self.direct and _is_state(name))

    def _markers(self) -> list[Path]:
        return [path for path in self._local_files() if path.name in (MARKER, CONTENT)]

    def _remote(self, name: str) -> str:
        return f"{self._root}/{name}"

    def remote_files(self) -> Iterator[tuple[str, int]]:
        """Name and size of every file at the URL."""

        def find() -> dict[str, Any]:
            self._system.invalidate_cache()
            try:
                return self._system.find(self._root, detail=True)
            except FileNotFoundError:
                return {}

        for path, about in self._retried(find).items():
            name = path[len(self._root) + 1 :]
            if name != MANIFEST:
                yield name, about["size"]

    def _read_manifest(self) -> dict[str, Any] | None:
        def read() -> bytes | None:
            try:
                return self._system.cat_file(self._remote(MANIFEST))
            except FileNotFoundError:
                return None

        try:
            return json.loads(self._retried(read) or b"null")
        except ValueError:  # torn, on a system that shows files while they are written
            return None

    def download(self, name: str) -> None:
        """Fetch one file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        self._retried(lambda: self._system.get_file(self._remote(name), str(temporary)))
        os.replace(temporary, path)

    def _upload(self, name: str) -> list[int] | None:
        """Size and checksum of what was sent; None where the file is gone."""
        path, remote = self.folder / name, self._remote(name)

        def send() -> list[int] | None:
            try:
                if path.stat().st_size > WHOLE_BYTES and path.suffix != ".jsonl":
                    self._system.put_file(str(path), remote)
                    return [path.stat().st_size, _checksum(path)]
                content = path.read_bytes()  # a journal may grow while it is sent
                self._system.pipe_file(remote, content)
                return [len(content), zlib.crc32(content)]
            except FileNotFoundError:
                if path.exists():
                    raise
                return None

        return self._retried(send)

    def _remove(self, name: str) -> None:
        def remove() -> None:
            with suppress(FileNotFoundError):
                self._system.rm_file(self._remote(name))

        self._retried(remove)

    def _retried(self, action: Callable[[], T]) -> T:
        for number in range(TRIES):
            try:
                return action()
            except Exception as error:  # each file system raises its own
                failure = " ".join(str(error).split())[:200] or type(error).__name__
            if number + 1 == TRIES:
                break
            if threading.current_thread() is not self._thread:
                time.sleep(self._pause * 2**number)
            elif self._ended.wait(self._pause * 2**number):
                break
        raise Passing(
            f"{self.url}: failed {number + 1} times ({failure}): nothing is lost, all is in "
            f"{self.folder}; when the storage is back, the same command goes on from there"
        )


def _open_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    local = url.startswith(("file://", "local://"))
    try:
        system, root = url_to_fs(url, **({"auto_mkdir": True} if local else {}))
    except ImportError as error:
        extra = " pip install 'montessori-jax[gcs]'," if url.startswith(("gs:", "gcs:")) else ""
        raise UserError(f"{url}: needs a package that is not installed:{extra} {error}") from None
    except ValueError as error:
        raise UserError(f"{url}: no such storage: {error}") from None
    return system, root.rstrip("/")


def _is_marker(name: str) -> bool:
    return PurePosixPath(name).name in (MARKER, CONTENT)


def _is_state(name: str) -> bool:
    """Whether a file is of a training state, as `Work` has them below a stage's folder."""
    parts = PurePosixPath(name).parts
    return CHECKPOINTS in parts or parts[2:3] in ((STATE,), (STATES,))


def _is_sent(name: Path) -> bool:
    """Whether a file is the run's: no lock, nothing on its way to its name."""
    if name.name in (OWN, ".lock") or (name.name.startswith(".") and name.suffix == ".tmp"):
        return False
    return not any(part.endswith(".orbax-checkpoint-tmp") for part in name.parts)


def _without_unfinished(names: dict[str, Any]) -> list[str]:
    """All but the files of checkpoints that have no list."""

    def is_whole(name: str) -> bool:
        parts = PurePosixPath(name).parts
        if CHECKPOINTS not in parts:
            return True
        step = parts[: parts.index(CHECKPOINTS) + 2]
        return "/".join([*step, CONTENT]) in names

    return [name for name in names if is_whole(name)]


def _seen(path: Path) -> list[int]:
    """Size and time of change; nothing where the file is gone."""
    try:
        about = path.stat()
    except FileNotFoundError:
        return []
    return [about.st_size, about.st_mtime_ns]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _checksum(path: Path) -> int:
    checksum = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                checksum = zlib.crc32(block, checksum)
    except FileNotFoundError:
        return -1
    return checksum
