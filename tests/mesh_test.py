"""Rows over the axes of a mesh, and results that lie where they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from montessori_jax.config import MeshConfig
from montessori_jax.errors import UserError
from montessori_jax.influence.reference import Reference
from montessori_jax.mesh import make_mesh, row_axes, row_groups, sampling_mesh

MESH = {"candidate": 2, "data": 1, "fsdp": 4}


@pytest.mark.parametrize(
    ("rows", "axes"),
    [
        (8, ("candidate", "data", "fsdp")),
        (4, ("data", "fsdp")),
        (12, ("data", "fsdp")),
        (2, ()),
        (1, ()),
    ],
)
def test_rows_are_split_over_the_most_axes_that_divide_them(rows: int, axes: tuple[str, ...]):
    with jax.set_mesh(make_mesh(MeshConfig(**MESH))):
        found, ways = row_axes(rows)
        assert found == axes
        assert ways == row_groups(rows) == {3: 8, 2: 4, 0: 1}[len(axes)]


def test_axes_that_a_shard_map_has_taken_are_left_out():
    mesh, seen = make_mesh(MeshConfig(**MESH)), []

    def inner(x):
        seen.append(row_axes(8)[0])
        return x

    rows = PartitionSpec("candidate")
    split = jax.shard_map(
        inner, mesh=mesh, in_specs=rows, out_specs=rows, axis_names={"candidate"}, check_vma=False
    )
    jax.eval_shape(split, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert seen == [("data", "fsdp")]


def test_a_sampler_that_does_not_divide_the_devices_is_named():
    with pytest.raises(UserError, match=r"mesh\.sampler 3 does not divide the 8 devices"):
        sampling_mesh(MeshConfig(sampler=3))
    assert sampling_mesh(MeshConfig(sampler=4)).shape["tensor"] == 4


def test_without_a_mesh_there_is_nothing_to_split_over():
    assert row_axes(8) == ((), 1)


def test_a_reference_gradient_lies_where_the_parameters_do():
    mesh = make_mesh(MeshConfig(**MESH))
    params = jax.device_put(np.ones((8, 4), np.float32), NamedSharding(mesh, PartitionSpec("fsdp")))
    batches = jax.device_put(
        np.arange(24, dtype=np.float32).reshape(3, 8), NamedSharding(mesh, PartitionSpec())
    )

    def losses(params, batch):
        return jnp.sum(params**2, axis=1) * batch

    assert len(batches) % mesh.shape["candidate"]  # no even deal
    one = Reference(losses, batches, np.ones((3, 8)))
    gradient, along = one.gradient(params), one.hvp(params, params)
    assert gradient.sharding == along.sharding == params.sharding
    np.testing.assert_allclose(gradient[:, 0], 2 * batches.sum(axis=0))
