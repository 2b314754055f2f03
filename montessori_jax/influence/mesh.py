"""Several devices: candidates split over one axis of the mesh, the student over the others.

Candidates have nothing to say to each other, so the program of a device is that of one device
alone, written as such (`jax.shard_map`): no choice of the compiler can bring in communication
between candidates. Only the devices that share one copy of the student talk, and only about it.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from montessori_jax.mesh import CANDIDATE, DATA, FSDP, TENSOR, place

T = TypeVar("T")


def candidate_devices(mesh: Mesh | AbstractMesh | None) -> int:
    """Over how many places candidates are split."""
    return 1 if mesh is None else mesh.shape[CANDIDATE]


def reference_ways(mesh: Mesh | None) -> int:
    """Into how many parts the devices of one place split a batch of reference rows."""
    return 1 if mesh is None else mesh.shape[DATA] * mesh.shape[FSDP]


def laid_out(tree: T, mesh: Mesh) -> T:
    """Any pytree of weights or moments on the mesh: one copy for each place of a candidate.

    What is on the mesh already stays as it is (`montessori_jax.models.sharding` lays decoders out).
    Of other matrices the longest axis that ``fsdp`` divides is split over it, and the longest of
    the rest over ``tensor``; vectors, numbers and what does not divide are on every device.
    """

    def put(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh == mesh:
            return leaf
        shape = np.shape(leaf)
        spec: list[str | None] = [None] * len(shape)
        for name in (FSDP, TENSOR):
            free = [
                axis
                for axis, size in enumerate(shape)
                if spec[axis] is None and size % mesh.shape[name] == 0
            ]
            if mesh.shape[name] > 1 and len(shape) > 1 and free:
                spec[max(free, key=lambda axis: shape[axis])] = name
        return place(leaf, mesh, PartitionSpec(*spec))

    return jax.tree.map(put, tree)


def place_reference(batches: T, mesh: Mesh) -> T:
    """Reference batches ``[passes, rows, ...]``, their rows split within each candidate's place."""

    def put(leaf: Any) -> Any:
        split = np.ndim(leaf) > 1 and np.shape(leaf)[1] % reference_ways(mesh) == 0
        return place(leaf, mesh, PartitionSpec(None, (DATA, FSDP)) if split else None)

    return jax.tree.map(put, batches)


def over_passes(
    function: Callable[[Any, Any, Any, jax.Array], T], mesh: Mesh | AbstractMesh | None
) -> Callable[[Any, Any, Any, jax.Array], T]:
    """``function(losses, params, batches, weights)``, a sum over passes, dealt out to the places.

    Each candidate's place adds up its own share of the passes, and the places add up their sums.
    Where the passes do not divide, some come again without weight. The function itself where there
    is but one place.
    """
    if mesh is None or candidate_devices(mesh) == 1:
        return function
    places = candidate_devices(mesh)

    def summed(losses: Any, params: Any, batches: Any, weights: jax.Array) -> T:
        own = function(losses, params, batches, weights)
        return jax.tree.map(lambda leaf: jax.lax.psum(leaf, CANDIDATE), own)

    dealt = jax.shard_map(
        summed,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), *[PartitionSpec(CANDIDATE)] * 2),
        out_specs=PartitionSpec(),
        axis_names={CANDIDATE},
        check_vma=False,
    )

    def run(losses: Any, params: Any, batches: Any, weights: jax.Array) -> T:
        count = len(weights)
        again = np.arange(-(-count // places) * places) % count
        once = np.arange(len(again)) < count
        weights = jax.numpy.where(once.reshape(-1, *[1] * (weights.ndim - 1)), weights[again], 0)
        return dealt(losses, params, jax.tree.map(lambda leaf: leaf[again], batches), weights)

    return run


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
        mesh: of `montessori_jax.mesh.make_mesh`.
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
