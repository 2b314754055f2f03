"""Precisions by name: how the products inside losses and gradients are computed.

- ``float32``: every product float32 to the last bit (JAX's ``highest``). The default of GPUs (TF32)
  and TPUs (one bf16 pass) is coarser than the differences that influence is made of.
- ``bf16_split``: float32 in and out, each product as six bf16 products on matrix units (the dot
  algorithm ``BF16_BF16_F32_X6``, about 24 bits), where the backend offers it.
- ``bfloat16``: activations and products in bf16. Its noise floor is measured and printed.
"""

from functools import cache

import jax
import jax.numpy as jnp

from montessori_jax.errors import UserError

SPLIT = "BF16_BF16_F32_X6"
MATMUL = {"float32": "highest", "float64": "highest", "bf16_split": SPLIT, "bfloat16": "default"}


def matmul_precision(name: str) -> str:
    """The value for `jax.default_matmul_precision`."""
    return MATMUL[name]


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of activations."""
    return jnp.dtype("float32" if name == "bf16_split" else name)


@cache
def require_precision(name: str) -> None:
    """Raises `UserError` where this backend cannot compute in the precision of that name."""
    if name != "bf16_split":
        return
    one = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    try:
        with jax.default_matmul_precision(SPLIT):
            jax.jit(jnp.dot).lower(one, one).compile()
    except Exception as error:
        raise UserError(
            f"precision bf16_split needs products that {jax.default_backend()} does not offer "
            f"({SPLIT}): use float32"
        ) from error
