"""Rows -> encoded chats, with a reason for each row that cannot be one."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from montessori_jax import cluster
from montessori_jax.data.chat import ChatError, ChatFormat, EncodedChat, fit
from montessori_jax.data.encoded_file import EncodedFile
from montessori_jax.data.own_parts import read_rows_together
from montessori_jax.data.rows import Row, RowFile
from montessori_jax.errors import UserError


@dataclass(frozen=True)
class EncodedRows:
    """``rows[i]`` encoded as ``chats[i]``; ``skipped`` maps a row's position to its reason."""

    rows: list[Row]
    chats: list[EncodedChat]
    skipped: dict[int, str]
    cut: int

    @property
    def tokens(self) -> int:
        return sum(len(chat.tokens) for chat in self.chats)

    def causes(self) -> dict[str, int]:
        return dict(Counter(self.skipped.values()))


def encode_rows(
    source: RowFile, chat: ChatFormat, max_length: int, *, limit: int | None = None
) -> EncodedRows:
    """Encode a file's rows, the first ``limit`` that can be.

    A response is cut at ``max_length`` tokens (counted in ``cut``); a row whose prompt alone is
    that long, or that was malformed already, is skipped with its reason. The processes of a job
    call this together: each encodes rows of its own, and all get all.

    Raises:
        UserError: no row is left.
    """
    skipped = {bad.index: bad.reason for bad in source.bad}
    rows: list[Row] = []
    chats: list[EncodedChat] = []
    cut = 0
    together = cluster.shared_out(source.rows, partial(_encoded, chat=chat))
    for row, encoded in zip(source.rows, together, strict=True):
        if limit is not None and len(chats) == limit:
            break
        if isinstance(encoded, str):
            skipped[row.index] = encoded
            continue
        fitted = fit(encoded, max_length)
        if fitted is None:
            skipped[row.index] = f"prompt longer than {max_length} tokens"
            continue
        cut += len(fitted.tokens) < len(encoded.tokens)
        rows.append(row)
        chats.append(fitted)
    if not chats:
        causes = ", ".join(f"{reason} ({n})" for reason, n in Counter(skipped.values()).items())
        raise UserError(f"{source.source}: no usable row: {causes or 'it is empty'}")
    return EncodedRows(rows, chats, skipped, cut)


def _encoded(row: Row, chat: ChatFormat) -> EncodedChat | str:
    try:
        return chat.encode(row.conversation())
    except ChatError as error:
        return str(error)


@dataclass(frozen=True)
class RowsOnDisk:
    """A source's rows without their texts, and the encoded chats of those that could be.

    ``rows[i]`` is encoded whole as ``chats[i]``; ``reasons`` says of every other row, by its index,
    why it is not. ``content`` is a hash of all texts and ids that were encoded.
    """

    source: RowFile
    rows: list[Row]
    chats: EncodedFile
    reasons: dict[int, str]
    content: str


def encode_to_disk(
    source: str | Path, chat: ChatFormat, folder: Path, *, limit: int | None = None
) -> RowsOnDisk:
    """Every row that can be encoded, whole, from file to file: memory holds names and reasons.

    The processes of a job call this together: each reads and encodes rows of its own, and all keep
    all.

    Args:
        source: as `read_rows` takes it.
        chat: the model's format.
        folder: where encoded chats are kept while they are used.
        limit: read only the first rows, good and malformed together; all by default.

    Raises:
        UserError: the source cannot be read, or ``folder`` not written to.
    """
    chats = EncodedFile(folder)
    failed: dict[int, str] = {}
    texts = hashlib.sha256()

    waiting: list[Row] = []

    def encode() -> None:
        for row, encoded in zip(
            waiting, cluster.shared_out(waiting, partial(_encoded, chat=chat)), strict=True
        ):
            if isinstance(encoded, str):
                failed[row.index] = encoded
                continue
            chats.append(encoded)
            texts.update(json.dumps([row.index, row.conversation()], ensure_ascii=False).encode())
        waiting.clear()

    def wait(row: Row) -> None:
        waiting.append(row)
        if len(waiting) == cluster.TOGETHER:
            encode()

    read = read_rows_together(source, limit=limit, on_row=wait)
    encode()
    rows = [row for row in read.rows if row.index not in failed]
    texts.update(json.dumps([row.id for row in rows], ensure_ascii=False).encode())
    reasons = {bad.index: bad.reason for bad in read.bad} | failed
    return RowsOnDisk(read, rows, chats, reasons, texts.hexdigest()[:16])
