"""Instruction rows: one way to read them, whatever file they are in.

Columns: ``instruction``, an optional ``input``, and ``response`` (or ``output``, as in Alpaca and
AlpacaEval files; ``response`` wins where both have a value); or ``messages``, a list of objects
with ``role`` (system, user, assistant) and ``content``, which wins over the other columns.
An optional ``id`` is a text or a whole number. Other columns are left alone.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from montessori_jax.data.sources import Record, Records, open_records
from montessori_jax.errors import UserError

Message = dict[str, str]
"""One turn: ``role`` is system, user or assistant, ``content`` its text."""

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Row:
    """One well-formed row; its texts are kept exactly as they were written.

    Attributes:
      index: its position in the source, from 0, malformed rows counted, empty lines not.
      id: the ``id`` column, else the line number (from 1); unique among the rows of a source.
      instruction: the instruction; with ``messages``, the last user turn.
      input: the input, or "".
      response: the response; with ``messages``, the last assistant turn; "" if there is none
        (only where none was needed).
      messages: the turns as they were given, or None for an instruction row.
      prompt_id: the ``prompt_id`` column, which candidates of one generation prompt share.
    """

    index: int
    id: str
    instruction: str
    input: str
    response: str
    messages: tuple[Message, ...] | None = None
    prompt_id: str | None = None

    def prompt(self) -> list[Message]:
        """The turns before the response: an input follows its instruction after a newline."""
        if self.messages is None:
            text = f"{self.instruction}\n{self.input}" if self.input else self.instruction
            return [{"role": "user", "content": text}]
        turns = self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages
        return [dict(turn) for turn in turns]

    def conversation(self) -> list[Message]:
        """The prompt and, last, the assistant's response. ValueError where there is none."""
        if not self.response:
            raise ValueError(f"row {self.id} has no response")
        return [*self.prompt(), {"role": "assistant", "content": self.response}]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why in a few words; rows with one cause share the words."""

    index: int
    id: str
    reason: str


@dataclass(frozen=True)
class RowFile:
    """What a source holds: good and malformed rows, each in the order of the source."""

    source: str
    rows: list[Row]
    bad: list[BadRow]

    @property
    def total(self) -> int:
        """The number of rows, malformed ones included."""
        return len(self.rows) + len(self.bad)

    def causes(self) -> dict[str, int]:
        """How many rows are malformed for each reason, the commonest first."""
        counts = Counter(bad.reason for bad in self.bad)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def require(self, minimum: int = 1) -> list[Row]:
        """The good rows, or a UserError with the counts by cause if fewer than `minimum`."""
        if len(self.rows) >= minimum:
            return self.rows
        message = f"{self.source} has {len(self.rows)} usable rows of {self.total}"
        causes = ", ".join(f"{reason} ({count})" for reason, count in self.causes().items())
        raise UserError(f"{message}, but {minimum} are needed" + (f": {causes}" if causes else ""))


class _Malformed(Exception):
    pass


def read_rows(
    source: str | Path | Records,
    *,
    need_response: bool = True,
    limit: int | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> RowFile:
    """Reads a source of instruction rows; malformed rows are set aside, not raised.

    Args:
      source: see :func:`montessori_jax.data.sources.open_records`; or what that has opened.
      need_response: whether a row without a response is malformed.
      limit: read only the first `limit` rows, good and malformed together.
      on_row: called with every good row as it is read, before it has its id. The rows that are
        returned then have no texts: files of any length are read in little memory.

    Returns:
      The good and the malformed rows. All of them may be malformed: ``.require()`` insists on
      some good ones.

    Raises:
      UserError: the source does not exist, cannot be read, has no rows or no usable column, or
        gives one id to two good rows (ids name rows in every output, so they are never changed
        in silence; only a row without an id, whose line number is another row's id, gets
        ``line-N``).
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit of rows to read from {source} is {limit}; expected 1 or more")
    records = source if isinstance(source, Records) else open_records(source)
    if records.columns is not None:
        _check_columns(records.name, records.columns, need_response)

    found: dict[str, None] = {}  # a set that keeps its order
    parsed: list[tuple[int, str | None, Row | str]] = []  # line, own id, row or reason
    for index, (line, record) in enumerate(islice(records.items, limit)):
        if isinstance(record, dict):
            found.update(dict.fromkeys(record))
        own, row = _parse(index, record, need_response)
        if on_row is not None and isinstance(row, Row):
            on_row(row)
            row = replace(row, instruction="", input="", response="", messages=None)
        parsed.append((line, own, row))
    if not parsed:
        raise UserError(f"{records.name} has no rows; expected at least one")
    if records.columns is None:
        if not found:
            reasons = RowFile("", [], [BadRow(0, "", str(row)) for _, _, row in parsed]).causes()
            raise UserError(
                f"{records.name} has no usable row: {next(iter(reasons))}; expected "
                'objects such as {"instruction": ..., "response": ...}'
            )
        _check_columns(records.name, tuple(found), need_response)
    return _with_ids(records.name, parsed)


def _check_columns(name: str, columns: Sequence[str], need_response: bool) -> None:
    shown = ", ".join(columns[:8]) + (", ..." if len(columns) > 8 else "")
    if "messages" in columns:
        return
    if "instruction" not in columns:
        raise UserError(
            f"{name} has no usable column (it has: {shown}); expected `instruction` "
            "with `response` or `output`, or `messages`"
        )
    if need_response and not {"response", "output"} & set(columns):
        raise UserError(
            f"{name} has no responses (its columns: {shown}); expected `response` or "
            "`output` beside `instruction`, or `messages`"
        )


def _with_ids(name: str, parsed: list[tuple[int, str | None, Row | str]]) -> RowFile:
    line_of: dict[str, int] = {}
    for line, own, row in parsed:
        if own is None or isinstance(row, str):
            continue
        if own in line_of:
            raise UserError(
                f"{name} has the id {own!r} in rows {line_of[own]} and {line}; make "
                "the ids unique or drop the column"
            )
        line_of[own] = line

    rows: list[Row] = []
    bad: list[BadRow] = []
    for index, (line, own, row) in enumerate(parsed):
        if own is None:
            own = str(line)
            while own in line_of:
                own = f"line-{own}"
        if isinstance(row, str):
            bad.append(BadRow(index, own, row))
        else:
            rows.append(replace(row, index=index, id=own))
    return RowFile(name, rows, bad)


def _parse(index: int, record: Record, need_response: bool) -> tuple[str | None, Row | str]:
    if isinstance(record, str):
        return None, record
    own: str | None = None
    try:
        own = _id(record.get("id"))
        prompt = record.get("prompt_id")
        row = (
            _instruction_row(index, record, need_response)
            if _absent(record.get("messages"))
            else _messages_row(index, record["messages"], need_response)
        )
        return own, row if prompt is None else replace(row, prompt_id=str(prompt))
    except _Malformed as malformed:
        return own, str(malformed)


def _instruction_row(index: int, record: dict[str, Any], need_response: bool) -> Row:
    instruction = _text(record, "instruction")
    if instruction is None:
        raise _Malformed("instruction is missing")
    if not instruction.strip():
        raise _Malformed("instruction is empty")
    input_text = _text(record, "input") or ""
    response = _text(record, "response")
    if response is None:
        response = _text(record, "output")
    if need_response and response is None:
        raise _Malformed("response is missing")
    response = response if response and response.strip() else ""
    if need_response and not response:
        raise _Malformed("response is empty")
    return Row(index, "", instruction, input_text if input_text.strip() else "", response)


def _messages_row(index: int, value: Any, need_response: bool) -> Row:
    if not isinstance(value, (list, tuple)):
        raise _Malformed("messages is not a list")
    turns = tuple(_turn(item) for item in value)
    spoken = turns[1:] if turns and turns[0]["role"] == "system" else turns
    if not spoken:
        raise _Malformed("messages has no user turn")
    # What every chat template takes; several raise on anything else, in the middle of a run.
    for position, turn in enumerate(spoken):
        if turn["role"] != ("user", "assistant")[position % 2]:
            raise _Malformed("turns do not alternate between user and assistant")
    answered = spoken[-1]["role"] == "assistant"
    if need_response and not answered:
        raise _Malformed("the last turn is not the assistant's")
    if answered and need_response and not spoken[-1]["content"].strip():
        raise _Malformed("response is empty")
    if answered and not spoken[-1]["content"].strip():
        turns, spoken, answered = turns[:-1], spoken[:-1], False
    if any(not turn["content"].strip() for turn in spoken):
        raise _Malformed("a turn is empty")
    return Row(
        index,
        "",
        instruction=spoken[-2 if answered else -1]["content"],
        input="",
        response=spoken[-1]["content"] if answered else "",
        messages=turns,
    )


def _turn(item: Any) -> Message:
    if not isinstance(item, dict):
        raise _Malformed("a turn is not an object with role and content")
    role, content = _text(item, "role"), _text(item, "content")
    if role is None or content is None:
        raise _Malformed("a turn lacks its role or content")
    if role not in ROLES:
        raise _Malformed(f"unknown role {role[:20]!r}")
    return {"role": role, "content": content}


def _id(value: Any) -> str | None:
    if _absent(value):
        return None
    if isinstance(value, float) and value.is_integer():  # whole numbers that a NaN made floats
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _Malformed("id is not a text or a whole number")
    text = str(value) if isinstance(value, int) else (_text({"id": value}, "id") or "")
    return text if text.strip() else None


def _text(record: dict[str, Any], column: str) -> str | None:
    value = record.get(column)
    if _absent(value):
        return None
    if not isinstance(value, str):
        raise _Malformed(f"{column} is not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair: JSON allows it, no tokenizer takes it
        raise _Malformed(f"{column} is not valid Unicode") from None
    return value


def _absent(value: Any) -> bool:
    # Parquet and pandas write a missing text as null or as NaN.
    return value is None or (isinstance(value, float) and math.isnan(value))
