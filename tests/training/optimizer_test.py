"""Fifty steps against torch's AdamW and SGD with transformers' schedule, and probe steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from montessori_jax.config import MeshConfig, OptimizerConfig, SftConfig
from montessori_jax.data.packing import pack
from montessori_jax.mesh import make_mesh
from montessori_jax.models.sharding import laid_out, moment_shardings
from montessori_jax.models.weights import from_params
from montessori_jax.training.optimizer import (
    _rounded_by_chance,
    make_optimizer,
    probe_optimizer,
)
from montessori_jax.training.schedules import rate_table
from montessori_jax.training.state import start
from montessori_jax.training.steps import sft_step
from tests.training import samples

STEPS = 50


def torch_optimizer(settings: OptimizerConfig, parameters: Any) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=settings.learning_rate)
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )


@pytest.mark.parametrize(
    "settings",
    [
        # Clipped at half of the steps or more; without clipping; SGD.
        SftConfig(learning_rate=1e-3, final_learning_rate=1e-6, remat="none"),
        SftConfig(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0, decay="linear"),
        SftConfig(learning_rate=1e-2, optimizer="sgd", max_grad_norm=2.0),
    ],
    ids=["adamw", "adamw-decay", "sgd"],
)
def test_fifty_steps_of_a_llama_are_those_of_torch(settings: SftConfig) -> None:
    model, params, theirs = samples.twins()
    chats = samples.chats(STEPS)
    batches = [pack([chat], [[0]], row_length=24, slots=24) for chat in chats]
    tx = make_optimizer(settings, STEPS)
    state, losses = start(params, tx), []
    step = jax.jit(sft_step(model, tx, settings))
    for batch in batches:
        state, metrics = step(state, jax.tree.map(lambda leaf: leaf[None], batch))
        losses.append(float(metrics["loss"]))

    optimizer = torch_optimizer(settings, theirs.parameters())
    schedule = samples.torch_schedule(optimizer, settings, STEPS)
    expected, clipped = [], 0
    for chat in chats:
        loss = -samples.torch_log_probs(theirs, chat).mean()
        optimizer.zero_grad()
        loss.backward()
        if settings.max_grad_norm > 0:
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), settings.max_grad_norm)
            clipped += float(norm) > settings.max_grad_norm
        optimizer.step()
        schedule.step()
        expected.append(loss.item())

    if settings.max_grad_norm > 0:
        assert clipped > 0
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    after = dict(from_params(model.config, jax.device_get(state.params)))
    start_of = dict(from_params(model.config, jax.device_get(params)))
    moved = max(np.abs(after[name] - start_of[name]).max() for name in after)
    assert moved > 1e-2  # so that agreement within 1e-5 says something
    for name, value in theirs.state_dict().items():
        np.testing.assert_allclose(after[name], value.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


def test_adamw_by_hand() -> None:
    settings = OptimizerConfig(
        learning_rate=0.1,
        final_learning_rate=0.1,
        warmup_ratio=0,
        decay_ratio=0,
        weight_decay=0.5,
        max_grad_norm=0,
    )
    tx = make_optimizer(settings, 2)
    params = {"w": jnp.array([2.0])}
    state = tx.init(params)
    # Bias-corrected moments of a first gradient g are g and g^2: -0.1 (sign(g) + 0.5 * 2).
    updates, state = tx.update({"w": jnp.array([4.0])}, state, params)
    np.testing.assert_allclose(updates["w"], [-0.2], rtol=1e-5)
    # m = .9 * .4 + .1 * (-2) = .16, over 1 - .81; v = .999 * .016 + .001 * 4, over 1 - .998001.
    updates, state = tx.update({"w": jnp.array([-2.0])}, state, params)
    direction = (0.16 / 0.19) / np.sqrt((0.999 * 0.016 + 0.004) / 0.001999)
    np.testing.assert_allclose(updates["w"], [-0.1 * (direction + 1.0)], rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_probe_continues_the_warm_up(name: str) -> None:
    """At the rate of the schedule's end, a probe's update is the run's own next update."""
    settings = OptimizerConfig(
        optimizer=name, learning_rate=0.01, warmup_ratio=1, decay_ratio=0, weight_decay=0.1
    )
    tx = make_optimizer(settings, 3)
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4)}
    state = tx.init(params)
    for step in range(3):
        gradient = jax.tree.map(lambda leaf, by=step: jnp.cos(leaf + by), params)
        _, state = tx.update(gradient, state, params)
    gradient = jax.tree.map(jnp.sin, params)
    probe = probe_optimizer(settings, float(rate_table(settings, 3)[-1]))
    assert jax.tree.structure(probe.init(params)) == jax.tree.structure(state)
    own, _ = tx.update(gradient, state, params)
    probed, _ = probe.update(gradient, state, params)
    assert samples.equal(own, probed)
    doubled, _ = probe_optimizer(settings, 0.02).update(gradient, state, params)
    assert samples.largest_difference(doubled, jax.tree.map(lambda x: 2 * x, own)) < 1e-8


def test_clipping_can_be_left_out_of_a_probe() -> None:
    settings = OptimizerConfig(optimizer="sgd", max_grad_norm=1.0)
    params = {"w": jnp.zeros(2)}
    gradient = {"w": jnp.array([30.0, 40.0])}
    for clip, expected in ((True, [-0.6, -0.8]), (False, [-30.0, -40.0])):
        tx = probe_optimizer(settings, 1.0, clip=clip)
        updates, _ = tx.update(gradient, tx.init(params), params)
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)


def test_moments_are_float32() -> None:
    _, params = samples.student()
    state = make_optimizer(OptimizerConfig(), 10).init(params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 0]
    assert len(moments) == 2 * len(jax.tree.leaves(params))
    assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.float32)}


def test_narrow_moments_are_bfloat16_and_right_on_average() -> None:
    """A constant gradient's moments: g and g^2, whatever the number of steps behind them."""
    settings = OptimizerConfig(moments_dtype="bfloat16", max_grad_norm=0)
    tx = make_optimizer(settings, 10)
    params = {"w": jnp.zeros(4096)}
    grads = {"w": jnp.full(4096, 3.0)}
    begun = tx.init(params)
    moments = [leaf for leaf in jax.tree.leaves(begun) if leaf.ndim > 0]
    assert [leaf.dtype for leaf in moments] == [jnp.bfloat16] * 2

    @jax.jit
    def run(state: Any) -> Any:
        return jax.lax.fori_loop(
            0, 5000, lambda _, state: tx.update(grads, state, params)[1], state
        )

    mean, square = [leaf for leaf in jax.tree.leaves(run(begun)) if leaf.ndim > 0]
    np.testing.assert_allclose(np.asarray(mean, np.float64).mean(), 3.0, rtol=0.003)
    expected = 9 * (1 - 0.999**5000)
    np.testing.assert_allclose(np.asarray(square, np.float64).mean(), expected, rtol=0.003)


@pytest.mark.parametrize("value", [np.inf, np.nan, 0.0, 1.0, 3.0e38])
def test_what_bfloat16_has_is_kept_by_rounding(value: float) -> None:
    found = _rounded_by_chance(jnp.full(1000, value, jnp.float32), jax.random.key(0))
    nearest = np.full(1000, value, np.float32).astype(jnp.bfloat16)
    exact = np.asarray(found, np.float32)
    np.testing.assert_allclose(exact, nearest.astype(np.float32), rtol=2**-7)


def test_narrow_moments_train_like_wide_ones() -> None:
    """Sixty steps of the small model: how far apart losses and weights end."""
    model, params = samples.student()
    chats = samples.chats(4)
    batch = pack(chats, [[0], [1], [2], [3]], row_length=24, slots=24)
    batch = jax.tree.map(lambda leaf: leaf[None], batch)
    ends = {}
    for dtype in ("float32", "bfloat16"):
        settings = SftConfig(learning_rate=3e-3, moments_dtype=dtype, remat="none")
        tx = make_optimizer(settings, 60)
        state, step = start(params, tx), jax.jit(sft_step(model, tx, settings))
        losses = []
        for _ in range(60):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        ends[dtype] = (np.array(losses), state.params)
    wide, narrow = ends["float32"], ends["bfloat16"]
    assert wide[0][-1] < 0.25 * wide[0][0]  # it learns
    np.testing.assert_allclose(narrow[0], wide[0], rtol=0.005)  # seen: 0.0004
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, wide[1], params))
    apart = optax.tree.norm(jax.tree.map(jnp.subtract, wide[1], narrow[1]))
    assert 1e-4 < float(apart / moved) < 0.02  # seen: 0.006


def test_a_narrow_states_moments_lie_with_their_parameters() -> None:
    """`moment_shardings` sees through the wrapper."""
    model, params = samples.student()
    tx = make_optimizer(OptimizerConfig(moments_dtype="bfloat16"), 1)
    mesh = make_mesh(MeshConfig(candidate=1, data=1, fsdp=2, tensor=2), devices=jax.devices()[:4])
    assert mesh is not None
    shardings = moment_shardings(tx, laid_out(model, params, mesh), mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(tx.init(params))
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(shardings))
