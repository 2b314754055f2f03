"""Baselines against torch's gradients, and LESS against its formula in numpy."""

import jax
import numpy as np
import optax
import pytest
import torch

from montessori_jax.errors import UserError
from tests.influence.problems import curved, reference_points


def torch_gradients(params, points):
    """The gradient of each point's squared error, one flat vector each."""
    inner = torch.tensor(np.array(params["inner"]), requires_grad=True)
    outer = torch.tensor(np.array(params["outer"]), requires_grad=True)
    found = []
    for x, y in points:
        loss = (torch.tanh(torch.tensor(x) @ inner) @ outer - y) ** 2
        parts = torch.autograd.grad(loss, (inner, outer))
        found.append(np.concatenate([part.numpy().ravel() for part in parts]))
    return np.array(found)


@pytest.fixture(scope="module")
def gradients():
    with jax.enable_x64(True):
        problem = curved(optax.adam(1e-2), moments=True)
        points = [(one.data["x"], one.data["y"]) for one in problem.items]
        references = zip(*reference_points(), strict=True)
        return (
            problem,
            torch_gradients(problem.params, points),
            torch_gradients(problem.params, references),
        )


def flat(tree):
    return np.concatenate([np.ravel(tree["inner"]), np.ravel(tree["outer"])])


def test_grad_dot_is_torchs_dot_product(gradients):
    problem, candidates, references = gradients
    with jax.enable_x64(True):
        found = problem.influences("grad_dot", gradient_scale=0.5)
    np.testing.assert_allclose(found, 0.5 * candidates @ references.mean(0), rtol=1e-12)


def test_grad_cos_is_torchs_cosine(gradients):
    problem, candidates, references = gradients
    with jax.enable_x64(True):
        found = problem.influences("grad_cos", block=2)
    mean = torch.from_numpy(references.mean(0))
    expected = torch.nn.functional.cosine_similarity(torch.from_numpy(candidates), mean[None])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_less_is_its_formula(gradients):
    problem, candidates, references = gradients
    adam = problem.opt_state[0]
    m, v = flat(adam.mu), flat(adam.nu)
    direction = (0.9 * m + 0.1 * candidates) / np.sqrt(0.999 * v + 0.001 * candidates**2 + 1e-8)
    with jax.enable_x64(True):
        found = problem.influences("less")
    expected = (unit(direction) @ unit(references).T).mean(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_less_mended_takes_the_step_that_torch_takes(gradients):
    problem, candidates, references = gradients
    adam = problem.opt_state[0]
    updates = []
    for gradient in candidates:
        weight = torch.zeros(len(gradient), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.0)
        optimizer.state[weight] = {
            "step": torch.tensor(50.0),
            "exp_avg": torch.tensor(flat(adam.mu)),
            "exp_avg_sq": torch.tensor(flat(adam.nu)),
        }
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        updates.append(-weight.detach().numpy())
    with jax.enable_x64(True):
        found = problem.influences("less", form="mended")
    expected = (unit(np.array(updates)) @ unit(references).T).mean(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_less_without_moments_is_refused():
    with jax.enable_x64(True):
        problem = curved(optax.sgd(0.1))
        with pytest.raises(UserError, match="needs Adam's moments"):
            problem.score("less")
