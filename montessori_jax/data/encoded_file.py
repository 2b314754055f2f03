"""Encoded chats on disk, so that memory does not grow with their number."""

import os
import tempfile
import weakref
from array import array
from pathlib import Path

import numpy as np

from montessori_jax.data.chat import EncodedChat
from montessori_jax.data.lazy import LazySequence
from montessori_jax.data.sources import in_one_line
from montessori_jax.errors import UserError


class EncodedFile(LazySequence[EncodedChat]):
    """Encoded chats in a temporary file, which goes with the process; 12 bytes of each in memory.

    Args:
        folder: where the file lies, nameless; 4 bytes a token.

    Raises:
        UserError: the folder cannot be written to, there or in `append`.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._ends = array("q", [0])  # in tokens
        self._prompts = array("i")
        try:
            # Closed with this object, which outlives any one block.
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise self._full(error) from error
        weakref.finalize(self, self._file.close)

    def append(self, chat: EncodedChat) -> None:
        """Write one more chat."""
        tokens = np.asarray(chat.tokens, np.int32)
        try:
            self._file.write(tokens.tobytes())
            self._file.flush()
        except OSError as error:
            raise self._full(error) from error
        self._ends.append(self._ends[-1] + len(tokens))
        self._prompts.append(chat.prompt_length)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each chat, int64."""
        return np.diff(np.array(self._ends, np.int64))

    @property
    def prompt_lengths(self) -> np.ndarray:
        """The number of tokens of each chat's prompt, int32."""
        return np.array(self._prompts, np.int32)

    def __len__(self) -> int:
        return len(self._prompts)

    def make(self, index: int) -> EncodedChat:
        start, end = self._ends[index], self._ends[index + 1]
        # Read and not mapped: a mapped page counts as the process's memory.
        data = os.pread(self._file.fileno(), 4 * (end - start), 4 * start)
        return EncodedChat(np.frombuffer(data, np.int32), self._prompts[index])

    def _full(self, error: OSError) -> UserError:
        return UserError(
            f"{self._folder}: encoded candidates cannot be kept there: {in_one_line(error)}; free "
            "some space, or choose another folder"
        )
