"""Where a run is kept: in a folder, or at a URL with a folder on this machine that it works in."""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from montessori_jax.errors import UserError
from montessori_jax.mirror import Mirror
from montessori_jax.models.sources import cache_folder
from montessori_jax.runs import MARKER, RunDirectory
from montessori_jax.training.state_folder import by_first_process


def is_url(run_dir: str) -> bool:
    """Whether a run directory is ``gs://bucket/run``, ``s3://...`` or the like."""
    return "://" in run_dir


def local_folder(run_dir: str, local_dir: str = "") -> Path:
    """Where a run works: ``run_dir`` itself or, for a URL, ``local_dir`` or a folder of the cache.

    Raises:
        UserError: ``local_dir`` is given, and ``run_dir`` is a folder itself.
    """
    if not is_url(run_dir):
        if local_dir:
            raise UserError(f"local_dir is for a run_dir that is a URL, and {run_dir} is a folder")
        return Path(run_dir)
    if local_dir:
        return Path(local_dir)
    url = run_dir.rstrip("/")
    key = hashlib.sha256(url.encode()).hexdigest()[:12]
    return cache_folder() / "runs" / key / url.rsplit("/", 1)[-1]


def nothing() -> None:
    """What is done where there is nothing to do."""


@dataclass(frozen=True)
class Kept:
    """How a run's folder and its URL are kept alike; nothing of it does anything without a URL.

    Attributes:
        send: send the changes at once; in the first process, nothing in the others.
        share: called by all processes together: what the first has, all have afterwards.
        store: the URL, where processes that share no disk write training states together; None:
            they are in the folder.
    """

    send: Callable[[], None] = nothing
    share: Callable[[], None] = nothing
    store: epath.Path | None = None

    def open(self, folder: Path) -> RunDirectory:
        """The directory of an earlier run in ``folder``."""
        path = RunDirectory.existing(folder).path
        return RunDirectory(path, self.send, self.share, self.store)


@contextmanager
def mirrored(run_dir: str, folder: Path, say: Callable[[str], None]) -> Iterator[Kept]:
    """Keep a run's folder and its URL alike within the block; nothing to do for a plain folder.

    Of several processes the first fetches and sends. The others see its folder or, where each has
    a disk of its own, follow by what it sent.

    Raises:
        UserError: as `Mirror` and `check_shared`.
    """
    if not is_url(run_dir):
        check_shared(folder)
        yield Kept()
        return
    blind = _blind(folder)
    apart = len(blind) > 0 and len(blind) == jax.process_count() - 1
    if not apart:
        _check_none(blind, folder)
    mirror = Mirror(run_dir, folder, say, direct=apart)
    store = _store(run_dir) if apart else None

    def share() -> None:
        by_first_process(mirror.push)
        if jax.process_index() > 0:
            mirror.follow()

    with ExitStack() as stack:
        if _several() and jax.process_index() > 0:
            if apart:
                stack.enter_context(RunDirectory(folder).locked())
            by_first_process(mirror.__enter__)
            yield Kept(nothing, share if apart else nothing, store)
            return
        enter = partial(stack.enter_context, mirror)
        by_first_process(enter) if _several() else enter()
        yield Kept(mirror.push, share if apart else nothing, store)


def _store(url: str) -> epath.Path:
    """A URL as several processes write training states to it."""
    scheme, _, path = url.rstrip("/").partition("://")
    if scheme in ("file", "local"):
        return epath.Path(path)
    if scheme in ("gs", "gcs", "s3"):
        return epath.Path(f"{scheme.replace('gcs', 'gs')}://{path}")
    raise UserError(
        f"{url}: processes without a shared disk can write training states to gs:// and s3:// "
        "only: give such a run_dir, or a local_dir on a disk that all hosts share"
    )


def is_summed_up(name: str) -> bool:
    """Whether a summary reads the files of a run that are called so."""
    return name in ("config.yaml", "costs.jsonl", MARKER)


@contextmanager
def summary_folder(run_dir: str, wanted: Callable[[str], bool] = is_summed_up) -> Iterator[Path]:
    """A run's folder to sum it up from: of a URL a copy of what that reads, which goes away.

    ``wanted`` tells by its name whether a file is copied.

    Raises:
        UserError: no such storage, or it cannot be read.
    """
    if not is_url(run_dir):
        yield Path(run_dir)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / run_dir.rstrip("/").rsplit("/", 1)[-1]
        mirror = Mirror(run_dir, folder, print)
        for name, _ in mirror.remote_files():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if wanted(PurePosixPath(name).name):
                mirror.download(name)
        yield folder


def _several() -> bool:
    # Asked without starting a backend: this process may be one that stays off the accelerator.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def check_shared(folder: Path) -> None:
    """Hold several processes to one folder that all of them see; nothing to do for one.

    Raises:
        UserError: in every process, where one does not see what the first wrote.
    """
    _check_none(_blind(folder), folder)


def _blind(folder: Path) -> list[int]:
    """The processes that do not see what the first one writes into a folder."""
    if not _several():
        return []
    token = int(multihost_utils.broadcast_one_to_all(np.uint32(time.time_ns() & 0xFFFFFFFF)))
    path = folder / f".shared-{token}"
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    multihost_utils.sync_global_devices("a token is written")
    seen = multihost_utils.process_allgather(np.asarray(path.exists()))
    if jax.process_index() == 0:
        path.unlink()
    return [int(number) for number in np.flatnonzero(~np.ravel(seen))]


def _check_none(blind: list[int], folder: Path) -> None:
    if blind:
        raise UserError(
            f"{folder}: process {', '.join(map(str, blind))} does not see what process 0 writes "
            "there: give a folder on a disk that all hosts share, or a URL for run_dir "
            "(gs://bucket/run) and each process a local_dir of its own"
        )
