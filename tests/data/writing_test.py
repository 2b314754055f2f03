import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from montessori_jax.data.rows import read_rows
from montessori_jax.data.writing import (
    DatasetCard,
    write_dataset_card,
    write_dataset_parts,
    write_jsonl,
    write_parquet,
)
from montessori_jax.errors import UserError

ROWS = [
    {"id": "a", "instruction": "Say é | \u2028", "response": "é\n", "score": 0.1},
    {"id": "b", "instruction": "Say no.", "response": "No.", "kept": True},
]
CARD = DatasetCard(
    title="Two rows",
    description="Made for a test.",
    columns={
        "id": "name of the row",
        "instruction": "what is | asked",
        "response": "the answer",
        "score": "influence in nats",
        "kept": "whether it was kept",
    },
    made=["Prompted the teacher.", "Dropped\nduplicates."],
    counts={"prompts": 1200, "near duplicates": 3},
    seed=7,
    models={"teacher": "hf:org/teacher"},
    license="apache-2.0",
)


def test_jsonl_bytes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert write_jsonl(path, ({"b": i, "a": "é"} for i in range(2))) == 2
    assert path.read_bytes() == '{"b": 0, "a": "é"}\n{"b": 1, "a": "é"}\n'.encode()
    assert write_jsonl(path, []) == 0
    assert path.read_bytes() == b""
    assert os.listdir(path.parent) == ["rows.jsonl"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800"])
def test_jsonl_refuses_what_json_cannot_hold(tmp_path: Path, value: object) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ROWS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"JSON compliant|surrogates not allowed"):
        write_jsonl(path, [{"a": 1}, {"a": value}])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_round_trips(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    write_parquet(tmp_path / "rows.parquet", ROWS)
    for name in ("rows.jsonl", "rows.parquet"):
        read = read_rows(tmp_path / name)
        assert [(row.id, row.instruction, row.response) for row in read.rows] == [
            (row["id"], row["instruction"], row["response"]) for row in ROWS
        ]
    table = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert table == [{**ROWS[0], "kept": None}, {**ROWS[1], "score": None, "kept": True}]


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    many = [{"id": str(i), "text": "word " * (i % 50), "x": i / 7} for i in range(5000)]
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", many)
        write_parquet(tmp_path / f"{name}.parquet", [dict(row) for row in many])
        write_dataset_card(tmp_path / name, ROWS, CARD)
    for suffix in (".jsonl", ".parquet", "/data.parquet", "/README.md"):
        one, two = (tmp_path / f"{name}{suffix}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([], "no rows to write"),
        ([{"a": 1}, {"a": "x"}], "column a cannot be Parquet: ArrowInvalid"),
        ([{"a": "\ud800"}], "column a cannot be Parquet: "),
        ([{"a": {}}], "cannot be Parquet: ArrowNotImplementedError"),
    ],
)
def test_parquet_refuses(tmp_path: Path, rows: list[dict[str, object]], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        write_parquet(tmp_path / "rows.parquet", rows)
    assert os.listdir(tmp_path) == []


class TestAtomic:
    def test_the_old_file_stays_until_the_new_one_is_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text("old\n")

        def rows() -> Iterator[dict[str, int]]:
            yield {"a": 1}
            assert path.read_text() == "old\n"
            yield {"a": 2}

        write_jsonl(path, rows())
        assert path.read_text() == '{"a": 1}\n{"a": 2}\n'

    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text("old\n")

        def interrupted() -> Iterator[dict[str, int]]:
            yield {"a": 1}
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_jsonl(path, interrupted())
        assert path.read_text() == "old\n"
        assert os.listdir(tmp_path) == ["rows.jsonl"]

    def test_a_kill_leaves_the_old_file_and_the_next_attempt_mends(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text("old\n")
        code = (
            "import os, signal; from montessori_jax.data.writing import open_atomically\n"
            f"with open_atomically({str(path)!r}) as file:\n"
            "    file.write(b'half' * 10000); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
        )
        assert subprocess.run([sys.executable, "-c", code]).returncode == -9
        assert path.read_text() == "old\n"
        write_jsonl(path, [{"a": 1}])
        assert path.read_text() == '{"a": 1}\n'
        assert os.listdir(tmp_path) == ["rows.jsonl"]

    def test_a_link_is_followed(self, tmp_path: Path) -> None:
        target, link = tmp_path / "target.jsonl", tmp_path / "link.jsonl"
        target.write_text("old\n")
        link.symlink_to(target)
        write_jsonl(link, [{"a": 1}])
        assert link.is_symlink()
        assert target.read_text() == '{"a": 1}\n'

    def test_permissions_follow_the_umask(self, tmp_path: Path) -> None:
        old = os.umask(0o027)
        try:
            write_jsonl(tmp_path / "rows.jsonl", [])
        finally:
            os.umask(old)
        assert (tmp_path / "rows.jsonl").stat().st_mode & 0o777 == 0o640


class TestErrors:
    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_a_write_that_the_system_refuses_half_way(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"rows.{suffix}"
        path.write_text("old\n")
        write = write_jsonl if suffix == "jsonl" else write_parquet
        rows = [{"id": str(i), "n": i * 7919 % 99_991} for i in range(50_000)]
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        try:
            with pytest.raises(UserError) as caught:
                write(path, rows)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert str(caught.value).startswith(f"cannot write {path}: file too large")
        assert path.read_text() == "old\n"
        assert os.listdir(tmp_path) == [path.name]

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        def fsync(descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)
        path = tmp_path / "rows.jsonl"
        with pytest.raises(UserError) as caught:
            write_jsonl(path, ROWS)
        assert str(caught.value) == (
            f"cannot write {path}: the disk is full; free some space and run the same command again"
        )
        assert os.listdir(tmp_path) == []

    def test_names_that_cannot_be_files(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="it is not an ordinary file; choose another name"):
            write_jsonl(tmp_path, ROWS)
        with pytest.raises(UserError, match="it is not an ordinary file; choose another name"):
            write_jsonl("/dev/null", ROWS)
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"cannot write .*/file/rows.jsonl: "):
            write_jsonl(tmp_path / "file" / "rows.jsonl", ROWS)


class TestDatasetCard:
    def test_data_and_card(self, tmp_path: Path) -> None:
        folder = write_dataset_card(tmp_path / "set", ROWS, CARD)
        assert sorted(os.listdir(folder)) == ["README.md", "data.parquet"]
        assert [row.id for row in read_rows(folder).rows] == ["a", "b"]

        text = (folder / "README.md").read_text("utf-8")
        head, body = text.removeprefix("---\n").split("\n---\n", 1)
        assert yaml.safe_load(head) == {
            "license": "apache-2.0",
            "configs": [{"config_name": "default", "data_files": "data.parquet"}],
        }
        assert body == (
            "\n# Two rows\n\nMade for a test.\n\n"
            "## Columns\n\n"
            "| column | type | meaning |\n| --- | --- | --- |\n"
            "| `id` | string | name of the row |\n"
            "| `instruction` | string | what is \\| asked |\n"
            "| `response` | string | the answer |\n"
            "| `score` | double | influence in nats |\n"
            "| `kept` | bool | whether it was kept |\n\n"
            "## How it was made\n\n1. Prompted the teacher.\n2. Dropped duplicates.\n\nSeed: 7\n\n"
            "## Models\n\n- teacher: `hf:org/teacher`\n\n"
            "## Counts\n\n"
            "| what | number |\n| --- | --- |\n"
            "| rows | 2 |\n| prompts | 1,200 |\n| near duplicates | 3 |\n"
        )

    def test_datasets_loads_the_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import datasets

        folder = write_dataset_card(tmp_path / "set", ROWS, CARD)
        loaded = datasets.load_dataset(
            str(folder), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert json.dumps(loaded.to_list()) == json.dumps(
            pq.read_table(folder / "data.parquet").to_pylist()
        )

    def test_every_column_is_described(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="descriptions differ in: kept, new"):
            write_dataset_card(tmp_path / "set", [{**ROWS[0], "new": 1}], CARD)
        assert not (tmp_path / "set").exists()

    def test_parts_load_as_splits(self, tmp_path: Path) -> None:
        import datasets

        parts = {"warmup": ROWS[:1], "probing": ROWS}
        folder = write_dataset_parts(tmp_path / "set", parts, CARD)
        loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
        assert {name: part.num_rows for name, part in loaded.items()} == {"warmup": 1, "probing": 2}
        assert loaded["probing"]["id"][:] == ["a", "b"]
        text = (folder / "README.md").read_text()
        assert "| rows of warmup | 1 |" in text
        assert "| rows of probing | 2 |" in text
