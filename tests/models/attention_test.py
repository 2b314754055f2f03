"""Attention against torch's scaled dot product with an explicit mask, and who sees whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from montessori_jax.models.attention import decode_attention, packed_attention, wide

ROWS, LENGTH, HEADS, KV_HEADS, DIM = 2, 12, 4, 2, 8
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], np.int32)
BRANCHES = np.array([[0, 0, 1, 1, 2, 0, 0, 1, 2, 0, 0, 0], [0] * 4 + [1] * 5 + [2] * 3], np.int32)


def inputs(dtype=np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)

    def draw(heads: int) -> np.ndarray:
        return (2 * rng.normal(size=(ROWS, LENGTH, heads, DIM))).astype(dtype)

    return draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)


def mask(segments: np.ndarray, branches: np.ndarray | None) -> np.ndarray:
    """Who sees whom, one pair of tokens at a time."""
    seen = np.zeros((ROWS, LENGTH, LENGTH), bool)
    for row in range(ROWS):
        for to in range(LENGTH):
            for of in range(to + 1):
                same = segments[row, to] == segments[row, of]
                kin = branches is None or branches[row, of] in (0, branches[row, to])
                seen[row, to, of] = same and kin
    return seen


def by_torch(query, key, value, seen: np.ndarray) -> torch.Tensor:
    group = HEADS // KV_HEADS
    query = query.transpose(1, 2)
    key, value = (x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (key, value))
    mixed = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=torch.tensor(seen)[:, None]
    )
    return mixed.transpose(1, 2)


@pytest.mark.parametrize("branches", [None, BRANCHES])
def test_agrees_with_torch_in_value_and_gradients(branches: np.ndarray | None):
    arrays = inputs()
    weight = np.random.default_rng(1).normal(size=(ROWS, LENGTH, HEADS, DIM)).astype(np.float32)
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    expected = by_torch(*tensors, mask(SEGMENTS, branches))
    (expected * torch.tensor(weight)).sum().backward()

    def total(query, key, value):
        mixed = packed_attention(query, key, value, SEGMENTS, branches)
        return jnp.sum(mixed * weight), mixed

    gradients, found = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*arrays)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=2e-6)
    for ours, theirs in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), atol=2e-5)


def test_forward_mode_agrees_with_reverse_mode():
    arrays = inputs()
    tangents = tuple(np.random.default_rng(2).normal(size=a.shape).astype("f4") for a in arrays)

    def total(*args):
        return jnp.sum(jnp.square(packed_attention(*args, SEGMENTS, BRANCHES)))

    _, forward = jax.jvp(total, arrays, tangents)
    gradients = jax.grad(total, argnums=(0, 1, 2))(*arrays)
    reverse = sum(jnp.vdot(g, t) for g, t in zip(gradients, tangents, strict=True))
    np.testing.assert_allclose(forward, reverse, rtol=1e-5)


@pytest.mark.parametrize("branches", [None, BRANCHES])
def test_what_is_not_seen_changes_no_bit(branches: np.ndarray | None):
    query, key, value = inputs()
    seen = mask(SEGMENTS, branches)
    before = np.asarray(packed_attention(query, key, value, SEGMENTS, branches))
    for row, of in [(0, 1), (0, 2), (0, 6), (0, 10), (1, 5), (1, 11)]:
        other_key, other_value = key.copy(), value.copy()
        other_key[row, of] += 3.0
        other_value[row, of] -= 5.0
        after = np.asarray(packed_attention(query, other_key, other_value, SEGMENTS, branches))
        same = (before == after).all(axis=(2, 3))
        assert same[1 - row].all()
        assert np.array_equal(same[row], ~seen[row, :, of])


def test_bfloat16_keeps_scores_and_softmax_in_float32():
    query, key, value = (jnp.asarray(a, jnp.bfloat16) for a in inputs())
    found = packed_attention(query, key, value, SEGMENTS)
    assert found.dtype == jnp.bfloat16
    exact = packed_attention(*(a.astype(jnp.float32) for a in (query, key, value)), SEGMENTS)
    # The softmax's weights are rounded once to bfloat16 (8 bits) and so is the result.
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.05)


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        query, key, value = inputs(np.float64)
        found = np.asarray(packed_attention(query, key, value, SEGMENTS))
        tensors = [torch.tensor(array) for array in (query, key, value)]
        expected = by_torch(*tensors, mask(SEGMENTS, None)).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-14)


def test_wide():
    assert wide(jnp.bfloat16) == wide(jnp.float16) == wide(jnp.float32) == jnp.float32
    assert wide(jnp.float64) == jnp.float64


@pytest.mark.parametrize(("slots", "steps"), [(5, (2, 4)), (256, (130, 40))])
def test_decoding_attends_to_the_prompt_and_to_what_is_written(slots: int, steps: tuple[int, int]):
    """Each sample by itself, by torch, on its prompt's real tokens and slots up to its step."""
    rng = np.random.default_rng(3)
    prompts, samples, prompt_length = 2, 3, 6
    lengths = np.array([6, 4], np.int32)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    query = draw(prompts, samples, HEADS, DIM)
    prompt = [draw(prompts, KV_HEADS, prompt_length, DIM) for _ in range(2)]
    own = [draw(prompts, samples, KV_HEADS, slots, DIM) for _ in range(2)]
    for array in prompt:
        array[1, :, 4:] = 1e3  # padding
    for array in own:
        for p, step in enumerate(steps):
            array[p, :, :, step + 1 :] = 1e3  # not written yet
    found = decode_attention(query, *prompt, lengths, *own, np.array(steps, np.int32))
    for p in range(prompts):
        for s in range(samples):
            key, value = (
                np.concatenate([a[p, :, : lengths[p]], b[p, s, :, : steps[p] + 1]], axis=1)
                for a, b in zip(prompt, own, strict=True)
            )
            repeated = [torch.tensor(a).repeat_interleave(2, dim=0) for a in (key, value)]
            expected = torch.nn.functional.scaled_dot_product_attention(
                torch.tensor(query[p, s])[:, None], *repeated
            )[:, 0]
            np.testing.assert_allclose(found[p, s], expected.numpy(), atol=2e-6)
