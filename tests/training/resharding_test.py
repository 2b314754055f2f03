"""States saved from one mesh and restored on another, in one process and from two."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from montessori_jax.config import MeshConfig, OptimizerConfig
from montessori_jax.mesh import make_mesh, mesh_of
from montessori_jax.models.sharding import moment_shardings, param_shardings
from montessori_jax.storage import mirrored
from montessori_jax.training.checkpoints import Checkpoints, Student, load_student, save_student
from montessori_jax.training.optimizer import make_optimizer
from montessori_jax.training.state import TrainState
from tests.training import samples

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = OptimizerConfig()


def mesh(**sizes: int) -> Mesh:
    """The first devices as such a mesh."""
    axes = {"candidate": 1, "data": 1, **sizes}
    made = make_mesh(MeshConfig(**axes), devices=jax.devices()[: int(np.prod([*axes.values()]))])
    assert made is not None
    return made


def warm() -> TrainState:
    """A state whose every leaf has numbers of its own."""
    _, params = samples.student()
    tx = make_optimizer(SETTINGS, 9)
    _, opt_state = jax.jit(tx.update)(jax.tree.map(jnp.cos, params), tx.init(params), params)
    return TrainState(params, opt_state, jnp.asarray(4, jnp.int32))


def shardings(on: Mesh) -> TrainState:
    model, _ = samples.student()
    everywhere: Any = NamedSharding(on, PartitionSpec())
    tx = make_optimizer(SETTINGS, 9)
    params = param_shardings(model, on)
    shapes = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        model.shapes(),
        params,
    )
    return TrainState(params, moment_shardings(tx, shapes, on), everywhere)


def like(state: TrainState, on: Mesh | None) -> TrainState:
    if on is None:
        return jax.eval_shape(lambda: state)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings(on),
    )


def assert_same_bits(found: TrainState | None, expected: TrainState) -> None:
    assert found is not None
    assert samples.equal(jax.device_get(found), jax.device_get(expected))


MESHES = {
    "fsdp=4 data=2": {"fsdp": 4, "data": 2},
    "tensor=2 fsdp=2": {"tensor": 2, "fsdp": 2},
    "one device": None,
}


@pytest.mark.parametrize("there", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("here", MESHES.values(), ids=MESHES)
def test_saved_from_one_mesh_it_is_the_same_on_another(
    tmp_path: Path, here: dict[str, int] | None, there: dict[str, int] | None
) -> None:
    expected = warm()
    state = expected if here is None else jax.device_put(expected, shardings(mesh(**here)))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(state, "run")
    on = None if there is None else mesh(**there)
    found = Checkpoints(tmp_path / "checkpoints").restore(like(expected, on), "run")
    assert_same_bits(found, expected)
    assert found is not None
    if on is None:
        assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(found))
    else:
        wanted = jax.tree.leaves(shardings(on))
        assert [leaf.sharding for leaf in jax.tree.leaves(found)] == wanted


def test_a_student_saved_from_a_mesh_is_loaded_on_another(tmp_path: Path) -> None:
    expected, (model, _) = warm(), samples.student()
    state = jax.device_put(expected, shardings(mesh(fsdp=4, data=2)))
    save_student(tmp_path / "state", Student(state, SETTINGS, 3e-6, {}))
    assert_same_bits(load_student(tmp_path / "state", model).state, expected)
    on = mesh(tensor=2, fsdp=2)
    found = load_student(tmp_path / "state", model, on).state
    assert_same_bits(found, expected)
    assert mesh_of(found.opt_state) == mesh_of(found.params) == on


PROCESS = """
import sys
from pathlib import Path
import jax

folder, port, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=number)
from jax.experimental import multihost_utils
from montessori_jax.mesh import fetch
from montessori_jax.errors import UserError
from montessori_jax.storage import check_shared, mirrored
from montessori_jax.training.checkpoints import Checkpoints, Student, save_student
from tests.training.resharding_test import SETTINGS, like, mesh, shardings, warm

on = mesh(fsdp=8)  # so that a weight's parts are in both processes
assert len({device.process_index for device in on.devices.flat}) == 2
state = jax.tree.map(
    lambda leaf, sharding: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__),
    jax.device_get(warm()),
    shardings(on),
)
(folder / "run" / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True, exist_ok=True)
(folder / "run" / "config.yaml").touch()  # by which a run's folder is known
multihost_utils.sync_global_devices("begin")
with Checkpoints(folder / "run" / "checkpoints", keep=1) as checkpoints:
    for step in (2, 3, 4):  # the last one stays
        checkpoints.save(state._replace(step=state.step * 0 + step), "run")
save_student(folder / "state", Student(state, SETTINGS, 3e-6, {}))
said = []
again = Checkpoints(folder / "run" / "checkpoints", say=said.append)
found = again.restore(like(warm(), mesh(tensor=2, fsdp=2, data=2)), "run")
for one, other in zip(jax.tree.leaves(fetch(found)), jax.tree.leaves(jax.device_get(warm()))):
    assert one.tobytes() == other.tobytes()
assert again.restore(like(warm(), on), "another run") is None
assert len(said) == (1 if number == 0 else 0), said
assert again.steps() == []
with again:
    again.save(state, "run")
check_shared(folder)
try:
    check_shared(folder / f"disk of {number}")
except UserError as error:
    assert "disk of" in str(error) and "process 1 does not see" in str(error), error
else:
    raise AssertionError("two disks are no shared one")
multihost_utils.sync_global_devices("the first process has removed its token")
assert not list(folder.rglob(".shared-*"))
with mirrored(f"file://{folder}/store", folder / "run", said.append) as kept:
    kept.send()
print("process", number, "is done")
"""


def test_two_processes_save_and_one_restores(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    logs = [tmp_path / f"process-{number}.log" for number in (0, 1)]
    processes = []
    for number, log in enumerate(logs):
        with log.open("w") as stream:
            command = [sys.executable, "-c", PROCESS, str(tmp_path), port, str(number)]
            env = {**os.environ, "XLA_FLAGS": ""}
            processes.append(
                subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, env=env)
            )
    try:
        ends = time.monotonic() + 300
        while time.monotonic() < ends and any(one.poll() is None for one in processes):
            if any("Traceback" in log.read_text() for log in logs):
                break  # neither ends before the other
            time.sleep(0.2)
        said = [log.read_text() for log in logs]
        assert [one.poll() for one in processes] == [0, 0], "\n".join(text[-3000:] for text in said)
        assert all(f"process {number} is done" in text for number, text in enumerate(said))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    expected, on = warm(), mesh(tensor=2, fsdp=2)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.steps() == [4]
    assert_same_bits(checkpoints.restore(like(expected, on), "run"), expected)
    assert_same_bits(checkpoints.restore(like(expected, None), "run"), expected)
    fetched = tmp_path / "another machine"
    with mirrored(f"file://{tmp_path}/store", fetched, print):
        stored = Checkpoints(fetched / "checkpoints").restore(like(expected, None), "run")
    assert_same_bits(stored, expected)
    model, _ = samples.student()
    assert_same_bits(load_student(tmp_path / "state", model, on).state, expected)
