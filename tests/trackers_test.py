"""Each tracker without a network, read back by its own reader; a resumed run goes on in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from montessori_jax.config import RunConfig, as_dict
from montessori_jax.config_file import build
from montessori_jax.errors import UserError
from montessori_jax.metrics import MetricsFile
from montessori_jax.pipeline import run
from montessori_jax.stopping import Stop
from montessori_jax.trackers import OPENERS, Tracking, check_tracker, scalars
from tests.tracker_files import tensorboard_scalars, trackio_scalars, wandb_scalars

# A process of its own each time, as a run that is killed and started again.
SCRIPT = """
import sys
from pathlib import Path
from montessori_jax.metrics import MetricsFile
from montessori_jax.trackers import Tracking, check_tracker
kind, folder, first, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
check_tracker([kind])
tracking = Tracking((kind,), "project", "my-run", "iteration-1/dpo", folder / "logs")
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


def losses(kind: str, folder: Path) -> dict[int, float]:
    """The one run that was logged in ``folder``."""
    if kind == "tensorboard":
        found = tensorboard_scalars(folder / "logs", "iteration-1/dpo")
    elif kind == "wandb":
        runs, identities = wandb_scalars(folder / "logs")
        [(name, found)] = runs.items()
        assert name == "my-run/iteration-1/dpo"
        [(_, group)] = identities[name]  # both processes wrote to one run
        assert group == "my-run"
    else:
        [found] = trackio_scalars(folder / "trackio", "project").values()
    assert found.keys() == {"loss", "held/margin"}
    assert set(found["held/margin"].values()) == {2.5}
    return found["loss"]


@pytest.mark.parametrize("kind", OPENERS)
def test_a_resumed_run_goes_on_in_the_trackers_run(kind: str, tmp_path: Path):
    pytest.importorskip(kind, reason=f"needs {kind}: pip install '.[trackers]'")
    log(kind, tmp_path, 1, 5)
    log(kind, tmp_path, 3, 8)  # back to its last checkpoint: steps 3 and 4 come again
    assert losses(kind, tmp_path) == pytest.approx({step: 1 / step for step in range(1, 8)})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 8))


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ("none", ()),
        ("wandb", ("wandb",)),
        (["trackio", "tensorboard", "trackio"], ("trackio", "tensorboard")),
        ([], ()),
    ],
)
def test_one_tracker_several_or_none(given, kinds):
    settings = build(RunConfig, {"tracker": given}, "run.yaml")
    assert settings.tracker == kinds
    assert build(RunConfig, as_dict(settings), "saved").tracker == kinds


@pytest.mark.parametrize("given", ["wandbb", ["wandb", "none"], 3, [["wandb"]], None])
def test_what_names_no_tracker_is_refused(given):
    with pytest.raises(UserError, match=r"run\.yaml: 'tracker") as caught:
        build(RunConfig, {"tracker": given}, "run.yaml")
    assert "\n" not in str(caught.value)


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
        check_tracker(["tensorboard", "wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracker(["tensorboard", "wandb"])


class Listed:
    """A tracker that keeps what it is given."""

    def __init__(self, kept: list[tuple[int, dict[str, float]]]):
        self.kept = kept

    def log(self, step: int, values: dict[str, float]) -> None:
        self.kept.append((step, values))

    def close(self) -> None:
        pass


def test_a_tracker_that_fails_is_said_once_and_the_others_go_on(tmp_path: Path, monkeypatch):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install '.[trackers]'")
    (tmp_path / "logs").write_text("a file where a folder is needed")
    said: list[str] = []
    kept: list[tuple[int, dict[str, float]]] = []
    monkeypatch.setitem(OPENERS, "trackio", lambda *_: Listed(kept))
    tracking = Tracking(("tensorboard", "trackio"), logs=tmp_path / "logs")
    with MetricsFile(tmp_path / "metrics.jsonl", tracking, said.append) as metrics:
        for step in (1, 2, 3):
            metrics.write({"step": step, "loss": 1.0})
    assert len(metrics.read()) == 3
    assert len(said) == 1
    assert kept == [(step, {"loss": 1.0}) for step in (1, 2, 3)]
    assert "the tracker tensorboard failed and is left out" in said[0]
    assert "\n" not in said[0]
