"""Where a run works, and what is read of one that is elsewhere."""

from pathlib import Path

import jax
import pytest

from montessori_jax import storage
from montessori_jax.errors import UserError
from montessori_jax.runs import MARKER
from montessori_jax.storage import local_folder, mirrored, summary_folder

RUN = {
    "config.yaml": "seed: 1",
    "iteration-1/generate/data.parquet": "rows",
    f"iteration-1/generate/{MARKER}": "{}",
    "iteration-1/dpo/metrics.jsonl": "{}\n",
}


def write(folder: Path) -> None:
    for name, text in RUN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_plain_folder_is_not_mirrored(tmp_path: Path) -> None:
    write(tmp_path)
    with mirrored(str(tmp_path), tmp_path, print) as kept:
        kept.send()
    assert names(tmp_path) == sorted(RUN)


def test_a_run_is_summed_up_from_the_store(tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store/run"
    with mirrored(store, tmp_path / "a", print):
        write(tmp_path / "a")
    with summary_folder(store) as folder:
        assert folder.name == "run"
        assert names(folder) == ["config.yaml", f"iteration-1/generate/{MARKER}"]
        assert (folder / "iteration-1" / "dpo").is_dir()  # begun
    assert not folder.exists()
    with summary_folder(str(tmp_path)) as folder:
        assert folder == tmp_path


@pytest.mark.parametrize(
    ("url", "blind", "message"),
    [
        ("memory://bucket/run", [1, 2], "can write training states to gs:// and s3:// only"),
        ("gs://bucket/run", [2], "process 2 does not see .* each process a local_dir of its own"),
        ("runs/a", [1, 2], "process 1, 2 does not see .* a URL for run_dir"),
    ],
)
def test_disks_on_which_processes_cannot_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, blind: list[int], message: str
) -> None:
    monkeypatch.setattr(storage, "_blind", lambda folder: blind)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(UserError, match=message), mirrored(url, tmp_path, print):
        pass


def test_where_a_run_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONTESSORI_CACHE", str(tmp_path))
    assert local_folder("runs/a") == Path("runs/a")
    assert local_folder("gs://bucket/a", "/fast/disk") == Path("/fast/disk")
    first, second = local_folder("gs://bucket/a/"), local_folder("gs://other/a")
    assert first == local_folder("gs://bucket/a")
    assert first != second
    assert first.name == second.name == "a"
    assert first.is_relative_to(tmp_path / "runs")
    with pytest.raises(UserError, match="local_dir is for a run_dir that is a URL"):
        local_folder("runs/a", "/fast/disk")
