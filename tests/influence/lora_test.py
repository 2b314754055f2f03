"""Influence on a student with an adapter: steps on the adapter alone, against a loop in float64."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from montessori_jax.config import InfluenceConfig
from montessori_jax.influence import (
    chat_candidate,
    score_candidates,
)
from montessori_jax.models.lora import LoraModel, LoraSpec
from montessori_jax.training.losses import token_losses
from tests.influence.students import CONFIG, MODEL, adamw, chats, warmed_up
from tests.meshes import mesh_on

REFERENCES, CANDIDATES = chats(5, 31, longest=24), chats(5, 32, longest=24)
SPEC = LoraSpec(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))


def student(dtype=jnp.float32):
    """An adapter in mid-training on the tiny warmed-up model, with Adam's state of two steps."""
    base = jax.tree.map(lambda leaf: leaf.astype(dtype), warmed_up()[0])
    model = LoraModel(CONFIG, base, SPEC)
    adapter = jax.tree.map(lambda leaf: leaf.astype(dtype), model.init(jax.random.key(0)))
    state = adamw(1e-2).init(adapter)
    random = np.random.default_rng(0)
    for _ in range(2):
        gradient = jax.tree.map(
            lambda leaf: jnp.asarray(0.1 * random.normal(size=leaf.shape), dtype), adapter
        )
        with jax.numpy_dtype_promotion("standard"):
            updates, state = adamw(1e-2).update(gradient, state, adapter)
        adapter = optax.apply_updates(adapter, updates)
    return model, adapter, state


def settings(**changes) -> InfluenceConfig:
    return InfluenceConfig(**{"chunk": 5, "rows_per_pass": 2, "max_length": 64, **changes})


@cache
def loop_influence(rate: float) -> np.ndarray:
    """The definition, one candidate and one sample at a time, on merged float64 weights."""
    with jax.enable_x64(True):
        model, adapter, state = student(jnp.float64)
        tx = adamw(rate)

        @jax.jit
        def mean_loss(adapter, tokens, weights):
            # By hand, and not by the model's own product: W + s A B for the two targets.
            merged = jax.tree.map(lambda leaf: leaf, model.base)
            for part, name in (("attention", "query"), ("mlp", "down")):
                one = adapter["layers"][part][name]
                kernel = model.base["layers"][part][name]["kernel"]
                merged["layers"][part][name]["kernel"] = kernel + 2.0 * jnp.einsum(
                    "lir,lro->lio", one["lora_a"], one["lora_b"]
                )
            places = jnp.arange(64)[None]
            hidden = MODEL.hidden(
                merged, tokens[None], jnp.ones((1, 64), jnp.int32), places, dtype=jnp.float64
            )
            log_probs = jax.nn.log_softmax(hidden[0] @ MODEL.head(merged))
            picked = jnp.take_along_axis(log_probs[:-1], tokens[1:, None], axis=1)[:, 0]
            return -jnp.sum(picked * weights) / jnp.sum(weights)

        def loss(adapter, chat):
            tokens, weights = np.zeros(64, np.int32), np.zeros(63)
            tokens[: len(chat.tokens)] = chat.tokens
            weights[chat.prompt_length - 1 : len(chat.tokens) - 1] = 1
            return mean_loss(adapter, tokens, weights)

        def reference(adapter) -> float:
            return float(np.mean([loss(adapter, chat) for chat in REFERENCES]))

        before = reference(adapter)
        found = []
        for chat in CANDIDATES:
            gradient = jax.grad(loss)(adapter, chat)
            with jax.numpy_dtype_promotion("standard"):
                updates, _ = tx.update(gradient, state, adapter)
            found.append(before - reference(optax.apply_updates(adapter, updates)))
        return np.array(found)


@pytest.mark.parametrize(
    ("block", "mesh"),
    [
        pytest.param(1, (), marks=pytest.mark.slow),
        (4, ()),
        pytest.param(1, ("candidate", "fsdp"), marks=pytest.mark.slow),
    ],
)
def test_exact_is_the_definition_on_the_adapter(block: int, mesh: tuple[str, ...]) -> None:
    rate = 1e-2
    truth = loop_influence(rate)
    with jax.enable_x64(True):
        model, adapter, state = student(jnp.float64)
        from montessori_jax.influence import local_influence
        from montessori_jax.influence.chats import (
            MeanLoss,
            TokenLosses,
            chat_candidate,
            chat_reference,
        )  # fmt: skip

        losses = TokenLosses(model, "float64")
        scores = local_influence(
            MeanLoss(losses),
            adapter,
            state,
            adamw(rate),
            [chat_candidate(str(i), chat, 64, coarse=True) for i, chat in enumerate(CANDIDATES)],
            chat_reference(model, REFERENCES, dtype="float64", rows_per_pass=2),
            method="exact",
            block=block,
            chunk=5,
            mesh=mesh_on(*mesh) if mesh else None,
        )
    found = np.array([score.influence for score in scores])
    assert np.abs(truth).max() > 1e-4
    np.testing.assert_allclose(found, truth, rtol=1e-9, atol=1e-12)


def test_first_order_and_exact_agree_where_the_step_is_small() -> None:
    model, adapter, state = student()
    made = {
        method: score_candidates(
            model, adapter, state, adamw(1e-3), CANDIDATES, REFERENCES, settings(method=method)
        )
        for method in ("exact", "first_order")
    }
    exact, estimate = (
        np.array([score.influence for score in made[method]]) for method in ("exact", "first_order")
    )
    assert np.abs(exact).max() > 1e-5
    np.testing.assert_allclose(estimate, exact, atol=0.02 * np.abs(exact).max())


def test_the_base_is_no_constant_of_the_program() -> None:
    """Two students of one shape, another base: one program, and other losses."""
    model, adapter, _ = student()
    other = LoraModel(CONFIG, jax.tree.map(lambda leaf: 0.5 * leaf, model.base), SPEC)
    traced = []

    @jax.jit
    def loss(model, adapter, batch):
        traced.append(model)
        return token_losses(model, adapter, batch)

    batch = chat_candidate("0", CANDIDATES[0], 64).data
    first, second = loss(model, adapter, batch), loss(other, adapter, batch)
    assert len(traced) == 1
    assert not np.allclose(first, second)
