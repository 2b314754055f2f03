"""Each tracker without a network, read back by its own reader; a resumed run goes on in it."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from montessori_jax.config import RunConfig
from montessori_jax.errors import UserError
from montessori_jax.metrics import MetricsFile
from montessori_jax.pipeline import run
from montessori_jax.stopping import Stop
from montessori_jax.trackers import Tracking, check_tracker, scalars

# A process of its own each time, as a run that is killed and started again.
SCRIPT = """
import sys
from pathlib import Path
from montessori_jax.metrics import MetricsFile
from montessori_jax.trackers import Tracking, check_tracker
kind, folder, first, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
check_tracker(kind)
tracking = Tracking(kind, "project", "my-run", "iteration-1/dpo", folder / "logs")
with MetricsFile(folder / "metrics.jsonl", tracking) as metrics:
    for step in range(first, last):
        metrics.write({"step": step, "loss": 1 / step, "held": {"margin": 2.5}, "note": "text"})
"""


def log(kind: str, folder: Path, first: int, last: int) -> None:
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(folder / "trackio"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    command = [sys.executable, "-c", SCRIPT, kind, str(folder), str(first), str(last)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout


def tensorboard_losses(folder: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs" / "tensorboard" / "iteration-1" / "dpo"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss", "held/margin"]
    seen = [(event.step, event.value) for event in events.Scalars("loss")]
    assert len(seen) == len(dict(seen))
    return dict(seen)


def wandb_records(file: Path) -> Iterator[bytes]:
    """What wandb logged: a LevelDB log (blocks of 32 KB; crc, size, kind) behind seven bytes."""
    content, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""


def wandb_losses(folder: Path) -> dict[int, float]:
    from wandb.proto.wandb_internal_pb2 import Record

    seen, names = [], set()
    for file in sorted(folder.glob("logs/wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, wandb_records(file)):
            if record.HasField("run"):
                names.add((record.run.run_id, record.run.run_group, record.run.display_name))
            if record.HasField("history"):
                keys = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                assert keys["held/margin"] == 2.5
                assert "note" not in keys
                seen.append((keys["_step"], keys["loss"]))
    assert len({name for name, _, _ in names}) == 1  # both processes wrote to one run
    assert {name[1:] for name in names} == {("my-run", "my-run/iteration-1/dpo")}
    assert len(seen) == len(dict(seen))
    return dict(seen)


def trackio_losses(folder: Path) -> dict[int, float]:
    # Where trackio keeps its files is fixed when it is imported.
    script = (
        "import json, trackio; [r] = trackio.Api().runs('project'); "
        "print(json.dumps([(x['step'], x['loss'], x['held/margin']) "
        "for x in __import__('trackio.sqlite_storage').sqlite_storage.SQLiteStorage"
        ".get_logs('project', r.name)]))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(folder / "trackio")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {margin for _, _, margin in rows} == {2.5}
    assert len(rows) == len({step for step, _, _ in rows})
    return {step: loss for step, loss, _ in rows}


READERS = {
    "tensorboard": tensorboard_losses,
    "wandb": wandb_losses,
    "trackio": trackio_losses,
}


@pytest.mark.parametrize("kind", READERS)
def test_a_resumed_run_goes_on_in_the_trackers_run(kind: str, tmp_path: Path):
    pytest.importorskip(kind, reason=f"needs {kind}: pip install '.[trackers]'")
    log(kind, tmp_path, 1, 5)
    log(kind, tmp_path, 3, 8)  # back to its last checkpoint: steps 3 and 4 come again
    found = READERS[kind](tmp_path)
    assert found == pytest.approx({step: 1 / step for step in range(1, 8)})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 8))


def test_only_numbers_are_tracked():
    record = {"step": 3, "loss": 0.5, "ok": True, "name": "x", "a": {"b": 1, "step": 2}, "n": None}
    assert scalars(record) == {"loss": 0.5, "a/b": 1, "a/step": 2}


def test_a_missing_package_is_named_before_any_work(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = RunConfig(run_dir=str(tmp_path / "run"), tracker="wandb", teacher="no/such/model")
    with pytest.raises(UserError) as caught:
        run(config, say=print, stop=Stop())
    assert "tracker 'wandb' needs a package" in str(caught.value)
    assert "montessori-jax[trackers]" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_wandb_without_an_account_is_refused_unless_offline(tmp_path: Path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb: pip install '.[trackers]'")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match="wandb login"):
        check_tracker("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracker("wandb")


def test_a_tracker_that_fails_is_said_once_and_the_file_goes_on(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install '.[trackers]'")
    (tmp_path / "logs").write_text("a file where a folder is needed")
    said: list[str] = []
    tracking = Tracking("tensorboard", logs=tmp_path / "logs")
    with MetricsFile(tmp_path / "metrics.jsonl", tracking, said.append) as metrics:
        for step in (1, 2, 3):
            metrics.write({"step": step, "loss": 1.0})
    assert len(metrics.read()) == 3
    assert len(said) == 1
    assert "the tracker failed and is left out" in said[0]
    assert "\n" not in said[0]
