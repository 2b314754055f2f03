"""Compiled programs are counted: one a shape, none the second time."""

import jax
import jax.numpy as jnp
import numpy as np

from montessori_jax.programs import counted_programs


def test_a_program_a_shape():
    @jax.jit
    def double(x):
        return jnp.sin(x) * 2

    with counted_programs() as found:
        for size in (3, 4, 3, 4, 4):
            double(np.ones(size, np.float32))
    assert found.count == 2
    assert found.seconds > 0
    double(np.ones(5, np.float32))
    assert found.count == 2
