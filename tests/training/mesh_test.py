"""Training on several devices: one device's losses, gradients and weights, on every mesh."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from montessori_jax.config import DpoConfig, EvaluationConfig, MeshConfig, SftConfig
from montessori_jax.errors import UserError
from montessori_jax.evaluation.reference_loss import reference_loss
from montessori_jax.mesh import make_mesh, mesh_of
from montessori_jax.models import Model
from montessori_jax.models.families import family_of
from montessori_jax.models.lora import LoraModel, LoraSpec
from montessori_jax.models.sharding import check_mesh, laid_out, param_shardings
from montessori_jax.training.dpo import train_dpo
from montessori_jax.training.reference_log_probs import pair_log_probs
from montessori_jax.training.sft import train_sft
from montessori_jax.training.state import start
from tests.meshes import IDS, SHAPES, mesh_on
from tests.models.tiny import FAMILIES
from tests.training.samples import chats, pairs, student

# SGD, so that what comes out is linear in the gradients: Adam's root hides their size and makes
# much of a rounding error near zero.
SFT = SftConfig(
    optimizer="sgd", learning_rate=0.5, batch_size=12, micro_batch=2, max_length=32, log_every=1
)
DPO = DpoConfig(optimizer="sgd", learning_rate=0.5, batch_size=5, micro_batch=2, max_length=32)
CHATS, PAIRS = chats(30, 5), pairs(9, 6)


@pytest.fixture(scope="module", autouse=True)
def _compile_soon():
    """Nearly all of the time is compiling: how fast the programs are does not matter here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def close(found, wanted) -> None:
    """Equal to 1e-5 of each array's largest number."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        other = np.asarray(other)
        scale = np.abs(other).max() or 1.0
        np.testing.assert_allclose(np.asarray(one) / scale, other / scale, rtol=0, atol=1e-5)


def sft(params, model=None):
    """The final state and the metrics of every step."""
    rows: list[dict] = []
    model = model or student()[0]
    state = train_sft(model, params, CHATS, SFT, seed=1, metrics=rows.append)
    return state, [{name: row[name] for name in ("loss", "grad_norm")} for row in rows]


def dpo(params):
    """The reference's log-probs, the final state and the metrics of every step."""
    model = student()[0]
    rows: list[dict] = []
    reference = pair_log_probs(model, params, PAIRS, DPO)
    state = train_dpo(model, params, PAIRS, DPO, reference=reference, seed=1, metrics=rows.append)
    return reference, state, [{name: row[name] for name in ("loss", "grad_norm")} for row in rows]


def gradients(params):
    """Of the first step of each: what Adam's first moment is a tenth of."""
    model, found = student()[0], []
    first = {"optimizer": "adamw", "max_grad_norm": 0.0}
    reference = pair_log_probs(model, params, PAIRS[: DPO.batch_size], DPO)
    for state in (
        train_sft(model, params, CHATS[: SFT.batch_size], replace(SFT, **first), seed=1),
        train_dpo(model, params, PAIRS[: DPO.batch_size], replace(DPO, **first),
                  reference=reference, seed=1),
    ):  # fmt: skip
        assert int(state.step) == 1
        found.append(optax.tree.get(state.opt_state, "mu"))
    return found


@pytest.fixture(scope="module")
def alone():
    """What one device makes of it."""
    _, params = student()
    return sft(params), dpo(params), gradients(params)


@pytest.mark.parametrize("names", SHAPES, ids=IDS)
def test_sft_and_dpo_are_one_devices(names, alone):
    model, params = student()
    mesh = mesh_on(*names)
    spread = laid_out(model, params, mesh)
    state, rows = sft(spread)
    assert mesh_of(state.params) == mesh
    (lone_state, lone_rows), (lone_reference, lone_dpo, lone_dpo_rows), lone_gradients = alone
    close(state.params, lone_state.params)
    close(rows, lone_rows)
    reference, state, rows = dpo(spread)
    close(reference, lone_reference)
    close(state.params, lone_dpo.params)
    close(rows, lone_dpo_rows)
    close(gradients(spread), lone_gradients)


@pytest.mark.parametrize("names", [("fsdp", "tensor"), ("data", "tensor")], ids="-".join)
def test_an_adapters_training_is_one_devices(names):
    model, params = student()
    spec = LoraSpec(rank=2)
    key = jax.random.key(3)
    alone = LoraModel(model.config, params, spec)
    lone_state, lone_rows = sft(alone.init(key), alone)
    mesh = mesh_on(*names)
    spread = LoraModel(model.config, laid_out(model, params, mesh), spec)
    state, rows = sft(laid_out(spread, spread.init(key), mesh), spread)
    close(state.params, lone_state.params)
    close(rows, lone_rows)


@pytest.mark.parametrize("names", [("data", "fsdp"), ("fsdp", "tensor")], ids="-".join)
def test_evaluation_is_one_devices(names):
    model, params = student()
    lone = reference_loss(model, params, CHATS, EvaluationConfig())
    found = reference_loss(model, laid_out(model, params, mesh_on(*names)), CHATS,
                           EvaluationConfig())  # fmt: skip
    close(found.by_sample, lone.by_sample)
    assert found.tokens == lone.tokens


def test_weights_and_moments_are_split_as_the_table_says():
    model, params = student()
    mesh = mesh_on("fsdp", "tensor")
    state = start(laid_out(model, params, mesh), optax.adam(1e-3))
    moments = state.opt_state[0].mu
    for tree in (state.params, moments):
        query = tree["layers"]["attention"]["query"]["kernel"]
        assert query.sharding.shard_shape(query.shape) == (2, 12, 16)
        down = tree["layers"]["mlp"]["down"]["kernel"]
        assert down.sharding.shard_shape(down.shape) == (2, 20, 12)
        # 61 tokens are not split by two: that axis is whole.
        embedding = tree["embed"]["embedding"]
        assert embedding.sharding.shard_shape(embedding.shape) == (61, 12)
    assert state.opt_state[0].count.sharding.is_fully_replicated


def test_every_parameter_of_every_family_is_in_the_table():
    mesh = mesh_on("fsdp", "tensor")
    biases = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
    for name, values in FAMILIES.items():
        model = Model(replace(family_of(values, name), **biases))
        split = [
            jax.tree_util.keystr(path)
            for path, sharding in jax.tree_util.tree_leaves_with_path(param_shardings(model, mesh))
            if not sharding.is_fully_replicated
        ]
        whole = {"norm", "scale", "['out']['bias']", "['down']['bias']"}
        for path, _ in jax.tree_util.tree_leaves_with_path(model.shapes()):
            key = jax.tree_util.keystr(path)
            assert (key in split) != any(part in key for part in whole), key


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tensor": 8, "data": 1}, "mesh.tensor 8 does not divide the model's num_attention_heads"),
        ({"fsdp": 5, "data": 1}, "mesh.fsdp 5 does not divide the model's hidden_size 24"),
        ({"fsdp": 3, "tensor": 3}, "9 does not divide the 8 cpu devices here"),
    ],
)
def test_a_mesh_that_does_not_divide_is_one_line(settings, named):
    with pytest.raises(UserError, match=r"lower mesh|set mesh") as caught:
        check_mesh(student()[0].config, make_mesh(MeshConfig(**settings)))
    assert named in str(caught.value)
