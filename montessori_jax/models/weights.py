"""Stored tensors <-> the parameter tree, by the family's one table."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from montessori_jax.errors import UserError
from montessori_jax.models.config import ModelConfig
from montessori_jax.models.decoder import Model, Params
from montessori_jax.models.families import Row, conversion_table

# Buffers that old checkpoints carry and that follow from the configuration.
IGNORED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
HEAD = "lm_head.weight"
FLOATS = ("float64", "float32", "float16", "bfloat16")
SHOWN = 3


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
) -> Params:
    """Hugging Face tensors -> `Model` parameters: renamed, transposed, layers stacked.

    Float16 and bfloat16 tensors are widened exactly. Tensors are read one at a time, so that the
    peak is the parameters plus one stacked tensor.

    Args:
        config: what the tensors belong to; fixes names and shapes.
        tensors: arrays by Hugging Face name; may be lazy (then a `LazyTensors` too).
        dtype: of the parameters.
        origin: what errors call the tensors' source.

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

    shapes = Model(config).shapes()
    params: Params = {}
    for row in conversion_table(config):
        target = np.empty(_leaf(shapes, row.path).shape, dtype)
        for name, layer in _names(row, config):
            place = target if layer is None else target[layer]
            place[...] = row.transform.read(_floating(origin, name, tensors[name]))
        branch = params
        for key in row.path[:-1]:
            branch = branch.setdefault(key, {})
        branch[row.path[-1]] = jnp.asarray(target)
    if redundant_head:
        embedding = next(row.name for row in conversion_table(config) if row.path[0] == "embed")
        if not np.array_equal(tensors[HEAD], tensors[embedding]):
            raise UserError(
                f"{origin}: 'tie_word_embeddings' is true, but {HEAD} differs from {embedding}; "
                "set it to false in config.json to use both"
            )
    return params


def from_params(config: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """`Model` parameters -> Hugging Face tensors, one at a time, layer by layer in file order.

    Arrays keep the parameters' dtype and are C-contiguous. The inverse of `to_params`, bit for
    bit. Raises `ValueError` where ``params`` is not a tree of ``config``.
    """
    shapes = jax.tree.map(lambda leaf: leaf.shape, Model(config).shapes())
    found = jax.tree.map(lambda leaf: tuple(leaf.shape), params)
    if shapes != found:
        raise ValueError(f"the parameters do not belong to this configuration: {found} != {shapes}")
    leaves = {row.path: np.asarray(_leaf(params, row.path)) for row in conversion_table(config)}
    for name, row, layer in _file_order(config):
        leaf = leaves[row.path] if layer is None else leaves[row.path][layer]
        yield name, np.ascontiguousarray(row.transform.write(leaf))


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
