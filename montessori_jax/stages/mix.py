"""Stage: seeds and what a teacher wrote from them, as one data set to train on."""

from collections.abc import Mapping
from typing import Any

from montessori_jax.data.rows import read_rows
from montessori_jax.data.tables import read_table
from montessori_jax.data.writing import DatasetCard, write_dataset_card
from montessori_jax.work import Work

COLUMNS = {
    "id": "where the row is from, and its id there",
    "messages": "the conversation, the response last",
}


def mix(
    seeds: str, losses: str, parts: Mapping[str, str], work: Work, *, rows: int
) -> dict[str, Any]:
    """Write the measured seeds, then as many rows of each part as fit, ``rows`` in all at most.

    Args:
        seeds: seed rows.
        losses: rows with the ``id`` of each seed that is taken.
        parts: name -> rows.
        work: where to write.
        rows: the most that are written.

    Returns:
        Counts: ``seeds``, ``written`` by part and ``rows`` in all.
    """
    wanted = {str(one["id"]) for one in read_table(losses, ("id",))}
    known = {name: read_rows(place).rows for name, place in parts.items()}
    taken = {"seed": [row for row in read_rows(seeds).rows if row.id in wanted][:rows]}
    room = rows - len(taken["seed"])
    share = fair_shares({name: len(found) for name, found in known.items()}, room)
    taken |= {name: found[: share[name]] for name, found in known.items()}
    mixed = [
        {"id": f"{name}/{row.id}", "messages": row.conversation()}
        for name, found in taken.items()
        for row in found
    ]
    counts = {name: len(found) for name, found in taken.items()}
    card = DatasetCard(
        title="Seeds and what a teacher wrote from them",
        description="Seed tasks, and more of those that a student found hard.",
        columns=COLUMNS,
        made=("took the seeds", "added rows written from them, equal shares of each time"),
        counts={f"from {name}": count for name, count in counts.items()},
    )
    write_dataset_card(work.folder, mixed, card)
    return {"rows": len(mixed), "seeds": counts.pop("seed"), "written": counts}


def fair_shares(sizes: Mapping[str, int], room: int) -> dict[str, int]:
    """How many rows of each part make up ``room``: as equal as its parts' sizes let them be."""
    shares: dict[str, int] = {}
    for name in sorted(sizes, key=lambda one: sizes[one]):
        shares[name] = min(sizes[name], room // (len(sizes) - len(shares)))
        room -= shares[name]
    return shares
