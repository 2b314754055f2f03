"""Checkpoints: exact, atomic, noticed when damaged."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from montessori_jax.config import OptimizerConfig, WarmupConfig
from montessori_jax.errors import UserError
from montessori_jax.models import Model
from montessori_jax.training import places
from montessori_jax.training.checkpoints import (
    Checkpoints,
    Student,
    load_student,
    read_about,
    save_student,
)
from montessori_jax.training.optimizer import make_optimizer
from montessori_jax.training.state import TrainState, start
from montessori_jax.training.state_folder import CONTENT, Unusable, check_files, list_content
from tests.training import samples


@cache
def state(step: int) -> TrainState:
    """A state with every leaf different, NaN's neighbours and negative zero included."""
    params = {
        "a": jnp.arange(12.0).reshape(3, 4) * step,
        "b": jnp.array([-0.0, jnp.finfo(jnp.float32).tiny, jnp.inf]),
    }
    tx = make_optimizer(OptimizerConfig(), 10)
    _, opt_state = tx.update(jax.tree.map(jnp.cos, params), tx.init(params), params)
    return TrainState(params, opt_state, jnp.asarray(step, jnp.int32))


@pytest.fixture
def said() -> list[str]:
    return []


def open_at(folder: Path, said: list[str], keep: int = 2) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", keep, said.append)


def save(folder: Path, said: list[str], *steps: int) -> None:
    """Save the states of these steps as one run and wait for them."""
    with open_at(folder, said) as checkpoints:
        for step in steps:
            checkpoints.save(state(step), "run")


def damage(folder: Path, *, truncate: bool = False) -> None:
    """Flip one bit of, or cut, the largest file with numbers in it."""
    largest = max(folder.rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content[: len(content) // 2] if truncate else content))


def test_the_newest_is_restored_to_the_bit_by_another_process(
    tmp_path: Path, said: list[str]
) -> None:
    save(tmp_path, said, 2, 4, 6)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    like = jax.eval_shape(lambda: state(6))
    found = open_at(tmp_path, said).restore(like, "run")
    assert samples.equal(found, state(6))
    assert np.signbit(np.asarray(found.params["b"]))[0]
    assert said == []


def test_nothing_saved_is_nothing_restored(tmp_path: Path, said: list[str]) -> None:
    assert open_at(tmp_path, said).restore(state(1), "run") is None
    assert said == []


@pytest.mark.parametrize("truncate", [False, True], ids=["bit", "cut"])
def test_a_damaged_one_falls_back_to_the_one_before(
    tmp_path: Path, said: list[str], truncate: bool
) -> None:
    save(tmp_path, said, 2, 4)
    damage(tmp_path / "checkpoints" / "4" / "state", truncate=truncate)
    found = open_at(tmp_path, said).restore(state(1), "run")
    assert samples.equal(found, state(2))
    assert len(said) == 1
    assert "checkpoint of step 4 is damaged" in said[0]
    assert "\n" not in said[0]
    damage(tmp_path / "checkpoints" / "2" / "state", truncate=truncate)
    assert open_at(tmp_path, said).restore(state(1), "run") is None
    assert "step 2 is damaged" in said[1]


def test_a_step_can_be_saved_again_after_its_damage(tmp_path: Path, said: list[str]) -> None:
    save(tmp_path, said, 4)
    damage(tmp_path / "checkpoints" / "4" / "state")
    with open_at(tmp_path, said) as second:
        assert second.restore(state(1), "run") is None
        second.save(state(4), "run")
    assert samples.equal(open_at(tmp_path, said).restore(state(1), "run"), state(4))


def test_another_runs_checkpoint_is_not_used(tmp_path: Path, said: list[str]) -> None:
    save(tmp_path, said, 4)
    assert open_at(tmp_path, said).restore(state(1), "other run") is None
    assert said == [
        "checkpoints: the checkpoint of step 4 belongs to a run with other data or settings "
        "and is removed"
    ]


def test_a_half_written_one_is_cleaned_up(tmp_path: Path, said: list[str]) -> None:
    """A kill in the middle of a save leaves a folder of another name, or one without its list."""
    save(tmp_path, said, 2)
    complete = tmp_path / "checkpoints" / "2"
    half = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").write_bytes((complete / "_CHECKPOINT_METADATA").read_bytes())
    later = tmp_path / "checkpoints" / "6"
    shutil.copytree(complete, later)
    (later / CONTENT).unlink()
    found = open_at(tmp_path, said).restore(state(1), "run")
    assert samples.equal(found, state(2))
    assert not half.exists()
    assert said == ["checkpoints: the checkpoint of step 6 is incomplete and is removed"]


def test_clear_removes_the_folder(tmp_path: Path, said: list[str]) -> None:
    checkpoints = open_at(tmp_path, said)
    checkpoints.save(state(2), "run")
    checkpoints.clear()  # while it is being written
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("keep", [1, 3])
def test_so_many_are_kept(tmp_path: Path, said: list[str], keep: int) -> None:
    with open_at(tmp_path, said, keep) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(state(step), "run")
    assert checkpoints.steps() == list(range(6 - keep, 6))


def test_older_ones_go_only_when_the_newer_is_complete(tmp_path: Path, said: list[str]) -> None:
    checkpoints = open_at(tmp_path, said, keep=1)
    checkpoints.save(state(2), "run")
    checkpoints.save(state(4), "run")
    assert (checkpoints.folder / "2" / CONTENT).is_file()  # complete, and 4 is being written
    checkpoints.finish()
    assert checkpoints.steps() == [4]


def test_a_state_may_be_donated_while_it_is_written(tmp_path: Path, said: list[str]) -> None:
    """The next steps overwrite the arrays at once; what is saved is what they were."""
    step = jax.jit(lambda leaf: leaf * 2 + 1, donate_argnums=0)
    first = {"w": jax.random.normal(jax.random.key(0), (1000, 1000))}
    before = np.array(first["w"])
    begun = TrainState(first, (), jnp.asarray(1, jnp.int32))
    like = jax.eval_shape(lambda one: one, begun)
    with open_at(tmp_path, said) as checkpoints:
        checkpoints.save(begun, "run")
        moved = begun.params["w"]
        del first, begun
        for _ in range(5):
            moved = step(moved)
        jax.block_until_ready(moved)
    found = open_at(tmp_path, said).restore(like, "run")
    assert found is not None
    np.testing.assert_array_equal(found.params["w"], before)


FULL_DISK = """
import resource, sys
from pathlib import Path
from typing import ClassVar
import jax, jax.numpy as jnp
from montessori_jax.errors import UserError
from montessori_jax.training.checkpoints import Checkpoints
from montessori_jax.training.state import TrainState

noise = jax.random.normal(jax.random.key(0), (300_000,))
state = TrainState({"w": noise}, (), jnp.asarray(1, jnp.int32))
checkpoints = Checkpoints(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # no file may be larger
checkpoints.save(state, "run")
print("saving goes on behind")
try:
    checkpoints.save(state, "run") if sys.argv[2] == "save" else checkpoints.finish()
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("when", ["save", "finish"])
def test_a_disk_without_room_is_said_at_the_next_call(tmp_path: Path, when: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / "full", when],
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first == "saving goes on behind"
    assert f"{tmp_path / 'full' / '1'}: a checkpoint cannot be written: " in second
    assert "File too large" in second


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_student_comes_back_whole(tmp_path: Path, name: str) -> None:
    model, params = samples.student()
    settings = WarmupConfig(optimizer=name, learning_rate=3e-6, weight_decay=0.1)
    tx = make_optimizer(settings, 5)
    begun = start(params, tx)
    updates, opt_state = jax.jit(tx.update)(params, begun.opt_state, params)
    warm = TrainState(updates, opt_state, jnp.asarray(5, jnp.int32))
    about = {"model": "wheel:some", "fingerprint": "abc"}
    for _ in range(2):  # the second replaces the first
        save_student(tmp_path / "state", Student(warm, settings, 3e-6, about))
    found = load_student(tmp_path / "state", model)
    assert samples.equal(found.state, warm)
    assert found.learning_rate == 3e-6
    assert found.about == about
    assert type(found.settings) is OptimizerConfig
    for item in fields(OptimizerConfig):
        assert getattr(found.settings, item.name) == getattr(settings, item.name)
    notes = read_about(tmp_path / "state")
    assert notes is not None
    assert notes["about"] == about


def test_what_is_no_student_is_said(tmp_path: Path) -> None:
    model, params = samples.student()
    assert read_about(tmp_path) is None
    with pytest.raises(UserError, match="there is no student checkpoint here"):
        load_student(tmp_path / "nowhere", model)
    (tmp_path / "about").mkdir()
    with pytest.raises(UserError, match="not a student checkpoint"):
        load_student(tmp_path, model)
    settings = OptimizerConfig(optimizer="sgd")
    begun = start(params, make_optimizer(settings, 1))
    save_student(tmp_path / "state", Student(begun, settings, 1e-6, {}))
    larger = Model(samples.larger_config())
    with pytest.raises(
        UserError,
        match=r"is of another model or optimizer \(\.params.*float32\[2.* there, float32\[3",
    ):
        load_student(tmp_path / "state", larger)
    assert samples.equal(load_student(tmp_path / "state", model).state, begun)
    damage(tmp_path / "state" / "state")
    with pytest.raises(UserError, match="this student is damaged"):
        load_student(tmp_path / "state", model)


class Bucket(MemoryFileSystem):
    """Stands for ``gs://``, for all but Orbax, which writes its arrays past fsspec."""

    protocol = "gs"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    def __init__(self, **options: object):
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("gs://").strip("/")


def test_folders_at_a_url(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gs", Bucket)
    place = epath.Path("gs://bucket/run/checkpoints")
    for name in ("1", "2", "3", "4.orbax-checkpoint-tmp"):
        places.write(place / name / "about" / "metadata", b'{"identity": "run"}')
    checkpoints = Checkpoints(place, 2, said.append)
    assert checkpoints.steps() == [1, 2, 3]
    list_content(place / "3")
    check_files(place / "3")
    assert json.loads(places.read(place / "3" / CONTENT)) == {"about/metadata": [19, None]}
    places.write(place / "3" / "about" / "metadata", b"{")
    with pytest.raises(Unusable, match=r"damaged \(about/metadata has changed"):
        check_files(place / "3")
    checkpoints._prune(3)
    assert checkpoints.steps() == [2, 3]
    assert checkpoints.restore(state(0), "run") is None
    assert [line.split(": ")[1][:31] for line in said] == [
        "the checkpoint of step 3 is dam",
        "the checkpoint of step 2 is inc",
    ]
    assert checkpoints.steps() == []
    checkpoints.clear()
    assert places.names(place) == []


def test_a_list_made_at_a_url_is_good_on_a_disk_and_the_other_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A run goes from one process, which mirrors its disk, to several that write to the URL.
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gs", Bucket)
    url, disk = epath.Path("gs://bucket/moved/5"), epath.Path(tmp_path / "5")
    for made, read in ((url, disk), (disk, url)):
        places.remove(url)
        places.remove(disk)
        for place in (url, disk):
            (disk / "about").mkdir(parents=True, exist_ok=True)
            places.write(place / "about" / "metadata", b'{"identity": "run"}')
        list_content(made)
        places.write(read / CONTENT, places.read(made / CONTENT))
        check_files(read)
        places.write(read / "about" / "metadata", b'{"identity": "ru"}')
        with pytest.raises(Unusable, match=r"damaged \(about/metadata has changed"):
            check_files(read)
