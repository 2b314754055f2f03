"""Several devices: candidates split over one axis of a mesh, the student's weights over the other.

Candidates have nothing to say to each other, so the program of a device is that of one device
alone, written as such (`jax.shard_map`): no choice of the compiler can bring in communication
between candidates. Only the devices that share one copy of the student talk, and only about it.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from montessori_jax.errors import UserError

T = TypeVar("T")
CANDIDATE, STUDENT = "candidate", "student"


def make_mesh(devices: int = 0, shards: int = 1) -> Mesh | None:
    """A mesh ``candidate x student`` of this host's devices; None where it would be one device.

    Args:
        devices: how many; 0 takes all accelerators, and one of the CPU's.
        shards: how many share one copy of the student. ``devices / shards`` candidates (times
            those side by side on a device) are probed at a time.

    Raises:
        UserError: the host has fewer devices, or ``shards`` does not divide them.
    """
    local = jax.local_devices()
    count = devices or (1 if local[0].platform == "cpu" else len(local))
    if count > len(local):
        raise UserError(
            f"devices {count}: this host has {len(local)} ({local[0].platform}): give at most "
            "that many, or 0 for all accelerators"
        )
    if count % shards:
        raise UserError(
            f"student_shards {shards} does not divide {count} devices: give a divisor of it, or "
            "another number of devices"
        )
    if count == 1:
        return None
    places = np.array(local[:count]).reshape(count // shards, shards)
    return Mesh(places, (CANDIDATE, STUDENT), axis_types=(AxisType.Auto, AxisType.Auto))


def candidate_devices(mesh: Mesh | None) -> int:
    """Over how many places candidates are split."""
    return 1 if mesh is None else mesh.shape[CANDIDATE]


def laid_out(tree: T, mesh: Mesh) -> T:
    """A pytree of weights or moments on the mesh: one copy for each place of a candidate.

    The longest axis of a matrix that the student's devices divide is split over them; vectors,
    numbers and what does not divide are on every device.
    """
    shards = mesh.shape[STUDENT]

    def put(leaf: Any) -> jax.Array:
        shape = np.shape(leaf)
        spec: list[str | None] = [None] * len(shape)
        axes = [axis for axis, size in enumerate(shape) if size % shards == 0]
        if shards > 1 and len(shape) > 1 and axes:
            spec[max(axes, key=lambda axis: shape[axis])] = STUDENT
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(put, tree)


def on_every_device(tree: T, mesh: Mesh) -> T:
    """A pytree of arrays with a copy on each device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_candidates(
    function: Callable[..., T],
    mesh: Mesh | None,
    *,
    axes: Sequence[int | None],
    out_axis: int,
) -> Callable[..., T]:
    """``function`` on every device for its own candidates; the function itself without a mesh.

    To be called in a compiled program. All arrays are arguments: none may be captured.

    Args:
        function: of pytrees to a pytree.
        mesh: of `make_mesh`.
        axes: for each argument the candidates' axis in its leaves, which `candidate_devices`
            divides; None where all devices read all of it.
        out_axis: the candidates' axis in what is returned.
    """
    if mesh is None:
        return function

    def spec(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, CANDIDATE)

    # With check_vma a gradient by weights that all devices hold would be summed over candidates.
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(map(spec, axes)),
        out_specs=spec(out_axis),
        axis_names={CANDIDATE},
        check_vma=False,
    )
