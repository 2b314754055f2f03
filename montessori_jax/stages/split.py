"""Stage: candidates -> a warm-up set and a probing set, whole prompts at a time."""

from typing import Any

import numpy as np

from montessori_jax.data.tables import read_table
from montessori_jax.data.writing import DatasetCard, write_dataset_parts
from montessori_jax.errors import UserError
from montessori_jax.stages.generate import COLUMNS
from montessori_jax.work import Work


def split_candidates(
    candidates: str, fraction: float, warmup_rows: int, work: Work
) -> dict[str, Any]:
    """Write ``warmup.parquet`` and ``probing.parquet``, two splits of one data set, and its card.

    ``fraction`` of the prompts, at least one, drawn by the seed, warm the student up (at most
    ``warmup_rows`` rows are used); the others are probed, all candidates of a prompt together.

    Raises:
        UserError: there are fewer than two prompts.
    """
    rows = read_table(candidates)
    prompts = list(dict.fromkeys(row["prompt_id"] for row in rows))
    if len(prompts) < 2:
        raise UserError(
            f"{candidates}: candidates of {len(prompts)} prompt, 2 are needed to warm up and to "
            "probe: raise generation.prompts"
        )
    count = min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)
    order = np.random.Generator(np.random.Philox(key=work.seed)).permutation(len(prompts))
    chosen = {prompts[i] for i in order[:count]}
    warmup = [row for row in rows if row["prompt_id"] in chosen][:warmup_rows]
    probing = [row for row in rows if row["prompt_id"] not in chosen]
    card = DatasetCard(
        title="Candidates, split to warm a student up and to probe it",
        description="Instructions and responses written by a teacher: the student is trained on "
        "the split warmup before the local data influence of each row of probing is measured.",
        columns={name: COLUMNS.get(name, "as in the candidates") for name in rows[0]},
        made=(
            f"a share of {fraction} of the prompts drawn for warmup, at most {warmup_rows} rows",
            "all other prompts in probing, the candidates of a prompt together",
        ),
        counts={"prompts of warmup": count, "prompts of probing": len(prompts) - count},
        seed=work.seed,
    )
    write_dataset_parts(work.folder, {"warmup": warmup, "probing": probing}, card)
    return {
        "warmup": len(warmup),
        "probing": len(probing),
        "warmup_prompts": count,
        "probing_prompts": len(prompts) - count,
    }
