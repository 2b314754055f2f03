"""Files of rows for the tests of the reader, and the error that each bad one gives."""

import json
from pathlib import Path

import pytest

from montessori_jax.data.rows import read_rows
from montessori_jax.errors import UserError

GOOD = {"instruction": "Name a prime.", "response": "Seven."}


def jsonl(folder: Path, *records: object, name: str = "rows.jsonl") -> Path:
    path = folder / name
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def talk(*turns: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def one_line_error(source: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
