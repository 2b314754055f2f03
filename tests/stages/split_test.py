from pathlib import Path

import pyarrow.parquet as pq
import yaml

from montessori_jax.costs import Meter
from montessori_jax.data.writing import write_parquet
from montessori_jax.stages.generate import COLUMNS
from montessori_jax.stages.split import split_candidates
from montessori_jax.work import Work


def test_splits_are_one_data_set_with_a_card(tmp_path: Path):
    rows = [
        {**dict.fromkeys(COLUMNS, "x"), "id": f"{p}-{c}", "prompt_id": p}
        for p in range(5)
        for c in range(3)
    ]
    write_parquet(tmp_path / "data.parquet", rows)
    work = Work(tmp_path / "split", 7, Meter(None, "split"))

    result = split_candidates(str(tmp_path), 0.4, 4, work)

    parts = {
        name: pq.read_table(work.folder / f"{name}.parquet").to_pylist()
        for name in ("warmup", "probing")
    }
    assert len(parts["warmup"]) == result["warmup"] == 4  # 6 rows of 2 prompts, 4 are used
    assert len(parts["probing"]) == 9
    warm = {row["prompt_id"] for row in parts["warmup"]}
    assert len(warm) == 2
    assert warm.isdisjoint(row["prompt_id"] for row in parts["probing"])
    head = yaml.safe_load((work.folder / "README.md").read_text().split("---")[1])
    assert head["configs"][0]["data_files"] == [
        {"split": "warmup", "path": "warmup.parquet"},
        {"split": "probing", "path": "probing.parquet"},
    ]
