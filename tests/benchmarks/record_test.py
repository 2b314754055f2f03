"""What a benchmark's file says about how it was made."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks import record


def test_a_result_carries_its_circumstances(tmp_path: Path) -> None:
    path = record.write_result("speed", {"ms": 1.5}, folder=tmp_path / "new", command="make speed")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "new" / "speed.json"
    assert written["result"] == {"ms": 1.5}
    assert written["command"] == "make speed"
    made = datetime.fromisoformat(written["date"])
    assert timedelta() <= datetime.now(UTC) - made < timedelta(minutes=1)
    assert written["packages"]["numpy"] == metadata.version("numpy")
    assert written["machine"]["python"] == sys.version.split()[0]
    # conftest imports jax and asks for eight CPU devices.
    assert written["machine"]["devices"] == ["cpu: cpu"] * 8
    assert [file.name for file in path.parent.iterdir()] == ["speed.json"]


def test_a_result_replaces_the_one_before_and_a_bad_one_does_not(tmp_path: Path) -> None:
    record.write_result("speed", {"ms": 1.5}, folder=tmp_path)
    path = record.write_result("speed", {"ms": 2.5}, folder=tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.write_result("speed", {"ms": float("nan")}, folder=tmp_path)
    assert json.loads(path.read_text(encoding="utf-8"))["result"] == {"ms": 2.5}


def test_the_commit_is_gits_and_says_if_files_were_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        settings = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        done = subprocess.run(
            ["git", *settings, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.commit() == {"id": None, "changed": None}
    git("init", "--quiet")
    (tmp_path / "code.py").write_text("1\n", encoding="utf-8")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "old.json").write_text("{}\n", encoding="utf-8")
    git("add", "--all")
    git("commit", "--quiet", "--message", "first")
    identity = git("rev-parse", "HEAD")
    assert record.commit() == {"id": identity, "changed": False}
    # The file a benchmark is about to replace is no change to what it measured.
    (tmp_path / "benchmarks" / "results" / "old.json").write_text("{1}\n", encoding="utf-8")
    assert record.commit() == {"id": identity, "changed": False}
    (tmp_path / "code.py").write_text("2\n", encoding="utf-8")
    assert record.commit() == {"id": identity, "changed": True}


def test_the_command_names_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["/somewhere/benchmarks/speed.py", "--texts", "/home/me/a.jsonl", "--kept", "5"]
    monkeypatch.setattr(sys, "argv", arguments)
    path = record.write_result("speed", {}, folder=tmp_path)
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["command"] == "python -m benchmarks.speed --texts a.jsonl --kept 5"
