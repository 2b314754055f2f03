"""Collectives counted by hand, in compiled programs and in text as the TPU compiler writes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from montessori_jax.config import MeshConfig
from montessori_jax.mesh import make_mesh
from montessori_jax.plan.hlo import collectives

SHAPE = {"candidate": 1, "data": 2, "fsdp": 2, "tensor": 2}


def compiled(body) -> str:
    """The text of ``body`` on 8 devices, each with 16 of 128 numbers."""
    mesh = make_mesh(MeshConfig(**SHAPE))
    spec = PartitionSpec(("data", "fsdp", "tensor"))
    split = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((128,), jnp.float32)
    return jax.jit(split).lower(x).compile().as_text()


def test_a_loops_trips_and_each_kinds_bytes():
    def body(x):
        def trip(x, _):
            x = x + jnp.sum(jax.lax.all_gather(x, "fsdp"), axis=0)
            return jax.lax.psum(x, ("data", "tensor")), None

        return jax.lax.scan(trip, x, None, length=5)[0]

    by_kind = {one.kind: one for one in collectives(compiled(body), SHAPE)}
    # 16 numbers of 4 bytes: a gather from 2 sends them once, a reduction over 4 sends 2 x 3/4.
    assert by_kind["all-gather"].axes == ("fsdp",)
    assert by_kind["all-gather"].count == 5
    assert by_kind["all-gather"].sent == 5 * 64
    assert by_kind["all-reduce"].axes == ("data", "tensor")
    assert by_kind["all-reduce"].sent == pytest.approx(5 * 64 * 2 * 3 / 4)


def test_loops_whose_count_the_data_tell_run_as_often_as_is_said():
    def body(x):
        trips = x[0].astype(jnp.int32)
        return jax.lax.fori_loop(0, trips, lambda _, y: jax.lax.psum(y, "data"), x)

    text = compiled(body)
    assert [one.count for one in collectives(text, SHAPE)] == [1]
    assert [one.count for one in collectives(text, SHAPE, (7,))] == [7]


TPU = """HloModule m, entry_computation_layout={(f32[16]{0:T(128)})->f32[16]{0:T(128)}}

%add.clone (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[16]) -> bf16[8] {
  %input = bf16[16]{0:T(128)(2,1)} parameter(0)
  %all-reduce.7 = bf16[16]{0:T(128)(2,1)} all-reduce(%input), channel_id=3, \
replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true, to_apply=%add.clone
  ROOT %slice.1 = bf16[8]{0} slice(%all-reduce.7), slice={[0:8]}
}

%start (p0: f32[16]) -> f32[64] {
  %p0 = f32[16]{0:T(128)} parameter(0)
  ROOT %all-gather.1 = f32[64]{0:T(128)S(1)} all-gather(%p0), channel_id=9, \
replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}, dimensions={0}
}

%done (p1: f32[16]) -> f32[64] {
  %p1 = f32[16]{0:T(128)} parameter(0)
  ROOT %all-gather.2 = f32[64]{0:T(128)S(1)} all-gather(%p1), channel_id=9, \
replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}, dimensions={0}
}

%condition.1 (c: (s32[], bf16[16], f32[16])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(22)
  %c = (s32[]{:T(128)}, bf16[16]{0}, f32[16]{0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%counter, %constant.3), direction=LT
}

%body.1 (d: (s32[], bf16[16], f32[16])) -> (s32[], bf16[16], f32[16]) {
  %d = (s32[]{:T(128)}, bf16[16]{0}, f32[16]{0}) parameter(0)
  %x = bf16[16]{0} get-tuple-element(%d), index=1
  %y = f32[16]{0} get-tuple-element(%d), index=2
  %fusion.1 = bf16[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.2 = f32[64]{0} fusion(%y), kind=kCustom, calls=%start
  %fusion.3 = f32[64]{0} fusion(%y), kind=kCustom, calls=%done
  %moved = (f32[16]{0}, f32[16]{0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%y), channel_id=11, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  ROOT %tuple.1 = (s32[], bf16[16]{0}, f32[16]{0}) tuple(%d)
}

ENTRY %main.1 (q: f32[16]) -> f32[16] {
  %q = f32[16]{0:T(128)} parameter(0)
  %w = (s32[]{:T(128)}, bf16[16]{0}, f32[16]{0}) while(%q), condition=%condition.1, body=%body.1
  ROOT %r = f32[16]{0:T(128)} get-tuple-element(%w), index=2
}
"""


def test_text_as_the_tpu_compiler_writes_it():
    """A reduction that is cut is a scatter; the steps of an asynchronous one are one; a loop's
    count is in its condition; groups are lists, or axes of a mesh of the compiler's own."""
    found = {one.kind: one for one in collectives(TPU, SHAPE)}
    assert set(found) == {"reduce-scatter", "all-gather", "collective-permute"}
    scatter, gather = found["reduce-scatter"], found["all-gather"]
    assert (scatter.axes, scatter.dtype, scatter.count) == (("tensor",), "bf16", 22)
    assert scatter.sent == 22 * 32 / 2
    assert (gather.axes, gather.count) == (("data", "tensor"), 22)
    assert gather.sent == 22 * 64 * 3
    assert found["collective-permute"].axes == ("data",)
    assert found["collective-permute"].sent == 22 * 64


def test_groups_given_by_counting():
    line = "  ROOT %r = f32[8] all-reduce(%q), replica_groups=[2,4]<=[2,2,2]T(1,0,2), to_apply=%a"
    text = f"ENTRY %main (q: f32[8]) -> f32[8] {{\n  %q = f32[8] parameter(0)\n{line}\n}}\n"
    [one] = collectives(text, SHAPE)
    # Groups {0, 1, 4, 5} and {2, 3, 6, 7}: data and tensor differ, fsdp does not.
    assert one.axes == ("data", "tensor")
    assert np.isclose(one.sent, 32 * 2 * 3 / 4)


SHARED = """ENTRY %main.1 (q: f32[16], r: f32[32]) -> f32[32] {
  %q = f32[16]{0:T(128)} parameter(0)
  %r = f32[32]{0:T(128)} parameter(1)
  %psum.1 = f32[16]{0:T(128)} all-reduce(%q), channel_id=1, replica_groups={{0,1},{2,3}}, \
use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(f)/shard_map/psum"}
  %psum.2 = f32[32]{0:T(128)} all-reduce(%r), channel_id=1, replica_groups={{0,1},{2,3}}, \
use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(f)/shard_map/psum"}
  ROOT %s = f32[32]{0:T(128)} copy(%psum.2)
}
"""


def test_collectives_of_a_shard_map_share_a_channel():
    shape = {"candidate": 1, "data": 2, "fsdp": 2, "tensor": 1}
    [one] = collectives(SHARED, shape)
    assert (one.axes, one.count, one.sent) == (("fsdp",), 2, 64 + 128)


SLICES = """ENTRY %main.1 (q: f32[16]) -> f32[16] {
  %q = f32[16]{0:T(128)} parameter(0)
  %token.1 = token[] after-all()
  %all-reduce.1 = f32[16]{0:T(128)} all-reduce(%q), channel_id=3, \
replica_groups={{0,1},{2,3}}, use_global_device_ids=true, to_apply=%add
  %send.1 = (f32[16]{0:T(128)}, u32[], token[]) send(%q, %token.1), channel_id=2, \
is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.1 = token[] send-done(%send.1), channel_id=2, is_host_transfer=true
  ROOT %r = f32[16]{0:T(128)} copy(%q)
}
"""


def test_what_goes_between_slices_is_told_apart():
    """Two slices of four chips: a chip's 64 bytes are summed over 2 chips within a slice, and over
    the 2 slices; either way 2 x 1/2 of them leave it."""
    shape = {"candidate": 1, "data": 4, "fsdp": 2, "tensor": 1}
    within, between = sorted(
        collectives(SLICES, shape, across=("data", 2)), key=lambda one: one.between_slices
    )
    assert (within.kind, within.axes, within.between_slices) == ("all-reduce", ("fsdp",), False)
    assert (between.kind, between.axes, between.between_slices) == ("all-reduce", ("data",), True)
    assert within.sent == between.sent == 64
    assert [one.axes for one in collectives(SLICES, shape)] == [("fsdp",)]
