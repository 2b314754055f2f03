"""Token lengths of instructions and responses (the paper's figures 11 and 12)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from montessori_jax.report.run_data import Iteration

MOST = 4000
"""Rows of a data set that are measured, evenly spread over it."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of one data set's texts in ``unit``; ``measured`` of ``rows`` rows."""

    instructions: Int[np.ndarray, " n"]
    responses: Int[np.ndarray, " n"]
    unit: str
    rows: int

    @property
    def measured(self) -> int:
        return len(self.instructions)


def spread_texts(file: Path, columns: tuple[str, ...], most: int) -> tuple[int, list[list[str]]]:
    """How many rows a data set has, and the texts of at most ``most`` evenly spread ones."""
    import pyarrow.parquet as pq

    texts: list[list[str]] = [[] for _ in columns]
    with pq.ParquetFile(file) as table:
        rows = table.metadata.num_rows
        wanted = np.unique(np.linspace(0, max(rows - 1, 0), min(rows, most)).astype(int))
        start = 0
        for batch in table.iter_batches(batch_size=4096, columns=list(columns)):
            inside = wanted[(wanted >= start) & (wanted < start + batch.num_rows)] - start
            picked = batch.take(inside.tolist())
            for place, name in enumerate(columns):
                texts[place] += [text or "" for text in picked.column(name).to_pylist()]
            start += batch.num_rows
    return rows, texts


def measure_lengths(iteration: Iteration, file: Path) -> Lengths:
    """Count tokens of the student that the run trained, or of its teacher; else words."""
    rows, (instructions, responses) = spread_texts(file, ("instruction", "response"), MOST)
    place = next(_tokenizers(iteration.path), None)
    if place is None:
        counts = [
            np.array([len(text.split()) for text in some]) for some in (instructions, responses)
        ]
        return Lengths(counts[0], counts[1], "words", rows)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(place))

    def count(texts: list[str]) -> np.ndarray:
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return np.array([len(one.ids) for one in encoded])

    return Lengths(count(instructions), count(responses), "tokens", rows)


def _tokenizers(iteration: Path) -> Iterator[Path]:
    for pattern in ("train-*/student/tokenizer.json", "*/student/tokenizer.json",
                    "*/teacher/tokenizer.json"):  # fmt: skip
        yield from sorted(iteration.glob(pattern))
