"""Fused attention kernels, and when each is exactly what `packed_attention` defines.

Both have reverse-mode derivatives alone: forward mode (`jax.jvp`) raises through them and needs
the plain implementation.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from montessori_jax.errors import UserError
from montessori_jax.mesh import TENSOR, row_axes

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")
BY_BACKEND = {"gpu": "cudnn", "tpu": "splash"}
# Splash attention works in blocks of 128 or more. cuDNN's backward pass with a mask has given NaN
# on an H100 where length % 128 is 64 (pytorch issue 196678), so it gets whole blocks too.
BLOCK = 128
LARGEST_BLOCK = 512
CUDNN_LARGEST_HEAD = 128


def choose(
    implementation: str,
    query: Float[Array, "rows length heads dim"],
    *,
    branches: bool,
    soft_cap: float | None,
    backend: str | None = None,
) -> str:
    """``xla``, ``cudnn`` or ``splash``: the one asked for, or for ``auto`` the backend's fastest.

    ``auto`` takes ``xla`` where the backend's kernel would not compute exactly what is asked. The
    backend is the platform of the mesh that is set (`jax.set_mesh`), which need not be this
    host's: programs are compiled for chips that are not there too.

    Raises:
        UserError: a kernel that was named cannot compute this, and why.
    """
    backend = backend or platform()
    if implementation == "auto":
        fastest = BY_BACKEND.get(backend, "xla")
        return "xla" if _obstacle(fastest, query, branches, soft_cap, backend) else fastest
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"attention '{implementation}' is not known; choose {', '.join(IMPLEMENTATIONS)}"
        )
    reason = _obstacle(implementation, query, branches, soft_cap, backend)
    if reason:
        raise UserError(f"attention '{implementation}' {reason}; set attention to auto or xla")
    return implementation


def platform() -> str:
    """``cpu``, ``gpu`` or ``tpu``: of the mesh that is set, or JAX's default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _obstacle(
    kernel: str, query: Array, branches: bool, soft_cap: float | None, backend: str
) -> str | None:
    """Why ``kernel`` is not exact here, or does not run."""
    if kernel == "xla":
        return None
    wanted = next(name for name, its in BY_BACKEND.items() if its == kernel)
    if backend != wanted:
        return f"needs a {wanted.upper()}, but JAX runs on a {backend.upper()}"
    if query.shape[1] % BLOCK:
        return f"needs rows of a multiple of {BLOCK} tokens, not {query.shape[1]}"
    if kernel == "splash":
        return "cannot keep branches of one prompt apart" if branches else None
    if soft_cap is not None:
        return "has no soft cap, which this model needs"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 alone, not {query.dtype}"
    if query.shape[-1] > CUDNN_LARGEST_HEAD:
        return f"has heads of at most {CUDNN_LARGEST_HEAD} features, not {query.shape[-1]}"
    return None


def by_dot_product(
    query: Float[Array, "rows length heads dim"],
    key: Float[Array, "rows length kv_heads dim"],
    value: Float[Array, "rows length kv_heads dim"],
    allowed: Bool[Array, "rows length length"],
    scale: float,
    kernel: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "rows length heads dim"]:
    """`jax.nn.dot_product_attention` with the mask written out: exact for every mask."""
    return jax.nn.dot_product_attention(
        query, key, value, mask=allowed[:, None], scale=scale, implementation=kernel
    )


def by_splash(
    query: Float[Array, "rows length heads dim"],
    key: Float[Array, "rows length kv_heads dim"],
    value: Float[Array, "rows length kv_heads dim"],
    segment_ids: Int[Array, "rows length"],
    *,
    window: int | None,
    sliding: bool | Bool[Array, ""],
    scale: float,
    soft_cap: float | None,
    interpret: bool = False,
) -> Float[Array, "rows length heads dim"]:
    """Splash attention, JAX's Pallas kernel for TPUs, which skips blocks that nobody sees.

    Its masks are static: where only a traced value tells whether a layer slides, both kernels are
    compiled and one of them runs. On a mesh that is set each device attends for its own rows and
    heads, for the compiler cannot split a kernel. ``interpret`` runs it on a CPU, slowly, for
    tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length = query.shape[1]
    block = next(size for size in (LARGEST_BLOCK, LARGEST_BLOCK // 2, BLOCK) if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def attend(window: int | None) -> Array:
        # How many tokens back and ahead; none back is no limit.
        reach = (None if window is None else window - 1, 0)
        seen = splash.LocalMask((length, length), reach, offset=0)

        def here(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
            kernel = splash.make_splash_mha_single_device(
                splash.MultiHeadMask([seen] * query.shape[2]),
                block_sizes=sizes,
                attn_logits_soft_cap=soft_cap,
                interpret=interpret,
            )

            def one(query: Array, key: Array, value: Array, segments: Array) -> Array:
                return kernel(query, key, value, segment_ids=splash.SegmentIds(segments, segments))

            # The kernel has neither a batch axis nor a scale. In float32: a rounded scale is a
            # bias.
            scaled = (query.astype(jnp.float32) * scale).astype(query.dtype).swapaxes(1, 2)
            mixed = jax.vmap(one)(scaled, key.swapaxes(1, 2), value.swapaxes(1, 2), segment_ids)
            return mixed.swapaxes(1, 2)

        split = _split(here, query.shape[0], key.shape[2])
        return split(query, key, value, segment_ids)

    if window is None or isinstance(sliding, bool):
        return attend(window if sliding else None)
    return jax.lax.cond(sliding, lambda: attend(window), lambda: attend(None))


def _split(attend: Callable[..., Array], rows: int, kv_heads: int) -> Callable[..., Array]:
    """``attend(query, key, value, segment_ids)`` with rows and heads split over the mesh's axes.

    Over those axes that no `jax.shard_map` around has taken; what an axis does not divide, all of
    its devices compute.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}
    if not free:
        return attend
    by_rows, _ = row_axes(rows)
    by_heads = TENSOR if TENSOR in free and kv_heads % free[TENSOR] == 0 else None
    whole = PartitionSpec(by_rows or None, None, by_heads)
    return jax.shard_map(
        attend,
        in_specs=(whole, whole, whole, PartitionSpec(by_rows or None)),
        out_specs=whole,
        axis_names=set(free),
        check_vma=False,  # a Pallas call does not say over which axes its results vary
    )
