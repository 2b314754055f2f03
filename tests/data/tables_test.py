"""Tables of artifacts: their rows, and how many there are."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from montessori_jax.data.tables import count_rows, read_table
from montessori_jax.errors import UserError


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "folder"])
def test_rows_are_counted_as_they_are_read(tmp_path: Path, name: str):
    place = tmp_path / name
    if name == "rows.jsonl":
        place.write_text('{"id": 1}\n\n{"id": 2}\n{"id": 3}')
    else:
        if name == "folder":
            place.mkdir()
        file = place / "data.parquet" if name == "folder" else place
        pq.write_table(pa.table({"id": [1, 2, 3]}), file, row_group_size=2)
    assert count_rows(place) == len(read_table(place)) == 3


def test_a_damaged_file_is_one_line(tmp_path: Path):
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"PAR1 and no more")
    for read in (count_rows, read_table):
        with pytest.raises(UserError, match=r"rows.parquet: cannot be read as Parquet: .+$"):
            read(file)
