"""Stored tensors <-> the parameter tree, by the family's one table."""

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from montessori_jax.errors import UserError
from montessori_jax.models.config import ModelConfig
from montessori_jax.models.decoder import Model, Params
from montessori_jax.models.families import Row, conversion_table
from montessori_jax.models.sharding import param_shardings

# Buffers that old checkpoints carry and that follow from the configuration.
IGNORED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
HEAD = "lm_head.weight"
FLOATS = ("float64", "float32", "float16", "bfloat16")
SHOWN = 3
ALIGNMENT = 64  # bytes; XLA's CPU client copies a host array that is aligned to less
TILE = 64  # columns of a transposed matrix copied at a time: 2.5 times faster than all at once


@runtime_checkable
class LazyTensors(Protocol):
    """A mapping of names to arrays that knows shapes without reading the arrays."""

    def shape(self, name: str) -> tuple[int, ...]: ...


def to_params(
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: jnp.dtype | type = jnp.float32,
    origin: str = "weights",
    mesh: Mesh | None = None,
) -> Params:
    """Hugging Face tensors -> `Model` parameters: renamed, transposed, layers stacked.

    Float16 and bfloat16 tensors are widened exactly. Each tensor is read once, in the order of
    ``tensors``, into the parameter that it belongs to: on a CPU the peak is the parameters plus
    one tensor, on an accelerator the host holds one tensor.

    Args:
        config: what the tensors belong to; fixes names and shapes.
        tensors: arrays by Hugging Face name; may be lazy (then a `LazyTensors` too).
        dtype: of the parameters.
        origin: what errors call the tensors' source.
        mesh: where the parameters are to lie (`montessori_jax.models.sharding`); each process
            reads what its own devices hold of them. None is the default device.

    Raises:
        UserError: tensors that are missing, unknown, misshapen or not floating point, by name; or
            a tied model whose ``lm_head.weight`` is another matrix than its embedding.
    """
    expected = stored_shapes(config)
    names = {name for name in tensors if not IGNORED.search(name)}
    redundant_head = config.tie_word_embeddings and HEAD in names
    if redundant_head:
        names.remove(HEAD)
    wrong = []
    for name in names & expected.keys():
        found = tensors.shape(name) if isinstance(tensors, LazyTensors) else tensors[name].shape
        if tuple(found) != expected[name]:
            wrong.append(f"{name} is {list(found)}, the configuration says {list(expected[name])}")
    problems = [
        _listed("missing tensors", [name for name in expected if name not in names]),
        _listed("unknown tensors", sorted(names - expected.keys())),
        _listed("misshapen tensors", sorted(wrong)),
    ]
    if any(problems):
        raise UserError(f"{origin}: {'; '.join(filter(None, problems))}")

    places = {name: (row, layer) for name, row, layer in _file_order(config)}
    shapes = Model(config).shapes()
    shardings = None if mesh is None else param_shardings(Model(config), mesh)
    buffers: dict[tuple[str, ...], _HostBuffer | _DeviceBuffer | _SplitBuffer] = {}
    for name in tensors:
        if name not in places or name not in names:
            continue
        row, layer = places[name]
        if row.path not in buffers:
            about = _leaf(shapes, row.path).shape, jnp.dtype(dtype)
            if shardings is None:
                buffers[row.path] = _buffer(*about)
            else:
                buffers[row.path] = _SplitBuffer(*about, _leaf(shardings, row.path))
        tensor = _floating(origin, name, tensors[name])
        buffers[row.path].put(row.transform.read(tensor), layer)
    if redundant_head:
        embedding = next(row.name for row in conversion_table(config) if row.path[0] == "embed")
        if not _same(tensors[HEAD], tensors[embedding]):
            raise UserError(
                f"{origin}: 'tie_word_embeddings' is true, but {HEAD} differs from {embedding}; "
                "set it to false in config.json to use both"
            )
    params: Params = {}
    for row in conversion_table(config):
        branch = params
        for key in row.path[:-1]:
            branch = branch.setdefault(key, {})
        branch[row.path[-1]] = buffers.pop(row.path).array()
    return params


def from_params(config: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """`Model` parameters -> Hugging Face tensors, one at a time, layer by layer in file order.

    Arrays keep the parameters' dtype and are C-contiguous. The inverse of `to_params`, bit for
    bit. Raises `ValueError` where ``params`` is not a tree of ``config``.
    """
    for name, view in stored_views(config, params):
        yield name, np.ascontiguousarray(view)


def stored_views(config: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """As `from_params`, but strided views of the parameters where these are in host memory.

    From an accelerator one tensor at a time is fetched.
    """
    shapes = jax.tree.map(lambda leaf: leaf.shape, Model(config).shapes())
    found = jax.tree.map(lambda leaf: tuple(leaf.shape), params)
    if shapes != found:
        raise ValueError(f"the parameters do not belong to this configuration: {found} != {shapes}")
    for name, row, layer in _file_order(config):
        yield name, row.transform.write(_fetch(_leaf(params, row.path), layer))


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint, in the order of `from_params`."""
    shapes = Model(config).shapes()

    def stored(row: Row, layer: int | None) -> tuple[int, ...]:
        shape = _leaf(shapes, row.path).shape
        return row.transform.shape(shape if layer is None else shape[1:])

    return {name: stored(row, layer) for name, row, layer in _file_order(config)}


def _file_order(config: ModelConfig) -> Iterator[tuple[str, Row, int | None]]:
    """Every stored tensor: what precedes the layers, then layer by layer, then what follows."""
    table = conversion_table(config)
    stacked = [row for row in table if "{layer}" in row.name]
    first = table.index(stacked[0])
    for row in table[:first]:
        yield row.name, row, None
    for layer in range(config.num_layers):
        for row in stacked:
            yield row.name.format(layer=layer), row, layer
    for row in table[first + len(stacked) :]:
        yield row.name, row, None


def _names(row: Row, config: ModelConfig) -> Iterator[tuple[str, int | None]]:
    """The stored names that one parameter is made of."""
    if "{layer}" not in row.name:
        yield row.name, None
        return
    for layer in range(config.num_layers):
        yield row.name.format(layer=layer), layer


def _leaf(tree: Params, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


class _HostBuffer:
    """A parameter being filled in host memory, handed to JAX without another copy."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, device: jax.Device | None = None):
        self._device = device
        size = math.prod(shape) * dtype.itemsize
        raw = np.empty(size + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        self._whole = raw[start : start + size].view(dtype).reshape(shape)

    def put(self, part: np.ndarray, layer: int | None) -> None:
        _copy(self._whole if layer is None else self._whole[layer], part)

    def array(self) -> jax.Array:
        return jax.device_put(self._whole, self._device, may_alias=True)


class _DeviceBuffer:
    """A parameter being filled on the device; the host holds one layer's part of it."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, device: jax.Device | None = None):
        self._shape, self._dtype, self._device = shape, dtype, device
        self._whole: jax.Array | None = None

    def put(self, part: np.ndarray, layer: int | None) -> None:
        host = np.empty(part.shape, self._dtype)
        _copy(host, part)
        if layer is None:
            self._whole = jax.device_put(host, self._device)
        else:
            whole = self._whole
            if whole is None:
                whole = jnp.zeros(self._shape, self._dtype, device=self._device)
            self._whole = _insert(whole, host, layer)
        jax.block_until_ready(self._whole)  # or the host would hold all that is still on its way

    def array(self) -> jax.Array:
        assert self._whole is not None
        return self._whole


class _SplitBuffer:
    """A parameter being filled on a mesh: each device of this process has its own part."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding):
        self._shape, self._sharding = shape, sharding
        part = sharding.shard_shape(shape)
        self._parts = [
            (index or (), _buffer(part, dtype, device))
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        ]

    def put(self, part: np.ndarray, layer: int | None) -> None:
        for index, buffer in self._parts:
            # Layers are never split.
            buffer.put(part[index if layer is None else index[1:]], layer)

    def array(self) -> jax.Array:
        arrays = [buffer.array() for _, buffer in self._parts]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, arrays)


def _buffer(
    shape: tuple[int, ...], dtype: np.dtype, device: jax.Device | None = None
) -> _HostBuffer | _DeviceBuffer:
    platform = jax.default_backend() if device is None else device.platform
    return (_HostBuffer if platform == "cpu" else _DeviceBuffer)(shape, dtype, device)


@partial(jax.jit, donate_argnums=0)
def _insert(whole: jax.Array, part: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, part, layer, axis=0)


@jax.jit
def _take(whole: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(whole, layer, axis=0, keepdims=False)


def _fetch(leaf: Any, layer: int | None) -> np.ndarray:
    """One layer of a parameter on the host; a view where it is there already."""
    if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
        # All processes do this together, and each gets all of it.
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        whole = leaf if layer is None else _take(leaf, layer)
        return np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(whole))
    here = not isinstance(leaf, jax.Array) or all(d.platform == "cpu" for d in leaf.devices())
    if layer is None or here:
        whole = np.asarray(leaf)
        return whole if layer is None else whole[layer]
    # JAX keeps the host copy of an array that was fetched: fetching the stack would hold it all.
    return np.asarray(_take(leaf, layer))


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """``target[...] = source``, whose axes may be the other way round."""
    if source.ndim < 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for start in range(0, source.shape[-1], TILE):
        target[..., start : start + TILE] = source[..., start : start + TILE]


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Equality, some rows at a time."""
    step = 1024
    return len(one) == len(other) and all(
        np.array_equal(one[start : start + step], other[start : start + step])
        for start in range(0, len(one), step)
    )


def _floating(origin: str, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.name not in FLOATS:
        raise UserError(
            f"{origin}: {name} is stored as {array.dtype.name}; only float weights are read "
            "(quantised ones from GGUF files alone)"
        )
    return array


def _listed(what: str, items: list[str]) -> str:
    """``what: a, b, c and 5 more``; nothing where there are no items."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{what}: {', '.join(items[:SHOWN])}{more}" if items else ""
