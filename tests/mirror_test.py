"""A run's folder and its copy in object storage: fsspec's store in memory, and one on the disk."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from montessori_jax import mirror
from montessori_jax.errors import Passing, UserError
from montessori_jax.mirror import Mirror
from montessori_jax.runs import MARKER
from montessori_jax.storage import mirrored
from montessori_jax.training.state_folder import CONTENT
from montessori_jax.work import CHECKPOINTS

STORE = "memory://bucket/run"


@pytest.fixture(autouse=True)
def _empty_store() -> Iterator[None]:
    yield
    MemoryFileSystem.store.clear()


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != mirror.OWN]
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


def machine(folder: Path, said: list[str] | None = None, **changes: Any) -> Mirror:
    """A machine whose background pushes never come, unless asked for."""
    listener: Callable[[str], None] = print if said is None else said.append
    return Mirror(STORE, folder, listener, **{"pause": 0.0, "every": 1e6, **changes})


RUN = {
    "config.yaml": "seed: 1",
    "iteration-1/generate/data.parquet": "rows",
    f"iteration-1/generate/{MARKER}": "{}",
    "iteration-1/dpo/metrics.jsonl": '{"step": 1}\n',
    f"iteration-1/dpo/{CHECKPOINTS}/2/state/d/a": "numbers",
    f"iteration-1/dpo/{CHECKPOINTS}/2/{CONTENT}": "{}",
}


def test_what_one_machine_sends_another_fetches(tmp_path: Path) -> None:
    here, there, said = tmp_path / "a", tmp_path / "b", []
    with machine(here) as kept:
        write(here, RUN)
        # What is on its way to its name, and a checkpoint without its list, stay here.
        write(here, {".lock": "", ".config.yaml.tmp": "se", "x.orbax-checkpoint-tmp/y": "z"})
        write(here, {f"iteration-1/dpo/{CHECKPOINTS}/3/state/d/a": "num"})
        kept.push()
    with machine(there, said):
        assert read(there) == RUN
        write(there, {"iteration-1/dpo/done.json": "{}"})
    assert said == [f"fetching {STORE} to {there}"]
    with machine(here, said):
        done = here / "iteration-1/dpo/done.json"
        assert done.read_text() == "{}"
    assert said == [f"fetching {STORE} to {place}" for place in (there, here)]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the objects written, in order."""
    names: list[str] = []
    whole = MemoryFileSystem.pipe_file

    def pipe_file(self: Any, path: str, value: bytes, **options: Any) -> Any:
        names.append(path.removeprefix("/bucket/run/"))
        return whole(self, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    return names


def test_only_what_has_changed_is_sent_and_markers_after_what_they_mark(
    tmp_path: Path, sent: list[str]
) -> None:
    write(tmp_path, RUN)
    with machine(tmp_path) as kept:
        sent.clear()
        kept.push()
        assert sorted(sent) == sorted([*RUN, mirror.MANIFEST])
        assert {Path(name).name for name in sent[-3:-1]} == {MARKER, CONTENT}
        assert sent[-1] == mirror.MANIFEST
        sent.clear()
        kept.push()
        assert sent == []
        write(tmp_path, {"iteration-1/dpo/metrics.jsonl": '{"step": 1}\n{"step": 2}\n'})
        kept.push()
        assert sent == ["iteration-1/dpo/metrics.jsonl", mirror.MANIFEST]
        sent.clear()
    with machine(tmp_path):  # the same machine again
        pass
    assert sent == [mirror.MANIFEST]


def test_wherever_a_machine_vanishes_no_marker_is_there_without_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Vanished(BaseException):
        pass

    whole = MemoryFileSystem.pipe_file
    left = 0

    def pipe_file(self: Any, path: str, value: bytes, **options: Any) -> Any:
        nonlocal left
        if left == 0:
            raise Vanished
        left -= 1
        return whole(self, path, value, **options)

    here = tmp_path / "a"
    write(here, RUN)
    seen = []
    for count in range(len(RUN) + 2):
        MemoryFileSystem.store.clear()
        (here / mirror.OWN).unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
            left = 1 + count  # one for entering
            kept = machine(here)
            kept.pull()
            kept._commit()
            if count <= len(RUN):
                with pytest.raises(Vanished):
                    kept.push()
            else:
                kept.push()
        there = tmp_path / str(count)
        machine(there).pull()
        found = read(there)
        seen.append(len(found))
        assert found.items() <= RUN.items()
        generated, trained = "iteration-1/generate/", f"iteration-1/dpo/{CHECKPOINTS}/"
        if f"{generated}{MARKER}" in found:
            assert f"{generated}data.parquet" in found
        assert (f"{trained}2/{CONTENT}" in found) == any(trained in name for name in found)
        # The machine that vanished comes back, and sends the rest.
        again = machine(here)
        again.pull()
        again.push()
        assert read(here) == RUN
        machine(tmp_path / f"{count} again").pull()
        assert read(tmp_path / f"{count} again") == RUN
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, len(RUN))


def test_what_is_gone_here_goes_there(tmp_path: Path) -> None:
    write(tmp_path, RUN)
    with machine(tmp_path) as kept:
        kept.push()
        for path in sorted((tmp_path / f"iteration-1/dpo/{CHECKPOINTS}/2").rglob("*"))[::-1]:
            path.unlink() if path.is_file() else path.rmdir()
    left = [name for name in RUN if CHECKPOINTS not in name]
    system = fsspec.filesystem("memory")
    assert sorted(system.find("/bucket/run")) == sorted(
        f"/bucket/run/{name}" for name in [*left, mirror.MANIFEST]
    )


def test_a_store_that_fails_now_and_then_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = MemoryFileSystem.pipe_file, 0

    def pipe_file(self: Any, path: str, value: bytes, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 3:
            raise OSError("503 slow down")
        return whole(self, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    write(tmp_path / "a", RUN)
    with machine(tmp_path / "a"):
        pass
    with machine(tmp_path / "b"):
        assert read(tmp_path / "b") == RUN


def test_a_store_that_stays_away_is_one_error_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipe_file(self: Any, *arguments: Any, **options: Any) -> Any:
        raise OSError("no route\nto host")

    write(tmp_path, RUN)
    kept = machine(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
        with pytest.raises(Passing, match=r"^memory://bucket/run: failed 6 times \(no route to"):
            kept.push()
    assert read(tmp_path) == RUN
    said: list[str] = []

    def work() -> None:
        with machine(tmp_path, said):
            monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
            write(tmp_path, {"more": "text"})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # the work's own failure is what is raised
        work()
    assert len(said) == 1
    assert said[0].startswith("warning: memory://bucket/run: failed 6 times")


def test_a_machine_that_was_replaced_stops_sending(tmp_path: Path) -> None:
    old, new = machine(tmp_path / "a"), machine(tmp_path / "b")
    write(tmp_path / "a", RUN)
    old.pull()
    old.push()
    with new:
        assert read(tmp_path / "b") == RUN
        write(tmp_path / "a", {"iteration-1/dpo/metrics.jsonl": "other"})
        with pytest.raises(UserError, match="another machine has gone on with this run"):
            old.push()
        write(tmp_path / "b", {"iteration-1/dpo/done.json": "{}"})
    machine(tmp_path / "c").pull()
    assert (
        read(tmp_path / "c") == read(tmp_path / "b") == {**RUN, "iteration-1/dpo/done.json": "{}"}
    )


STATE_FILES = {
    "iteration-1/warmup/state/d/a": "numbers",
    f"iteration-1/dpo/{CHECKPOINTS}/2/d/a": "numbers",
    f"iteration-1/dpo/{CHECKPOINTS}/2/{CONTENT}": "{}",
    f"iteration-1/dpo/{CHECKPOINTS}/3/d/a": "num",
}


def write_states() -> None:
    for name, text in STATE_FILES.items():
        fsspec.filesystem("memory").pipe_file(f"/bucket/run/{name}", text.encode())


def test_a_process_with_a_disk_of_its_own_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there, journal = tmp_path / "a", tmp_path / "b", "iteration-1/dpo/texts"
    rest = {name: text for name, text in RUN.items() if CHECKPOINTS not in name}
    part = {f"{journal}-1.jsonl": "not told yet"}
    sent = {f"{journal}-2.jsonl": "by an earlier job"}
    write_states()
    follower = machine(there, direct=True)
    with machine(here, direct=True) as kept:
        write(here, {**rest, **sent})
        write(there, {"config.yaml": "seed: 2", "iteration-1/old.jsonl": "", **part})
        kept.push()
        follower.follow()
        assert read(there) == {**rest, **part, **sent}
        write(there, {f"{journal}-2.jsonl": "and more"})
        follower.follow()
        assert read(there)[f"{journal}-2.jsonl"] == "and more"
        (here / f"{journal}-2.jsonl").unlink()
        fetched = []
        whole = Mirror.download
        monkeypatch.setattr(
            Mirror, "download", lambda self, name: (fetched.append(name), whole(self, name))
        )
        done = {f"{journal}.jsonl": "told", f"iteration-1/dpo/{MARKER}": "{}"}
        write(here, done)
        kept.push()
        follower.follow()
        assert fetched == sorted(done)
        assert read(there) == read(here) == {**rest, **done}
    system = fsspec.filesystem("memory")
    assert all(system.exists(f"/bucket/run/{name}") for name in STATE_FILES)


@pytest.mark.parametrize("same", [True, False], ids=["the same disk", "another disk"])
def test_one_process_goes_on_with_the_states_that_several_wrote(tmp_path: Path, same: bool) -> None:
    with machine(tmp_path / "a", direct=True):
        write(tmp_path / "a", {"config.yaml": "seed: 1"})
        write_states()
    folder = tmp_path / ("a" if same else "b")
    with machine(folder):
        whole = {name: text for name, text in STATE_FILES.items() if "/3/" not in name}
        assert read(folder) == {"config.yaml": "seed: 1", **whole}


def test_several_go_on_with_the_states_that_one_process_sent(tmp_path: Path) -> None:
    write(tmp_path, RUN)
    with machine(tmp_path):
        pass
    with machine(tmp_path, direct=True):
        write(tmp_path, {"more": "text"})
    system = fsspec.filesystem("memory")
    assert all(system.exists(f"/bucket/run/{name}") for name in [*RUN, "more"])


def test_changes_are_sent_in_the_background(tmp_path: Path) -> None:
    with machine(tmp_path, every=0.02):
        write(tmp_path, {"iteration-1/generate/instructions.jsonl": '{"a": 1}\n{"b'})
        deadline = time.monotonic() + 30
        place = "/bucket/run/iteration-1/generate/instructions.jsonl"
        while not fsspec.filesystem("memory").exists(place):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_storage_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^nowhere://a/b: no such storage: "):
        Mirror("nowhere://a/b", tmp_path, print)
    with pytest.raises(UserError, match=r"^gs://a/b: needs a package .*montessori-jax\[gcs\]"):
        Mirror("gs://a/b", tmp_path, print)


def test_large_files_go_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "WHOLE_BYTES", 3)
    write(tmp_path / "a", RUN)
    store = f"file://{tmp_path}/store/deep"
    with mirrored(store, tmp_path / "a", print) as kept:
        kept.send()
    with mirrored(store, tmp_path / "b", print):
        assert read(tmp_path / "b") == RUN
