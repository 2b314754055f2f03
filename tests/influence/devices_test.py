"""Several devices: the scores of one, by programs in which candidates never meet."""

import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from montessori_jax.config import InfluenceConfig, MeshConfig
from montessori_jax.errors import UserError
from montessori_jax.influence import (
    METHODS,
    MeanLoss,
    TokenLosses,
    chat_candidate,
    chat_reference,
    local_influence,
    make_mesh,
    score_candidates,
)
from montessori_jax.influence.mesh import laid_out as spread
from montessori_jax.mesh import CANDIDATE
from montessori_jax.models.sharding import laid_out
from tests.influence import small
from tests.influence.problems import curved, influences
from tests.influence.students import MODEL, chats, student
from tests.meshes import SHAPES as MESHES
from tests.meshes import mesh_on

# Candidates on all eight devices; and in four places, the student on two devices in each.
SHAPES = {"candidates": {"candidate": 8}, "sharded student": {"candidate": 4, "fsdp": 2}}
# Each estimator's program for candidates.
PROGRAMS = {
    "exact": "exact.probe_step",
    "first_order": "first_order.products",
    "control_variate": "control_variate.corrected",
    "linearized": "linearized.packed_slopes",
    "second_order": "second_order.curved",
    "grad_cos": "baselines.aligned",
}
EXACT = [("exact", shape) for shape in SHAPES]
MAIN = [*EXACT, ("linearized", "candidates")]
FEW = [("candidate", "fsdp"), ("data", "tensor")]
REFERENCES = chats(8, 41)
ROWS = chats(11, 42)
COLLECTIVE = re.compile(
    r"^.*(?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|"
    r"collective-broadcast|\bsend|\brecv)(?:-start)?\(.*$",
    re.MULTILINE,
)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("shape", SHAPES)
def test_any_models_scores_are_one_devices(method, shape):
    # 19 candidates fill no chunk evenly, and two sizes of chunk leave devices idle.
    with jax.enable_x64(True):
        problem = curved(optax.adam(1e-2), count=19, moments=True)
        alone = problem.influences(method)
        mesh = on(shape)
        for how in ({"block": 2}, {"chunk": 3}):
            found = problem.influences(method, mesh=mesh, **how)
            np.testing.assert_allclose(found, alone, rtol=1e-6)


def on(shape):
    return make_mesh(MeshConfig(**SHAPES[shape]), "influence")


def in_float64(method, mesh=None):
    """Scores of the decoder, and its parameters as they were laid out."""
    params, state, tx = small.student(1e-4)
    params, state = (
        jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, tree)
        for tree in (params, state)
    )
    params = laid_out(small.MODEL, params, mesh)
    given = {"dtype": "float64", "gradient_dtype": "float64"}
    reference = chat_reference(small.MODEL, REFERENCES, **given)
    items = [chat_candidate(str(i), chat, 48) for i, chat in enumerate(ROWS)]
    loss = MeanLoss(TokenLosses(small.MODEL, "float64"))
    student = (loss, params, state, tx, items, reference)
    return influences(local_influence(*student, method=method)), params


def in_float32(method, mesh=None):
    params, state, tx = student(1e-4)
    params = laid_out(MODEL, params, mesh)
    settings = InfluenceConfig(method=method, max_length=48, audit=0)
    return influences(score_candidates(MODEL, params, state, tx, ROWS, REFERENCES, settings))


@pytest.fixture
def programs(monkeypatch):
    """The compiled text of a method's program for candidates."""

    def watch(method):
        module, name = PROGRAMS[method].split(".")
        module = importlib.import_module(f"montessori_jax.influence.{module}")
        real, texts = getattr(module, name), []

        def run(*given):
            if not texts:
                texts.append(real.lower(*given).compile().as_text())
            return real(*given)

        monkeypatch.setattr(module, name, run)
        return texts

    return watch


def groups(line: str) -> list[list[int]]:
    """Which devices exchange something in a collective operation."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", line)
    listed = pairs or re.search(r"replica_groups=\{(\{.*?\})\}", line)
    if listed:
        return [[int(n) for n in one.split(",")] for one in re.findall(r"\{(.*?)\}", listed[1])]
    axes = re.search(r"replica_groups=mesh\[([^]]*)\] \{([^}]*)\}", line)
    if axes:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        over = [list(sizes).index(name.strip(" '")) for name in axes[2].split(",")]
        numbers = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
        width = math.prod(numbers.shape[axis] for axis in over)
        return np.moveaxis(numbers, over, range(-len(over), 0)).reshape(-1, width).tolist()
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    assert tiled, f"how are devices grouped here? {line}"
    shape, whole, order = (tiled[i] and [int(n) for n in tiled[i].split(",")] for i in (1, 2, 3))
    numbers = np.arange(np.prod(whole)).reshape(whole)
    return (numbers.transpose(order) if order else numbers).reshape(shape).tolist()


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        # Each takes half a minute, most of it compiling.
        pytest.param(method, shape, marks=() if (method, shape) in MAIN else pytest.mark.slow)
        for method in PROGRAMS
        for shape in SHAPES
    ],
)
def test_candidates_never_meet_and_scores_are_one_devices_in_float32(method, shape, programs):
    alone = in_float32(method)
    texts = programs(method)
    shards = SHAPES[shape].get("fsdp", 1)
    found = in_float32(method, on(shape))
    assert np.abs(found - alone).max() < 1e-3 * alone.std()
    [text] = texts
    assert "num_partitions=8" in text
    lines = COLLECTIVE.findall(text)
    assert bool(lines) == (shards > 1)
    for line in lines:
        for group in groups(line):
            # Devices 0 and 1 are the first place of a candidate, 2 and 3 the second, ...
            assert {number // shards for number in group} == {group[0] // shards}, line


@pytest.mark.parametrize("shape", SHAPES)
def test_a_program_in_which_candidates_meet_is_seen_as_one(shape):
    mesh = on(shape)
    data = jax.device_put(np.arange(16.0), NamedSharding(mesh, PartitionSpec(CANDIDATE)))
    text = jax.jit(lambda x: x - x.mean()).lower(data).compile().as_text()
    lines = COLLECTIVE.findall(text)
    assert lines
    shards = SHAPES[shape].get("fsdp", 1)
    places = [{number // shards for number in group} for one in lines for group in groups(one)]
    assert max(map(len, places)) == 8 // shards


@pytest.mark.parametrize(
    ("method", "names"),
    [
        # Forward and reverse mode through few meshes each, half a minute apiece.
        pytest.param(
            method, names, marks=() if method == "exact" or names in FEW else pytest.mark.slow
        )
        for method in ("exact", "first_order", "linearized")
        for names in MESHES
    ],
    ids=lambda one: one if isinstance(one, str) else "-".join(one),
)
def test_on_every_mesh_scores_are_one_devices_in_float64(method, names):
    with jax.enable_x64(True):
        alone, _ = in_float64(method)
        found, probe = in_float64(method, mesh_on(*names))
        np.testing.assert_allclose(found, alone, rtol=1e-6)
        kernel = probe["layers"]["mlp"]["up"]["kernel"]
        parts = {"fsdp": 1, "tensor": 2}
        assert all(
            kernel.sharding.shard_shape(kernel.shape)[axis] == kernel.shape[axis] // 2
            for name, axis in parts.items()
            if name in names
        )


def test_a_device_holds_its_share_of_any_student():
    params = student(1e-4).params
    placed = spread(params, on("sharded student"))
    whole, share = (sum(x.nbytes for x in jax.tree.leaves(t)) for t in (params, placed))
    assert whole == share
    mine = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed))
    assert whole / 2 <= mine < 0.55 * whole


def test_devices_that_are_not_there():
    with pytest.raises(UserError, match="9 does not divide the 8 cpu devices here"):
        make_mesh(MeshConfig(candidate=9), "influence")
    assert make_mesh(MeshConfig(), "influence") is None
