"""Cross-entropy against torch in value and gradient, both derivative modes, sums by sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from montessori_jax.data.chat import EncodedChat
from montessori_jax.data.packing import Batch, assign_rows, pack
from montessori_jax.models import Model, Params
from montessori_jax.models.families import family_of
from montessori_jax.models.weights import to_params
from montessori_jax.training.losses import cross_entropy, sum_by_sample, token_losses
from tests.models.tiny import CONFIG, state, torch_model

WIDTH, VOCAB = 24, 61


def inputs(tokens: int, dtype=np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(tokens, WIDTH)).astype(dtype)
    head = rng.normal(size=(WIDTH, VOCAB)).astype(dtype)
    return hidden, head, rng.integers(0, VOCAB, tokens).astype(np.int32)


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 256), (10, 256), (12, 4), (13, 4), (5, 1)])
def test_agrees_with_torch_in_value_and_gradient(tokens: int, chunk: int):
    hidden, head, targets = inputs(tokens)
    weight = np.random.default_rng(1).normal(size=tokens).astype(np.float32)
    their_hidden, their_head = (torch.tensor(a, requires_grad=True) for a in (hidden, head))
    expected = torch.nn.functional.cross_entropy(
        their_hidden @ their_head, torch.tensor(targets).long(), reduction="none"
    )
    (expected * torch.tensor(weight)).sum().backward()

    def total(hidden, head):
        losses = cross_entropy(hidden, head, targets, chunk=chunk)
        return jnp.sum(losses * weight), losses

    gradients, found = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(hidden, head)
    assert found.shape == (tokens,)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients[0], their_hidden.grad.numpy(), atol=1e-5)
    np.testing.assert_allclose(gradients[1], their_head.grad.numpy(), atol=2e-5)


def test_by_hand():
    # Logits (0, ln 2, ln 5): probabilities 1/8, 2/8, 5/8.
    hidden = jnp.ones((3, 1))
    head = jnp.log(jnp.asarray([[1.0, 2.0, 5.0]]))
    losses = cross_entropy(hidden, head, jnp.asarray([0, 1, 2], jnp.int32))
    np.testing.assert_allclose(losses, np.log([8, 4, 8 / 5]), rtol=1e-6)


def test_huge_logits_stay_finite():
    hidden = jnp.asarray([[1e4], [-1e4]])
    head = jnp.asarray([[1.0, -1.0]])
    losses = cross_entropy(hidden, head, jnp.asarray([0, 0], jnp.int32))
    np.testing.assert_allclose(losses, [0.0, 2e4])


def test_float64_agrees_to_float64_precision():
    hidden, head, targets = inputs(9, np.float64)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(hidden @ head), torch.tensor(targets).long(), reduction="none"
    )
    with jax.enable_x64(True):
        found = cross_entropy(jnp.asarray(hidden), jnp.asarray(head), targets, chunk=4)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-13)


def test_bfloat16_sums_in_float32():
    hidden, head, targets = inputs(40)
    narrow = jnp.asarray(hidden, jnp.bfloat16)
    found = cross_entropy(narrow, jnp.asarray(head), targets, chunk=16)
    assert found.dtype == jnp.float32
    rounded = np.asarray(jnp.asarray(head, jnp.bfloat16), np.float32)
    exact = cross_entropy(np.asarray(narrow, np.float32), rounded, targets)
    # Only the inputs are rounded: products, log-sum-exp and difference are float32.
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_bfloat16_gradient_of_the_head_is_summed_in_float32():
    """One target many times over: a bfloat16 sum would stop growing after 256 equal terms."""
    tokens = 2048
    hidden = jnp.ones((tokens, 1), jnp.bfloat16)
    head = jnp.zeros((1, 2), jnp.float32)
    targets = jnp.zeros(tokens, jnp.int32)
    gradient = jax.grad(lambda head: jnp.sum(cross_entropy(hidden, head, targets, chunk=1)))(head)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, [[-tokens / 2, tokens / 2]])


def test_logits_of_all_tokens_never_exist_at_once():
    tokens, vocab, width = 4096, 8192, 16
    shapes = (
        jax.ShapeDtypeStruct((tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )

    def total(hidden, head, targets):
        return jnp.sum(cross_entropy(hidden, head, targets))

    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 4


CHATS = [
    EncodedChat(np.random.default_rng(index).integers(0, VOCAB, length).astype(np.int32), prompt)
    for index, (length, prompt) in enumerate([(9, 4), (5, 1), (12, 11), (7, 2), (3, 2)])
]


def batch_of(chats: list[EncodedChat], row_length: int = 16) -> Batch:
    return pack(
        chats, assign_rows([len(c.tokens) for c in chats], row_length), row_length=row_length
    )


def student(tied: bool) -> tuple[LlamaForCausalLM, Model, Params]:
    config_json = CONFIG | {"tie_word_embeddings": tied}
    theirs = torch_model(config_json)
    config = family_of(config_json, "x")
    return theirs, Model(config), to_params(config, state(theirs))


def torch_losses(model: LlamaForCausalLM, chat: EncodedChat) -> torch.Tensor:
    """Losses of the response's tokens, the sample alone, as transformers' labels define them."""
    ids = torch.tensor(chat.tokens).long()[None]
    logits = model(ids).logits[0, chat.prompt_length - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, ids[0, chat.prompt_length :], reduction="none")


def test_packed_losses_agree_with_transformers_sample_by_sample():
    theirs, model, params = student(tied=False)
    batch = batch_of(CHATS)
    assert batch.tokens.shape[0] < len(CHATS)  # several samples share a row
    sums = sum_by_sample(token_losses(model, params, batch), batch, len(CHATS))
    for index, chat in enumerate(CHATS):
        expected = torch_losses(theirs, chat)
        assert sums.targets[index] == len(expected)
        np.testing.assert_allclose(sums.total[index], expected.sum().item(), rtol=1e-5)
        labels = torch.tensor(chat.tokens).long()[None].clone()
        labels[:, : chat.prompt_length] = -100
        own = theirs(torch.tensor(chat.tokens).long()[None], labels=labels).loss.item()
        np.testing.assert_allclose(sums.total[index] / sums.targets[index], own, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_gradients_of_all_parameters_agree_with_torch(tied: bool, remat: str):
    theirs, model, params = student(tied)
    sum(torch_losses(theirs, chat).mean() for chat in CHATS).backward()
    expected = to_params(
        model.config,
        {
            name: parameter.grad.numpy()
            for name, parameter in theirs.named_parameters()
            if not (tied and name == "lm_head.weight")
        },
    )
    batch = batch_of(CHATS)

    @jax.jit
    def gradient(params: Params) -> Params:
        def loss(params: Params) -> jax.Array:
            sums = sum_by_sample(token_losses(model, params, batch, remat=remat), batch, len(CHATS))
            return jnp.sum(sums.total / sums.targets)

        return jax.grad(loss)(params)

    found = gradient(params)
    for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(wanted).max()
        assert scale > 0
        np.testing.assert_allclose(ours, wanted, atol=1e-5 * scale)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_forward_mode_agrees_with_reverse_mode(remat: str):
    _, model, params = student(tied=True)
    batch = batch_of(CHATS)
    rng = np.random.default_rng(3)
    tangent = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)

    def losses(params: Params) -> jax.Array:
        return token_losses(model, params, batch, remat=remat) * batch.target_weights

    _, forward = jax.jit(lambda p, t: jax.jvp(losses, (p,), (t,)))(params, tangent)
    weight = jnp.asarray(rng.normal(size=forward.shape), jnp.float32)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(losses(p) * weight)))(params)
    dots = jax.tree.map(jnp.vdot, gradient, tangent)
    np.testing.assert_allclose(jnp.sum(forward * weight), sum(jax.tree.leaves(dots)), rtol=1e-4)


def test_forward_mode_agrees_with_finite_differences_in_float64():
    _, model, params = student(tied=False)
    batch = batch_of(CHATS)
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda p: jnp.asarray(np.asarray(p), jnp.float64), params)
        tangent = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), wide)

        @jax.jit
        def losses(params: Params) -> jax.Array:
            found = token_losses(model, params, batch, dtype=jnp.float64)
            return jnp.where(batch.target_weights > 0, found, 0.0)

        def moved(step: float) -> jax.Array:
            return losses(jax.tree.map(lambda p, t: p + step * t, wide, tangent))

        _, forward = jax.jvp(losses, (wide,), (tangent,))
        step = 1e-6
        numeric = (moved(step) - moved(-step)) / (2 * step)
        np.testing.assert_allclose(forward, numeric, atol=1e-6 * float(jnp.abs(forward).max()))


def test_bfloat16_losses_are_float32_and_near():
    _, model, params = student(tied=False)
    batch = batch_of(CHATS)
    exact = token_losses(model, params, batch) * batch.target_weights
    narrow = token_losses(model, params, batch, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.float32
    error = np.abs(narrow * batch.target_weights - exact).max()
    assert 1e-4 < error < 0.2


def test_fillers_and_padding_count_for_nothing():
    _, model, params = student(tied=False)
    layout = [[0, 1], [2], [3, 4]]
    tight = pack(CHATS, layout, row_length=16)
    loose = pack(CHATS, layout, row_length=24, slots=20, rows=5)
    totals = [
        sum_by_sample(token_losses(model, params, batch), batch, len(CHATS))
        for batch in (tight, loose)
    ]
    np.testing.assert_array_equal(totals[0].targets, totals[1].targets)
    np.testing.assert_allclose(totals[0].total, totals[1].total, rtol=1e-5)
    assert totals[0].total.shape == (len(CHATS),)


def test_sums_by_sample_by_hand():
    batch = batch_of(CHATS)._replace(
        target_samples=np.array([[0, 0, 1], [1, 2, 0]], np.int32),
        target_weights=np.array([[1, 1, 1], [1, 1, 0]], np.float32),
    )
    losses = jnp.asarray([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    sums = sum_by_sample(losses, batch, 4)
    np.testing.assert_array_equal(sums.total, [3.0, 12.0, 16.0, 0.0])
    np.testing.assert_array_equal(sums.targets, [2.0, 2.0, 1.0, 0.0])
