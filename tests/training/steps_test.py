"""Steps: accumulation, fillers, precision, and what a zero learning rate leaves alone."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from montessori_jax.config import DpoConfig, SftConfig
from montessori_jax.data.packing import pack
from montessori_jax.training.losses import token_losses
from montessori_jax.training.optimizer import make_optimizer, probe_optimizer
from montessori_jax.training.pairs import pack_pairs
from montessori_jax.training.state import TrainState, start
from montessori_jax.training.steps import accumulate, dpo_step, sft_step, used_micro_batches
from tests.training import samples

SFT = SftConfig(learning_rate=1e-2, warmup_ratio=0, max_grad_norm=0, remat="none")
DPO = DpoConfig(learning_rate=1e-2, warmup_ratio=0, max_grad_norm=0, remat="none", beta=0.5)


def sft_batch(micro_batches: int, rows: int, fillers: int = 0) -> Any:
    """Eight chats of unequal lengths, one a row, as ``micro_batches`` of ``rows``."""
    chats = samples.chats(8, seed=2)
    parts = [
        pack(chats, [[i] for i in range(at, at + rows)], row_length=24, slots=24)
        for at in range(0, micro_batches * rows, rows)
    ]
    parts += [pack(chats, [], row_length=24, slots=24, rows=rows)] * fillers
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)


def dpo_batch(micro_batches: int, rows: int, fillers: int = 0) -> Any:
    pairs = samples.pairs(8, seed=2)
    random = np.random.default_rng(5)
    log_probs = [random.normal(-4, 1, pair.targets) for pair in pairs]
    parts = [
        pack_pairs(pairs[at : at + rows], log_probs[at : at + rows],
                   row_length=32, slots=16, rows=rows)
        for at in range(0, micro_batches * rows, rows)
    ]  # fmt: skip
    parts += [pack_pairs([], row_length=32, slots=16, rows=rows)] * fillers
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)


@cache
def jitted(kind: str, **changes: Any) -> tuple[Any, TrainState]:
    """A step of SGD at rate 1, and the state it starts from.

    The model is a fresh one: log-probs near -4 a token, as the reference's, so that no margin is
    so large that its rounding decides the gradient.
    """
    model, params = samples.student()
    tx = probe_optimizer(replace(SFT, optimizer="sgd"), 1.0)
    if kind == "sft":
        step = sft_step(model, tx, replace(SFT, **changes))
    else:
        step = dpo_step(model, tx, replace(DPO, **changes))
    return jax.jit(step), start(params, tx)


def one_step(kind: str, batch: Any, **changes: Any) -> tuple[TrainState, Any]:
    """State and metrics after a step from whose parameters the gradient can be read off."""
    step, state = jitted(kind, **changes)
    return step(state, batch)


def gradient(state: TrainState) -> Any:
    """What one SGD step of rate 1 took away."""
    _, params = samples.student()
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, state.params)


def scale(tree: Any) -> float:
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_accumulation_is_exact_over_unequal_counts(kind: str) -> None:
    """One batch of 8, 4 of 2 and 2 of 4 are the same step, though their counts differ."""
    make = sft_batch if kind == "sft" else dpo_batch
    whole, metrics = one_step(kind, make(1, 8))
    counts = np.sum(jax.tree.leaves(make(4, 2))[-1 if kind == "dpo" else 6] != 0, axis=(1, 2))
    assert len(set(counts.tolist())) > 1
    for micro_batches, rows in ((4, 2), (2, 4)):
        other, again = one_step(kind, make(micro_batches, rows))
        assert samples.largest_difference(whole.params, other.params) < 1e-6
        for name, value in metrics.items():
            np.testing.assert_allclose(again[name], value, rtol=2e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_fillers_change_nothing_and_are_not_run(kind: str) -> None:
    make = sft_batch if kind == "sft" else dpo_batch
    plain, _ = one_step(kind, make(4, 2))
    padded, _ = one_step(kind, make(4, 2, fillers=3))
    assert samples.equal(plain, padded)
    weights = make(2, 2, fillers=3)
    weights = (weights if kind == "sft" else weights.batch).target_weights
    assert int(used_micro_batches(jnp.asarray(weights))) == 2
    calls: list[int] = []

    def objective(params: Any, micro: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        jax.debug.callback(lambda value: calls.append(int(value)), micro)
        return params * micro, {"sum": micro}

    gradient, sums = accumulate(objective, jnp.array(3.0), jnp.arange(1.0, 6.0), jnp.array(2))
    jax.effects_barrier()
    assert (float(gradient), float(sums["sum"])) == (3.0, 3.0)
    assert sorted(calls) == [1, 2]


def test_loss_is_the_mean_over_tokens_not_over_samples() -> None:
    model, params, theirs = samples.twins()
    tx = make_optimizer(SFT, 1)
    _, metrics = jax.jit(sft_step(model, tx, SFT))(start(params, tx), sft_batch(4, 2))
    losses = [-samples.torch_log_probs(theirs, chat) for chat in samples.chats(8, seed=2)]
    total = sum(float(loss.sum().item()) for loss in losses)
    tokens = sum(len(loss) for loss in losses)
    np.testing.assert_allclose(metrics["loss"], total / tokens, rtol=1e-5)
    assert float(metrics["targets"]) == tokens
    assert abs(total / tokens - np.mean([loss.mean().item() for loss in losses])) > 1e-3


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_gradient_norm_is_that_before_clipping(kind: str) -> None:
    batch = sft_batch(1, 8) if kind == "sft" else dpo_batch(1, 8)
    state, metrics = one_step(kind, batch)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient(state)), rtol=1e-5)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputation_does_not_change_the_step(kind: str, remat: str) -> None:
    batch = sft_batch(4, 2) if kind == "sft" else dpo_batch(4, 2)
    plain, _ = one_step(kind, batch)
    other, _ = one_step(kind, batch, remat=remat)
    assert samples.largest_difference(plain.params, other.params) < 1e-6


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_zero_learning_rate_moves_moments_and_no_parameter(kind: str) -> None:
    model, params = samples.student()
    tx = probe_optimizer(SFT, 0.0)
    step = sft_step(model, tx, SFT) if kind == "sft" else dpo_step(model, tx, DPO)
    batch = sft_batch(4, 2) if kind == "sft" else dpo_batch(4, 2)
    before = start(params, tx)
    after, _ = jax.jit(step)(before, batch)
    assert samples.equal(after.params, params)
    assert not samples.equal(after.opt_state, before.opt_state)
    assert int(after.step) == 1


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_bfloat16_is_for_computing_alone(kind: str) -> None:
    """Parameters and moments stay float32, and steps far below bf16's resolution count."""
    model, params = samples.student()
    tx = make_optimizer(replace(SFT, learning_rate=1e-6, final_learning_rate=0.0), 4)
    if kind == "sft":
        step, batch = sft_step(model, tx, replace(SFT, dtype="bfloat16")), sft_batch(4, 2)
    else:
        step, batch = dpo_step(model, tx, replace(DPO, dtype="bfloat16")), dpo_batch(4, 2)
    before = start(params, tx)
    after, metrics = jax.jit(step)(before, batch)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype, before, after)
    assert all(jax.tree.leaves(same))
    assert metrics["loss"].dtype == jnp.float32
    moved = jax.tree.map(lambda a, b: np.mean(np.asarray(a) != np.asarray(b)), after.params, params)
    # Norm scales start at 1, where float32's own spacing is 1e-7: nearly every weight moves.
    assert min(jax.tree.leaves(moved["layers"])) > 0.9
    # A first moment is a tenth of the first gradient: bf16's, close to float32's and not it.
    exact = gradient(one_step(kind, batch)[0])
    rough = jax.tree.map(lambda moment: np.asarray(moment) / 0.1, after.opt_state[1].mu)
    assert 1e-5 * scale(exact) < samples.largest_difference(exact, rough) < 0.02 * scale(exact)


def test_dpo_of_the_reference_itself_is_log_two() -> None:
    """With the policy's own log-probs as the reference the margin and the divergence are 0."""
    model, params = samples.student()
    pairs = samples.pairs(4)
    empty = pack_pairs(pairs, row_length=32, slots=16, rows=4)
    own = -np.asarray(jax.jit(token_losses, static_argnums=0)(model, params, empty.batch))
    own = [own[row, : pair.targets] for row, pair in enumerate(pairs)]
    batch = pack_pairs(pairs, own, row_length=32, slots=16, rows=4)
    _, metrics = one_step("dpo", jax.tree.map(lambda leaf: leaf[None], batch))
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(metrics["reward_margin"], 0, atol=1e-5)
    np.testing.assert_allclose(metrics["kl"], 0, atol=1e-10)


def test_a_step_is_compiled_once_and_moves_nothing_by_itself() -> None:
    """Under ``disallow`` a transfer no one asked for raises; the state's buffers are reused."""
    model, params = samples.student()
    tx = make_optimizer(SFT, 3)
    step = jax.jit(sft_step(model, tx, SFT), donate_argnums=0)
    state = start(params, tx)
    batch = jax.device_put(sft_batch(4, 2))
    lowered = step.lower(state, batch).compile()
    for _ in range(3):
        old = state
        with jax.transfer_guard("disallow"):
            state, _ = lowered(state, batch)
        assert jax.tree.leaves(old.params)[0].is_deleted()
    assert not jax.tree.leaves(params)[0].is_deleted()
    assert int(state.step) == 3
