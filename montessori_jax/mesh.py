"""Devices as a mesh of four axes, and arrays on it, over one process or several."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from montessori_jax.config import MeshConfig
from montessori_jax.errors import UserError

T = TypeVar("T")
# Where the leaves of a pytree lie, hashable; None on one device.
Places = tuple[NamedSharding, ...] | None
AXES = CANDIDATE, DATA, FSDP, TENSOR = ("candidate", "data", "fsdp", "tensor")
# Rows of a batch are split over all of these.
ROWS = (CANDIDATE, DATA, FSDP)


def make_mesh(
    settings: MeshConfig,
    use: Literal["training", "influence"] = "training",
    devices: Sequence[jax.Device] | None = None,
) -> Mesh | None:
    """A mesh ``candidate x data x fsdp x tensor``; None where it would be one device.

    Args:
        settings: the size of each axis, see `MeshConfig`.
        use: which axis gets what the others leave.
        devices: by default all devices of all processes. Those of several TPU slices are laid out
            so that only the first axis that can crosses between slices.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = sizes_of(settings, use, devices)
    count = int(np.prod(sizes))
    if count == 1 and len({device.process_index for device in devices}) == 1:
        return None
    return Mesh(_arranged(sizes, list(devices)[:count]), AXES, axis_types=(AxisType.Auto,) * 4)


def sampling_mesh(settings: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The mesh of the sampler: `sampling_ways` devices share a copy of the weights, and the others
    have prompts of their own.

    ``devices`` are by default this process's, or all of the job's (`write_together`).
    """
    layout = MeshConfig(candidate=1, tensor=sampling_ways(settings))
    if devices is None:
        together = write_together(settings, jax.local_device_count(), jax.device_count())
        devices = jax.devices() if together else jax.local_devices()
    if settings.sampler and len(devices) % settings.sampler:
        raise UserError(
            f"mesh.sampler {settings.sampler} does not divide the {len(devices)} devices that "
            "write: lower it"
        )
    return make_mesh(layout, devices=devices)


def sampling_ways(settings: MeshConfig) -> int:
    """How many devices share a copy of the sampler's weights."""
    return settings.sampler or settings.tensor


def write_together(settings: MeshConfig, own: int, together: int) -> bool:
    """Whether a copy of the sampler's weights takes more than a process's ``own`` devices, and the
    job has more: so many ``together``."""
    return own < together and sampling_ways(settings) > own


def sizes_of(
    settings: MeshConfig, use: Literal["training", "influence"], devices: Sequence[jax.Device]
) -> tuple[int, int, int, int]:
    """Of each axis in the order of `AXES`, with what `MeshConfig` leaves open filled in."""
    sizes = {name: getattr(settings, name) for name in AXES}
    given = ", ".join(f"{name} {size}" for name, size in sizes.items())
    fixed = int(np.prod([size for size in sizes.values() if size]))
    first = CANDIDATE if use == "influence" else DATA
    left = next((name for name in (first, CANDIDATE, DATA) if sizes[name] == 0), None)
    # Several processes compute together: each of their devices has its part.
    several = len({device.process_index for device in devices}) > 1
    usable = len(devices)
    if devices[0].platform == "cpu" and not several:
        usable = fixed
    if fixed > len(devices) or (left and usable % fixed):
        raise UserError(
            f"mesh ({given}): {fixed} does not divide the {len(devices)} "
            f"{devices[0].platform} devices here: lower mesh.fsdp, mesh.tensor or another axis"
        )
    if left is None and fixed != len(devices) and several:
        raise UserError(
            f"mesh ({given}): {fixed} devices, but the processes of this job have {len(devices)} "
            f"together: set mesh.data to 0, which takes what is left"
        )
    for name in (CANDIDATE, DATA):
        if sizes[name] == 0:
            sizes[name] = usable // fixed if name == left else 1
    return tuple(sizes.values())


def _arranged(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        across = next((axis for axis in range(3) if sizes[axis] % slices == 0), None)
        if across is None:
            raise UserError(
                f"mesh {'x'.join(map(str, sizes))}: none of candidate, data and fsdp is a multiple "
                f"of the {slices} slices: make one so, for the others stay within a slice"
            )
        outer = tuple(slices if axis == across else 1 for axis in range(len(sizes)))
        inner = tuple(size // much for size, much in zip(sizes, outer, strict=True))
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices=devices)
    return mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that a pytree's arrays lie on; None on one device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def places_of(tree: Any) -> Places:
    """Where each leaf of a pytree lies on its mesh."""
    if mesh_of(tree) is None:
        return None
    return tuple(leaf.sharding for leaf in jax.tree.leaves(tree))


def in_places(tree: T, places: Places) -> T:
    """In a compiled program: each leaf where ``places`` (of a tree of its structure) say."""
    if places is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    kept = [jax.lax.with_sharding_constraint(*pair) for pair in zip(leaves, places, strict=True)]
    return jax.tree.unflatten(structure, kept)


def use_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Within it programs are traced for ``mesh``; nothing happens without one."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def row_ways(mesh: Mesh | None) -> int:
    """Into how many parts a batch's rows are split."""
    return 1 if mesh is None else int(np.prod([mesh.shape[name] for name in ROWS]))


def place(tree: T, mesh: Mesh | None, spec: PartitionSpec | None = None) -> T:
    """Host arrays, the same in every process, on the mesh; each process uploads its own part.

    Args:
        tree: pytree of host arrays.
        mesh: of `make_mesh`; None is the default device.
        spec: how each is split; by default every device has all of it.
    """
    if mesh is None:
        return jax.device_put(tree)
    sharding = NamedSharding(mesh, spec or PartitionSpec())
    return put(tree, jax.tree.map(lambda leaf: sharding, tree))


def put(tree: T, shardings: Any) -> T:
    """Arrays where ``shardings``, a tree of `NamedSharding`, say; not copied if they are there."""

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(one, tree, shardings)


def place_rows(tree: T, mesh: Mesh | None, axis: int) -> T:
    """Host arrays of a batch on the mesh, rows (at ``axis``) split over `ROWS`."""
    return place(tree, mesh, PartitionSpec(*[None] * axis, ROWS))


def fetch(tree: T) -> T:
    """Arrays on the host, whole, in every process."""

    def whole(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(whole, tree)


def split_rows(x: Array, groups: int | None = None, heads: int | None = None) -> Array:
    """``[rows, ...]`` split by rows over the mesh that is set (`jax.set_mesh`), if there is one.

    Rows come in ``groups`` equal runs, none of which is cut; by default each is one. ``heads`` is
    an axis that ``tensor`` splits, where it divides it.

    Without this the compiler may split activations as the weights are, and then talks for every
    product. Over the axes of `row_axes`.
    """
    axes, ways = row_axes(groups or x.shape[0])
    spec: list[Any] = [axes or None, *[None] * (x.ndim - 1)]
    tensor = jax.sharding.get_abstract_mesh().shape.get(TENSOR, 1)
    if heads is not None and x.shape[heads] % tensor == 0 and tensor > 1:
        spec[heads] = TENSOR
    if ways == 1 and TENSOR not in spec:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def collected(embedding: Array) -> Array:
    """``[vocab, width]`` to look tokens up in, whole on every device where that must be.

    Of a table that ``fsdp`` and ``tensor`` both split, libtpu 0.0.42.1 ends the process in a
    look-up inside `jax.shard_map`, by a failed check of its partitioner of gathers.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual not in mesh.axis_types:
        return embedding
    if mesh.shape[FSDP] == 1 or mesh.shape[TENSOR] == 1:
        return embedding
    return jax.lax.with_sharding_constraint(embedding, PartitionSpec(None, None))


def row_groups(rows: int) -> int:
    """Into how many equal parts the mesh that is set splits ``rows``; 1 without a mesh."""
    return row_axes(rows)[1]


def row_axes(rows: int) -> tuple[tuple[str, ...], int]:
    """The axes of the mesh that is set that split ``rows``, and into how many parts.

    The most of `ROWS` from its end that divide them together, less those that a `jax.shard_map`
    around has taken: too few rows for all devices are split within each candidate's place, and
    places repeat each other's work.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return (), 1
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(name for name in ROWS if name in kinds and kinds[name] == AxisType.Auto)
    while axes:
        ways = int(np.prod([mesh.shape[name] for name in axes]))
        if rows % ways == 0:
            return axes, ways
        axes = axes[1:]
    return (), 1
