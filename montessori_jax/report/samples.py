"""Scored samples for the page: all of a small run, of a large one the prompts that say most.

A page holds whole prompts, so that each sample has its siblings (the other candidates of its
prompt). Of a large run these are the prompts with the most helpful and the most harmful samples,
and a tenth drawn at random.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from montessori_jax.report.run_data import Iteration, Run, iterations_of
from montessori_jax.seeding import derive_seed

MOST = 4000
"""Samples on a page."""
LONGEST = 4000
"""Characters of one text on a page."""
LARGEST = 14_000_000
"""Bytes of all texts on a page, as JSON."""
RANDOM_SHARE = 0.1


@dataclass(frozen=True)
class Candidates:
    """What a stage scores: files of an iteration's folder, and what is added to its name."""

    stage: str
    rows: str
    prompts: str
    added: str


# Of instructions that compete under a prompt, and of responses that do under an instruction.
SCORED = (
    Candidates("influence", "split/probing.parquet", "generate/prompts.jsonl", ""),
    Candidates(
        "influence-responses", "respond/data.parquet", "respond/prompts.jsonl", ", responses"
    ),
)


@dataclass(frozen=True)
class Scores:
    """Influence of an iteration's candidates, in nats; NaN where there is none.

    ``finished`` is False while the stage is at work: then these are the scores so far.
    """

    ids: list[str]
    influence: Float[np.ndarray, " n"]
    offset: float | None
    finished: bool

    @property
    def known(self) -> Float[np.ndarray, " k"]:
        return self.influence[~np.isnan(self.influence)]


def scored(runs: Sequence[Run]) -> Iterator[tuple[str, Candidates, Iteration, Scores]]:
    """All that has influence, with the name that figures give it."""
    for _, iteration, name in iterations_of(runs):
        for candidates in SCORED:
            found = read_scores(iteration.path / candidates.stage)
            if found is not None and len(found.known):
                yield name + candidates.added, candidates, iteration, found


def read_scores(stage: Path) -> Scores | None:
    """The scores of a stage's folder; from its journal where it has not ended."""
    file, journal = stage / "scores.parquet", stage / "chunks.jsonl"
    if file.exists():
        import pyarrow.parquet as pq

        found = pq.read_table(file, columns=["id", "influence", "offset"])
        values, offsets = found["influence"].to_numpy(), found["offset"].to_pylist()
        ids, finished = [str(name) for name in found["id"].to_pylist()], True
    elif journal.exists():
        rows = [row for chunk in _chunks(journal) for row in chunk["scores"]]
        ids, finished = [str(row["id"]) for row in rows], False
        values = np.array([row["influence"] for row in rows], float)
        offsets = [row.get("offset") for row in rows]
    else:
        return None
    offset = next((one for one in offsets if one is not None), None)
    return Scores(ids, np.asarray(values, np.float64), offset, finished)


def _chunks(journal: Path) -> list[dict[str, Any]]:
    chunks = []
    for line in journal.read_text(encoding="utf-8").split("\n")[:-1]:  # the last may be torn
        record = json.loads(line)
        if "chunk" in record:
            chunks.append(record)
    return sorted(chunks, key=lambda record: record["chunk"])


def choose_prompts(
    prompts: Sequence[str], influence: Float[np.ndarray, " n"], most: int, seed: int
) -> list[str]:
    """Prompts to show, the most telling ones first, until they hold ``most`` samples.

    In turn the prompt of the next most helpful and of the next most harmful sample; every tenth is
    drawn at random instead.
    """
    sizes: dict[str, int] = {}
    for name in prompts:
        sizes[name] = sizes.get(name, 0) + 1
    scored = np.flatnonzero(~np.isnan(influence))
    order = scored[np.argsort(-influence[scored], kind="stable")]
    ends = (prompts[place] for pair in zip(order, order[::-1], strict=True) for place in pair)
    names = list(sizes)
    draw = np.random.Generator(np.random.Philox(key=[seed, len(names)]))
    anyone = (names[place] for place in draw.permutation(len(names)))
    chosen: dict[str, None] = {}
    count = 0
    while len(chosen) < len(names) and count < most:
        by_chance = len(chosen) % round(1 / RANDOM_SHARE) == round(1 / RANDOM_SHARE) - 1
        turn = anyone if by_chance else ends
        # Where that source is used up, what is left in order.
        name = next(one for one in chain(turn, names) if one not in chosen)
        chosen[name] = None
        count += sizes[name]
    return list(chosen)


def collect(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page's script shows: ``groups``, ``prompts`` and ``samples``, as lists.

    A sample is ``[prompt, id, influence, rank, instruction, response, how it ended]``, ``rank``
    being 1 for the most helpful of its group; a prompt ``[group, id, messages or text]``; a group
    ``{label, total, shown, finished}``.
    """
    found = list(scored(runs))
    data: dict[str, Any] = {"groups": [], "prompts": [], "samples": [], "longest": LONGEST}
    for one in found:
        _add(data, *one, MOST // len(found), LARGEST // len(found))
    return data


def _add(
    data: dict[str, Any],
    label: str,
    candidates: Candidates,
    iteration: Iteration,
    scores: Scores,
    most: int,
    largest: int,
) -> None:
    places = {name: place for place, name in enumerate(scores.ids)}
    file = iteration.path / candidates.rows
    named = ((str(id_), str(prompt or id_)) for id_, prompt in _rows(file, ["id", "prompt_id"]))
    held = [(name, prompt) for name, prompt in named if name in places]
    influence = scores.influence[[places[name] for name, _ in held]]
    chosen = choose_prompts([prompt for _, prompt in held], influence, most, derive_seed(0, label))
    ranks = _ranks(influence)
    rank = {name: int(ranks[place]) for place, (name, _) in enumerate(held)}
    wanted = set(chosen)
    texts: dict[str, list[list[Any]]] = {name: [] for name in chosen}
    columns = ["id", "prompt_id", "instruction", "response", "response_finish"]
    for id_, prompt, instruction, response, finish in _rows(file, columns):
        name, prompt = str(id_), str(prompt or id_)
        if prompt in wanted and name in places:
            value = float(scores.influence[places[name]])
            texts[prompt].append(
                [
                    name,
                    None if np.isnan(value) else value,
                    rank[name] or None,
                    _cut(instruction),
                    _cut(response),
                    finish,
                ]
            )
    asked = _asked(iteration.path / candidates.prompts, wanted)
    group, size, shown = len(data["groups"]), 0, 0
    for name in chosen:
        prompt_row = [group, name, asked.get(name)]
        size += len(json.dumps([prompt_row, texts[name]], ensure_ascii=False).encode())
        if size > largest and shown:
            break
        data["prompts"].append(prompt_row)
        data["samples"] += [[len(data["prompts"]) - 1, *row] for row in texts[name]]
        shown += len(texts[name])
    data["groups"].append(
        {"label": label, "total": len(held), "shown": shown, "finished": scores.finished}
    )


def _ranks(influence: Float[np.ndarray, " n"]) -> np.ndarray:
    """1 for the highest; 0 where there is no score."""
    scored = np.flatnonzero(~np.isnan(influence))
    ranks = np.zeros(len(influence), int)
    ranks[scored[np.argsort(-influence[scored], kind="stable")]] = np.arange(1, len(scored) + 1)
    return ranks


def _rows(file: Path, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """Rows of a Parquet file, a batch in memory at a time; a column it lacks is all None."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        present = [name for name in columns if name in table.schema_arrow.names]
        for batch in table.iter_batches(batch_size=4096, columns=present):
            known = {name: batch.column(name).to_pylist() for name in present}
            empty = [None] * batch.num_rows
            yield from zip(*(known.get(name, empty) for name in columns), strict=True)


def _asked(file: Path, wanted: set[str]) -> dict[str, Any]:
    """What the teacher was asked, by prompt id: ``[[role, text], ...]`` or a text."""
    if not file.exists():
        return {}
    found: dict[str, Any] = {}
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["prompt_id"] in wanted:
                asked, prefill = row["prompt"], row.get("prefill") or ""
                if isinstance(asked, str):
                    found[row["prompt_id"]] = _cut(asked + prefill)
                    continue
                turns = [[one["role"], _cut(one["content"])] for one in asked]
                found[row["prompt_id"]] = turns + ([["prefilled answer", prefill]] * bool(prefill))
    return found


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
