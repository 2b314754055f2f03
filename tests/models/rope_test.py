"""Rotary embedding against transformers' and against complex multiplication in float64."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from montessori_jax.models.config import RopeScaling
from montessori_jax.models.families import family_of, to_hf_config
from montessori_jax.models.rope import inverse_frequencies, rotate, rotation
from tests.models.tiny import CONFIG

BASE = family_of(CONFIG | {"head_dim": 64, "max_position_embeddings": 131072}, "x")
SCALINGS = (None, RopeScaling("linear", 4.0), RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128])
@pytest.mark.parametrize("theta", [10000.0, 130000.0, 500000.0])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_are_those_of_transformers(head_dim: int, theta: float, scaling):
    config = replace(BASE, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    settings = {k: v for k, v in to_hf_config(config).items() if k != "model_type"}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(settings)))).inv_freq.numpy()
    ours = inverse_frequencies(config)
    assert ours.dtype == np.float32
    # Bit for bit where the exponents are exact; elsewhere torch's float32 power may be one bit off.
    if head_dim & (head_dim - 1) == 0:
        assert np.array_equal(ours, theirs)
    else:
        np.testing.assert_array_max_ulp(ours, theirs, maxulp=1)


def test_llama3_rule_by_hand():
    config = replace(BASE, head_dim=8, rope_theta=10000.0, rope_scaling=SCALINGS[2])
    # Wavelengths 6.28, 62.8, 628, 6283; below 8192 / 4 = 2048 kept; 6283 lies between 2048 and
    # 8192: (8192 / 6283.2 - 1) / 3 = 0.10127 of 1e-3 is kept, the rest is divided by 8.
    kept = (8192 / (2000 * math.pi) - 1) / 3
    expected = [1.0, 0.1, 0.01, 1e-3 * ((1 - kept) / 8 + kept)]
    assert kept == pytest.approx(0.10127, rel=1e-4)
    np.testing.assert_allclose(inverse_frequencies(config), expected, rtol=1e-6)
    slow = replace(config, rope_theta=1e8)  # wavelengths 6.28, 628, 62,832, 6,283,185
    np.testing.assert_allclose(
        inverse_frequencies(slow), [1.0, 0.01, 1e-4 / 8, 1e-6 / 8], rtol=1e-6
    )


def test_cosines_are_true_at_far_positions():
    positions = np.array([[0, 1, 100, 8191, 131071]], np.int32)
    cos, sin = jax.jit(lambda places: rotation(BASE, places))(positions)
    angle = positions[..., None].astype(np.float32) * inverse_frequencies(BASE).reshape(1, 1, -1)
    np.testing.assert_allclose(cos, np.cos(angle.astype(np.float64)), atol=1e-7, rtol=0)
    np.testing.assert_allclose(sin, np.sin(angle.astype(np.float64)), atol=1e-7, rtol=0)


def test_rotation_is_a_complex_multiplication_of_the_halves():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 64)).astype(np.float32)
    positions = rng.integers(0, 1000, (2, 5)).astype(np.int32)
    cos, sin = rotation(BASE, jnp.asarray(positions))
    found = np.asarray(rotate(jnp.asarray(x), cos, sin))
    turn = np.exp(1j * (positions[..., None] * inverse_frequencies(BASE).reshape(1, 1, -1)))
    z = (x[..., :32] + 1j * x[..., 32:]) * turn[:, :, None, :]
    np.testing.assert_allclose(found, np.concatenate([z.real, z.imag], -1), atol=2e-4)


def test_scores_depend_on_distance_alone():
    rng = np.random.default_rng(1)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 64)), jnp.float32) for _ in range(2))

    def score(at: int, other: int) -> float:
        q = rotate(query, *rotation(BASE, jnp.asarray([at], jnp.int32)))
        k = rotate(key, *rotation(BASE, jnp.asarray([other], jnp.int32)))
        return float(jnp.sum(q * k))

    assert score(10, 3) == pytest.approx(score(507, 500), abs=1e-4)
    assert score(10, 3) != pytest.approx(score(10, 4), abs=1e-2)


def test_bfloat16_heads_are_rotated_in_float32():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(1, 1, 1, 64)), jnp.bfloat16)
    cos, sin = rotation(BASE, jnp.asarray([[4001]], jnp.int32))
    found = rotate(x, cos, sin)
    assert found.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), cos, sin)
    assert jnp.array_equal(found, exact.astype(jnp.bfloat16))


def test_torch_applies_the_same_rotation():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rng = np.random.default_rng(3)
    x = rng.normal(size=(1, 7, 2, 64)).astype(np.float32)
    cos, sin = rotation(BASE, jnp.arange(7, dtype=jnp.int32)[None])
    two = [torch.tensor(np.asarray(part)).repeat(1, 1, 2) for part in (cos, sin)]
    theirs, _ = apply_rotary_pos_emb(torch.tensor(x), torch.tensor(x), *two, unsqueeze_dim=2)
    np.testing.assert_allclose(rotate(jnp.asarray(x), cos, sin), theirs.numpy(), atol=1e-6)
