"""Weights, moments and batches as shapes with their places on a mesh: nothing is allocated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from montessori_jax.config import MeshConfig, RunConfig, TrainingConfig
from montessori_jax.mesh import AXES, ROWS, make_mesh, sampling_mesh, write_together
from montessori_jax.models import Model, ModelConfig, Params
from montessori_jax.models.lora import LoraModel, LoraSpec
from montessori_jax.models.sharding import moment_shardings, param_shardings
from montessori_jax.plan.targets import Target
from montessori_jax.plan.topology import host_devices, topology_devices
from montessori_jax.training.state import TrainState


class Planned(NamedTuple):
    """What is planned: settings, the two models by shape, and the mesh of each use."""

    config: RunConfig
    teacher: ModelConfig
    student: ModelConfig
    training: Mesh
    influence: Mesh
    sampling: Mesh
    hosts: int


def meshes(settings: MeshConfig, target: Target) -> tuple[Mesh, Mesh, Mesh, int]:
    """The meshes of training, of influence and of a sampler, of one device where there is one; and
    how many hosts write apart, each with a sampler of its own."""
    devices = topology_devices(target)
    own, hosts = host_devices(target, devices)
    if write_together(settings, len(own), len(devices)):
        own, hosts = devices, 1
    one = np.array(devices[:1]).reshape((1,) * len(AXES))
    alone = Mesh(one, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    training = make_mesh(settings, "training", devices) or alone
    return (
        training,
        make_mesh(settings, "influence", devices) or alone,
        sampling_mesh(settings, own) or alone,
        hosts,
    )


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with a sharding each; one sharding serves all."""
    if isinstance(shardings, NamedSharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, shapes)
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=at),
        shapes,
        shardings,
    )


def everywhere(shapes: Any, mesh: Mesh) -> Any:
    """Shapes of which every chip has all."""
    return placed(shapes, NamedSharding(mesh, PartitionSpec()))


def by_rows(shapes: Any, mesh: Mesh, axis: int) -> Any:
    """Shapes split by rows at ``axis``, as `montessori_jax.mesh.place_rows` does."""
    return placed(shapes, NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS)))


def weights(model: Model, mesh: Mesh, dtype: str = "float32") -> Params:
    """A model's parameters; an adapter's for a LoRA model."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), model.shapes()
    )
    return placed(shapes, param_shardings(model, mesh))


def trained_model(config: ModelConfig, settings: TrainingConfig, mesh: Mesh) -> Model:
    """The model that a stage trains: whole, or an adapter on its frozen weights."""
    model = Model(config)
    if not settings.lora_rank:
        return model
    spec = LoraSpec(
        settings.lora_rank, settings.lora_alpha, settings.lora_targets, settings.lora_rslora
    )
    return LoraModel(config, weights(model, mesh, settings.lora_base_dtype), spec)


def moments(tx: optax.GradientTransformation, model: Model, mesh: Mesh) -> Any:
    """The optimizer's state."""
    params = weights(model, mesh)
    return placed(jax.eval_shape(tx.init, params), moment_shardings(tx, params, mesh))


def train_state(tx: optax.GradientTransformation, model: Model, mesh: Mesh) -> TrainState:
    """A state between two steps."""
    step = everywhere(jax.ShapeDtypeStruct((), jnp.int32), mesh)
    return TrainState(weights(model, mesh), moments(tx, model, mesh), step)


def bytes_on_chip(tree: Any) -> int:
    """Bytes that one chip holds of shapes with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
