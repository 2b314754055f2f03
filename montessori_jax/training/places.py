"""Folders of training states, on this machine or at a URL: listed, read, written and removed.

Orbax writes to a URL past fsspec, so nothing that fsspec remembers of it is believed.
"""

import os
import zlib
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from etils import epath

from montessori_jax.data.writing import open_atomically

Place = str | Path | epath.Path


def is_remote(place: Place) -> bool:
    """Whether a place is a URL."""
    return "://" in str(place)


def absolute(place: Place) -> epath.Path:
    """A folder of this machine by its whole path; a URL as it is."""
    return epath.Path(place) if is_remote(place) else epath.Path(place).absolute()


def names(folder: epath.Path) -> list[str]:
    """What lies directly in a folder; nothing where there is none."""
    if not is_remote(folder):
        return os.listdir(folder) if folder.is_dir() else []
    system, root = _opened(folder)
    try:
        found = [path.rstrip("/") for path in system.ls(root, detail=False)]
    except FileNotFoundError:
        return []
    return [PurePosixPath(path).name for path in found if path != root]


def contents(folder: epath.Path) -> dict[str, list[int | None]]:
    """Every file below a folder with its size and CRC-32; the latter is None at a URL, where the
    store checks and reading all of it would be another download."""
    if not is_remote(folder):
        paths = sorted(place / name for place, _, found in folder.walk() for name in found)
        return {
            str(path.relative_to(folder)): [path.stat().length, checksum(path)] for path in paths
        }
    system, root = _opened(folder)
    found = system.find(root, detail=True)
    return {path[len(root) + 1 :]: [found[path]["size"], None] for path in sorted(found)}


def checksum(path: epath.Path) -> int:
    """CRC-32 of a file of this machine."""
    found = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return found


def read(path: epath.Path) -> bytes:
    """A file's content; raises `FileNotFoundError`."""
    if not is_remote(path):
        return path.read_bytes()
    system, name = _opened(path)
    return system.cat_file(name)


def write(path: epath.Path, content: bytes) -> None:
    """Write a file that is there with all of its content or not at all."""
    if is_remote(path):
        system, name = _opened(path)
        system.pipe_file(name, content)
        return
    with open_atomically(path) as file:
        file.write(content)


def remove(folder: epath.Path) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if not is_remote(folder):
        folder.rmtree(missing_ok=True)
        return
    system, root = _opened(folder)
    with suppress(FileNotFoundError):
        system.rm(root, recursive=True)


def _opened(place: epath.Path) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    system, root = url_to_fs(str(place))
    system.invalidate_cache()
    return system, root.rstrip("/")
