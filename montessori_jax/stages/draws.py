"""Stage: a random number for each row, in place of what would be measured: a control."""

from typing import Any

from montessori_jax.data.tables import read_table
from montessori_jax.data.writing import DatasetCard, write_dataset_parts
from montessori_jax.seeding import derive_seed
from montessori_jax.work import Work


def draws(rows: str, work: Work) -> dict[str, Any]:
    """Write ``scores.parquet``: ``id`` and ``draw``, uniform from 0 to 1, by seed and id alone."""
    table = [
        {"id": str(row["id"]), "draw": derive_seed(work.seed, str(row["id"])) / 2**31}
        for row in read_table(rows, ("id",))
    ]
    card = DatasetCard(
        title="Random scores",
        description="Numbers that know nothing of the rows, to compare other scores with.",
        columns={"id": "the row", "draw": "uniform from 0 to 1"},
        made=("drew a number for each row, by the seed and the row's id",),
        seed=work.seed,
    )
    write_dataset_parts(work.folder, {"scores": table}, card)
    return {"rows": len(table)}
