"""Precisions by name, and a clear error where the backend has none of that name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from montessori_jax.errors import UserError
from montessori_jax.influence.precision import (
    compute_dtype,
    matmul_precision,
    require_precision,
)


def test_split_products_are_float32_or_refused():
    # float32-faithful where the backend has it: far closer to float64 than one bf16 pass.
    assert compute_dtype("bf16_split") == jnp.float32
    if jax.default_backend() == "cpu":
        require_precision("bf16_split")  # XLA's CPU compiler knows the name
    else:
        try:
            require_precision("bf16_split")
        except UserError as error:
            pytest.skip(str(error))
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 64, 64)).astype(np.float32)
    with jax.default_matmul_precision(matmul_precision("bf16_split")):
        found = jax.jit(jnp.dot)(a, b)
    np.testing.assert_allclose(found, a.astype(np.float64) @ b, atol=2e-5)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_others_are_everywhere(name):
    require_precision(name)
    assert compute_dtype(name) == jnp.dtype(name)
