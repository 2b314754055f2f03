"""The programs of the built-in sampler: a prompt enters, all texts grow by a token."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from montessori_jax.data.packing import bucket
from montessori_jax.generation.sampler import drawing
from montessori_jax.generation.slots import enter, vacant, write
from montessori_jax.mesh import ROWS, TENSOR, row_ways
from montessori_jax.models import Model, Params
from montessori_jax.models.inference import unstack
from montessori_jax.models.sharding import AXIS_OF, dimensions
from montessori_jax.plan.programs import Program
from montessori_jax.plan.shapes import Planned, bytes_on_chip, everywhere, weights
from montessori_jax.plan.work import WRITTEN, written_as


def generation_programs(
    planned: Planned, section: str, samples: int, prompts: float
) -> list[Program]:
    """Of the teacher writing by one section of the settings: the prompt's pass, and a decode step
    for all rows.

    Each host writes with its own chips, for prompts of its own, or all together: texts are split
    over the rows of the mesh, weights over ``tensor`` alone.

    Args:
        planned: settings, models and meshes.
        section: ``generation``, ``responses`` or ``judging``.
        samples: texts to one prompt, side by side.
        prompts: of an iteration, all hosts together.
    """
    config, mesh, kind = planned.config, planned.sampling, WRITTEN[section]
    settings, model = getattr(config, section), Model(planned.teacher)
    dtype = "float32" if settings.dtype == "float32" else "bfloat16"
    # As `JaxSampler`: a slot for each part of the mesh, however few prompts are asked for.
    ways, length, longest = row_ways(mesh), bucket(kind.prompt), bucket(kind.longest)
    slots = -(-settings.prompts_per_batch // ways) * ways
    rows = slots * samples
    own = drawing(settings)
    asked, written, cache = jax.eval_shape(
        lambda: vacant(
            model, settings=own, slots=slots, samples=samples, length=longest, dtype=dtype
        )
    )
    prompt = _by_slots(asked.prompt, mesh, heads=1)
    asked = _by_slots(asked._replace(prompt=()), mesh)._replace(prompt=prompt)
    written, cache = _by_slots(written, mesh), _by_slots(cache, mesh, heads=2)
    laid = _decoding(model, mesh, dtype)
    static: dict[str, Any] = {"settings": own, "stop_ids": (2,)}
    number = everywhere(jax.ShapeDtypeStruct((), jnp.int32), mesh)
    unsigned = everywhere(jax.ShapeDtypeStruct((), jnp.uint32), mesh)
    flag = everywhere(jax.ShapeDtypeStruct((), jnp.bool_), mesh)

    def prefill() -> Any:
        tokens = everywhere(jax.ShapeDtypeStruct((1, length), jnp.int32), mesh)
        with jax.set_mesh(mesh):
            return enter.trace(
                model, laid, asked, written, number, tokens, number, unsigned, unsigned,
                samples=samples, **static,
            )  # fmt: skip

    def decode() -> Any:
        finished = everywhere(jax.ShapeDtypeStruct((rows,), jnp.bool_), mesh)
        with jax.set_mesh(mesh):
            return write.trace(
                model, laid, asked, written, cache, finished, flag, chunk=1, **static
            )

    here, count = math.ceil(prompts / planned.hosts), model.parameter_count()
    # The weights as they were loaded, and whatever else of the sampler is not in the program.
    loaded = bytes_on_chip(weights(model, mesh, dtype))
    name = written_as(section, samples)
    group = "judging" if section == "judging" else "generation"
    lower = ("mesh.sampler", f"{section}.prompts_per_batch", f"{section}.max_tokens")
    return [
        Program(
            group,
            f"{name}: prefill",
            f"a prompt of {length} tokens",
            prefill,
            mesh,
            runs=here,
            model_flops=2.0 * count * length,
            beside=loaded + bytes_on_chip(cache),
            lower=lower,
        ),
        Program(
            group,
            f"{name}: decode",
            f"a token for each of {rows} rows",
            decode,
            mesh,
            runs=math.ceil(here / slots) * kind.written,
            model_flops=2.0 * count * rows,
            beside=loaded,
            read=bytes_on_chip(laid),
            lower=lower,
        ),
    ]


def _decoding(model: Model, mesh: jax.sharding.Mesh, dtype: str) -> Params:
    """`unstack`'s weights, split over ``tensor``: layers apart, kernels outputs first."""
    shapes = jax.eval_shape(lambda params: unstack(model, params, jnp.dtype(dtype)), model.shapes())

    def put(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [key.key for key in path if hasattr(key, "key")]
        if names[0] == "embedding":
            kinds: tuple[str, ...] = ("vocab", "width")
        elif names[0] == "head":
            kinds = ("vocab", "width")
        elif names[0] == "norm":
            kinds = ("norm",)
        else:
            kinds = dimensions(tuple(names[1:]))[1:]
            kinds = kinds[::-1] if names[-1] == "kernel" else kinds
        spec = [
            TENSOR if AXIS_OF[kind] == TENSOR and size % mesh.shape[TENSOR] == 0 else None
            for kind, size in zip(kinds, leaf.shape, strict=True)
        ]
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(put, shapes)


def _by_slots(tree: Any, mesh: jax.sharding.Mesh, heads: int | None = None) -> Any:
    """Texts and caches split over the mesh, as `montessori_jax.generation.slots.split` does."""

    def put(leaf: Any) -> Any:
        own = PartitionSpec(ROWS) if np.ndim(leaf) else PartitionSpec()
        if heads is not None and leaf.shape[heads] % mesh.shape[TENSOR] == 0:
            own = PartitionSpec(ROWS, *[None] * (heads - 1), TENSOR)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, own))

    return jax.tree.map(put, tree)
