"""One layer with moments made by hand: for tests of settings, which need no trained student."""

from functools import cache

import jax
import jax.numpy as jnp

from montessori_jax.models import Model, ModelConfig
from tests.influence.students import VOCABULARY, Student, adamw

MODEL = Model(
    ModelConfig(
        family="llama",
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
)


@cache
def student(rate: float) -> Student:
    """Random weights, and Adam's state as if after 50 steps of gradients near a hundredth."""
    params = MODEL.init(jax.random.key(0))
    tx = adamw(rate)
    adam, *others = tx.init(params)
    first = jax.tree.map(lambda leaf: 0.01 * leaf, params)
    second = jax.tree.map(lambda leaf: 1e-4 * (1 + leaf * leaf), params)
    warm = adam._replace(count=jnp.int32(50), mu=first, nu=second)
    return Student(params, (warm, *others), tx)
