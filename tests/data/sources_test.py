"""What is read of a source beside the texts."""

import pyarrow as pa
import pyarrow.parquet as pq

from montessori_jax.data.rows import read_rows
from montessori_jax.data.writing import write_jsonl


def test_candidates_keep_their_prompt_in_every_format(tmp_path):
    rows = [{"prompt_id": f"p{i}", "instruction": "a", "response": "b"} for i in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    for source in (tmp_path, tmp_path / "rows.jsonl"):
        assert [row.prompt_id for row in read_rows(source).rows] == ["p0", "p1"]
