"""Safetensors files, next to nothing of them in memory: mapped to be read, streamed when written.

The format (https://github.com/huggingface/safetensors): eight bytes of header length, a JSON
header with each tensor's dtype, shape and place, and the tensors' raw bytes.
"""

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from montessori_jax.errors import UserError

NAMES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
DTYPES = {name: np.dtype(kind) for name, kind in NAMES.items()}
# Rows are cast and put in order this much at a time as they are written.
BLOCK_BYTES = 4 * 1024**2


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: bytes ``start`` to ``stop`` of a file."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Shards(Mapping[str, np.ndarray]):
    """The tensors of several safetensors files, as read-only views of the mapped files.

    Iteration goes file by file, in each file from its beginning. Asking for a tensor lets go of
    the pages of the one before (which stays valid: what is read of it again is mapped again), so
    that a pass over the files holds one tensor's pages at a time.

    Raises:
        UserError: a file that is cut short, or is no safetensors file.
    """

    def __init__(self, files: Iterable[Path]):
        self._places: dict[str, _Place] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._last: _Place | None = None
        for file in files:
            try:
                # The library checks what the header says against the file.
                with safe_open(file, framework="numpy"):
                    pass
                with open(file, "rb") as source:
                    self._maps[file] = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
            except (SafetensorError, OSError, ValueError) as error:
                raise _broken(file, error) from None
            self._places |= _places(file, self._maps[file])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._places[name]
        if place.kind not in DTYPES:
            raise UserError(f"{place.file}: {name} is stored as {place.kind}, which is not read")
        self._let_go()
        self._last = place
        dtype = DTYPES[place.kind]
        count = math.prod(place.shape)
        if count == 0:
            return np.empty(place.shape, dtype)
        raw = np.frombuffer(self._maps[place.file], dtype, count, place.start)
        return raw.reshape(place.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return self._places[name].shape

    def _let_go(self) -> None:
        # Mapped pages count as this process's memory while they are mapped, and a machine that
        # runs short has to find them first.
        if self._last is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = self._last.start // mmap.PAGESIZE * mmap.PAGESIZE
        mapped = self._maps[self._last.file]
        mapped.madvise(mmap.MADV_DONTNEED, start, self._last.stop - start)


def write_shard(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[tuple[str, np.ndarray]],
    dtype: np.dtype,
) -> None:
    """Write one file of the tensors named in ``shapes``, a few megabytes in memory at a time.

    Args:
        path: the file.
        shapes: names and shapes, in the order of the file.
        tensors: names and arrays, taken from as many times as ``shapes`` has entries, in its
            order; cast to ``dtype`` (rounded to nearest even) as they are written.
        dtype: float32 or bfloat16.

    Raises:
        OSError: the file cannot be written.
        ValueError: a tensor is another one than ``shapes`` says.
    """
    kind = next(name for name, known in DTYPES.items() if known == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected, shape in shapes.items():
            name, array = next(tensors)
            if name != expected or array.shape != shape:
                raise ValueError(f"{name} {array.shape} comes where {expected} {shape} belongs")
            for block in _blocks(array, dtype):
                file.write(np.ascontiguousarray(block, dtype).view(np.uint8).data)


def _blocks(array: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Runs of rows; a vector in one piece."""
    if array.ndim < 2:
        yield array.reshape(-1)
        return
    rows = max(1, BLOCK_BYTES // max(1, math.prod(array.shape[1:]) * dtype.itemsize))
    for start in range(0, array.shape[0], rows):
        yield array[start : start + rows]


def _places(file: Path, content: mmap.mmap) -> dict[str, _Place]:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    places = {}
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (8 + size + offset for offset in about["data_offsets"])
        places[name] = _Place(file, about["dtype"], tuple(about["shape"]), start, stop)
    return places


def _broken(file: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{file}: cannot be read as safetensors ({reason}); copy or download it again")
