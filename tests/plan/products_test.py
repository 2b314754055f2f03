"""Matrix products of traced programs, counted by hand."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from montessori_jax.config import MeshConfig
from montessori_jax.mesh import make_mesh
from montessori_jax.plan.products import Products, products_of

ONE = 2 * 4**3  # the FLOPs of one product


def count(function, *trips: int, dtype=jnp.float32) -> Products:
    x = jax.ShapeDtypeStruct((4, 4), dtype)
    return products_of(jax.make_jaxpr(function)(x), trips)


def test_a_product_and_its_gradient():
    assert count(lambda x: x @ x) == (ONE, ONE)
    assert count(jax.grad(lambda x: jnp.sum(x @ x @ x))).flops == 2 * ONE + 4 * ONE


def test_loops_count_their_trips():
    def scanned(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0]

    def looped(x):
        trips = x[0, 0].astype(jnp.int32)
        return jax.lax.fori_loop(0, trips, lambda _, c: scanned(c), x)

    assert count(scanned).flops == 5 * ONE
    assert count(looped, 3).flops == 15 * ONE
    assert count(looped).flops == 5 * ONE


def test_of_a_choice_the_dearer_branch():
    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x)

    assert count(either).flops == 2 * ONE


def test_each_device_of_a_shard_map_computes():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    rows = PartitionSpec("data")
    split = jax.shard_map(
        lambda x: x @ x.T, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
    )
    # [2, 4] by [4, 2] on each of 4 devices.
    assert count(split).flops == 4 * 2 * 2 * 4 * 2


def test_exact_float32_products_go_through_a_matrix_unit_six_times():
    def exact(x):
        with jax.default_matmul_precision("highest"):
            return x @ x

    assert count(exact) == (ONE, 6 * ONE)
    assert count(exact, dtype=jnp.bfloat16) == (ONE, ONE)
