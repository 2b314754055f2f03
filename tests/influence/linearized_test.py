"""The optimizer as a line: exact for SGD, torch's derivative for AdamW, packed as alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from montessori_jax.errors import UserError
from montessori_jax.influence import Candidate, MeanLoss, Probe, TokenLosses, chat_candidate
from montessori_jax.influence.linearized import (
    packed_slopes,
    secant_slope,
    sum_pilots,
    tangent_slope,
)
from tests.influence.problems import curved
from tests.influence.students import MODEL, chats, student


@pytest.mark.parametrize(
    "how",
    [
        {"expansion_point": "mean_update"},
        {"expansion_point": "zero_gradient"},
        {"expansion_point": "params"},
        {"sensitivity": "tangent"},
    ],
    ids=lambda how: next(iter(how.values())),
)
@pytest.mark.parametrize("momentum", [None, 0.5])
def test_sgd_is_first_order_to_rounding(how, momentum):
    with jax.enable_x64(True):
        problem = curved(optax.sgd(0.05, momentum=momentum), count=8)
        if momentum:
            moved = jax.tree.map(lambda leaf: leaf + 0.1, problem.opt_state)
            problem = problem._replace(opt_state=moved)
        point = how.get("expansion_point", "zero_gradient")
        expected = problem.influences("first_order", expansion_point=point, pilots=5)
        found = problem.influences("linearized", pilots=5, gradient_scale=1.0, **how)
        scaled = problem.influences("linearized", pilots=5, gradient_scale=0.5, **how)
        half = problem.influences(
            "first_order", expansion_point=point, pilots=5, gradient_scale=0.5
        )
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(scaled, half, rtol=1e-12)


def test_tangent_is_the_derivative_of_torchs_step():
    rate, step = 1e-2, 1e-4

    def torch_update(gradient, first, second):
        weight = torch.zeros(len(first), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
        optimizer.state[weight] = {
            "step": torch.tensor(50.0),
            "exp_avg": torch.tensor(first),
            "exp_avg_sq": torch.tensor(second),
        }
        weight.grad = torch.full((len(first),), gradient, dtype=torch.float64)
        optimizer.step()
        return weight.detach().numpy()

    with jax.enable_x64(True):
        problem = curved(optax.adam(rate), moments=True)
        slope = tangent_slope(problem.tx, problem.params, problem.opt_state)
    adam = problem.opt_state[0]
    for name in ("inner", "outer"):
        first, second = (np.ravel(np.array(tree[name])) for tree in (adam.mu, adam.nu))
        high, low = (torch_update(sign * step, first, second) for sign in (1, -1))
        np.testing.assert_allclose(np.ravel(slope[name]), (high - low) / (2 * step), rtol=1e-6)


def test_secant_beats_tangent_where_the_second_moment_is_small():
    errors = {}
    with jax.enable_x64(True):
        problem = curved(optax.adam(1e-3), count=24, moments=True)
        adam = problem.opt_state[0]
        small = adam._replace(nu=jax.tree.map(lambda leaf: leaf * 1e-4, adam.nu))
        problem = problem._replace(opt_state=(small, *problem.opt_state[1:]))
        truth = problem.influences("exact")
        for name in ("secant", "tangent"):
            found = problem.influences("linearized", sensitivity=name)
            errors[name] = np.sqrt(np.mean((found - truth) ** 2)) / truth.std()
    assert errors["secant"] < 0.5 * errors["tangent"]


def test_the_secant_is_that_of_torchs_steps_scaled_to_the_pilots():
    # One weight a leaf: the fitted factor turns the secant into the pilots' own least-squares line.
    rate, moments = 1e-2, (0.3, 0.02)

    def torch_update(gradient):
        weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
        first, second = (torch.tensor([moment], dtype=torch.float64) for moment in moments)
        state = {"step": torch.tensor(50.0), "exp_avg": first, "exp_avg_sq": second}
        optimizer.state[weight] = state
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        return weight.item()

    gradients = [0.5, -1.0, 4.0]
    own = [torch_update(g) - torch_update(0.0) for g in gradients]
    line = np.dot(gradients, own) / np.dot(gradients, gradients)
    reach = 2 * np.sqrt(np.mean(np.square(gradients)))
    secant = (torch_update(reach) - torch_update(-reach)) / (2 * reach)
    with jax.enable_x64(True):
        params = {"seen": jnp.zeros(1), "two": jnp.zeros(2), "unseen": jnp.zeros(2)}
        tx = optax.adamw(rate, weight_decay=0.0)
        adam, *rest = tx.init(params)
        mu, nu = (jax.tree.map(lambda leaf, m=m: leaf + m, params) for m in moments)
        state = (adam._replace(count=jnp.int32(50), mu=mu, nu=nu), *rest)
        probe = Probe(lambda p, x: p["seen"][0] * x + p["two"][0] * x, params, state, tx, {})
        pilots = [Candidate(str(g), jnp.float64(g)) for g in gradients]
        slope = secant_slope(tx, params, state, sum_pilots(probe, pilots))
    np.testing.assert_allclose(slope["seen"], [line], rtol=1e-9)
    # The leaf's factor serves the weight that no pilot moved, too.
    np.testing.assert_allclose(slope["two"], [line, line], rtol=1e-9)
    assert abs(line / secant - 1) > 0.01
    assert np.isfinite(np.array(slope["unseen"])).all()


def test_the_curve_mends_what_saturation_hides():
    # From eight pilots on, scores follow the curve by which first order answers to the line.
    with jax.enable_x64(True):
        problem = curved(optax.adam(1e-3), count=24, moments=True)
        adam = problem.opt_state[0]
        small = adam._replace(nu=jax.tree.map(lambda leaf: leaf * 0.1, adam.nu))
        problem = problem._replace(opt_state=(small, *problem.opt_state[1:]))
        truth = problem.influences("first_order")
        bent = problem.influences("linearized", pilots=24)
        straight = problem.influences("linearized", pilots=7)
    assert np.std(bent - truth) < 0.75 * np.std(straight - truth)
    assert abs(np.mean(bent - truth)) < 1e-3 * np.std(truth)


def test_a_tangent_that_blows_up_is_refused():
    with jax.enable_x64(True):
        problem = curved(optax.adam(1e-3))
        broken = optax.adam(1e-3, eps=0.0)
        problem = problem._replace(tx=broken)
        with pytest.raises(UserError, match="sensitivity is not finite"):
            problem.score("linearized", sensitivity="tangent")


def test_pilots_are_asked_for():
    with jax.enable_x64(True):
        problem = curved(optax.adam(1e-3))
        with pytest.raises(UserError, match="give pool=candidates"):
            problem.score("linearized", pool=())


def test_packed_slopes_are_those_of_each_candidate_alone():
    # One row of three packed candidates against three rows of one: losses and derivatives.
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), student().params)
        keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
        leaves, structure = jax.tree.flatten(params)
        direction = jax.tree.unflatten(
            structure,
            [
                jax.random.normal(key, leaf.shape, leaf.dtype)
                for key, leaf in zip(keys, leaves, strict=True)
            ],
        )
        loss = MeanLoss(TokenLosses(MODEL, "float64"))
        data = [chat_candidate(str(i), chat, 64).data for i, chat in enumerate(chats(3, 77))]
        [(packed, members)] = list(loss.together(data))
        assert packed.batch.tokens.shape[:2] == (1, 1)
        [values], ([slopes],) = packed_slopes(loss, params, (direction,), packed)
        one = jax.jit(lambda batch: jax.jvp(lambda p: loss(p, batch), (params,), (direction,)))
        for place, index in enumerate(members):
            value, slope = one(data[index])
            np.testing.assert_allclose(values[place], value, rtol=1e-12)
            np.testing.assert_allclose(slopes[place], slope, rtol=1e-11)
