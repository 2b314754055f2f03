"""Stage: candidates -> a warm-up set and a probing set, whole prompts at a time."""

from typing import Any

import numpy as np

from montessori_jax.data.tables import read_table
from montessori_jax.data.writing import write_parquet
from montessori_jax.errors import UserError
from montessori_jax.work import Work


def split_candidates(
    candidates: str, fraction: float, warmup_rows: int, work: Work
) -> dict[str, Any]:
    """Write ``warmup.parquet`` and ``probing.parquet``.

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
    write_parquet(work.file("warmup.parquet"), warmup)
    write_parquet(work.file("probing.parquet"), probing)
    return {
        "warmup": len(warmup),
        "probing": len(probing),
        "warmup_prompts": count,
        "probing_prompts": len(prompts) - count,
    }
