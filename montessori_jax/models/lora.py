"""Low-rank adapters (LoRA, arXiv 2106.09685): ``x W + s (x A) B`` with ``W`` frozen and shared.

Our own few lines, since `flax.nnx.LoRA` and quax keep the adapter in the model's tree or re-trace
the model, and jax-lorax is no longer maintained (last release February 2024): here ``params`` of
every step and loss is the adapter alone, and the base is one argument of the program.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from montessori_jax.errors import UserError
from montessori_jax.models.config import ModelConfig
from montessori_jax.models.decoder import Model, Params
from montessori_jax.models.families import Row, conversion_table

ALL_LINEAR = "all-linear"
WEIGHT = ".weight"


@dataclass(frozen=True)
class LoraSpec:
    """Which linear layers get an adapter, of which rank and scale.

    Attributes:
        rank: width of ``A`` and height of ``B``.
        alpha: the scale is ``alpha / rank``, with ``rslora`` ``alpha / sqrt(rank)``.
        targets: names as peft's ``target_modules`` has them, whole or the last parts of a Hugging
            Face name: ``q_proj``, ``mlp.down_proj``; ``all-linear`` is every linear layer of the
            blocks (the head is none of them).
        rslora: rank-stabilised scale (arXiv 2312.03732).
    """

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    rslora: bool = False

    @property
    def scale(self) -> float:
        """``s``."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@partial(jax.tree_util.register_dataclass, data_fields=("base", "a", "b"), meta_fields=("scale",))
@dataclass(frozen=True)
class LoraKernel:
    """What stands in for a kernel: ``x @ this`` is ``x @ base + scale (x @ a) @ b``.

    The product of ``a`` and ``b`` is never formed, so that many adapters (a vmap over ``a`` and
    ``b``) share one product with ``base``. Has what `Linear` asks of an array.
    """

    base: Float[Array, "*layers inputs outputs"]
    a: Float[Array, "*layers inputs rank"]
    b: Float[Array, "*layers rank outputs"]
    scale: float

    def __getitem__(self, key: Any) -> "LoraKernel":
        if key is not Ellipsis:
            raise TypeError("an adapted kernel can only be taken whole")
        return self

    def astype(self, dtype: jnp.dtype | type) -> "LoraKernel":
        return jax.tree.map(lambda leaf: leaf.astype(dtype), self)

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.base + ((x @ self.a) * self.scale) @ self.b


@jax.jit
def _merged(base: Array, a: Array, b: Array, scale: Array) -> Array:
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (base.astype(product.dtype) + scale.astype(product.dtype) * product).astype(base.dtype)


def target_rows(config: ModelConfig, targets: tuple[str, ...]) -> tuple[Row, ...]:
    """The rows of the family's table that ``targets`` name, in its order.

    Raises:
        UserError: a target that names no linear layer of the blocks.
    """
    linear = [
        row
        for row in conversion_table(config)
        if "{layer}" in row.name and row.path[-1] == "kernel" and row.name.endswith(WEIGHT)
    ]

    def named(row: Row, target: str) -> bool:
        return target == ALL_LINEAR or f".{module(row)}".endswith(f".{target}")

    for target in targets:
        if not any(named(row, target) for row in linear):
            known = ", ".join([ALL_LINEAR, *(module(row).rpartition(".")[2] for row in linear)])
            raise UserError(
                f"LoRA target '{target}' is no linear layer of this {config.family} model; "
                f"there are: {known}"
            )
    chosen = tuple(row for row in linear if any(named(row, target) for target in targets))
    if not chosen:
        raise UserError(f"LoRA has no targets: name some, or {ALL_LINEAR}")
    return chosen


def module(row: Row) -> str:
    """The Hugging Face name of a row's module, with ``{layer}`` in it."""
    return row.name.removesuffix(WEIGHT)


def adapter_shapes(model: Model, spec: LoraSpec) -> Params:
    """The adapter's tree as `jax.ShapeDtypeStruct` leaves, float32.

    Nested as the parameters are; in each target's place ``lora_a [layers, inputs, rank]`` and
    ``lora_b [layers, rank, outputs]``. Raises `UserError` as `target_rows` does.
    """
    if spec.rank < 1:
        raise UserError(f"LoRA rank {spec.rank}: an adapter needs a rank of 1 or more")
    shapes = model.shapes()

    def pair(row: Row) -> Params:
        layers, inputs, outputs = leaf_at(shapes, row.path).shape
        sizes = {"lora_a": (layers, inputs, spec.rank), "lora_b": (layers, spec.rank, outputs)}
        return {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}

    return nest(target_rows(model.config, spec.targets), pair)


def init_adapter(key: Array, model: Model, spec: LoraSpec) -> Params:
    """A fresh adapter as peft makes one: ``A`` uniform in ``+-1 / sqrt(inputs)``, ``B`` zero.

    So the adapted model begins as its base. Float32 whatever the base's dtype. Each target's
    numbers depend on ``key`` and its name alone.
    """
    shapes = adapter_shapes(model, spec)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        if path[-1].key == "lora_b":
            return jnp.zeros(leaf.shape, leaf.dtype)
        own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        bound = leaf.shape[1] ** -0.5
        return jax.random.uniform(own, leaf.shape, leaf.dtype, -bound, bound)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def adapted(base: Params, adapter: Params, scale: float) -> Params:
    """The tree of ``base`` with a `LoraKernel` wherever ``adapter`` has one; nothing is copied."""
    if "lora_a" in adapter:
        kernel = LoraKernel(base["kernel"], adapter["lora_a"], adapter["lora_b"], scale)
        return {**base, "kernel": kernel}
    return {
        name: adapted(part, adapter[name], scale) if name in adapter else part
        for name, part in base.items()
    }


def merge(base: Params, adapter: Params, spec: LoraSpec, *, consume: bool = False) -> Params:
    """Plain parameters: ``W + s A B`` for each target, the rest as in ``base``.

    Summed in float32 and rounded once to ``base``'s dtype.

    Args:
        base: the parameters that the adapter was trained on.
        adapter: the adapter.
        spec: its scale.
        consume: free each kernel of ``base`` once its sum is there: the caller does not need it.
    """

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, LoraKernel):
            return leaf
        total = _merged(leaf.base, leaf.a, leaf.b, jnp.float32(leaf.scale))
        if consume:
            jax.block_until_ready(total)
            leaf.base.delete()
        return total

    return jax.tree.map(
        plain, adapted(base, adapter, spec.scale), is_leaf=lambda x: isinstance(x, LoraKernel)
    )


@partial(jax.tree_util.register_dataclass, data_fields=("base",), meta_fields=("config", "spec"))
@dataclass(frozen=True, eq=False)
class LoraModel(Model):
    """A decoder whose ``params`` are an adapter; the base's parameters are part of the model.

    A pytree: as an argument of a jitted function its base is an argument too, never a constant
    of the program, and stays one copy where ``params`` are vmapped. Takes a `Model`'s place in
    training and influence. Sampling and export want plain parameters: `merge`.
    """

    base: Params
    spec: LoraSpec
    __hash__ = None  # type: ignore[assignment]  # static, its base would be a constant

    def shapes(self) -> Params:
        """The adapter's tree, as `adapter_shapes`."""
        return adapter_shapes(self.decoder, self.spec)

    def init(self, key: Array) -> Params:
        """A fresh adapter, as `init_adapter`."""
        return init_adapter(key, self.decoder, self.spec)

    def parameter_count(self) -> int:
        """Of the base, which decides what a pass costs; adapters add a percent or so."""
        return self.decoder.parameter_count()

    @property
    def decoder(self) -> Model:
        """The model without an adapter."""
        return Model(self.config)

    def head(self, params: Params) -> Float[Array, "width vocab"]:
        """The base's output projection."""
        return super().head(self.base)

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "rows length"],
        segment_ids: Int[Array, "rows length"],
        positions: Int[Array, "rows length"],
        **options: Any,
    ) -> Float[Array, "rows length width"]:
        """As `Model.hidden`, of the base with the adapter ``params`` added."""
        whole = adapted(self.base, params, self.spec.scale)
        return super().hidden(whole, tokens, segment_ids, positions, **options)

    def merged(self, params: Params, *, consume: bool = False) -> Params:
        """Plain parameters for `decoder`, as `merge`."""
        return merge(self.base, params, self.spec, consume=consume)


def leaf_at(tree: Params, path: tuple[str, ...]) -> Any:
    """What lies at ``path`` in a nested dict."""
    for key in path:
        tree = tree[key]
    return tree


def nest(rows: tuple[Row, ...], content: Callable[[Row], Params]) -> Params:
    """A nested dict with ``content(row)`` in the place of each row's module."""
    tree: Params = {}
    for row in rows:
        place = tree
        for key in row.path[:-1]:
            place = place.setdefault(key, {})
        place |= content(row)
    return tree
