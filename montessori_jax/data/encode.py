"""Rows -> encoded chats, with a reason for each row that cannot be one."""

from collections import Counter
from dataclasses import dataclass

from montessori_jax.data.chat import ChatError, ChatFormat, EncodedChat, fit
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
    that long, or that was malformed already, is skipped with its reason.

    Raises:
        UserError: no row is left.
    """
    skipped = {bad.index: bad.reason for bad in source.bad}
    rows: list[Row] = []
    chats: list[EncodedChat] = []
    cut = 0
    for row in source.rows:
        if limit is not None and len(chats) == limit:
            break
        try:
            encoded = chat.encode(row.conversation())
        except ChatError as error:
            skipped[row.index] = str(error)
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


def encode_each(
    source: RowFile, chat: ChatFormat
) -> tuple[list[Row], list[EncodedChat], dict[int, str]]:
    """Every row that can be encoded, whole; and a reason for each that cannot, by its index."""
    rows: list[Row] = []
    chats: list[EncodedChat] = []
    reasons = {bad.index: bad.reason for bad in source.bad}
    for row in source.rows:
        try:
            chats.append(chat.encode(row.conversation()))
            rows.append(row)
        except ChatError as error:
            reasons[row.index] = str(error)
    return rows, chats, reasons
