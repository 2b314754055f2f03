"""Rows that are also test prompts, found by hash.

A reference set picks what the student learns. If it holds the prompts of a benchmark, the student
is steered by its own test: the score is then no measure of what it can do. The prompts themselves
are not shipped (AlpacaEval's are CC BY-NC), only 8-byte BLAKE2b hashes of their normalised text.
So exact copies are found, whatever their case, spacing or punctuation; paraphrases are not.

The hashes were made by this module from public files: the outputs of gpt4_1106_preview in
tatsu-lab/alpaca_eval (each model's file there holds all 805 prompts) and MT-Bench's question file
in lm-sys/FastChat, both turns::

    python -m montessori_jax.data.overlap AlpacaEval=model_outputs.json MT-Bench=question.jsonl
"""

import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

from montessori_jax.data.rows import Row
from montessori_jax.data.sources import open_records
from montessori_jax.data.writing import open_atomically
from montessori_jax.errors import UserError

HASHES = "shipped/test_prompt_hashes.json"


def prompt_hash(text: str) -> str | None:
    """8 bytes of BLAKE2b, in hex, of a text's letters and digits; None where it has none.

    Normalised first: NFKC, case folded, each run of anything but letters and digits one space.
    """
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())
    if not words:
        return None
    normal = " ".join(words).encode("utf-8")
    return hashlib.blake2b(normal, digest_size=8).hexdigest()


@cache
def benchmark_hashes() -> dict[str, frozenset[str]]:
    """The shipped hashes of each benchmark's prompts, by the benchmark's name."""
    text = (resources.files("montessori_jax.data") / HASHES).read_text("utf-8")
    return {name: frozenset(hashes) for name, hashes in json.loads(text).items()}


def find_overlaps(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Which rows ask what a benchmark asks.

    A row counts if its instruction, its instruction with its input, or any user turn is a
    benchmark's prompt.

    Returns:
      The ids of such rows, in order, by the benchmark's name; benchmarks without any are absent.
    """
    found: dict[str, list[str]] = {}
    for row in rows:
        hashes = {prompt_hash(text) for text in _questions(row)}
        for name, known in benchmark_hashes().items():
            if hashes & known:
                found.setdefault(name, []).append(row.id)
    return found


def warn_about_overlaps(rows: Sequence[Row], *, name: str = "the reference set") -> list[str]:
    """One line a benchmark whose prompts are among the rows; an empty list if there is none.

    Args:
      rows: the rows of one set.
      name: what to call that set, for example "the reference set refs.jsonl".
    """
    messages = []
    for benchmark, ids in find_overlaps(rows).items():
        first = ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
        messages.append(
            f"{name} shares {len(ids)} of its {len(rows)} rows with the {benchmark} prompts "
            f"(ids {first}): a {benchmark} score of a student steered or trained by them is not a "
            "fair test; drop these rows or do not report that score"
        )
    return messages


def _questions(row: Row) -> Iterator[str]:
    if row.messages is not None:
        yield from (turn["content"] for turn in row.messages if turn["role"] == "user")
        return
    yield row.instruction
    if row.input:
        yield f"{row.instruction}\n{row.input}"


def _prompts(path: str) -> Iterator[str]:
    """The prompts of a benchmark's file: every one of its `turns`, or its `instruction`."""
    for number, record in open_records(path).items:
        if isinstance(record, dict) and isinstance(record.get("turns"), list):
            yield from (str(turn) for turn in record["turns"])
        elif isinstance(record, dict) and isinstance(record.get("instruction"), str):
            yield record["instruction"]
        else:
            raise UserError(f"row {number} of {path} has neither `turns` nor `instruction`")


def hash_table(files: Mapping[str, str]) -> dict[str, list[str]]:
    """Benchmark name -> the sorted hashes of the prompts in its file (JSONL, JSON or Parquet).

    Raises:
      UserError: a file cannot be read, or a row of it has neither `turns` nor `instruction`.
    """
    table: dict[str, list[str]] = {}
    for name, path in files.items():
        hashes = {prompt_hash(prompt) for prompt in _prompts(path)}
        table[name] = sorted(value for value in hashes if value is not None)
    return table


def main(arguments: Sequence[str]) -> None:
    """Writes the hashes of ``NAME=FILE`` arguments into the package."""
    files = {}
    for argument in arguments:
        name, _, path = argument.partition("=")
        if not name or not path:
            raise UserError(f"{argument!r} is not NAME=FILE, such as AlpacaEval=model_outputs.json")
        files[name] = path
    if not files:
        raise UserError("nothing to hash; name the files, such as AlpacaEval=model_outputs.json")
    table = hash_table(files)
    with open_atomically(Path(__file__).parent / HASHES) as file:
        file.write((json.dumps(table, indent=0) + "\n").encode("utf-8"))
    print(", ".join(f"{name}: {len(hashes)} prompts" for name, hashes in table.items()))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"overlap: error: {error}")
