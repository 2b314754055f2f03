"""Which axis of the mesh splits which dimension of a decoder: one table, and what follows from it.

Weights are split over ``fsdp`` by the width that goes in or out, and over ``tensor`` by what a
layer has many of (Megatron's split, arXiv 1909.08053; ZeRO's, arXiv 1910.02054). Activations are
split by rows over every axis but ``tensor``.
"""

from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from montessori_jax.errors import UserError
from montessori_jax.mesh import FSDP, TENSOR, put
from montessori_jax.models.config import ModelConfig
from montessori_jax.models.decoder import Model, Params

# Of each kind of dimension, the axis that splits it.
AXIS_OF = {
    "layers": None,
    "vocab": TENSOR,
    "width": FSDP,
    "heads": TENSOR,  # query heads times their dimension
    "kv_heads": TENSOR,
    "inner": TENSOR,
    "head": None,  # one head's dimension
    "rank": None,
    "norm": None,  # as wide as the model, and small
}
# The dimensions of each parameter, by the end of its path.
DIMENSIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("embed", "embedding"): ("vocab", "width"),
    ("query", "kernel"): ("layers", "width", "heads"),
    ("query", "bias"): ("layers", "heads"),
    ("key", "kernel"): ("layers", "width", "kv_heads"),
    ("key", "bias"): ("layers", "kv_heads"),
    ("value", "kernel"): ("layers", "width", "kv_heads"),
    ("value", "bias"): ("layers", "kv_heads"),
    ("out", "kernel"): ("layers", "heads", "width"),
    ("out", "bias"): ("layers", "norm"),
    ("query_norm", "scale"): ("layers", "head"),
    ("key_norm", "scale"): ("layers", "head"),
    ("gate", "kernel"): ("layers", "width", "inner"),
    ("gate", "bias"): ("layers", "inner"),
    ("up", "kernel"): ("layers", "width", "inner"),
    ("up", "bias"): ("layers", "inner"),
    ("down", "kernel"): ("layers", "inner", "width"),
    ("down", "bias"): ("layers", "norm"),
    ("attention_norm", "scale"): ("layers", "norm"),
    ("attention_post_norm", "scale"): ("layers", "norm"),
    ("mlp_norm", "scale"): ("layers", "norm"),
    ("mlp_post_norm", "scale"): ("layers", "norm"),
    ("norm", "scale"): ("norm",),
    ("head", "kernel"): ("width", "vocab"),
}


def dimensions(path: tuple[str, ...]) -> tuple[str, ...]:
    """What each axis of the parameter at ``path`` is; an adapter's follow from its kernel's."""
    module, name = path[-2:]
    if name == "lora_a":
        return (*DIMENSIONS[module, "kernel"][:2], "rank")
    if name == "lora_b":
        layers, _, outputs = DIMENSIONS[module, "kernel"]
        return (layers, "rank", outputs)
    return DIMENSIONS[module, name]


def check_mesh(config: ModelConfig, mesh: Mesh | None) -> None:
    """Raise `UserError` where the mesh does not divide the model, naming the setting to change."""
    if mesh is None:
        return
    for axis, counts in (
        (FSDP, {"hidden_size": config.hidden_size}),
        (
            TENSOR,
            {
                "num_attention_heads": config.num_heads,
                "intermediate_size": config.intermediate_size,
            },
        ),
    ):
        for name, count in counts.items():
            if count % mesh.shape[axis]:
                writing = " (mesh.sampler where that is set, for writing)"
                raise UserError(
                    f"mesh.{axis} {mesh.shape[axis]} does not divide the model's {name} {count}: "
                    f"set mesh.{axis}{writing if axis == TENSOR else ''} to a divisor of it"
                )


def param_specs(model: Model, mesh: Mesh) -> Any:
    """The `PartitionSpec` of every parameter; what an axis does not divide is left whole.

    So are keys and values where there are fewer heads of them than ``tensor`` could split.

    Args:
        model: a decoder; for a LoRA model the specs are its adapter's.
        mesh: of `montessori_jax.mesh.make_mesh`.
    """
    whole = {"kv_heads"} if model.config.num_kv_heads % mesh.shape[TENSOR] else set()

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        names = dimensions(tuple(key.key for key in path))
        axes = [None if name in whole else AXIS_OF[name] for name in names]
        return PartitionSpec(
            *(
                axis if axis and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(axes, leaf.shape, strict=True)
            )
        )

    return jax.tree_util.tree_map_with_path(spec, model.shapes())


def param_shardings(model: Model, mesh: Mesh) -> Any:
    """Where every parameter of ``model`` lies (of an adapter alone, for a LoRA model)."""
    check_mesh(model.config, mesh)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        param_specs(model, mesh),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def moment_shardings(tx: optax.GradientTransformation, params: Params, mesh: Mesh) -> Any:
    """Where an optimizer's state lies: each moment with its parameter, all else everywhere.

    ``params`` lie on the mesh, or are `jax.ShapeDtypeStruct` with their shardings.
    """
    return optax.tree_utils.tree_map_params(
        tx,
        lambda _, param: param.sharding,
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )


def laid_out(model: Model, params: Params, mesh: Mesh | None) -> Params:
    """Parameters on the mesh; nothing is copied where they are there already."""
    return params if mesh is None else put(params, param_shardings(model, mesh))
